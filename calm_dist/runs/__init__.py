"""Run directories: lock, environment, metrics, checkpoints, and what is read from them."""
