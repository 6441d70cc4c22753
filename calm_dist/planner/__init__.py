"""What a recipe would need on a cluster: memory, time, storage, and which layout is best.

Nothing here imports torch, except for `local`, which measures the machine it runs on.
"""
