"""Text in, batches out: corpus, tokenizer, latent stores and the guarded streaming reader."""

import sys
from types import ModuleType

# Of mosaicml-streaming (0.13.0), what is not used here is replaced by empty modules. `vision` needs
# torchvision; the package index's torchvision is built for CUDA and does not load beside CPU torch.
# The others import transformers, half a second of the start of every process. The replacements are
# put here, in the package itself, so that DataLoader workers that are spawned have them too.
for _name in ("streaming.vision", "streaming.text", "streaming.multimodal"):
    sys.modules.setdefault(_name, ModuleType(_name))
if "streaming.base.dataloader" not in sys.modules:
    _dataloader = ModuleType("streaming.base.dataloader")
    _dataloader.StreamingDataLoader = None  # type: ignore[attr-defined]
    sys.modules[_dataloader.__name__] = _dataloader
