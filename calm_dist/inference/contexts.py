"""Texts that grow step by step, with the model's key-value cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calm_dist.inference.loading import LoadedModel

_FILLED_AT_ONCE = 1 << 14
"""Tokens of prompts that go through the model at once."""


def window_steps(model: LoadedModel) -> int:
    """The most steps that a model predicts from: all of its block but the last."""
    return max(1, model.recipe.block_size // model.recipe.model.patch_size - 1)


class Contexts:
    """The contexts from which the next steps of several texts are predicted; a step is a patch or a
    token.

    The window of a model is one step shorter than its block, whose last step predicts nothing in
    training. A text that outgrows the window continues from its newest half, as if it began there.
    The cache holds rotated keys, so it is filled again then, once every half window.

    All texts take a step in one batch. With ``reproducible`` the results for a text depend only on
    its own tokens, bit for bit: it is filled in alone, each later step has the same shape for any
    number of texts, and attends only to its own text. (This holds on CPU with MKL 2024.2 for hidden
    sizes that are multiples of 4; for others, the rounding of a row of a matrix product may depend
    on its index.)
    """

    def __init__(
        self,
        model: LoadedModel,
        texts: list[list[int]],
        max_new_steps: int,
        *,
        reproducible: bool = False,
    ) -> None:
        """``texts``: at least one text; the tokens of each are whole steps, at least one."""
        self._model = model
        self._step_size: int = model.recipe.model.patch_size
        self._window = window_steps(model)
        self._texts = [text[-self._window * self._step_size :] for text in texts]
        longest = max(map(len, self._texts)) // self._step_size + max_new_steps
        self._cache = model.new_cache(
            len(texts), min(longest, self._window), together=not reproducible
        )

    def start(self) -> Tensor:
        """The outputs after each text: hidden states (CALM) or logits [texts, d or V]."""
        if not self._cache.together:
            return torch.cat([self._fill(row) for row in range(len(self._texts))])
        outputs: dict[int, Tensor] = {}
        for rows in self._equally_long():
            # A slice is a view into the cache, and these rows are adjacent.
            tokens = torch.tensor(self._texts[rows])
            outputs |= zip(range(rows.start, rows.stop), self._predict(tokens, rows), strict=True)
        return torch.stack([outputs[row] for row in range(len(self._texts))])

    def _equally_long(self) -> Iterator[slice]:
        """Adjacent texts of equal length, few enough to fit into memory."""
        start = 0
        for row in range(1, len(self._texts) + 1):
            end = row == len(self._texts) or len(self._texts[row]) != len(self._texts[start])
            if end or (row - start) * len(self._texts[start]) >= _FILLED_AT_ONCE:
                yield slice(start, row)
                start = row

    def extend(self, rows: list[int], steps: list[list[int]]) -> Tensor:
        """Keep only the texts ``rows``, add one step to each, and return the outputs after them."""
        if len(rows) < len(self._texts):
            self._cache = self._cache.select(rows)
            self._texts = [self._texts[row] for row in rows]
        for row, step in enumerate(steps):
            if self._cache.lengths[row] == self._window:
                self._halve(row)
            self._texts[row] = self._texts[row] + step
        return self._predict(torch.tensor(steps), slice(0, len(steps)))

    def _halve(self, row: int) -> None:
        """Keep half a window, counting the step that is about to be added."""
        kept = max(1, self._window // 2) - 1
        text = self._texts[row]
        self._texts[row] = text[len(text) - kept * self._step_size :]
        self._cache.clear(row)
        if kept > 0:
            self._fill(row)

    def _fill(self, row: int) -> Tensor:
        return self._predict(torch.tensor([self._texts[row]]), slice(row, row + 1))

    def _predict(self, tokens: Tensor, rows: slice) -> Tensor:
        return self._model.outputs(tokens, cache=self._cache.select(rows))[:, -1]
