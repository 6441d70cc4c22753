"""What torch, Megatron-core and DeepSpeed need in order to run on fake tensors.

Each change is made in this process only, which does nothing but rehearse. Tried with torch 2.14.1,
Megatron-core 0.16.1 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from calm_dist.rehearsal.observer import Observer

_CHECK = "assert_ints_same_as_other_ranks"


def join_fake_world(rank: int, size: int) -> None:
    """Make this process one rank of a simulated world: collectives return at once and leave
    their results as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    real_new_group = dist.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *_: Any, **__: Any):  # type: ignore[no-untyped-def]
        # A gloo group of a store without peers ends the process (SIGSEGV).
        return real_new_group(ranks, backend="fake")

    modules: tuple[Any, ...] = (dist, dist.distributed_c10d)
    for module in modules:
        module.new_group = new_group
        module.all_gather_object = _all_gather_object
        module.broadcast_object_list = lambda *_, **__: None
        module.barrier = lambda *_, **__: None


def _all_gather_object(results: list[Any], value: Any, group: Any = None) -> None:
    """Every rank has what this one has."""
    results[:] = [value] * len(results)


def adapt(observer: Observer) -> None:
    """Make the libraries run on fake tensors, and report what the observer cannot see."""
    # The observer knows what runs in this thread.
    torch.autograd.set_multithreading_enabled(False)
    _move_modules_in_place()
    _answer_values(observer)
    _answer_tensor_types()
    _report_waits(observer)
    _report_triton(observer)
    _agree_with_absent_ranks()
    _average_by_ddp()


def _move_modules_in_place() -> None:
    """`Module.to` would exchange fake parameters by `swap_tensors`, which fails where something
    else refers to them, and which loses their identity: DeepSpeed then misses parameters in a
    table."""

    def apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        with torch.no_grad():
            for module in self.modules():
                for tensors in (module._parameters, module._buffers):
                    for tensor in tensors.values():
                        if tensor is not None:
                            _move(tensor, function(tensor.detach()))
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]


def _move(tensor: Any, moved: Any) -> None:
    if moved.dtype == tensor.dtype and moved.device == tensor.device:
        return
    tensor.data = moved
    if isinstance(tensor, FakeTensor):
        tensor.fake_device = moved.fake_device


def _answer_values(observer: Observer) -> None:
    """`tolist` of a fake tensor would read its elements one by one; `numpy` has no form for it."""

    def tolist(self: FakeTensor) -> Any:
        if self.dim() == 0:
            return self.item()
        if self.device.type == "cuda":
            observer.wait("numbers are read")
        return _made_up(list(self.shape), self.dtype)

    def numpy(self: FakeTensor, **_: Any) -> Any:
        if self.device.type != "cpu":
            raise TypeError("only a tensor on the host is an array of numpy; call cpu() before")
        return np.zeros(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))

    FakeTensor.tolist = tolist  # type: ignore[method-assign]
    FakeTensor.numpy = numpy  # type: ignore[assignment,method-assign]


def _made_up(shape: list[int], dtype: torch.dtype) -> Any:
    """Nested lists: different whole numbers, or finite ones."""
    if len(shape) > 1:
        return [_made_up(shape[1:], dtype) for _ in range(shape[0])]
    return [1.0] * shape[0] if dtype.is_floating_point else list(range(shape[0]))


def _answer_tensor_types() -> None:
    """`Tensor.type` of a fake tensor on the device lacks the device; Megatron's optimizer and
    DeepSpeed compare it with 'torch.cuda.FloatTensor'."""
    real_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        if args or kwargs or not isinstance(self, FakeTensor) or self.device.type != "cuda":
            return answer
        return "torch.cuda." + answer.rpartition(".")[2]

    torch.Tensor.type = tensor_type  # type: ignore[assignment,method-assign]


def _report_waits(observer: Observer) -> None:
    """Report waits of the host that are not operations on tensors."""
    for owner, name, what in (
        (torch.cuda, "synchronize", "torch.cuda.synchronize"),
        (torch.cuda.Stream, "synchronize", "Stream.synchronize"),
        (torch.cuda.Event, "synchronize", "Event.synchronize"),
    ):

        def wait(*_: Any, what: str = what, **__: Any) -> None:
            observer.wait(what)

        setattr(owner, name, wait)


def _report_triton(observer: Observer) -> None:
    """Count Triton's kernels instead of launching them."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return

    def run(*_: Any, **__: Any) -> None:
        observer.launch()

    JITFunction.run = run


def _agree_with_absent_ranks() -> None:
    """ZeRO-3 checks that all ranks hold the same list, which a fake broadcast does not bring."""
    import deepspeed.runtime.zero.stage3  # noqa: F401

    # Those that check have imported the function by its name.
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.") and _CHECK in vars(module):
            setattr(module, _CHECK, lambda *_, **__: None)


class _WithoutRebuild:
    """DDP's reducer that keeps its first buckets: to agree on others, it would read a tensor."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _average_by_ddp() -> None:
    """torch's DDP compares shapes and weights of all ranks by reading tensors, and needs a result
    of its all-reduce that the fake process group does not give."""
    from torch.nn.parallel import distributed

    for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
        setattr(distributed, name, lambda *_, **__: None)
    real_init = distributed.DistributedDataParallel.__init__

    # Without annotations: DDP would compare them with types, and here they are strings.
    def average(_, bucket):  # type: ignore[no-untyped-def]
        whole = bucket.buffer().div_(dist.get_world_size())
        dist.all_reduce(whole)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(whole)
        return done

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real_init(self, *args, **kwargs)
        self.register_comm_hook(None, average)
        self.reducer = _WithoutRebuild(self.reducer)

    distributed.DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
