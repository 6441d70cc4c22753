"""The tensors of a released checkpoint, from one file or several.

Files are mapped into memory if their format allows it, so that unused tensors are not read.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from calm_dist.errors import CheckpointError, listed
from calm_dist.files import follow_umask
from calm_dist.log import NOTE
from calm_dist.pickles import PickleBombError, load_weights
from calm_dist.released.files import WEIGHTS_FILE, weight_files
from calm_dist.released.names import TIED_OUTPUT

_log = logging.getLogger(__name__)

# Stored by older versions of transformers, although it follows from the configuration.
BUFFERS = ("rotary_emb.inv_freq",)
# Prefixes that torch's wrappers add to the name of every tensor: torch.compile; DDP and FSDP.
WRAPPERS = ("_orig_mod.", "module.")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Tensors:
    """Named tensors, and the file that contains each of them."""

    directory: Path
    values: dict[str, torch.Tensor]
    files: dict[str, Path]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def below(self, prefix: str) -> Tensors:
        """The tensors whose names begin with ``prefix``, which is removed."""
        names = [name for name in self.values if name.startswith(prefix)]
        return Tensors(
            self.directory,
            {name.removeprefix(prefix): self.values[name] for name in names},
            {name.removeprefix(prefix): self.files[name] for name in names},
        )

    def tied(self, pairs: Iterable[tuple[str, str]]) -> Tensors:
        """These tensors with both names of each pair; the files may contain only one of them.

        Raises:
            CheckpointError: the files contain both, and they differ.
        """
        values, files = dict(self.values), dict(self.files)
        for left, right in pairs:
            if left in values and right in values:
                self._check_equal(left, right)
                continue
            for absent, present in ((left, right), (right, left)):
                if present in values:
                    values[absent], files[absent] = values[present], files[present]
        return Tensors(self.directory, values, files)

    def _check_equal(self, left: str, right: str) -> None:
        one, other = self.values[left], self.values[right]
        if torch.equal(one, other):
            return
        if one.shape != other.shape:
            difference = f"have the shapes {tuple(one.shape)} and {tuple(other.shape)}"
        else:
            largest = (one.double() - other.double()).abs().max().item()
            difference = f"differ by up to {largest:.3g}"
        message = f"{self.files[left]}: {left} and {right} {difference}, but are one parameter here"
        if (left, right) == TIED_OUTPUT and one.shape == other.shape:
            raise CheckpointError(
                f"{message}. From a file with both, the authors' class (transformers 4.43) makes "
                "two parameters and trains them separately, so encoder and decoder of this "
                f"autoencoder use different matrices. Train again from a file with {right} alone, "
                "as export-hf writes it; or, if the reconstruction allows it, remove one of the "
                "two from this file"
            )
        raise CheckpointError(
            f"{message}; the file is damaged or was put together from several checkpoints"
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]], config: str) -> None:
        """Refuse tensors that are not exactly the expected ones.

        Args:
            shapes: expected names and shapes.
            config: source of the shapes, for the message.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape or not finite; the
                message names it and its file.
        """
        unknown = sorted(self.values.keys() - shapes.keys())
        if missing := sorted(shapes.keys() - self.values.keys()):
            others = f", and hold {listed(unknown, 3)}, which it does not know" if unknown else ""
            raise CheckpointError(
                f"{self.directory}: the weights lack {listed(missing, 3)}, which {config} asks "
                f"for{others}"
            )
        if unknown:
            raise CheckpointError(
                f"{self.files[unknown[0]]}: holds {listed(unknown, 3)}, for which {config} has no "
                "place"
            )
        for name, shape in shapes.items():
            if tuple(self.values[name].shape) != shape:
                raise CheckpointError(
                    f"{self.files[name]}: {name} has shape {tuple(self.values[name].shape)}, "
                    f"{config} asks for {shape}"
                )
            if not self.values[name].isfinite().all():
                raise CheckpointError(
                    f"{self.files[name]}: {name} contains numbers that are not finite; the file "
                    "is damaged, or its training diverged"
                )


def read_tensors(directory: str | Path) -> Tensors:
    """All weights of a model directory. Pickles are read as data only, never executed.

    If every name begins with a wrapper's prefix (`WRAPPERS`), it is removed and a line on stderr
    says so.

    Raises:
        CheckpointError: a file is missing, damaged, or contains anything but floating-point
            tensors.
    """
    values: dict[str, torch.Tensor] = {}
    files: dict[str, Path] = {}
    for file, promised in weight_files(directory).items():
        content = _read_file(file)
        names = content.keys() if promised is None else promised
        for name in names:
            if name not in content:
                raise CheckpointError(f"{file}: lacks {name}, which its index promises")
            values[name], files[name] = content[name], file
    values = {name: tensor for name, tensor in values.items() if not name.endswith(BUFFERS)}
    tensors = Tensors(Path(directory), values, files)
    prefix = _wrapper_prefix(tensors)
    if not prefix:
        return tensors
    _log.log(NOTE, f"note: {directory}: the prefix {prefix!r} of all tensor names is removed")
    return tensors.below(prefix)


def _wrapper_prefix(tensors: Tensors) -> str:
    """The longest sequence of wrappers' prefixes with which every tensor's name begins."""

    def is_before_all(prefix: str) -> bool:
        return bool(tensors.values) and all(name.startswith(prefix) for name in tensors)

    prefix = ""
    while found := next((w for w in WRAPPERS if is_before_all(prefix + w)), None):
        prefix += found
    return prefix


def write_weights(values: dict[str, torch.Tensor], directory: Path) -> None:
    """Write ``model.safetensors``."""
    save_tensors(values, directory / WEIGHTS_FILE)


def save_tensors(values: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any other file."""
    save_file(values, path, metadata={"format": "pt"})
    follow_umask(path)


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = load_weights(path, map_file=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it contains more than tensors and could run code; get it in the "
            "safetensors format"
        ) from error
    except PickleBombError as error:
        raise CheckpointError(
            f"{path}: refused, it would take far more memory than its size explains "
            f"({_line(error)}); get it in the safetensors format"
        ) from error
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(
            f"{path}: refused, it is damaged or not a weights file ({_line(error)}); get it again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors")
    for name, tensor in content.items():
        _check_kind(path, name, tensor)
    return dict(content)


def _check_kind(path: Path, name: str, tensor: Any) -> None:
    """Raise CheckpointError unless the value is a plain tensor of weights stored in the file."""
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path}: {name} is not a tensor ({type(tensor).__name__})")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(f"{path}: {name} is not a plain tensor ({tensor.layout})")
    if tensor.dtype not in DTYPES and not name.endswith(BUFFERS):
        wanted = ", ".join(_type_name(dtype) for dtype in DTYPES)
        raise CheckpointError(
            f"{path}: {name} is {_type_name(tensor.dtype)}; weights are read as {wanted}, so write "
            "the checkpoint in one of these"
        )
    # A pickle can expand one number to any shape.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} of shape {tuple(tensor.shape)} has only "
            f"{tensor.untyped_storage().nbytes()} bytes in the file"
        )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
