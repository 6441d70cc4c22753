"""What a training costs, from shapes: parameters, FLOPs, bytes and time of its parts. No torch."""
