"""The tensors of a released checkpoint, whichever files they lie in.

Files are mapped into memory where their format allows it: what is not asked for is not read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calm_dist.errors import CheckpointError
from calm_dist.files import follow_umask
from calm_dist.interop.layout import WEIGHTS_FILE, weight_files

# Older versions of transformers store what follows from the configuration.
BUFFERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Tensors:
    """Named tensors, and the file that each of them is from."""

    directory: Path
    values: dict[str, torch.Tensor]
    files: dict[str, Path]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def below(self, prefix: str) -> Tensors:
        """The tensors whose names begin with ``prefix``, without it."""
        names = [name for name in self.values if name.startswith(prefix)]
        return Tensors(
            self.directory,
            {name.removeprefix(prefix): self.values[name] for name in names},
            {name.removeprefix(prefix): self.files[name] for name in names},
        )

    def tied(self, pairs: Iterable[tuple[str, str]]) -> Tensors:
        """With both tensors of each pair, of which the files may have lost either.

        Raises:
            CheckpointError: both are there and differ.
        """
        values, files = dict(self.values), dict(self.files)
        for left, right in pairs:
            if left in values and right in values:
                if not torch.equal(values[left], values[right]):
                    raise CheckpointError(
                        f"{files[left]}: {left} and {right} differ, but are one parameter; the "
                        "file is damaged or was put together from several checkpoints"
                    )
                continue
            for absent, present in ((left, right), (right, left)):
                if present in values:
                    values[absent], files[absent] = values[present], files[present]
        return Tensors(self.directory, values, files)

    def check(self, shapes: Mapping[str, tuple[int, ...]], config: str) -> None:
        """Refuse what is not exactly the wanted tensors.

        Args:
            shapes: wanted names and shapes.
            config: what the shapes follow from, for the message.

        Raises:
            CheckpointError: naming file and tensor that is missing, unknown, of another shape or
                not finite.
        """
        if missing := sorted(shapes.keys() - self.values.keys()):
            raise CheckpointError(
                f"{self.directory}: the weights lack {_listed(missing)}, which {config} asks for"
            )
        if unknown := sorted(self.values.keys() - shapes.keys()):
            raise CheckpointError(
                f"{self.files[unknown[0]]}: holds {_listed(unknown)}, which {config} has no place "
                "for"
            )
        for name, shape in shapes.items():
            if tuple(self.values[name].shape) != shape:
                raise CheckpointError(
                    f"{self.files[name]}: {name} has shape {tuple(self.values[name].shape)}, "
                    f"{config} asks for {shape}"
                )
            if not self.values[name].isfinite().all():
                raise CheckpointError(
                    f"{self.files[name]}: {name} holds numbers that are not finite; the file is "
                    "damaged, or its training diverged"
                )


def read_tensors(directory: str | Path) -> Tensors:
    """All weights of a model directory. Pickles are read as data only, never executed.

    Raises:
        CheckpointError: a file is missing, damaged, or holds anything but floating-point tensors.
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
    return Tensors(Path(directory), values, files)


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
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and could run code; ask for it as "
            "safetensors"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged or no weights file ({_line(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors")
    for name, tensor in content.items():
        is_weight = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not is_weight or not tensor.is_floating_point() or tensor.is_meta:
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {name} is no floating-point tensor ({kind})")
    return {name: tensor for name, tensor in content.items() if not name.endswith(BUFFERS)}


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
