"""Functions that libraries decorate with torch.compile are compiled at their first call.

To decorate one loads the whole compiler, 2 to 3 seconds of a CPU core in every process, although
nothing is compiled yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_compile = torch.compile


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """What is imported inside is decorated without the compiler."""
    torch.compile = _compile_when_called  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = _compile


def _compile_when_called(function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """`torch.compile` of a function, as a decorator with or without settings."""
    if function is None:
        return functools.partial(_compile_when_called, **settings)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return _compile(function, **settings)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Inside another compiled function it is part of that one.
        inner = function if torch.compiler.is_compiling() else compiled()
        return inner(*args, **kwargs)

    return call
