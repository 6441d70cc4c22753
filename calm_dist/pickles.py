"""Pickles from untrusted files: measured before any unpickler reads them.

A few bytes of a pickle can ask for any amount of memory or time: a memo entry with a huge number
(the interpreter's unpickler allocates all entries below it), values that hold each other twice on
each of many levels, an archive that unpacks to a thousand times its size. This module does not
decide what a pickle may name, and therefore run; the caller must do that.
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
# In a genuine file, the total number of repeated values is a small multiple of its length.
_LARGEST_GROWTH = 100

_REMEMBER = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_RECALL = {"GET", "BINGET", "LONG_BINGET"}
# These modify the value below their arguments.
_FILL = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class PickleBombError(ValueError):
    """A pickle or an archive that asks for far more memory or time than its size explains."""


def load_weights(path: Path, *, map_file: bool = False) -> Any:
    """Load what `torch.save` wrote onto the CPU, with ``weights_only`` and after `check_pickle`.

    Args:
        map_file: map the file, so that tensors are read when used, if its format allows that.

    Raises:
        PickleBombError: see `check_pickle`; or the archive is compressed, which torch's never are.
        Exception: any type, for a damaged file.
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
    """Refuse a pickle whose values far outnumber its bytes; reads the stream up to its end.

    Each value has a weight: the number of values in it, repetitions included.

    Raises:
        PickleBombError: the memo numbers have gaps, a value holds itself, or the total weight of
            the values recalled from the memo is out of proportion.
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
                raise PickleBombError(f"it has {len(memo)} memo entries and asks for number "
                                      f"{number}")  # fmt: skip
            memo[number] = _top(stack)
        elif name in _RECALL or name == "DUP":
            value = _top(stack) if name == "DUP" else memo[argument]
            recalled += value.weight
            stack.append(value)
            value.is_used = True
        else:
            _run(opcode, stack)
        if recalled > _LARGEST_GROWTH * (count + 100):
            raise PickleBombError(f"it repeats {recalled} values within {count} instructions")


class _Value:
    """A value on an unpickler's stack."""

    __slots__ = ("is_used", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.is_used = False


def _run(opcode: pickletools.OpcodeInfo, stack: list[_Value | None]) -> None:
    """Apply the stack effect of an instruction."""
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
        raise ValueError("a mark instead of a value")
    return value


def _check_archive(path: Path) -> None:
    """Raises PickleBombError, or the errors of torch and zipfile for a damaged archive."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise PickleBombError(f"its entry {compressed[0]} is compressed, which torch never does")
    size, total = path.stat().st_size, sum(entry.file_size for entry in entries)
    if total > size:
        raise PickleBombError(f"its entries have {total} bytes in total, the file only {size}")
    # The same bytes that torch will read.
    reader = torch._C.PyTorchFileReader(str(path))
    check_pickle(io.BytesIO(reader.get_record("data.pkl")))
