"""What this package relies on inside other libraries; an upgrade fails here first."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

# (library, version that the names were looked up in).
TESTED = {"mosaicml-streaming": "0.13.0", "megatron-core": "0.16.1", "deepspeed": "0.19.8"}


def test_versions_are_those_that_the_names_were_looked_up_in() -> None:
    assert {name: version(name) for name in TESTED} == TESTED


def test_names_of_streaming() -> None:
    from calm_dist.compat import streaming

    for name in streaming.__all__:
        assert getattr(streaming, name) is not None, name
    assert streaming.ShardState.REMOTE.name == "REMOTE"
    assert streaming.shared_path(3, "locals") == "000003_locals"
    assert callable(streaming.dataset_module.get_shm_prefix)


def test_other_packages_stay_as_they_are() -> None:
    """Streaming's own modules load for others in the process, and nothing heavy loads for us."""
    code = """
import sys
import calm_dist.data.stream, calm_dist.runs.listing
print([name for name in ("transformers", "torchvision") if name in sys.modules])
import streaming
print(streaming.StreamingDataLoader.__module__, streaming.base.StreamingDataLoader.__name__)
from streaming.text import StreamingC4
print(StreamingC4.__name__, streaming.text.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "[]",
        "streaming.base.dataloader StreamingDataLoader",
        "StreamingC4 streaming.text",
    ]
