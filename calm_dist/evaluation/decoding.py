"""Latents to their most likely tokens, without more logits than it takes."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from calm_dist.models.autoencoder import Autoencoder

# bf16 rounds to 8 binary digits: both factors of a product, and the logit itself. Their third-order
# parts and the sum, which is in fp32, take less than a tenth of one rounding more.
_COARSE_ERROR = 3.1 * 2.0**-8
# Logits that are there at once: larger pieces leave the cache, and take 3 times as long.
_COARSE_ELEMENTS = 1 << 23
_EXACT_ELEMENTS = 1 << 26
_GROUP = 128
# Looking at more words of a row again is slower than all of its logits.
_MOST_CANDIDATES = 256
# Of few draws all tokens cost hardly more than one, and the vocabulary's weights stay in the cache
# when they are used again.
_DECODED_WHOLE = 16


class GreedyDecoder:
    """The autoencoder's decoder with arg-max; its weights may not change any more."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder

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

        Where a CPU multiplies in bf16, first so, with a bound of the error; then in fp32 the words
        that may still be the largest. The result is that of fp32, up to its own rounding.
        """
        if hidden.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
            rows = max(1, _COARSE_ELEMENTS // len(self._weight))
            return torch.cat([self._coarse_to_fine(piece) for piece in hidden.split(rows)])
        return self._all_logits(hidden)

    @property
    def _weight(self) -> torch.Tensor:
        return self._autoencoder.output_weight.detach()

    @cached_property
    def _coarse_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In bf16, filled up to whole groups of words; and the largest norm of a row."""
        weight = self._weight
        return (
            F.pad(weight.bfloat16(), (0, 0, 0, -len(weight) % _GROUP)),
            weight.norm(dim=-1).max(),
        )

    def _coarse_to_fine(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, largest_norm = self._coarse_weight
        logits = hidden.bfloat16() @ weight.T
        logits[:, len(self._weight) :] = -torch.inf
        # The largest of each group first, since to compare all logits takes as long as they did.
        groups = logits.unflatten(-1, (-1, _GROUP))
        tops = groups.amax(-1).float()
        top = tops.amax(-1)
        # By the inequality of Cauchy and Schwarz; for the largest logit, and for each other.
        threshold = top - 2 * _COARSE_ERROR * hidden.norm(dim=-1) * largest_norm
        row, group = (tops >= threshold[:, None]).nonzero(as_tuple=True)
        number, place = (groups[row, group] >= threshold[row, None]).nonzero(as_tuple=True)
        row, word = row[number], group[number] * _GROUP + place
        if not bool(top.isfinite().all()) or len(row) > _MOST_CANDIDATES * len(hidden):
            return self._all_logits(hidden)
        exact = (hidden[row] * self._weight[word]).sum(-1)
        best = exact.new_full((len(hidden),), -torch.inf).scatter_reduce(0, row, exact, "amax")
        # Of equal ones the first, as arg-max takes.
        is_best = exact == best[row]
        first = word.new_full((len(hidden),), len(self._weight))
        return first.scatter_reduce(0, row[is_best], word[is_best], "amin")

    def _all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = max(1, _EXACT_ELEMENTS // len(self._weight))
        return torch.cat([(piece @ self._weight.T).argmax(-1) for piece in hidden.split(rows)])


class LazyPatches:
    """Draws of a patch, each token of which is worked out when it is asked for.

    Args:
        latents: [n, l], one for each draw.
    """

    def __init__(self, decoder: GreedyDecoder, latents: torch.Tensor) -> None:
        self.patch_size = decoder.patch_size
        self._decoder, self._patches = decoder, decoder.patch_hidden(latents)
        self._hidden = None
        if len(latents) <= _DECODED_WHOLE:
            self._hidden = decoder.token_hidden(self._patches)
        self._known = np.full((len(latents), self.patch_size), -1)

    def __len__(self) -> int:
        return len(self._known)

    def tokens(self, rows: list[int], position: int) -> list[int]:
        """The tokens at one position of some of the draws."""
        unknown = [row for row in rows if self._known[row, position] < 0]
        if 0 < len(unknown) <= _DECODED_WHOLE and position > 0:
            # They agreed on the first token, so that the others will be asked for, too.
            self._work_out(unknown)
        elif unknown:
            if self._hidden is None:
                hidden = self._decoder.token_hidden(self._patches[unknown], position)
            else:
                hidden = self._hidden[unknown, position]
            self._known[unknown, position] = self._decoder.tokens(hidden).cpu().numpy()
        return self._known[rows, position].tolist()

    def patch(self, row: int) -> tuple[int, ...]:
        """A draw, whole."""
        if (self._known[row] < 0).any():
            self._work_out([row])
        return tuple(self._known[row].tolist())

    def _work_out(self, rows: list[int]) -> None:
        """All unknown tokens of a few draws at once; reading the vocabulary's weights takes most of
        the time."""
        if self._hidden is None:
            hidden = self._decoder.token_hidden(self._patches[rows])
        else:
            hidden = self._hidden[rows]
        unknown = torch.from_numpy(self._known[rows] < 0)
        known = torch.from_numpy(self._known[rows])
        known[unknown] = self._decoder.tokens(hidden[unknown.to(hidden.device)]).cpu()
        self._known[rows] = known.numpy()
