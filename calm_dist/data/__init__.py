"""Text in, batches out: corpus, tokenizer, latent stores and the guarded streaming reader."""

import sys
from types import ModuleType

# `import streaming` (mosaicml-streaming 0.13.0) imports `streaming.vision`, which needs
# torchvision; the package index's torchvision is built for CUDA and does not load beside CPU torch.
# Nothing here uses images, so an empty module takes its place. It is put here, in the package
# itself, so that DataLoader workers that are spawned have it too.
sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
