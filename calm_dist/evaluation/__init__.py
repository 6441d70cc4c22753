"""Evaluation: BrierLM, likelihood-free sampling, text generation."""
