"""Cost of a training, from its shapes: parameters, FLOPs, bytes and time by part. No torch."""
