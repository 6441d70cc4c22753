"""Trained models, ready to use: `load` a directory, and generate.

The module is callable: ``calm_dist.inference.load("runs/calm")`` is `load_text_model`. Its other
names are those of `inference.loading`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, overload

from calm_dist.inference.generate import Generation, find_tokenizer, generate, token_names
from calm_dist.inference.loading import (
    LoadedModel,
    load_model,
    load_released,
    single_process_recipe,
    single_process_topology,
    tokenizer_file,
)
from calm_dist.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "LoadedModel",
    "TextModel",
    "load_model",
    "load_released",
    "load_text_model",
    "single_process_recipe",
    "single_process_topology",
    "tokenizer_file",
]


@dataclass(frozen=True)
class TextModel:
    """A model and its tokenizer."""

    model: LoadedModel
    tokenizer: Tokenizer

    @overload
    def generate(self, prompts: str, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[Generation]: ...

    def generate(
        self, prompts: str | Sequence[str], **options: Any
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several in one batch; ``options`` as in `inference.generate`."""
        return generate(self.model, self.tokenizer, prompts, **options)


def load_text_model(
    directory: str | Path,
    *,
    tokenizer: str | Path | None = None,
    begin_token: str | None = None,
    end_token: str | None = None,
    autoencoder: str | Path | None = None,
    **options: Any,
) -> TextModel:
    """Load a checkpoint with its tokenizer.

    Args:
        directory: run directory (its newest valid checkpoint), checkpoint, or directory in the
            released layout.
        tokenizer: tokenizer file; default: the one that the model was trained with.
        begin_token, end_token: names of the tokens around documents, where the model does not
            record them.
        autoencoder: overrides the recipe's ``model.autoencoder`` (CALM).
        options: ``device``, ``dtype`` and ``world`` of `load_model`.

    Raises:
        CheckpointError: the checkpoint or the autoencoder is missing, damaged or does not fit.
        DataError: the tokenizer is missing or damaged.
    """
    model = load_model(directory, autoencoder, **options)
    names = token_names(model, begin_token, end_token)
    return TextModel(model, load_tokenizer(tokenizer or find_tokenizer(model), *names))


class _CallableModule(ModuleType):
    def __call__(self, directory: str | Path, **options: Any) -> TextModel:
        return load_text_model(directory, **options)


sys.modules[__name__].__class__ = _CallableModule
