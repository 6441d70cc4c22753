"""The discrete head: predicts the tokens of the next patch, one after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from calm_dist.heads import HeadRecipe
from calm_dist.heads.tokens import EXPANSION
from calm_dist.models.heads.base import Head

RMS_NORM_EPS = 1e-6


class TokenBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)), applied to each token independently."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = EXPANSION * hidden_size
        self.norm = nn.RMSNorm(hidden_size, eps=RMS_NORM_EPS)
        self.gate_up = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TokensHead(Head):
    """Computes states of a patch's K tokens, from which an output layer computes their logits.

    The state of token k depends on a projection of the hidden state for its position and, unless
    ``independent``, on the embeddings of the tokens before it in the patch. Embedding and output
    layer are not part of the head (`models.patch_tokens`), since they are cut over the vocabulary.
    """

    def __init__(
        self, head: HeadRecipe, hidden_size: int, latent_size: int, patch_size: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.independent = head.independent
        self.views = nn.Linear(hidden_size, patch_size * hidden_size)
        if not self.independent:
            self.norm_previous = nn.RMSNorm(hidden_size, eps=RMS_NORM_EPS)
            self.from_previous = nn.ModuleList(
                nn.Linear(k * hidden_size, hidden_size, bias=False) for k in range(1, patch_size)
            )
        self.blocks = nn.ModuleList(TokenBlock(hidden_size) for _ in range(head.num_mlp_layers))
        self.final_norm = nn.RMSNorm(hidden_size, eps=RMS_NORM_EPS)

    def layers_from_zero(self, init: str) -> Iterable[nn.Linear]:
        """None: the initial logits are determined by the output layer alone."""
        return []

    def forward(self, hidden: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """States of all K tokens, each given the true ones before it.

        Args:
            hidden: [S, d].
            previous: embeddings of the patch's first K - 1 tokens [S, K - 1, d]; unused by an
                ``independent`` head.

        Returns:
            [S, K, d].
        """
        views = self.views(hidden).unflatten(-1, (self.patch_size, -1))
        if self.independent or self.patch_size == 1:
            return self._states(views)
        assert previous is not None
        normed = self.norm_previous(previous)
        parts = [views[:, 0]]
        for k, linear in enumerate(self.from_previous, start=1):
            parts.append(views[:, k] + linear(normed[:, :k].flatten(1)))
        return self._states(torch.stack(parts, dim=1))

    def state(
        self, hidden: torch.Tensor, previous: torch.Tensor | None, place: int
    ) -> torch.Tensor:
        """The state of one token [S, d], for inference.

        Args:
            hidden: [S, d].
            previous: embeddings of the ``place`` tokens before it in the patch [S, place, d].
        """
        width = hidden.shape[-1]
        rows = slice(place * width, (place + 1) * width)
        view = F.linear(hidden, self.views.weight[rows], self.views.bias[rows])
        if not self.independent and place > 0:
            assert previous is not None
            view = view + self.from_previous[place - 1](self.norm_previous(previous).flatten(1))
        return self._states(view)

    def _states(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)
