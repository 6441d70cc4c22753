"""Watches every operation of a rank: kernels, memory, waits of the host, collectives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from calm_dist.rehearsal.accounting import Collective, EventCounts, KernelOrigin, MemoryLedger, Wait
from calm_dist.rehearsal.places import ENGINE, OPTIMIZER, OTHER, is_inside, line_here, part_here

# Operations without a kernel that their schema does not show to be views.
_WITHOUT_KERNEL = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
        *("set_", "lift_fresh", "record_stream", "is_pinned", "_local_scalar_dense", "detach_"),
        *("_unsafe_view", "_reshape_alias", "requires_grad_"),
    )
)
# The size of their result is known only on the device.
_DATA_DEPENDENT = frozenset(
    ("nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive")
)
_ACTIVATIONS, _OTHER_MEMORY, _GRADIENTS = "activations", "other", "gradients"
# Of DeepSpeed's optimizer.
_MAKES_BUCKETS = "setup_buckets"
_NOT_ACTIVATIONS = frozenset((OPTIMIZER, ENGINE, OTHER, "gradient buffers", "pipeline messages"))

# Operations of torch's distributed library, without their trailing underscores, and whether what
# passes the group is the whole of their first argument (the output) or of their second.
_COLLECTIVES = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "allgather": ("all-gather", 0),
    "_allgather_base": ("all-gather", 0),
    "allgather_into_tensor_coalesced": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "alltoall": ("all-to-all", 0),
    "alltoall_base": ("all-to-all", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "send": ("send", 0),
    "recv": ("receive", 0),
    "recv_any_source": ("receive", 0),
}


class Observer(TorchDispatchMode):
    """Records what the code under it does on the device; must be entered inside `FakeTensorMode`'s
    context."""

    def __init__(self, group_name: Callable[[dist.ProcessGroup], str]) -> None:
        """
        Args:
            group_name: what a process group is called.
        """
        super().__init__()
        self.memory = MemoryLedger()
        self.counts = EventCounts()
        self._group_name = group_name
        self._part_of_node: dict[int, str] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}
        # Of the host, in pinned memory.
        self._pinned: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> EventCounts:
        """Begin a new step; returns the counts of the last one."""
        last, self.counts = self.counts, EventCounts()
        self._part_of_node.clear()
        self.memory.restart()
        return last

    def wait(self, what: str) -> None:
        """Count a wait of the host for the device, in the code that called."""
        self.counts.waits[Wait(what, line_here())] += 1

    def launch(self, part: str | None = None) -> None:
        """Count a kernel that is launched outside torch's operations."""
        self.counts.kernels[self._part(part)] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            return self._collective(func, name, args, kwargs)
        part = self._part(None)
        self._note_waits(name, args, kwargs)
        if name == "_local_scalar_dense":
            return _any_number(func, args)
        if name == "_pin_memory":
            if _on_device(args[0]):
                raise RuntimeError("pin_memory: only tensors on the host can be pinned")
            # It has no form for fake tensors.
            pinned = args[0].clone() if isinstance(args[0], FakeTensor) else args[0]
            self._pin(pinned)
            return pinned
        result: Any = _largest(name, args) or func(*args, **kwargs)
        if name == "_to_copy" and kwargs.get("non_blocking") and _on_device(args[0]):
            # To the host: torch puts such a copy into pinned memory.
            self._pin(result)
        tensors = [tensor for tensor in _tensors(result) if _on_device(tensor)]
        for tensor in tensors:
            self._allocated(tensor, part)
        if _is_kernel(func, namespace, name) and (tensors or any(map(_on_device, _tensors(args)))):
            self.counts.kernels[part] += 1
        return result

    def _part(self, known: str | None) -> KernelOrigin:
        """The part that is at work, by the stack or, in the backward pass, by the node of the
        graph that is computed: it belongs to the part that made it."""
        node = torch._C._current_autograd_node()
        part = known or part_here()
        if node is None:
            # A node is made just before its first operation.
            made = torch._C._autograd._get_sequence_nr() - 1
            self._part_of_node.setdefault(made, part or OTHER)
        elif part is None:
            part = self._part_of_node.get(node._sequence_nr(), "gradient accumulation")
        return KernelOrigin(part or OTHER, backward=node is not None)

    def _note_waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is None:
            return
        on_device = _on_device(first)
        if name == "_local_scalar_dense" and on_device:
            self.wait("a number is read")
        elif name in _DATA_DEPENDENT and on_device:
            self.wait(f"size of the result of {name}")
        elif name == "_to_copy" and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
            of_host = None if on_device else first
            self._note_copy(first.device, target, of_host, kwargs.get("non_blocking"))
        elif name == "copy_" and isinstance(args[1], torch.Tensor):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            of_host = args[1] if on_device else first
            self._note_copy(args[1].device, first.device, of_host, non_blocking)
        elif name == "lift_fresh" and on_device:
            # torch.tensor(values, device="cuda")
            self._note_copy(torch.device("cpu"), first.device, None, False)

    def _note_copy(
        self,
        source: torch.device,
        target: torch.device,
        of_host: torch.Tensor | None,
        non_blocking: bool | None,
    ) -> None:
        """Count a wait, unless the copy is non-blocking and its memory of the host pinned: CUDA
        copies from and to other memory by a buffer of its own, in the order of the stream, with
        the host.

        Args:
            of_host: the tensor of the host; None: torch makes it, in pinned memory.
        """
        if source.type == target.type:
            return
        if non_blocking and (of_host is None or _key(of_host) in self._pinned):
            return
        self.wait("copy to the device" if target.type == "cuda" else "copy to the host")

    def _pin(self, tensor: torch.Tensor) -> None:
        key = _key(tensor)
        if tensor.device.type == "cpu" and key not in self._pinned:
            self._pinned[key] = weakref.ref(
                tensor.untyped_storage(), lambda _: self._pinned.pop(key, None)
            )

    def _allocated(self, tensor: torch.Tensor, part: KernelOrigin) -> None:
        """Count the tensor's storage, if it is new, until it is released."""
        if not isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._storages:
            return
        kind = _OTHER_MEMORY if part.name in _NOT_ACTIVATIONS else _ACTIVATIONS
        if part.name == ENGINE and part.backward and not is_inside(_MAKES_BUCKETS):
            kind = _GRADIENTS

        def released(_: Any, key: int = key) -> None:
            del self._storages[key]
            self.memory.remove(key)

        self._storages[key] = weakref.ref(storage, released)
        self.memory.add(key, storage.nbytes(), f"{kind}: {part.name}")

    def _collective(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        operation, which = _COLLECTIVES.get(name.rstrip("_"), (name.rstrip("_"), 0))
        group = next((g for g in map(_process_group, args) if g is not None), None)
        if group is not None and any(map(_on_device, _tensors(args))):
            key = Collective(operation, self._group_name(group))
            self.counts.calls[key] += 1
            moved = args[which] if which < len(args) else args[0]
            self.counts.bytes[key] += sum(t.nbytes for t in _tensors(moved))
        if "coalesced" in name:
            # These have no form for fake tensors.
            from torch._C._distributed_c10d import FakeWork

            return FakeWork().boxed()
        return func(*args, **kwargs)


def _key(tensor: torch.Tensor) -> int:
    """The same for all tensors that share their storage."""
    return tensor.untyped_storage()._cdata


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _is_kernel(func: Any, namespace: str, name: str) -> bool:
    """Whether an operation computes, rather than asking for a property or making a view."""
    return namespace != "prim" and not func.is_view and name not in _WITHOUT_KERNEL


def _any_number(func: Any, args: tuple[Any, ...]) -> Any:
    """A number in place of one that only a real tensor has: a finite loss, no overflow."""
    tensor = args[0]
    constant = getattr(tensor, "constant", None)
    if not isinstance(tensor, FakeTensor):
        return func(*args)
    if constant is not None:
        return constant.item()
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.dtype.is_floating_point else 0


def _largest(name: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
    """The largest result that an operation can have whose size depends on data; None for other
    operations. Those not known here remain errors."""
    if name != "_unique2":
        return None
    values = args[0]
    positions = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    return values.new_empty(values.numel()), positions, positions.new_empty(values.numel())


def _process_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value)
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
