"""Learning-rate schedule."""

from __future__ import annotations

import math

from calm_dist.recipe import Training


def learning_rate(training: Training, step: int) -> float:
    """Rate of optimizer step ``step`` (counted from 0): linear warm-up, then the schedule.

    ``cosine`` and ``linear`` decay from the end of the warm-up to zero at ``training.steps``.
    ``wsd`` decays over the last ``decay_steps``: step ``steps - n`` has n / ``decay_steps`` of the
    full rate.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    decay_steps = training.steps - training.warmup_steps
    if training.schedule == "wsd":
        # The checks of a recipe require it with this schedule.
        assert training.decay_steps is not None
        decay_steps = training.decay_steps
    done = step - (training.steps - decay_steps)
    progress = min(max(done / max(decay_steps, 1), 0.0), 1.0)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "wsd": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.schedule]
    return training.learning_rate * factor
