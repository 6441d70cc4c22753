"""Types shared by the methods that draw the next step of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

Method = Literal["auto", "exact", "pool"]
Sampler = Callable[[torch.Tensor, list[np.random.Generator]], list[list[int]]]
"""Hidden states or logits of texts [n, ...], and the randomness of this step for each -> the next
tokens of each."""
