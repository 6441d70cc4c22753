"""Scores of trained models: BrierLM, cross entropy, reconstruction."""
