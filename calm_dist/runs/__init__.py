"""Run directories: lock, environment, metrics, checkpoints, and code that reads them."""
