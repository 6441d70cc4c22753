"""Parameters and FLOPs of single layers; a multiply-add is 2 FLOPs."""

from __future__ import annotations


def linear_flops(inputs: int, outputs: int) -> int:
    """FLOPs of one row through a linear layer."""
    return 2 * inputs * outputs


def affine_parameters(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def layer_norm_parameters(size: int) -> int:
    """Parameters of a LayerNorm: weight and bias."""
    return 2 * size
