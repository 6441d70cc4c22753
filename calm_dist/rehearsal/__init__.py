"""A rehearsal: a rank's training steps on fake tensors of a GPU that need not be there.

`rehearse.py` starts a process for each rank (`worker.py`) in which torch finds GPUs
(`stand_in.py`), and compares what the ranks would need with the planner (`terminal.py`). No other
room imports this one.
"""
