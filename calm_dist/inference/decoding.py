"""Decode latents to their most likely tokens, with as few logits as necessary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from calm_dist.log import NOTE
from calm_dist.models.autoencoder import Autoencoder

_log = logging.getLogger(__name__)

_INT8_LARGEST = 127
_INT32_LOWEST = -(2**31)
# The bound of the error is itself computed in fp32.
_BOUND_ROUNDING = 1.001
# Logits in memory at a time: larger pieces do not fit the cache, and take 3 times as long.
_COARSE_ELEMENTS = 1 << 22
_EXACT_ELEMENTS = 1 << 26
# Elements of gathered weights in memory at a time, so that they fit the cache.
_FINE_ELEMENTS = 1 << 18
_GROUP = 128
# For so few rows the product with the weights on the left is faster by 1.5 to 2 times: the one with
# them on the right reorders all weights first.
_FEW_ROWS = 16
# Checking more words of a row is slower than computing all of its logits.
_MOST_CANDIDATES = 256
# For few draws, all tokens cost hardly more than one.
_DECODED_WHOLE = 16


@dataclass(frozen=True)
class _CoarseWeight:
    """The vocabulary's weights as int8 times a common step, padded to whole groups of words."""

    words: torch.Tensor
    step: torch.Tensor
    largest_norm: torch.Tensor
    """Largest norm of a word's original weights."""
    largest_error: torch.Tensor
    """Largest norm of a word's rounding error."""

    @classmethod
    def of(cls, weight: torch.Tensor) -> _CoarseWeight:
        rounded, step = _rounded(weight, weight.abs().amax())
        return cls(
            F.pad(rounded.to(torch.int8), (0, 0, 0, -len(weight) % _GROUP)),
            step,
            weight.norm(dim=-1).max(),
            (weight - rounded * step).norm(dim=-1).max(),
        )


def _rounded(values: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values divided by a step and rounded to the range of int8, and the step."""
    step = (largest / _INT8_LARGEST).clamp_min(torch.finfo(values.dtype).tiny)
    return (values / step).round_(), step


class GreedyDecoder:
    """The autoencoder's decoder with arg-max; the weights must not change after construction."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._coarsely = torch.cpu._is_vnni_supported()
        if autoencoder.output_weight.device.type == "cpu" and not self._coarsely:
            _log.log(
                NOTE,
                "this CPU has no int8 products (AVX-512 VNNI): tokens are decoded from all logits "
                "in fp32, which gives the same tokens and takes several times as long",
            )

    @property
    def patch_size(self) -> int:
        return self._autoencoder.patch_size

    def hidden(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [n, l] -> hidden states of their tokens [n, K, d], fp32."""
        return self._autoencoder.decoder(latents.float())

    def patch_hidden(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [n, l] -> hidden states [n, d] of their patches, fp32."""
        return self._autoencoder.decoder.patch_hidden(latents.float())

    def token_hidden(self, patches: torch.Tensor, position: int | None = None) -> torch.Tensor:
        """Hidden states of patches [n, d] -> those of their tokens [n, K, d], or at one position
        [n, d]."""
        return self._autoencoder.decoder.token_hidden(patches, position)

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, d] -> the tokens of the largest logits [rows].

        On CPUs with fast int8 products (instruction set AVX-512 VNNI), logits are first computed in
        int8 with an error bound, then in fp32 for the words that may still be the largest. The
        result is that of fp32, up to its own rounding. On other CPUs and on GPUs all logits are
        computed in fp32.
        """
        # torch's int8 product of a single column is wrong (2.13).
        if self._coarsely and hidden.device.type == "cpu" and hidden.shape[-1] > 1:
            rows = max(1, _COARSE_ELEMENTS // len(self._weight))
            return torch.cat([self._coarse_to_fine(piece) for piece in hidden.split(rows)])
        return self._all_logits(hidden)

    @property
    def _weight(self) -> torch.Tensor:
        return self._autoencoder.output_weight.detach()

    @cached_property
    def _coarse_weight(self) -> _CoarseWeight:
        return _CoarseWeight.of(self._weight)

    def _coarse_logits(
        self, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Coarse logits in int8 arithmetic.

        Returns:
            Integer logits [rows, words], padded to whole groups; the scale of a row's integers
            [rows] and the bound of the error of its scaled logits [rows], both fp64.
        """
        coarse = self._coarse_weight
        rounded, step = _rounded(hidden, hidden.abs().amax(-1, keepdim=True))
        # h w - h' w' = (h - h') w + h' (w - w'), bounded with the Cauchy-Schwarz inequality.
        lost = (hidden - rounded * step).norm(dim=-1).double() * coarse.largest_norm
        error = lost + (rounded * step).norm(dim=-1).double() * coarse.largest_error
        few = rounded.to(torch.int8)
        if 1 < len(few) <= _FEW_ROWS:
            logits = torch._int_mm(coarse.words, few.T).T.contiguous()
        else:
            logits = torch._int_mm(few, coarse.words.T)
        logits[:, len(self._weight) :] = _INT32_LOWEST
        return logits, step[:, 0].double() * coarse.step, _BOUND_ROUNDING * error

    def _coarse_to_fine(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, worth, error = self._coarse_logits(hidden)
        if not bool(error.isfinite().all()):
            return self._all_logits(hidden)
        # Compare the largest of each group first, since comparing all logits takes longer.
        groups = logits.unflatten(-1, (-1, _GROUP))
        tops = groups.amax(-1)
        # A logit that is below some exact logit by more than its own error is not the largest.
        rows, best = torch.arange(len(hidden)), tops.argmax(-1)
        likely = best * _GROUP + groups[rows, best].argmax(-1)
        reached = self._logits_of(hidden, rows, likely).double() - error
        threshold = (reached / worth).floor().clamp(_INT32_LOWEST + 1, -_INT32_LOWEST - 1).int()
        row, group = (tops >= threshold[:, None]).nonzero(as_tuple=True)
        number, place = (groups[row, group] >= threshold[row, None]).nonzero(as_tuple=True)
        row, word = row[number], group[number] * _GROUP + place
        if len(row) > _MOST_CANDIDATES * len(hidden):
            return self._all_logits(hidden)
        exact = self._logits_of(hidden, row, word)
        best = exact.new_full((len(hidden),), -torch.inf).scatter_reduce(0, row, exact, "amax")
        # Take the first of equal logits, as arg-max does.
        is_best = exact == best[row]
        first = word.new_full((len(hidden),), len(self._weight))
        return first.scatter_reduce(0, row[is_best], word[is_best], "amin")

    def _logits_of(
        self, hidden: torch.Tensor, row: torch.Tensor, word: torch.Tensor
    ) -> torch.Tensor:
        """The logits of pairs of a row and a word."""
        pairs = max(1, _FINE_ELEMENTS // hidden.shape[-1])
        return torch.cat(
            [
                hidden.index_select(0, rows).mul_(self._weight.index_select(0, words)).sum(-1)
                for rows, words in zip(row.split(pairs), word.split(pairs), strict=True)
            ]
        )

    def _all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = max(1, _EXACT_ELEMENTS // len(self._weight))
        return torch.cat([(piece @ self._weight.T).argmax(-1) for piece in hidden.split(rows)])


class LazyPatches:
    """Draws of a patch whose tokens are computed on demand.

    Args:
        latents: [n, l], one for each draw; more can be added.
    """

    def __init__(self, decoder: GreedyDecoder, latents: torch.Tensor | None = None) -> None:
        self.patch_size, self.decoder = decoder.patch_size, decoder
        self.patches: torch.Tensor | None = None
        self.known = np.full((0, self.patch_size), -1)
        if latents is not None:
            self.add(decoder.patch_hidden(latents))

    def __len__(self) -> int:
        return len(self.known)

    def add(self, patches: torch.Tensor) -> None:
        """Add draws, whose hidden states are those of `GreedyDecoder.patch_hidden`."""
        self.patches = patches if self.patches is None else torch.cat([self.patches, patches])
        unknown = np.full((len(patches), self.patch_size), -1)
        self.known = np.concatenate([self.known, unknown])

    def hidden(self, rows: np.ndarray) -> torch.Tensor:
        """Hidden states of some of the draws."""
        assert self.patches is not None
        return self.patches[torch.from_numpy(rows).to(self.patches.device)]

    def tokens(self, rows: list[int], position: int) -> list[int]:
        """The tokens at one position of some of the draws."""
        work_out([(self, rows, position)])
        return self.known[rows, position].tolist()

    def patch(self, row: int) -> tuple[int, ...]:
        """All tokens of a draw."""
        work_out([(self, [row], None)])
        return tuple(self.known[row].tolist())


def work_out(wanted: Sequence[tuple[LazyPatches, list[int], int | None]]) -> None:
    """Compute the unknown ones of the wanted tokens of several texts' draws, all with one arg-max,
    since reading the vocabulary's weights takes most of the time.

    Args:
        wanted: draws, rows of them, and a position, None for all; the decoder is the same.
    """
    groups: dict[int | None, list[tuple[LazyPatches, np.ndarray]]] = {}
    for draws, asked, position in wanted:
        columns = slice(None) if position is None else slice(position, position + 1)
        unknown = np.unique([row for row in asked if (draws.known[row, columns] < 0).any()])
        if position is not None and position > 0 and len(unknown) <= _DECODED_WHOLE:
            # They agree on the first token, so the other tokens will be needed as well.
            position = None
        if len(unknown):
            groups.setdefault(position, []).append((draws, unknown.astype(np.int64)))
    hidden: list[torch.Tensor] = []
    places: list[tuple[LazyPatches, Any, Any]] = []
    for position, group in groups.items():
        decoder = group[0][0].decoder
        patches = torch.cat([draws.hidden(rows) for draws, rows in group])
        states = decoder.token_hidden(patches, position)
        for draws, rows in group:
            of_rows, states = states[: len(rows)], states[len(rows) :]
            if position is None:
                at, column = (draws.known[rows] < 0).nonzero()
                of_rows = of_rows[torch.from_numpy(at), torch.from_numpy(column)]
            else:
                at, column = np.arange(len(rows)), np.full(len(rows), position)
            hidden.append(of_rows)
            places.append((draws, rows[at], column))
    if not hidden:
        return
    found = decoder.tokens(torch.cat(hidden)).cpu().numpy()
    for draws, rows, columns_of in places:
        draws.known[rows, columns_of], found = found[: len(rows)], found[len(rows) :]
