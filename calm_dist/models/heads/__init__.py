"""Generative heads: hidden state and noise in, latent samples out."""
