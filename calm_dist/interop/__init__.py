"""Other projects' file layouts."""
