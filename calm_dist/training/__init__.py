"""Training runs: loop, optimizer, checkpoints, metrics."""
