"""tools/train.py, killed at certain points.

KILLS in the environment is a list in JSON of {"rank": which rank dies, "before": "module:function"
or "module:Class.method", "call": before which call of it in this life, "having": text that must be
in the call's arguments to count}. What only a process calls that the rank forked ends that process.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
from typing import Any

from calm_dist.cli.console import run
from calm_dist.cli.training_tool import run_training_tool
from calm_dist.recipe import Recipe


def target(before: str) -> tuple[Any, str]:
    """The module or class of "module:function" or "module:Class.method", and the name there."""
    module, _, path = before.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def die_before(before: str, call: int, having: str = "") -> None:
    """SIGKILL this process instead of the ``call``-th call of a function."""
    owner, name = target(before)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += having in repr((args, kwargs))
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def train(recipe: Recipe) -> None:
    from calm_dist.compat import megatron_cpu
    from calm_dist.training import run as training

    megatron_cpu.install()
    for kill in json.loads(os.environ["KILLS"]):
        if kill.pop("rank") == int(os.environ["RANK"]):
            die_before(**kill)
    training.train(recipe)


if __name__ == "__main__":
    run(lambda: run_training_tool(__doc__, train))
