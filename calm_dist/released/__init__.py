"""The layout of the released checkpoints: reading and writing names, configurations, tensors."""
