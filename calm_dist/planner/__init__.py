"""Predict what a recipe needs on a cluster: memory, time, storage, and the best layout.

Nothing here imports torch, except for `local`, which measures the machine it runs on.
"""
