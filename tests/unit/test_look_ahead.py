"""Batches read and copied ahead: what is asked of torch, and when. No GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from calm_dist.errors import DataError
from calm_dist.training.batches import LookAhead

GPU = torch.device("cuda")


class Copies(TorchFunctionMode):
    """Notes what would pin tensors and copy them to a GPU, and leaves them where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            self.seen.append(f"pin {tuple(args[0].shape)}")
            return args[0]
        if func is torch.Tensor.to and GPU in args:
            waits = "" if kwargs.get("non_blocking") else ", waiting"
            self.seen.append(f"copy {tuple(args[0].shape)}{waits}")
            return args[0]
        return func(*args, **kwargs)


def batches() -> Iterator[dict[str, torch.Tensor]]:
    for i in range(2):
        yield {"index": torch.arange(4), "tokens": torch.full((4, 8), i), "mean": torch.ones(4, 2)}
    raise DataError("no more")


def test_each_batch_is_pinned_and_copied_when_it_is_read() -> None:
    """None of the copies waits; the index stays on the host; a failure is kept for later."""
    once = ["pin (4, 8)", "copy (4, 8)", "pin (4, 2)", "copy (4, 2)"]
    with Copies() as copies:
        ahead = LookAhead(batches(), GPU)
        for number in range(2):
            ahead.read()
            assert copies.seen == once
            assert (ahead.take()["tokens"] == number).all()
            assert copies.seen == once
            copies.seen.clear()
        ahead.read()
    assert ahead.failed and not copies.seen


def test_only_what_is_used_is_copied() -> None:
    with Copies() as copies:
        ahead = LookAhead(batches(), GPU, ("index", "tokens"))
        ahead.read()
    assert copies.seen == ["pin (4, 8)", "copy (4, 8)"] and set(ahead.take()) == {"index", "tokens"}


def test_nothing_is_copied_on_a_cpu() -> None:
    given = next(batches())
    with Copies() as copies:
        ahead = LookAhead([given], torch.device("cpu"))
        ahead.read()
        taken = ahead.take()
    assert not copies.seen and all(taken[name] is given[name] for name in given)
