"""Which tests run: the quick ones always, the long ones with ``--full``."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest

from calm_dist.log import show_on_console

# Their fixtures `store`, `tiny`, `without_flock` and `s3`.
pytest_plugins = ["launches", "no_flock", "s3_server"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long tests, too")


def pytest_configure(config: pytest.Config) -> None:
    # As the tools do: tests read what the package says from stdout and stderr.
    show_on_console()
    config.addinivalue_line("markers", "full: takes long; runs only with --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="long: runs with --full")
    for item in items:
        if item.get_closest_marker("full") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def own_world() -> Iterator[None]:
    """A module whose tests make this process a world of one leaves no trace of it to the next."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if "megatron.core.parallel_state" in sys.modules:
        from calm_dist.parallel.topology import destroy_topology

        destroy_topology()
    dist.destroy_process_group()
    # Each group that is still referred to has threads, one of which wakes up 100 times a second.
    gc.collect()
