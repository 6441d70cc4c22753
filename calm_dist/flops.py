"""Analytic parameters and FLOPs of each part of a model, from its recipe alone.

Conventions:

- A multiply-add is 2 FLOPs. Only matrix multiplications count: no norms, activations, softmax,
  rotary positions, energy score or optimizer. Recomputed activations do not count either.
- Attention is counted as full, over all steps of a block (T/K patches, or T tokens), in training
  and in inference, although it is causal: that is what the paper's Table 1 agrees with.
- Training is three times the forward pass.
- Inference generates one token at a time from a full context with a KV cache: one head sample, and
  the autoencoder's decoder for CALM. For an autoencoder it is one reconstruction.
- The last patch of a block, which predicts nothing inside it, and padding are not told apart.
- The frozen autoencoder's pass over the corpus is not part of CALM's training (see
  `encoder_flops`); its parameters are not CALM's.
- Parameters exclude rows that only pad the vocabulary to equal shards.

``train_flops`` is what the authors' released code executes; ``train_flops_ours`` is less, since our
head computes what does not depend on the noise once for all N samples.

Symbols: d hidden, f intermediate, l latent, V vocabulary, K tokens per patch, P steps, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from calm_dist.errors import RecipeError
from calm_dist.recipe import (
    AutoencoderRecipe,
    AutoencoderSize,
    CalmRecipe,
    Recipe,
    TransformerRecipe,
)
from calm_dist.recipe_checks import TIME_FEATURES

BACKWARD_AND_FORWARD = 3


@dataclass(frozen=True)
class Part:
    """One part of a model; FLOPs are per token of text."""

    name: str
    parameters: int
    train_flops_per_token: float = 0.0
    train_flops_per_token_ours: float = 0.0
    inference_flops_per_token: float = 0.0


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
        return sum(part.inference_flops_per_token for part in self.parts)

    @property
    def train_flops(self) -> float:
        """As the released code executes it, over all tokens."""
        return self.train_flops_per_token * self.tokens

    @property
    def train_flops_ours(self) -> float:
        """As this package executes it, over all tokens."""
        return self.train_flops_per_token_ours * self.tokens

    def part(self, name: str) -> Part:
        """The part of that name; `KeyError` where the model has none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)


def count(recipe: Recipe, tokens: int | None = None) -> Counts:
    """Count a recipe's model over ``tokens`` training tokens (default: steps x global batch).

    Raises:
        RecipeError: the recipe leaves a size to its data store; `Recipe.with_store` fills it in.
    """
    if tokens is None:
        tokens = recipe.training.steps * recipe.tokens_per_step
    model = recipe.model
    if model.kind == "calm":
        parts = _calm_parts(model, recipe.num_patches)
    elif model.kind == "transformer":
        parts = _transformer_parts(model, recipe.num_patches)
    else:
        parts = _autoencoder_parts(model)
    return Counts(tuple(parts), tokens)


def linear_flops(inputs: int, outputs: int) -> int:
    """FLOPs of one row through a linear layer."""
    return 2 * inputs * outputs


def attention_flops(hidden_size: int, steps: int, key_value_size: int | None = None) -> int:
    """FLOPs of one step through one attention layer: projections, then scores and their use.

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
    model: CalmRecipe, samples: int, *, share_condition: bool, evaluations: int = 1
) -> int:
    """FLOPs of one patch through the head: ``samples`` draws, its network run ``evaluations`` times
    for each.

    Without ``share_condition`` everything runs once a sample and evaluation, as in the released
    code. With it, what depends on the hidden state alone runs once: its embedding, and in the
    energy head its half of each block's first linear.
    """
    d, blocks = model.hidden_size, model.head.num_mlp_layers
    latent = known_size(model, "latent_size")
    square = linear_flops(d, d)
    if model.head.kind == "energy":
        of_condition = (1 + blocks) * square
        # A block: the noise's half of Linear(2d, d), then Linear(d, d), (d, 2d), (d, d).
        of_noise = linear_flops(model.head.noise_size, d) + (5 * blocks + 1) * square
        of_noise += linear_flops(d, latent)
    else:
        of_condition = square
        time = linear_flops(TIME_FEATURES, d) + square
        # A block: two linears, and the modulation's Linear(d, 3d); at the end Linear(d, 2d).
        of_noise = time + linear_flops(latent, d) + (5 * blocks + 2) * square
        of_noise += linear_flops(d, _head_outputs(model))
    passes = samples * evaluations
    return passes * of_noise + (1 if share_condition else passes) * of_condition


def _head_outputs(model: CalmRecipe) -> int:
    """Outputs of an iterative head's network; diffusion predicts a variance, too."""
    return known_size(model, "latent_size") * (2 if model.head.kind == "diffusion" else 1)


def encoder_flops(size: AutoencoderSize, patch_size: int, latent_size: int) -> int:
    """FLOPs of one patch through the encoder, to mean and log_std."""
    d = size.hidden_size
    rows = (patch_size + 1) * size.num_encoder_layers // 2
    return (
        rows * mlp_flops(d, size.intermediate_size)
        + linear_flops(patch_size * d, d)
        + linear_flops(d, 2 * latent_size)
    )


def decoder_flops(size: AutoencoderSize, patch_size: int, latent_size: int) -> int:
    """FLOPs of one patch through the decoder, up to its output layer."""
    d = size.hidden_size
    rows = (patch_size + 1) * size.num_decoder_layers // 2
    return (
        linear_flops(latent_size, d)
        + rows * mlp_flops(d, size.intermediate_size)
        + linear_flops(d, patch_size * d)
    )


def head_parameters(model: CalmRecipe) -> int:
    """Weights, biases and norms of the head."""
    d, blocks = model.hidden_size, model.head.num_mlp_layers
    latent = known_size(model, "latent_size")
    if model.head.kind == "energy":
        embeddings = _affine(model.head.noise_size, d) + _affine(d, d) + 2 * _layer_norm(d)
        block = _layer_norm(d) + _affine(2 * d, d) + 2 * _affine(d, d) + _affine(d, 2 * d)
        final = _layer_norm(d) + _affine(d, d) + _affine(d, latent)
    else:
        embeddings = _affine(TIME_FEATURES, d) + 2 * _affine(d, d) + _affine(latent, d)
        block = _layer_norm(d) + 2 * _affine(d, d) + _affine(d, 3 * d)
        final = _affine(d, 2 * d) + _affine(d, _head_outputs(model))
    return embeddings + blocks * block + final


def _calm_parts(model: CalmRecipe, steps: int) -> list[Part]:
    d, patch_size, latent = model.hidden_size, model.patch_size, known_size(model, "latent_size")
    vocab_size, autoencoder = known_size(model, "vocab_size"), model.autoencoder_size
    compressor = _affine(patch_size * d, 2 * d) + _affine(2 * d, d) + _layer_norm(d)
    decoder = decoder_flops(autoencoder, patch_size, latent) / patch_size
    samples = model.head.num_samples
    natural, ours = (
        head_flops(model, samples, share_condition=shared) / patch_size for shared in (False, True)
    )
    evaluations = model.head.evaluations_per_sample
    one = head_flops(model, 1, share_condition=True, evaluations=evaluations) / patch_size
    return [
        Part("embedding", vocab_size * d),
        _trained("patch_compressor", compressor, compressor_flops(d, patch_size) / patch_size),
        *_body_parts(model, steps),
        Part(
            "head",
            head_parameters(model),
            BACKWARD_AND_FORWARD * natural,
            BACKWARD_AND_FORWARD * ours,
            one,
        ),
        Part("autoencoder_decoder", 0, inference_flops_per_token=decoder),
        Part(
            "autoencoder_output_layer",
            0,
            inference_flops_per_token=linear_flops(autoencoder.hidden_size, vocab_size),
        ),
    ]


def _transformer_parts(model: TransformerRecipe, steps: int) -> list[Part]:
    d, vocab_size = model.hidden_size, known_size(model, "vocab_size")
    return [
        Part("embedding", vocab_size * d),
        *_body_parts(model, steps),
        _trained("output_layer", vocab_size * d, linear_flops(d, vocab_size)),
    ]


def _body_parts(model: CalmRecipe | TransformerRecipe, steps: int) -> list[Part]:
    """The Transformer layers, with their norms, and the final norm."""
    d, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    key_value_size = d * model.key_value_heads // model.num_attention_heads
    attention = layers * attention_flops(d, steps, key_value_size) / model.patch_size
    mlp = layers * mlp_flops(d, f) / model.patch_size
    return [
        _trained("attention", layers * (2 * d * (d + key_value_size) + d), attention),
        _trained("mlp", layers * (3 * d * f + d), mlp),
        Part("final_norm", d),
    ]


def _autoencoder_parts(model: AutoencoderRecipe) -> list[Part]:
    d, f, patch_size, latent = (
        model.hidden_size,
        model.intermediate_size,
        model.patch_size,
        model.latent_size,
    )
    vocab_size, block = known_size(model, "vocab_size"), 3 * d * f + d
    encoder = (
        model.num_encoder_layers * block + _affine(patch_size * d, d) + d + _affine(d, 2 * latent)
    )
    decoder = model.num_decoder_layers * block + _affine(latent, d) + _affine(d, patch_size * d) + d
    return [
        Part("embedding", vocab_size * d),
        _trained("encoder", encoder, encoder_flops(model, patch_size, latent) / patch_size),
        _trained("decoder", decoder, decoder_flops(model, patch_size, latent) / patch_size),
        # Tied to the embedding.
        _trained("output_layer", 0, linear_flops(d, vocab_size)),
    ]


def _trained(name: str, parameters: int, forward: float) -> Part:
    """A part that training runs once per step of text, in the released code as in ours."""
    training = BACKWARD_AND_FORWARD * forward
    return Part(name, parameters, training, training, forward)


def _affine(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def _layer_norm(size: int) -> int:
    return 2 * size


def known_size(model: CalmRecipe | TransformerRecipe | AutoencoderRecipe, name: str) -> int:
    """``model.vocab_size`` or ``model.latent_size``, which a recipe may leave to its data store.

    Raises:
        RecipeError: it does, and no store has filled it in.
    """
    size = getattr(model, name)
    if size is None:
        raise RecipeError(
            f"model.{name}: absent, but parameters and FLOPs depend on it; set it, or give a "
            "data.path that exists, whose store knows it"
        )
    return size
