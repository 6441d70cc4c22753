"""Latents in one byte per number: each dimension of a block has a scale and an offset of its own.

Scales of a block need nothing else of the corpus, so workers write the same store in any order.
"""

from __future__ import annotations

import numpy as np

_LEVELS = 127


def quantize(mean: np.ndarray, log_std: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of a block.

    Args:
        mean, log_std: finite, [P, l].

    Returns:
        ``mean`` and ``log_std`` int8[P, l], and ``scales`` float16[4, l]: scale and offset of the
        mean, then those of log_std.
    """
    codes, scales = [], []
    for values in (mean, log_std):
        values = values.astype(np.float32)
        low, high = values.min(axis=0), values.max(axis=0)
        offset = ((low + high) / 2).astype(np.float16)
        # Codes are made with the numbers that are stored. Rounding may have moved the offset.
        most = np.maximum(high - offset, offset - low)
        scale = np.maximum(most / _LEVELS, np.finfo(np.float16).tiny).astype(np.float16)
        code = np.rint((values - offset.astype(np.float32)) / scale.astype(np.float32))
        codes.append(np.clip(code, -_LEVELS, _LEVELS).astype(np.int8))
        scales += [scale, offset]
    return {"mean": codes[0], "log_std": codes[1], "scales": np.stack(scales)}


def dequantize(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``mean`` and ``log_std`` float32[..., P, l] of columns, which may be stacked; others as they
    are."""
    values = {name: column for name, column in columns.items() if name != "scales"}
    if "scales" in columns:
        scales = columns["scales"].astype(np.float32)[..., None, :]
        for name, first in (("mean", 0), ("log_std", 2)):
            scale, offset = scales[..., first, :, :], scales[..., first + 1, :, :]
            values[name] = columns[name].astype(np.float32) * scale + offset
    return values
