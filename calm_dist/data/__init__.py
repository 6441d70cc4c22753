"""From tokens to batches: stores of tokens and latents, and the guarded streaming reader."""
