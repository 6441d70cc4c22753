"""Comparisons of models and reports of runs, for people and as JSON."""
