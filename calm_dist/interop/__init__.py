"""Released models by name, and checkpoints converted from and to the released layout."""
