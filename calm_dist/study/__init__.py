"""Studies: many trainings from one plan, each with a budget of FLOPs, scored, with JSON results."""
