"""Analytic parameters and FLOPs of each part of a model, from its recipe alone.

Conventions:

- A multiply-add is 2 FLOPs. Only matrix multiplications count: no embedding look-ups, norms,
  activations, softmax, rotary positions, energy score or optimizer.
- Attention is counted as full, over all P steps of a block (T/K patches, or T tokens), although it
  is causal, because that agrees with the paper's Table 1. ``causal=True`` counts what a kernel that
  skips masked positions computes: (P + 1) / 2 visible steps on average.
- Training is three times the forward pass. The exact backward pass is a little less than twice the
  forward pass, because the head's noise, times and latents need no gradient
  (`head_backward_flops`). Recomputed activations are counted separately
  (`Part.recomputed_flops_per_token`).
- Inference generates the token after a full context: with a key-value cache only the last step
  goes through the backbone, and sees all P steps by either convention; without a cache, all P steps
  do. For CALM it includes one head sample and the autoencoder's decoder. For an autoencoder it is
  one reconstruction.
- The last patch of a block, which predicts nothing inside it, and padding count like any other.
- The frozen autoencoder's training and its pass over the corpus are not part of CALM's training:
  `count_autoencoder` counts them. Its parameters are not part of CALM's.
- Parameters exclude rows that only pad the vocabulary to equal shards.

``train_flops`` is what the authors' released code executes; ``train_flops_ours`` is less, since our
head computes everything that does not depend on the noise once for all N samples.

Symbols: d hidden, f intermediate, l latent, V vocabulary, K tokens per patch, P steps, L layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from calm_dist.errors import RecipeError
from calm_dist.heads.counting import affine_parameters, layer_norm_parameters, linear_flops
from calm_dist.recipe import (
    AutoencoderModel,
    AutoencoderSize,
    CalmModel,
    Recipe,
    TransformerModel,
)

BACKWARD_AND_FORWARD = 3

PEAK_FLOPS = (
    ("A100", 312e12, 19.5e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("B200", 2250e12, 75e12),
)
"""Words of a GPU's name, and its FLOP/s in bf16 (tensor cores, dense) and fp32 (NVIDIA's data
sheets). The first match counts; a bare name is the SXM form."""


def peak_flops(gpu: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU of this name in ``fp32`` or ``bf16``; None if unknown.

    fp32 is without TF32, which torch does not use by default.
    """
    if "MIG" in gpu:  # a part of a GPU
        return None
    for name, bf16, fp32 in PEAK_FLOPS:
        if re.search(rf"\b{name}\b", gpu):
            return fp32 if precision == "fp32" else bf16
    return None


@dataclass(frozen=True)
class Part:
    """One part of a model; FLOPs are per token of text."""

    name: str
    parameters: int
    train_flops_per_token: float = 0.0
    train_flops_per_token_ours: float = 0.0
    inference_flops_per_token: float = 0.0
    """With a key-value cache."""
    inference_flops_per_token_without_cache: float = 0.0
    recomputed_flops_per_token: float = 0.0
    """Forward pass that the backward pass repeats if the recipe has ``parallel.recompute``."""

    @property
    def forward_flops_per_token(self) -> float:
        """One forward pass of training, as the released code executes it."""
        return self.train_flops_per_token / BACKWARD_AND_FORWARD

    @property
    def forward_flops_per_token_ours(self) -> float:
        """One forward pass of training, as this package executes it."""
        return self.train_flops_per_token_ours / BACKWARD_AND_FORWARD


@dataclass(frozen=True)
class Counts:
    """All parts of a model, and their sums over ``tokens`` training tokens."""

    parts: tuple[Part, ...]
    tokens: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def train_flops_per_token(self) -> float:
        """As the released code executes it."""
        return sum(part.train_flops_per_token for part in self.parts)

    @property
    def train_flops_per_token_ours(self) -> float:
        """As this package executes it."""
        return sum(part.train_flops_per_token_ours for part in self.parts)

    @property
    def inference_flops_per_token(self) -> float:
        """With a key-value cache."""
        return sum(part.inference_flops_per_token for part in self.parts)

    @property
    def inference_flops_per_token_without_cache(self) -> float:
        return sum(part.inference_flops_per_token_without_cache for part in self.parts)

    @property
    def recomputed_flops_per_token(self) -> float:
        """FLOPs that recomputation adds to training; 0 if the recipe has none."""
        return sum(part.recomputed_flops_per_token for part in self.parts)

    @property
    def train_flops(self) -> float:
        """As the released code executes it, over all tokens."""
        return self.train_flops_per_token * self.tokens

    @property
    def train_flops_ours(self) -> float:
        """As this package executes it, over all tokens."""
        return self.train_flops_per_token_ours * self.tokens

    def part(self, name: str) -> Part:
        """The part of that name; `KeyError` if the model has none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)


def count(recipe: Recipe, tokens: int | None = None, *, causal: bool = False) -> Counts:
    """Count a recipe's model over ``tokens`` training tokens (default: steps x global batch).

    Args:
        causal: count attention over visible steps only, instead of all steps.

    Raises:
        RecipeError: the recipe leaves a size to its data store; `Recipe.with_store` fills it in.
    """
    if tokens is None:
        tokens = recipe.training.steps * recipe.tokens_per_step
    model = recipe.model
    if model.kind == "calm":
        parts = _calm_parts(model, recipe, causal)
    elif model.kind == "transformer":
        parts = _transformer_parts(model, recipe, causal)
    else:
        parts = _autoencoder_parts(model)
    return Counts(tuple(parts), tokens)


def count_autoencoder(model: CalmModel, tokens: int) -> Counts:
    """Count the autoencoder of a CALM, trained on ``tokens`` tokens.

    One pass of its encoder over a corpus costs ``part("encoder").forward_flops_per_token`` a token.

    Raises:
        RecipeError: the recipe leaves a size to its data store or to the autoencoder's checkpoint.
    """
    autoencoder = AutoencoderModel(
        kind="autoencoder",
        vocab_size=known_size(model, "vocab_size"),
        patch_size=model.patch_size,
        latent_size=known_size(model, "latent_size"),
        latent_slots=model.latent_slots or 1,
        **model.autoencoder_size.model_dump(),
    )
    return Counts(tuple(_autoencoder_parts(autoencoder)), tokens)


def attention_flops(hidden_size: int, steps: float, key_value_size: int | None = None) -> float:
    """FLOPs of one step through one attention layer that sees ``steps`` steps: projections, scores,
    and the weighted sum of values.

    ``key_value_size`` is smaller than ``hidden_size`` with grouped-query attention.
    """
    projections = linear_flops(hidden_size, hidden_size) + linear_flops(
        hidden_size, key_value_size or hidden_size
    )
    return 2 * projections + 4 * hidden_size * steps


def mlp_flops(hidden_size: int, intermediate_size: int) -> int:
    """FLOPs of one row through a SwiGLU block: gate, up, down."""
    return 3 * linear_flops(hidden_size, intermediate_size)


def compressor_flops(hidden_size: int, patch_size: int) -> int:
    """FLOPs of one patch through the input compressor: Linear(Kd, 2d), Linear(2d, d)."""
    return linear_flops(patch_size * hidden_size, 2 * hidden_size) + linear_flops(
        2 * hidden_size, hidden_size
    )


def head_flops(
    model: CalmModel, samples: int, *, share_condition: bool, evaluations: int = 1
) -> int:
    """FLOPs of one patch through the head: ``samples`` draws, ``evaluations`` runs of the network
    for each.

    Without ``share_condition`` everything runs once per sample and evaluation, as in the released
    code. With it, the parts that depend only on the hidden state run once: its embedding, and in
    the energy head its half of each block's first linear.
    """
    head, sizes = model.head, head_sizes(model)
    of_condition = model.head_spec.condition_flops(head, *sizes)
    of_noise = model.head_spec.sample_flops(head, *sizes)
    passes = samples * evaluations
    return passes * of_noise + (1 if share_condition else passes) * of_condition


def head_backward_flops(model: CalmModel, samples: int) -> int:
    """FLOPs of one patch's backward pass through our head: twice the forward pass, without the
    gradients of noise, times and latents, which are not needed."""
    spec, arguments = model.head_spec, (model.head, *head_sizes(model))
    inputs = samples * spec.input_flops(*arguments) + spec.shared_input_flops(*arguments)
    return 2 * head_flops(model, samples, share_condition=True) - inputs


def head_sizes(model: CalmModel) -> tuple[int, int]:
    """Hidden and latent size for a head's description and module; the latent size is 0 for a head
    without latents.

    Raises:
        RecipeError: the recipe leaves the latent size to its data store.
    """
    return model.hidden_size, known_size(model, "latent_size") if model.has_latents else 0


def encoder_flops(size: AutoencoderSize, patch_size: int, latent_size: int) -> int:
    """FLOPs of one patch through the encoder, to mean and log_std."""
    d = size.hidden_size
    rows = (patch_size + 1) * size.num_encoder_layers // 2
    return (
        rows * mlp_flops(d, size.intermediate_size)
        + linear_flops(patch_size * d, d)
        + linear_flops(d, 2 * latent_size)
    )


def decoder_flops(size: AutoencoderSize, patch_size: int, latent_size: int, slots: int = 1) -> int:
    """FLOPs of one patch through the decoder, up to its output layer; with K slots its first half
    runs K times."""
    d = size.hidden_size
    rows = (patch_size + slots) * size.num_decoder_layers // 2
    return (
        slots * linear_flops(latent_size, d)
        + rows * mlp_flops(d, size.intermediate_size)
        + linear_flops(d, patch_size * d)
    )


def head_parameters(model: CalmModel) -> int:
    """Weights, biases and norms of the head."""
    return model.head_spec.parameters(model.head, *head_sizes(model))


def _calm_parts(model: CalmModel, recipe: Recipe, causal: bool) -> list[Part]:
    d, patch_size = model.hidden_size, model.patch_size
    vocab_size = known_size(model, "vocab_size")
    parameters = (
        affine_parameters(patch_size * d, 2 * d)
        + affine_parameters(2 * d, d)
        + layer_norm_parameters(d)
    )
    compressor = _trained(
        "patch_compressor", parameters, compressor_flops(d, patch_size) / patch_size
    )
    samples = model.head.samples_in_training
    natural, ours = (
        head_flops(model, samples, share_condition=shared) / patch_size for shared in (False, True)
    )
    evaluations = model.head.evaluations_per_sample
    one = head_flops(model, 1, share_condition=True, evaluations=evaluations) / patch_size
    head = Part(
        "head",
        head_parameters(model),
        BACKWARD_AND_FORWARD * natural,
        BACKWARD_AND_FORWARD * ours,
        one,
        one,
    )
    return [
        Part("embedding", vocab_size * d),
        _repeated(compressor, recipe.num_patches),
        *_backbone_parts(model, recipe, causal),
        head,
        *(_decoder_parts(model) if model.has_latents else _token_parts(model)),
    ]


def _decoder_parts(model: CalmModel) -> list[Part]:
    """The frozen autoencoder's decoder, from a sample to tokens."""
    size, latent = model.autoencoder_size, known_size(model, "latent_size")
    slots = model.latent_slots or 1
    decoder = decoder_flops(size, model.patch_size, latent, slots) / model.patch_size
    output = linear_flops(size.hidden_size, known_size(model, "vocab_size"))
    return [
        _inference_only("autoencoder_decoder", decoder),
        _inference_only("autoencoder_output_layer", output),
    ]


def _token_parts(model: CalmModel) -> list[Part]:
    """The vocabulary tables of a head that predicts tokens; each token has its own softmax."""
    d, vocab_size = model.hidden_size, known_size(model, "vocab_size")
    tables = [_trained("output_layer", vocab_size * d, linear_flops(d, vocab_size))]
    if not model.head.independent:
        tables.insert(0, Part("patch_embedding", vocab_size * d))
    return tables


def _transformer_parts(model: TransformerModel, recipe: Recipe, causal: bool) -> list[Part]:
    d, vocab_size = model.hidden_size, known_size(model, "vocab_size")
    return [
        Part("embedding", vocab_size * d),
        *_backbone_parts(model, recipe, causal),
        _trained("output_layer", vocab_size * d, linear_flops(d, vocab_size)),
    ]


def _backbone_parts(
    model: CalmModel | TransformerModel, recipe: Recipe, causal: bool
) -> list[Part]:
    """The Transformer layers, with their norms, and the final norm."""
    d, f, layers, steps = (
        model.hidden_size,
        model.intermediate_size,
        model.num_hidden_layers,
        recipe.num_patches,
    )
    key_value_size = d * model.key_value_heads // model.num_attention_heads
    # For one step that sees all steps, and for the average step in training.
    last, average = (
        layers * attention_flops(d, visible, key_value_size) / model.patch_size
        for visible in (steps, (steps + 1) / 2 if causal else steps)
    )
    norms = model.layer_norm_parameters - d
    attention = _trained("attention", layers * (2 * d * (d + key_value_size) + norms), average)
    mlp = _trained("mlp", layers * (3 * d * f + d), layers * mlp_flops(d, f) / model.patch_size)
    parts = [
        replace(_repeated(attention, steps), inference_flops_per_token=last),
        _repeated(mlp, steps),
    ]
    if recipe.parallel.recompute:
        parts = [
            replace(part, recomputed_flops_per_token=part.forward_flops_per_token_ours)
            for part in parts
        ]
    return [*parts, Part("final_norm", d)]


def _autoencoder_parts(model: AutoencoderModel) -> list[Part]:
    d, f, patch_size, latent = (
        model.hidden_size,
        model.intermediate_size,
        model.patch_size,
        model.latent_size,
    )
    vocab_size, block = known_size(model, "vocab_size"), 3 * d * f + d
    encoder = model.num_encoder_layers * block + affine_parameters(patch_size * d, d) + d
    encoder += affine_parameters(d, 2 * latent)
    decoder = model.num_decoder_layers * block + affine_parameters(latent, d) + d
    decoder += affine_parameters(d, patch_size * d)
    return [
        Part("embedding", vocab_size * d),
        _trained("encoder", encoder, encoder_flops(model, patch_size, latent) / patch_size),
        _trained("decoder", decoder, _decoder_flops_per_token(model)),
        # Tied to the embedding.
        _trained("output_layer", 0, linear_flops(d, vocab_size)),
    ]


def _decoder_flops_per_token(model: AutoencoderModel) -> float:
    size = (model.patch_size, model.latent_size, model.latent_slots)
    return decoder_flops(model, *size) / model.patch_size


def _trained(name: str, parameters: int, forward: float) -> Part:
    """A part that training runs once per step of text, in the released code and in ours, and
    inference only for the last step."""
    training = BACKWARD_AND_FORWARD * forward
    return Part(name, parameters, training, training, forward, forward)


def _repeated(part: Part, steps: int) -> Part:
    """A part that inference without a cache runs again for all steps."""
    repeated = steps * part.forward_flops_per_token
    return replace(part, inference_flops_per_token_without_cache=repeated)


def _inference_only(name: str, forward: float) -> Part:
    """A part of the frozen autoencoder."""
    return Part(
        name,
        0,
        inference_flops_per_token=forward,
        inference_flops_per_token_without_cache=forward,
    )


def known_size(model: CalmModel | TransformerModel | AutoencoderModel, name: str) -> int:
    """``model.vocab_size`` or ``model.latent_size``, which a recipe may leave to its data store.

    Raises:
        RecipeError: the recipe leaves it out, and no store has filled it in.
    """
    size = getattr(model, name)
    if size is None:
        raise RecipeError(
            f"model.{name}: absent, but parameters and FLOPs depend on it; set it, or give a "
            "data.path that exists, whose store contains it"
        )
    return size
