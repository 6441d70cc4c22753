"""Load released models, and convert checkpoints from and to the released layout."""
