"""Bytes on each rank of a training, from its recipe alone.

Memory kept between steps follows the trainer: the backbone has Megatron's mixed-precision
optimizer, replicated on every replica (the distributed optimizer shards its state); the head has a
ZeRO engine over all ranks of the last stage. A step adds the tensors that autograd keeps for the
backward pass, counted one by one at the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from calm_dist.costs import flops
from calm_dist.costs.chunks import (
    LOGITS,
    SCORE_POSITIONS,
    ZERO_BUCKET_ELEMENTS,
    output_logits,
    rows_at_once,
)
from calm_dist.costs.stages import chunk_sizes
from calm_dist.recipe import (
    AutoencoderRecipe,
    CalmModel,
    LanguageModelRecipe,
    Recipe,
    TransformerModel,
)
from calm_dist.recipe.checks import padded_vocab_size

UINT16_ENTRIES = 1 << 16
"""Largest vocabulary whose tokens fit uint16, as which data stores then hold them."""
FP32_BYTES = 4
_TOKEN_BYTES = 8
# Tensors of a chunk's draws that exist together: the draws, their noise, a product of both.
SCORE_COPIES = 3


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline stage at its peak."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Activations of embedding, backbone and output layer, for all micro-batches in flight."""
    head_samples: int = 0
    """The head's activations, mostly those of its N samples."""
    energy_score: int = 0
    """Draws of the posterior, a chunk of positions at a time."""
    buffers: int = 0
    """Buckets and gathered sequences of the libraries, and the batch of a step. The fused AdamW has
    no temporaries."""

    @property
    def kept(self) -> int:
        """Bytes kept between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        parts = vars(self)
        return max(parts, key=parts.__getitem__)

    def __add__(self, other: Memory) -> Memory:
        mine, theirs = vars(self), vars(other)
        return Memory(**{name: mine[name] + theirs[name] for name in mine})


def layer_counts(recipe: Recipe) -> list[int]:
    """Layers of each pipeline stage."""
    return [sum(chunks) for chunks in chunk_sizes(recipe)]


def stage_memory(
    recipe: Recipe, stage: int, *, layers: int | None = None, on_cpu: bool | None = None
) -> Memory:
    """Memory of a rank of pipeline stage ``stage``.

    Args:
        layers: number of layers of the stage, if already known from `layer_counts`.
        on_cpu: whether norms and SwiGLU are torch's composite forms, as on CPUs, which keep more
            memory; default: true if ``parallel.device`` is cpu.

    Raises:
        RecipeError: the recipe leaves a size to its data store; `Recipe.with_store` fills it in.
    """
    on_cpu = recipe.parallel.device == "cpu" if on_cpu is None else on_cpu
    if not isinstance(recipe, LanguageModelRecipe):
        assert isinstance(recipe, AutoencoderRecipe)
        return _autoencoder(recipe)
    model = recipe.model
    layers = layer_counts(recipe)[stage] if layers is None else layers
    memory = _backbone_state(recipe, backbone_parameters(recipe, stage, layers))
    backbone, last, layer, gradients = _backbone_activations(recipe, model, stage, layers, on_cpu)
    head = Memory()
    if model.kind == "calm" and stage == recipe.parallel.pipeline_parallel_size - 1:
        head = _head(recipe, model)
        if model.has_latents and recipe.data.latents == "on_the_fly":
            # The frozen autoencoder, whole and in fp32.
            encoder = flops.count_autoencoder(model, 0).parameters
            head += Memory(weights=encoder * FP32_BYTES)
    embedding = _embedding_gradient(recipe, backbone) if stage == 0 else 0
    again = layer if recipe.parallel.recompute else 0
    after = last + head.head_samples
    # When the backward pass of the last layer begins, the activations after the layers are freed.
    backbone += max(last, again - head.head_samples)
    most = max(after + _output_loss(recipe, stage, on_cpu), again + gradients)
    buffers = _gathered_sequence(recipe, model) + max(0, most - max(after, again))
    # The backward pass of the embedding comes last, when little else is there.
    buffers = max(buffers, embedding - backbone - head.head_samples - head.energy_score)
    return memory + head + Memory(activations=backbone, buffers=buffers + _batch(recipe, stage))


def backbone_parameters(recipe: LanguageModelRecipe, stage: int, layers: int) -> int:
    """Parameters of embedding, ``layers`` layers, norms and output layer on a rank of a stage."""
    model = recipe.model
    tensor, last = (
        recipe.parallel.tensor_parallel_size,
        recipe.parallel.pipeline_parallel_size - 1,
    )
    d, f = model.hidden_size, model.intermediate_size
    products = 2 * d * (d + key_value_size(model)) + 3 * d * f
    parameters = layers * (products // tensor + model.layer_norm_parameters)
    if stage == 0:
        parameters += table_parameters(recipe)
        if model.kind == "calm":
            # Column- and row-parallel linears; the second bias and the norm are on every rank.
            split = 2 * (model.patch_size + 1) * d * d + 2 * d
            parameters += split // tensor + 3 * d
    if stage == last:
        parameters += d + last_stage_tables(model) * table_parameters(recipe)
    return parameters


def last_stage_tables(model: CalmModel | TransformerModel) -> int:
    """Vocabulary tables on the last stage: output layer, embedding of a patch's earlier tokens."""
    if model.kind == "transformer":
        return 1
    if model.has_latents:
        return 0
    return 1 if model.head.independent else 2


def table_parameters(recipe: Recipe) -> int:
    """Parameters of a rank's part of the embedding, or of the output layer."""
    model = recipe.model
    rows = padded_vocab_size(flops.known_size(model, "vocab_size"))
    return rows * model.hidden_size // recipe.parallel.tensor_parallel_size


def key_value_size(model: CalmModel | TransformerModel) -> int:
    """Width of all keys, or of all values."""
    return model.hidden_size * model.key_value_heads // model.num_attention_heads


def element_bytes(recipe: Recipe) -> int:
    """Bytes of a weight or an activation."""
    return FP32_BYTES if recipe.precision == "fp32" else 2


def chunks_in_flight(recipe: Recipe, stage: int) -> int:
    """Most forward passes that wait for their backward pass, in 1F1B or its interleaved form."""
    stages, chunks = recipe.parallel.pipeline_parallel_size, recipe.parallel.chunks_per_stage
    forwards = recipe.num_micro_batches * chunks
    if chunks == 1:
        return min(stages - stage, forwards)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, forwards)


def head_shards(recipe: Recipe) -> int:
    """Ranks of the last stage that share a replica's positions."""
    return recipe.parallel.tensor_parallel_size * recipe.parallel.context_parallel_size


def _backbone_state(recipe: Recipe, parameters: int) -> Memory:
    precise = recipe.precision == "fp32"
    master = 0 if precise else FP32_BYTES
    state = parameters * (recipe.training.optimizer_spec.state_bytes + master)
    if recipe.parallel.distributed_optimizer:
        state //= recipe.data_parallel_size * recipe.parallel.context_parallel_size
    return Memory(
        weights=parameters * element_bytes(recipe),
        # bf16 accumulates gradients in fp32 and keeps fp32 master weights.
        gradients=parameters * FP32_BYTES,
        optimizer=state,
    )


def _backbone_activations(
    recipe: Recipe, model: CalmModel | TransformerModel, stage: int, layers: int, on_cpu: bool
) -> tuple[int, int, int, int]:
    """Activation bytes: for all micro-batches in flight on a stage; after the last layer (without
    the head); of one whole layer; and of the gradients in its backward pass."""
    parallel = recipe.parallel
    tensor, d = parallel.tensor_parallel_size, model.hidden_size
    width, pieces = element_bytes(recipe), parallel.context_parallel_size
    block = recipe.training.micro_batch_size * recipe.padded_length
    positions = block // pieces
    along_sequence = tensor if parallel.use_sequence_parallel else 1
    kv = key_value_size(model)
    # Input and output; the composite form also keeps the normalised input, both in fp32.
    per_element = 2 * FP32_BYTES + width if on_cpu else 2 * width
    norm = per_element * d
    # q, k and v in one tensor (the values are a view of it); rotated q and k; the output. Of keys
    # and values that are gathered, only the gathered ones are kept.
    attention = 3 * d + 3 * kv if pieces == 1 else 2 * d
    if not on_cpu and recipe.training.micro_batch_size > 1:
        # The output is copied from batch-first to sequence-first order.
        attention += d
    # Gate and up in one tensor, and the product. On CPUs, where no kernel fuses SwiGLU, SiLU of the
    # gate and Megatron's copy of up as well.
    mlp = (5 if on_cpu else 3) * model.intermediate_size
    layer = positions * (2 * norm / along_sequence + (attention + mlp) * width / tensor)
    if model.qk_norm:
        layer += positions * per_element * (d + kv) / tensor
    if pieces > 1:
        # The last piece attends to the keys and values of all pieces.
        layer += block * 2 * kv * width / tensor
    kept = positions * d * width / along_sequence if parallel.recompute else layer
    in_flight = chunks_in_flight(recipe, stage)
    total = in_flight * layers / parallel.chunks_per_stage * kept
    if stage == 0 and model.kind == "calm":
        # Concatenated embeddings, both sides of SiLU, the LayerNorm's input.
        embedded = positions * (model.patch_size * d + 4 * d / tensor + d) * width
        total += _embedded_in_flight(recipe, in_flight) * embedded
    last = 0.0
    if stage == parallel.pipeline_parallel_size - 1:
        last = positions * norm / along_sequence
        if last_stage_tables(model):
            # The loss makes the gradients of the output layer, in fp32, and of the states.
            last += table_parameters(recipe) * FP32_BYTES + positions * model.patch_size * d * width
    # Gradients of the MLP's input and output, of SiLU, and of gate and up, which are there twice
    # while they are joined; the product and its gradient have been freed.
    gradients = positions * width * (2 * d + 3 * model.intermediate_size / tensor)
    return int(total), int(last), int(layer), int(gradients)


def _batch(recipe: LanguageModelRecipe, stage: int) -> int:
    """Bytes of a rank's part of a global batch: whole blocks of int64 tokens, and on the last stage
    of fp32 latents, mean and log_std, if they are stored."""
    model = recipe.model
    numbers = 0
    if stage == recipe.parallel.pipeline_parallel_size - 1 and recipe.reads_latents:
        assert model.kind == "calm"
        numbers = 2 * flops.known_size(model, "latent_size")
    patch = model.patch_size * _TOKEN_BYTES + numbers * FP32_BYTES
    return (
        recipe.training.global_batch_size // recipe.data_parallel_size * recipe.num_patches * patch
    )


def _output_loss(recipe: LanguageModelRecipe, stage: int, on_cpu: bool) -> int:
    """Bytes that one chunk of the output layer's loss needs on the last stage, without the
    gradients that it leaves; 0 on other stages."""
    model = recipe.model
    if stage < recipe.parallel.pipeline_parallel_size - 1 or not last_stage_tables(model):
        return 0
    rows = recipe.training.micro_batch_size * recipe.padded_length * model.patch_size
    rows //= recipe.parallel.context_parallel_size
    words = table_parameters(recipe) // model.hidden_size
    at_once = rows_at_once(rows, words, output_logits(on_cpu))
    chunk = _chunk_of_loss(at_once * words, table_parameters(recipe), element_bytes(recipe))
    # A CALM's states were gathered from the ranks' shards.
    gathered = model.kind == "calm" and recipe.parallel.tensor_parallel_size > 1
    return chunk + gathered * rows * model.hidden_size * element_bytes(recipe)


def _chunk_of_loss(logits: int, table: int, width: int) -> int:
    """Bytes of a chunk of `losses.linear_cross_entropy`: its logits, which become their gradient in
    place; in bf16 the product before it, the gradient after it, and that of the table, too."""
    if width == FP32_BYTES:
        return logits * FP32_BYTES
    return logits * (FP32_BYTES + 2 * width) + table * width


def _embedding_gradient(recipe: LanguageModelRecipe, kept: int) -> int:
    """Bytes on the first stage during the embedding's backward pass, beside what is kept between
    steps: the gradient of its table and of its output, and the other micro-batches in flight.

    Args:
        kept: activations of all micro-batches in flight.
    """
    model, width = recipe.model, element_bytes(recipe)
    rows = recipe.training.micro_batch_size * recipe.padded_length
    rows //= recipe.parallel.context_parallel_size
    output = rows * model.patch_size * model.hidden_size * width
    others = kept * (1 - 1 / chunks_in_flight(recipe, 0))
    return int(others) + table_parameters(recipe) * width + output


def _embedded_in_flight(recipe: Recipe, in_flight: int) -> int:
    """Micro-batches in the first chunk among the chunks' ``in_flight`` forward passes of the first
    stage. The interleaved schedule takes as many micro-batches as there are stages through one
    chunk, then through the next."""
    stages, chunks = recipe.parallel.pipeline_parallel_size, recipe.parallel.chunks_per_stage
    return sum(number // stages % chunks == 0 for number in range(in_flight))


def _gathered_sequence(recipe: Recipe, model: CalmModel | TransformerModel) -> int:
    """Bytes of a layer's input as gathered by sequence-parallel ranks, and of its gradient before
    it is cut."""
    if not recipe.parallel.use_sequence_parallel:
        return 0
    positions = recipe.padded_length // recipe.parallel.context_parallel_size
    rows = recipe.training.micro_batch_size * positions
    return 2 * rows * model.hidden_size * element_bytes(recipe)


def sums_head_gradients(recipe: LanguageModelRecipe) -> bool:
    """Whether each rank adds up the head's gradients of several micro-batches itself
    (`parallel.local_gradients`)."""
    return recipe.parallel.zero_stage < 3 and recipe.num_micro_batches > 1


def _head(recipe: LanguageModelRecipe, model: CalmModel) -> Memory:
    """The generative head in its ZeRO engine, on one rank of the last stage."""
    parallel, head = recipe.parallel, model.head
    parameters = flops.head_parameters(model)
    ranks, stage = head_shards(recipe) * recipe.data_parallel_size, parallel.zero_stage
    width = element_bytes(recipe)
    positions = recipe.training.micro_batch_size * recipe.padded_length // head_shards(recipe)
    hidden, latent = flops.head_sizes(model)
    # ZeRO-1 and 2 keep fp32 master weights even in fp32 training.
    master = 0 if stage == 3 and recipe.precision == "fp32" else FP32_BYTES
    gradients = parameters * FP32_BYTES // (ranks if stage >= 2 else 1)
    if sums_head_gradients(recipe):
        gradients += parameters * FP32_BYTES
    activations = model.head_spec.activation_elements(head, hidden, latent) * width
    activations += model.head_spec.loss_elements(head, hidden, latent) * FP32_BYTES
    score = 0
    if head.spec.scores_energy:
        chunk = min(SCORE_POSITIONS, positions)
        score = SCORE_COPIES * chunk * head.posterior_samples * latent * FP32_BYTES
    return Memory(
        weights=parameters * width // (ranks if stage == 3 else 1),
        gradients=gradients,
        optimizer=parameters * (recipe.training.optimizer_spec.state_bytes + master) // ranks,
        head_samples=positions * activations,
        energy_score=score,
        # ZeRO-3 also has gathered weights, of this layer and the next ones, and their gradients.
        buffers=min(parameters, ZERO_BUCKET_ELEMENTS) * width * (3 if stage == 3 else 1),
    )


def _autoencoder(recipe: AutoencoderRecipe) -> Memory:
    """The autoencoder with fp32 weights on every rank; bf16 applies to activations only."""
    model = recipe.model
    width, patch_size = element_bytes(recipe), model.patch_size
    parameters = flops.count(recipe, tokens=0).parameters
    layers = model.num_encoder_layers + model.num_decoder_layers
    # Rows of a patch in MLP blocks: half of the layers process K tokens, half one patch.
    rows = layers * (patch_size + 1) / 2
    elements = rows * (2 * model.hidden_size + 4 * model.intermediate_size)
    patches = recipe.training.micro_batch_size * recipe.num_patches
    words = flops.known_size(model, "vocab_size")
    tokens, table = patches * patch_size, words * model.hidden_size
    chunk = rows_at_once(tokens, words, LOGITS) * words
    activations = int(patches * elements * width) + table * FP32_BYTES
    # Embeddings of the distinct words (at most all) and of all tokens; states and their gradient,
    # which the loss makes in the forward pass.
    activations += 4 * tokens * model.hidden_size * FP32_BYTES
    activations += _chunk_of_loss(chunk, table, width)
    if width < FP32_BYTES:
        # The weights as autocast keeps them, and inputs and outputs of norms, in fp32.
        activations += parameters * width + int(patches * rows * 2 * model.hidden_size * width)
    # With DDP, the sums of the earlier micro-batches beside the buckets that are reduced.
    copies = 2 if recipe.data_parallel_size > 1 and recipe.num_micro_batches > 1 else 1
    return Memory(
        weights=parameters * FP32_BYTES,
        gradients=copies * parameters * FP32_BYTES,
        optimizer=parameters * recipe.training.optimizer_spec.state_bytes,
        activations=activations,
    )
