"""A CALM with an energy head for transformers' Auto classes, from an exported directory.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokens = model.generate(input_ids, max_new_tokens=64, temperature=0.5)

One file, which needs torch and transformers only. Modules have the names of the released layout.
Written for transformers 4.57, tried with 5.24.0. For training and evaluation use the package that
wrote this file.
"""

import inspect
import json
from collections import Counter
from math import comb

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import cached_file

_LAYER_NORM_EPS = 1e-6
_ROWS_AT_ONCE = 256
"""Tokens whose logits are in memory at a time."""
_FORWARD_NAMES = inspect.signature(LlamaModel.forward).parameters
_CACHE = "cache" if "cache" in _FORWARD_NAMES else "past_key_values"
"""What transformers calls keys and values: 5.24 warns of the name that 4.57 has."""


class CalmConfig(LlamaConfig):
    """``config.json`` of the released layout.

    ``autoencoder_config`` has the values of ``autoencoder/config.json``, from where they are read
    if they are absent.
    """

    model_type = "energy"

    def __init__(
        self,
        patch_size=4,
        latent_size=128,
        num_mlp_layers=4,
        noise_size=64,
        autoencoder_config=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.latent_size = latent_size
        self.num_mlp_layers = num_mlp_layers
        self.noise_size = noise_size
        self.autoencoder_config = autoencoder_config


class _HeadBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.linears = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * width),
        )
        self.down_proj = nn.Linear(width, width)

    def forward(self, x, condition):
        gate, up = self.linears(torch.cat([self.in_ln(x), condition], dim=-1)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class _FinalLayer(nn.Module):
    def __init__(self, width, latent_size):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.linears = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, latent_size)
        )

    def forward(self, x):
        return self.linears(self.in_ln(x))


class _EnergyHead(nn.Module):
    """Hidden states [..., d] and uniform noise [..., noise_size] in [-0.5, 0.5) -> latents."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.noise_embd = nn.Linear(config.noise_size, width)
        self.hidden_embd = nn.Linear(width, width)
        self.norm_hidden = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.norm_noise = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.mlp_blocks = nn.ModuleList(_HeadBlock(width) for _ in range(config.num_mlp_layers))
        self.final_layer = _FinalLayer(width, config.latent_size)

    def forward(self, hidden, noise):
        x = self.norm_noise(self.noise_embd(noise))
        condition = self.norm_hidden(self.hidden_embd(hidden))
        for block in self.mlp_blocks:
            x = block(x, condition)
        return self.final_layer(x)


class _GatedMLP(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _AutoencoderLayer(nn.Module):
    def __init__(self, size, inner, eps):
        super().__init__()
        self.mlp = _GatedMLP(size, inner)
        self.layernorm = nn.RMSNorm(size, eps=eps)

    def forward(self, x):
        return x + self.mlp(self.layernorm(x))


class _Decoder(nn.Module):
    """Latents [n, l] -> hidden states of their tokens [n, K, d]; ``lm_head_weight`` is [V, d]."""

    def __init__(self, vocab_size, patch_size, latent_size, values):
        super().__init__()
        size, eps = values.get("hidden_size", 512), values.get("rms_norm_eps", 1e-6)
        inner, layers = values.get("intermediate_size", 1280), values.get("num_decoder_layers", 2)
        self.patch_size = patch_size
        self.latent_to_hidden = nn.Linear(latent_size, size)
        self.decoder_layers = nn.ModuleList(
            _AutoencoderLayer(size, inner, eps) for _ in range(layers)
        )
        self.expand_layer = nn.Linear(size, patch_size * size)
        self.norm = nn.RMSNorm(size, eps=eps)
        self.lm_head_weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, latents):
        half = len(self.decoder_layers) // 2
        x = self.latent_to_hidden(latents)
        for layer in self.decoder_layers[:half]:
            x = layer(x)
        x = self.expand_layer(x).unflatten(-1, (self.patch_size, -1))
        for layer in self.decoder_layers[half:]:
            x = layer(x)
        return self.norm(x)


class _Autoencoder(nn.Module):
    """The decoder of the autoencoder; its encoder is not needed to generate."""

    def __init__(self, config):
        super().__init__()
        values = config.autoencoder_config
        vocab_size = values.get("vocab_size", config.vocab_size)
        self.decoder = _Decoder(vocab_size, config.patch_size, config.latent_size, values)

    def tokens(self, latents):
        """Latents [n, l] -> their most likely tokens [n, K]."""
        hidden = self.decoder(latents).flatten(0, 1)
        weight = self.decoder.lm_head_weight
        found = [(part @ weight.T).argmax(-1) for part in hidden.split(_ROWS_AT_ONCE)]
        return torch.cat(found).unflatten(0, (-1, self.decoder.patch_size))


class CalmForCausalLM(PreTrainedModel):
    """Continuous Autoregressive Language Model (arXiv 2510.27688) with an energy head.

    It has no probabilities, so there are no logits: `forward` returns hidden states of patches, and
    `generate` samples K tokens at a time.
    """

    config_class = CalmConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LlamaDecoderLayer"]
    # The encoder, and the second names of the head's weights.
    _keys_to_ignore_on_load_unexpected = [r"ae_model\.encoder\.", r"generative_head\."]

    def __init__(self, config):
        super().__init__(config)
        if config.autoencoder_config is None:
            file = cached_file(config.name_or_path, "autoencoder/config.json")
            with open(file, encoding="utf-8") as stream:
                config.autoencoder_config = json.load(stream)
        width = config.hidden_size
        self.transformer = LlamaModel(config)
        self.embed_proj = nn.Sequential(
            nn.Linear(config.patch_size * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width, eps=_LAYER_NORM_EPS),
        )
        self.mlp_generator = _EnergyHead(config)
        self.ae_model = _Autoencoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embed_tokens

    def set_input_embeddings(self, value):
        self.transformer.embed_tokens = value

    def forward(self, input_ids, past_key_values=None, use_cache=None, **kwargs):
        """Tokens [B, P * K] -> hidden states [B, P, d], from which the next patches are sampled."""
        size = self.config.patch_size
        if input_ids.shape[1] % size:
            raise ValueError(f"{input_ids.shape[1]} tokens are not a multiple of {size}")
        embedded = self.transformer.embed_tokens(input_ids).unflatten(1, (-1, size)).flatten(2)
        outputs = self.transformer(
            inputs_embeds=self.embed_proj(embedded),
            use_cache=use_cache,
            **{_CACHE: past_key_values},
        )
        return BaseModelOutputWithPast(outputs.last_hidden_state, getattr(outputs, _CACHE))

    def sample_patches(self, hidden, num_samples, generator=None):
        """Hidden states [B, d] -> independent draws of the next patch, tokens [B, N, K]."""
        shape = (*hidden.shape[:1], num_samples, self.config.noise_size)
        noise = torch.rand(shape, generator=generator, device=hidden.device) - 0.5
        same = hidden[:, None].expand(-1, num_samples, -1)
        latents = self.mlp_generator(same, noise.to(hidden.dtype))
        return self.ae_model.tokens(latents.flatten(0, 1)).unflatten(0, shape[:2])

    @torch.no_grad()
    def generate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens=128,
        temperature=0.5,
        num_samples=200,
        eos_token_id=None,
        pad_token_id=None,
        generator=None,
        do_sample=True,
        **options,
    ):
        """Continue prompts.

        The model reads the newest ``max_position_embeddings`` - 1 patches of a long prompt; a text
        that outgrows them continues from its newest half.

        Args:
            input_ids: prompts [B, T]; begin tokens are added up to whole patches.
            attention_mask: [B, T], 0 where a prompt is padded.
            temperature: 1, or 1/n for a whole n, by a pool of ``num_samples`` draws.
            eos_token_id, pad_token_id: override the configuration's; several end tokens as a list.
            generator: random numbers, on the model's device.
            do_sample: True; there is no other way to generate.

        Raises:
            ValueError: other options of transformers' models.

        Returns:
            tokens [B, T + new], each prompt followed by its continuation; after the end token they
            are padded.
        """
        if not do_sample or options:
            raise ValueError(
                f"generate: {', '.join(options) or f'do_sample={do_sample}'}: not for this model, "
                "which has no logits; it samples at a temperature of 1/n"
            )
        exponent = round(1 / temperature) if 0 < temperature <= 1 else 0
        if exponent < 1 or abs(exponent * temperature - 1) > 1e-6:
            raise ValueError(f"temperature {temperature}: must be 1/n for a whole n")
        if exponent > 1 and num_samples < exponent:
            raise ValueError(
                f"num_samples {num_samples}: temperature {temperature} needs {exponent}"
            )
        if eos_token_id is None:
            eos_token_id = self.config.eos_token_id
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        pad = (ends or [0])[0] if pad is None else pad
        whole = attention_mask is None or bool(attention_mask.all())
        rows = [input_ids] if whole else input_ids.split(1)
        masks = [None] if whole else attention_mask.bool().split(1)
        new = []
        for prompts, mask in zip(rows, masks, strict=True):
            known = prompts if mask is None else prompts[mask][None]
            made = self._continue(
                known, max_new_tokens, exponent, num_samples, ends, pad, generator
            )
            new.append(made)
        length = max(made.shape[1] for made in new)
        padded = [F.pad(made, (0, length - made.shape[1]), value=pad) for made in new]
        return torch.cat([input_ids, torch.cat(padded)], dim=1)

    def _continue(self, prompts, most, exponent, num_samples, ends, pad, generator):
        """New tokens [B, at most ``most``] of prompts of equal length."""
        size = self.config.patch_size
        if self.config.bos_token_id is None:
            raise ValueError("bos_token_id: not in config.json; it fills prompts to whole patches")
        # The last patch of a block predicts nothing in training.
        window = max(1, self.config.max_position_embeddings - 1)
        context = F.pad(
            prompts, (size - prompts.shape[1] % size, 0), value=self.config.bos_token_id
        )[:, -window * size :]
        going = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
        made, cache, unread, length = prompts[:, :0], None, context, 0
        while made.shape[1] < most and bool(going.any()):
            outputs = self(unread, past_key_values=cache, use_cache=True)
            cache = getattr(outputs, _CACHE)
            draws = 1 if exponent == 1 else num_samples
            pools = self.sample_patches(outputs.last_hidden_state[:, -1], draws, generator)
            current = torch.stack([_choose(pool, exponent, generator) for pool in pools])
            context, unread = torch.cat([context, current], dim=1), current
            if context.shape[1] > window * size:
                context = context[:, -max(1, window // 2) * size :]
                unread, cache = context, None
            written, width = current, size
            if ends:
                is_end = torch.isin(current, current.new_tensor(ends)).cumsum(-1) > 0
                written = torch.where(is_end | ~going[:, None], pad, current)
                # The end token itself is written, as by other models.
                first = is_end & (is_end.cumsum(-1) == 1) & going[:, None]
                written = torch.where(first, current, written)
                # Columns that a text still wrote to.
                width = int(((first.cumsum(-1) - first.long() == 0) & going[:, None]).any(0).sum())
                going = going & ~is_end.any(-1)
            made, length = torch.cat([made, written], dim=1), length + width
        return made[:, : min(length, most)]


def _choose(pool, exponent, generator):
    """A patch of a pool [N, K]: those seen at least n times are weighted by C(count, n); if there
    is none, n - 1 is tried, and so on."""
    if len(pool) == 1:
        return pool[0]
    counts = Counter(map(tuple, pool.tolist()))
    level = min(exponent, max(counts.values()))
    patches = [patch for patch, count in counts.items() if count >= level]
    weights = [comb(counts[patch], level) for patch in patches]
    # Exact integers: they may not fit a float.
    shares = torch.tensor([weight / sum(weights) for weight in weights])
    if generator is not None:
        shares = shares.to(generator.device)
    chosen = int(torch.multinomial(shares, 1, generator=generator))
    return torch.tensor(patches[chosen], device=pool.device)
