"""Checks of this package on one GPU: right and as fast as predicted.

`runner.py` runs the parts of `parts.py`, each in a process of its own (`worker.py`), and `goals.py`
compares their results with one another, with the planner and with a rehearsal. `page.py` writes
them as Markdown.
"""
