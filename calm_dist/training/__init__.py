"""Training runs: loop, optimizers, watchdog and the writing of checkpoints."""
