"""Code shared by the command-line tools."""
