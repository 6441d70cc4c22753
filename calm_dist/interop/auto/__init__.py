"""What an exported directory carries for transformers' Auto classes; nothing here is imported."""
