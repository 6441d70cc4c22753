"""Types shared by the methods that draw the next step of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

Method = Literal["auto", "exact", "pool"]
Sampler = Callable[[torch.Tensor, np.random.Generator], list[int]]
"""Hidden state or logits of a text, and the randomness of this step -> the next tokens."""
