"""Tensors of checkpoints: models and optimizers of any layout, written beside the training."""
