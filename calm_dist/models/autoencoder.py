"""The autoencoder: K tokens <-> the posterior of one latent (section 2 of the paper).

Plain PyTorch. Names of modules and configuration fields are those of the released code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from calm_dist.costs.flops import known_size
from calm_dist.recipe import CalmModel


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and regularisation of an autoencoder; fields have their released names if they exist.

    ``ae_dropout`` is the dropout of the latent. ``token_dropout`` (released: the same value)
    replaces that share of the input tokens by ``replaced_token_id`` (released: 0) in training.
    """

    vocab_size: int
    patch_size: int = 4
    latent_size: int = 128
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    ae_dropout: float = 0.15
    token_dropout: float = 0.15
    replaced_token_id: int = 0
    kl_weight: float = 1e-3
    kl_clamp: float = 0.5
    rms_norm_eps: float = 1e-6
    latent_slots: int = 1
    """1, or ``patch_size``: the latent has that many equal parts, and the decoder of token k sees
    the first k. The released code has no such field; it corresponds to 1."""

    def __post_init__(self) -> None:
        """Raise ValueError if layers cannot be halved or the latent cannot be cut into slots."""
        if self.latent_slots not in (1, self.patch_size) or self.latent_size % self.latent_slots:
            raise ValueError(
                f"latent_slots: {self.latent_slots} with patch_size {self.patch_size} and "
                f"latent_size {self.latent_size}; use 1, or patch_size if it divides latent_size"
            )
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(self, name)
            if layers < 2 or layers % 2:
                raise ValueError(
                    f"{name}: {layers} is not an even number of at least 2, but half of the layers "
                    f"work on tokens and half on patches; use {max(2, layers + layers % 2)}"
                )


class GatedMLP(nn.Module):
    """SwiGLU without biases: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AELayer(nn.Module):
    """x + MLP(RMSNorm(x)): a layer without attention, applied to each position independently."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.mlp = GatedMLP(config)
        self.layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.layernorm(x))


class Encoder(nn.Module):
    """Tokens [n, K] -> concatenated mean and log_std [n, 2l]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.encoder_layers = nn.ModuleList(
            AELayer(config) for _ in range(config.num_encoder_layers)
        )
        self.hidden_to_latent = nn.Linear(hidden, 2 * config.latent_size)
        self.squeeze_layer = nn.Linear(config.patch_size * hidden, hidden)
        self.norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        half = len(self.encoder_layers) // 2
        # These layers see one token at a time, so each distinct token is computed once.
        occurring, position = tokens.unique(return_inverse=True)
        x = self.embed_tokens(occurring)
        for layer in self.encoder_layers[:half]:
            x = layer(x)
        x = self.squeeze_layer(F.embedding(position, x).flatten(-2))
        for layer in self.encoder_layers[half:]:
            x = layer(x)
        return self.hidden_to_latent(self.norm(x))


class Decoder(nn.Module):
    """Latents [..., l] -> hidden states of K tokens [..., K, d].

    With ``latent_slots`` the layers that work on patches run once for each token, on the latent
    without the slots of later tokens; parameters are the same.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.patch_size, self.slots = config.patch_size, config.latent_slots
        self.latent_to_hidden = nn.Linear(config.latent_size, hidden)
        self.decoder_layers = nn.ModuleList(
            AELayer(config) for _ in range(config.num_decoder_layers)
        )
        self.expand_layer = nn.Linear(hidden, config.patch_size * hidden)
        self.norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.token_hidden(self.patch_hidden(latents))

    def patch_hidden(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [..., l] -> hidden states of patches [..., d], which `token_hidden` expands; with
        slots, one hidden state for each token, from the slots it may see: [..., K, d]."""
        if self.slots > 1:
            latents = latents[..., None, :] * self._seen(latents)
        x = self.latent_to_hidden(latents)
        for layer in self.decoder_layers[: len(self.decoder_layers) // 2]:
            x = layer(x)
        return x

    def token_hidden(self, patches: torch.Tensor, position: int | None = None) -> torch.Tensor:
        """Hidden states of patches from `patch_hidden` -> those of their tokens [..., K, d], or of
        the token at one position only [..., d]."""
        expand = self.expand_layer
        if position is not None:
            weight, bias = (
                part.chunk(self.patch_size)[position] for part in (expand.weight, expand.bias)
            )
            x = F.linear(patches if self.slots == 1 else patches[..., position, :], weight, bias)
        elif self.slots == 1:
            x = expand(patches).unflatten(-1, (self.patch_size, -1))
        else:
            weight = expand.weight.unflatten(0, (self.patch_size, -1))
            x = torch.einsum("...kd,ked->...ke", patches, weight)
            x = x + expand.bias.unflatten(0, (self.patch_size, -1))
        for layer in self.decoder_layers[len(self.decoder_layers) // 2 :]:
            x = layer(x)
        return self.norm(x)

    def _seen(self, latents: torch.Tensor) -> torch.Tensor:
        """1 where the decoder of a token sees a component of the latent, else 0; [K, l]."""
        tokens = torch.arange(self.slots, device=latents.device)
        slot = tokens.repeat_interleave(latents.shape[-1] // self.slots)
        return (slot <= tokens[:, None]).to(latents.dtype)


def config_of(model: CalmModel) -> AutoencoderConfig:
    """The autoencoder of a CALM's recipe, which need not exist.

    Raises:
        RecipeError: the recipe leaves its sizes to a data store.
    """
    return AutoencoderConfig(
        vocab_size=known_size(model, "vocab_size"),
        patch_size=model.patch_size,
        latent_size=known_size(model, "latent_size"),
        latent_slots=model.latent_slots or 1,
        **model.autoencoder_size.model_dump(),
    )


class Autoencoder(nn.Module):
    """Encoder and decoder with the output logits tied to the token embedding."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def patch_size(self) -> int:
        """K, the number of tokens in a patch."""
        return self.config.patch_size

    @property
    def output_weight(self) -> torch.Tensor:
        """Weight of the output layer [V, d], which is the token embedding."""
        return self.encoder.embed_tokens.weight

    def encode(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, T] -> posterior mean and log_std, each [B, T/K, l].

        Raises:
            ValueError: T is not a multiple of K.
        """
        batch, length = tokens.shape
        if length % self.patch_size:
            raise ValueError(f"{length} tokens are not a multiple of patch_size={self.patch_size}")
        mean, log_std = self.encoder(tokens.reshape(batch, -1, self.patch_size)).chunk(2, dim=-1)
        return mean, log_std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, P, l] -> logits [B, P*K, V]."""
        hidden = self.decoder(latents).flatten(-3, -2)
        return F.linear(hidden, self.output_weight)
