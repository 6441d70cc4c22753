"""Time single parts of the models."""
