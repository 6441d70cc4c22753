"""Pickles from files that are not trusted: measured before any unpickler reads them.

A few bytes of a pickle can ask for any amount of memory or time: an entry of the memo with a huge
number (the interpreter's unpickler makes room for all below it), values that hold each other twice
on each of many levels, an archive that unpacks to a thousand times its size. What a pickle may
name, and so run, is not decided here; whoever reads it must do that.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

ZIP_MAGIC = b"PK\x03\x04"
# torch's older format: number, version, machine, the content, the names of its storages.
_PICKLES_OF_LEGACY_FILES = 5
# How often the values of a genuine file appear again, in all, is a small multiple of its length.
_LARGEST_GROWTH = 100

_REMEMBER = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_RECALL = {"GET", "BINGET", "LONG_BINGET"}
# These change the value below what they take.
_FILL = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class PickleBombError(ValueError):
    """A pickle or an archive that asks for far more memory or time than its size explains."""


def load_weights(path: Path, *, map_file: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU, with ``weights_only`` and measured before.

    Args:
        map_file: leave tensors in the file until they are used, where its format allows that.

    Raises:
        PickleBombError: see `check_pickle`; or the archive is compressed, which torch's are not.
        Exception: whatever the bytes of a damaged file lead to.
    """
    with path.open("rb") as file:
        is_archive = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        file.seek(0)
        if not is_archive:
            for _ in range(_PICKLES_OF_LEGACY_FILES):
                check_pickle(file)
    if is_archive:
        _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=map_file and is_archive)


def check_pickle(stream: bytes | IO[bytes]) -> None:
    """Refuse a pickle whose values would be much more than its bytes; read up to its end.

    Each value has a weight, the number of values that are in it, counted as often as they are met.

    Raises:
        PickleBombError: numbers of the memo have gaps, a value holds itself, or the weights of all
            that is taken from the memo are out of proportion.
        ValueError: it is damaged.
    """
    memo: dict[int, _Value] = {}
    stack: list[_Value | None] = []  # None is a mark
    recalled = count = 0
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), start=1):
        name = opcode.name
        if name in _REMEMBER:
            number = len(memo) if argument is None else argument
            if number > len(memo):
                raise PickleBombError(f"it has {len(memo)} entries of the memo, and asks for one "
                                      f"with the number {number}")  # fmt: skip
            memo[number] = _top(stack)
        elif name in _RECALL or name == "DUP":
            value = _top(stack) if name == "DUP" else memo[argument]
            recalled += value.weight
            stack.append(value)
            value.is_used = True
        else:
            _run(opcode, stack)
        if recalled > _LARGEST_GROWTH * (count + 100):
            raise PickleBombError(f"its values are {recalled} after {count} instructions")


class _Value:
    """A value on an unpickler's stack."""

    __slots__ = ("is_used", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.is_used = False


def _run(opcode: pickletools.OpcodeInfo, stack: list[_Value | None]) -> None:
    """What an instruction takes from the stack and leaves there."""
    before, after = list(opcode.stack_before), list(opcode.stack_after)
    taken: list[_Value | None] = []
    if pickletools.markobject in before:
        while (value := stack.pop()) is not None:
            taken.append(value)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(stack.pop())
    values = [value for value in taken if value is not None]
    if opcode.name in _FILL:
        filled = values.pop()
        if filled.is_used:
            raise PickleBombError("a value changes after another one holds it")
        filled.weight += sum(value.weight for value in values)
        stack.append(filled)
    else:
        weight = 1 + sum(value.weight for value in values)
        stack += [None if kind is pickletools.markobject else _Value(weight) for kind in after]
    for value in values:
        value.is_used = True


def _top(stack: list[_Value | None]) -> _Value:
    value = stack[-1]
    if value is None:
        raise ValueError("a mark where a value is wanted")
    return value


def _check_archive(path: Path) -> None:
    """Raises PickleBombError; or what torch and zipfile raise for a damaged one."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise PickleBombError(f"{compressed[0]} in it is compressed, which torch never does")
    size, total = path.stat().st_size, sum(entry.file_size for entry in entries)
    if total > size:
        raise PickleBombError(f"its entries have {total} bytes together, the file has {size}")
    # The same bytes that torch will read.
    reader = torch._C.PyTorchFileReader(str(path))
    check_pickle(io.BytesIO(reader.get_record("data.pkl")))
