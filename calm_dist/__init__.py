"""calm_dist: distributed pretraining of Continuous Autoregressive Language Models (CALM)."""

__version__ = "0.1.0"
