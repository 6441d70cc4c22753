"""Text in, batches out: corpus, tokenizer, latent stores and the guarded streaming reader."""
