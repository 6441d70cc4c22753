"""Tensors of checkpoints: models and optimizers of any layout, written during the training."""
