"""Measured times of single parts of the models."""
