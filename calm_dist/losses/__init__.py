"""Losses: energy score, autoencoder, cross entropy."""
