"""From text to batches: corpus, tokenizer, latent stores and the guarded streaming reader."""
