"""Studies: many trainings from one plan, each at a budget of FLOPs, scored, and kept as JSON."""
