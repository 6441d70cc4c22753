"""Shims for Megatron-core 0.16.1 on CPU with gloo, each with its reason.

`install` must run before anything else of Megatron-core is used. It does nothing if CUDA is
available, so that the same entry point serves both. Each shim documents the symptom that it works
around, and can be removed once Megatron-core fixes it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from calm_dist.compat.megatron_import import import_megatron

_FACTORIES = frozenset(
    ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "empty_like")
)

# Modules that create tensors with a literal device="cuda": token counts, gradient norms, overflow
# flags, checkpoint exchange. Their `torch` is replaced by a proxy; torch itself is not changed.
MODULES_WITH_LITERAL_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.transformer.utils",
)

_installed = False


class _CpuTorch(types.ModuleType):
    """`torch` as one Megatron module sees it: ``device="cuda"`` in a factory means the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch, name)
        if name not in _FACTORIES:
            return real

        def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device") or "").startswith("cuda"):
                kwargs["device"] = "cpu"
            return real(*args, **kwargs)

        return on_cpu


def install() -> bool:
    """Make Megatron-core run on CPU if CUDA is not available; returns whether it did."""
    global _installed
    import_megatron()
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    _disable_jit()
    _redirect_cuda_calls()
    _replace_rng_tracker()
    for name in MODULES_WITH_LITERAL_CUDA:
        importlib.import_module(name).torch = _CpuTorch()  # type: ignore[attr-defined]
    _answer_cuda_tensor_types()
    _installed = True
    return True


def _disable_jit() -> None:
    """`jit_fuser` is torch.compile, which needs a C++ compiler at run time."""
    from megatron.core import jit

    jit.disable_jit_fuser()


def _redirect_cuda_calls() -> None:
    """About 40 factories take ``device=torch.cuda.current_device()``; p2p and checkpoints
    synchronise. Both raise "Torch not compiled with CUDA enabled" on a CPU build."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None


def _replace_rng_tracker() -> None:
    """The tracker of tensor-parallel random states saves and restores CUDA generators."""
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise RuntimeError(f"random state {name} (seed {seed}) is already there")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(
            self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME
        ) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    def initialize_rng_tracker(*_: Any, force_reset: bool = False, **__: Any) -> None:
        if force_reset or not megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED:
            megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
            megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True

    megatron_random.initialize_rng_tracker = initialize_rng_tracker
    # Activation recomputation saves both the CUDA and the CPU state; here they are the same.
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _answer_cuda_tensor_types() -> None:
    """`megatron.core.optimizer` compares `Tensor.type()` with 'torch.cuda.FloatTensor'."""
    real_type: Callable[..., Any] = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        if args or kwargs or answer.startswith("torch.cuda."):
            return answer
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = tensor_type  # type: ignore[assignment,method-assign]
