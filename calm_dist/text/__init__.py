"""Text: corpora in all their formats, documents, tokenizers and blocks of tokens."""
