"""The models: autoencoder, patch embedding, backbone, generative heads, discrete baseline."""
