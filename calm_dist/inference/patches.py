"""Draw the next patches of texts from a model that provides only samples of latents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from calm_dist.inference.decoding import LazyPatches, work_out
from calm_dist.inference.loading import LoadedModel
from calm_dist.inference.methods import Method, Sampler
from calm_dist.inference.sampling import (
    Asking,
    Draw,
    Look,
    Patch,
    exact_steps,
    exponent_parts,
    pool_steps,
)

_DRAWN_AT_ONCE = 4096
"""Draws that go through head and decoder at once."""


@dataclass
class _Text:
    """A text whose next patch is being drawn.

    Attributes:
        number: its place in the batch.
        noise: its own stream of random numbers, on the model's device.
        asking: the sampling method, which asks for draws and for their tokens.
        request: what it asks for; None at the end.
        patch: the result.
    """

    number: int
    noise: torch.Generator
    asking: Asking[Patch]
    draws: LazyPatches
    request: Draw | Look | None = None
    patch: Patch = ()

    def go_on(self, reply: Any) -> None:
        try:
            self.request = self.asking.send(reply)
        except StopIteration as done:
            self.request, self.patch = None, done.value


def patch_sampler(
    model: LoadedModel, temperature: float, method: Method, pool_size: int, max_draws: int
) -> Sampler:
    """A function from hidden states [n, d] to the next patch of each text.

    The draws of all texts go through head, decoder and arg-max together, each from its text's own
    random numbers. Neither the number of draws of a text nor its random numbers depend on the other
    texts; the rounding does.
    """
    _, fraction = exponent_parts(temperature)
    exact = method == "exact" or (method == "auto" and fraction != 0)

    def asking(rng: np.random.Generator) -> Asking[Patch]:
        if exact:
            return exact_steps(temperature, rng, max_draws=max_draws)
        return pool_steps(temperature, rng, pool_size=pool_size)

    def sample(hidden: torch.Tensor, rngs: list[np.random.Generator]) -> list[list[int]]:
        texts = []
        for number, rng in enumerate(rngs):
            noise = torch.Generator(hidden.device).manual_seed(int(rng.integers(2**63)))
            texts.append(_Text(number, noise, asking(rng), LazyPatches(model.decoder)))
        _run(model, hidden, texts)
        return [list(text.patch) for text in texts]

    return sample


def _run(model: LoadedModel, hidden: torch.Tensor, texts: list[_Text]) -> None:
    """Answer the requests of texts, all of one kind together, until each has its patch."""
    for text in texts:
        text.go_on(None)
    while any(text.request for text in texts):
        # All draws first, so that as many texts as possible then ask for tokens.
        while drawing := [text for text in texts if isinstance(text.request, Draw)]:
            _draw(model, hidden, drawing)
            for text in drawing:
                text.go_on(model.decoder.patch_size)
        looking = [(text, text.request) for text in texts if isinstance(text.request, Look)]
        work_out([(text.draws, look.rows, look.position) for text, look in looking])
        for text, look in looking:
            known = text.draws.known[look.rows]
            text.go_on(
                list(map(tuple, known.tolist()))
                if look.position is None
                else known[:, look.position].tolist()
            )


def _draw(model: LoadedModel, hidden: torch.Tensor, texts: list[_Text]) -> None:
    """Make the draws that the texts ask for; those of equally many go through the head at once,
    which computes what does not depend on the noise once for each text."""

    def count_of(text: _Text) -> int:
        assert isinstance(text.request, Draw)
        return text.request.count

    for count, group in groupby(sorted(texts, key=count_of), key=count_of):
        several, size = list(group), max(1, _DRAWN_AT_ONCE // count)
        for start in range(0, len(several), size):
            part = several[start : start + size]
            noise = [model.head.draw_noise(text.noise, count, 1) for text in part]
            states = hidden[[text.number for text in part]]
            latents = model.head.sample(states, torch.cat(noise, dim=-2).to(hidden))
            # [count, texts, l] -> hidden states [texts, count, ...] of the patches
            patches = model.decoder.patch_hidden(latents.transpose(0, 1).flatten(0, 1))
            for text, of_text in zip(part, patches.split(count), strict=True):
                text.draws.add(of_text)
