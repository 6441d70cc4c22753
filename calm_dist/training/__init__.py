"""Training runs: loop, optimizer, checkpoints of tensors."""
