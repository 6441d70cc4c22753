"""The layout of the released checkpoints: names, configurations, tensors; both ways."""
