"""Trained models in one process: loading, generation, sampling, decoding."""
