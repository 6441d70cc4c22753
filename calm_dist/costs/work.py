"""Work of a pipeline stage's ranks for one micro-batch, forward and backward: products, attention,
bytes of element-wise kernels, launches. Seconds follow from a cluster's rates.

Bytes and launches of element-wise kernels were counted in this package's own steps with a
TorchDispatchMode (every operator's inputs and outputs); tests/distributed/test_planner_bytes.py
counts the bytes again. The constants are accesses of one element per position, forward and backward
together.
"""

from __future__ import annotations

from dataclasses import dataclass

from calm_dist.costs import flops
from calm_dist.costs.chunks import SCORE_POSITIONS, output_logits, rows_at_once
from calm_dist.costs.clusters import Cluster
from calm_dist.costs.memory import (
    FP32_BYTES,
    backbone_parameters,
    element_bytes,
    head_shards,
    key_value_size,
    last_stage_tables,
    sums_head_gradients,
    table_parameters,
)
from calm_dist.recipe import CalmModel, LanguageModelRecipe, TransformerModel

# One RMSNorm: torch's fused kernel; its composite form on CPUs.
NORM_FUSED, NORM_COMPOSITE = 5, 31
# A layer without its two norms, per element of the hidden state: rotary positions, slices of q, k
# and v, residuals; per element of the MLP's width: SiLU, the product, Megatron's copy of up.
LAYER_HIDDEN, LAYER_INTERMEDIATE = 61, 16
LAYER_KERNELS = 80
# The same on GPUs, where one kernel rotates queries and one keys (`models.rotary_kernel`: 4
# accesses instead of 27), and one computes SwiGLU (`models.swiglu_kernel`).
GPU_HIDDEN, GPU_INTERMEDIATE = 15, 8
# Kernels on GPUs are those of rehearsals of CALM-M: of a layer; of the compressor; of Megatron's
# schedule, batch and loss (19) and the norm after the layers (2); of the sums of a layer's
# gradients, and of those outside the layers.
GPU_LAYER_KERNELS, GPU_COMPRESSOR_KERNELS, SCHEDULE_KERNELS = 29, 18, 21
SUM_KERNELS, GPU_SUM_KERNELS, GPU_OTHER_SUM_KERNELS = 12, 6, 8
# Of the optimizer's step on GPUs: the copies of a layer's new weights, and all else; of the head's
# engine.
WEIGHT_KERNELS, OPTIMIZER_KERNELS, ENGINE_KERNELS = 6, 60, 30
# Embeddings of all tokens, SiLU and LayerNorm of the compressor, per element of the hidden state.
COMPRESSOR_HIDDEN, COMPRESSOR_KERNELS = 40, 40
# The frozen encoder, forward, per element of a token's hidden state and of its MLP's width: the
# embedding, a norm and a residual; SiLU and the product.
ENCODER_HIDDEN, ENCODER_INTERMEDIATE, ENCODER_KERNELS = 20, 6, 40
# Energy score: accesses per element of a draw, in fp32; kernels per chunk of positions, about as
# many on GPUs, where distances come from differences.
DRAW_ACCESSES, SCORE_KERNELS = 7, 35
# The same in one kernel on GPUs: warp instructions per component of a draw, for up to eight samples
# (37,700 for 100 draws of 128; tests/gpu compiles it), and kernels of a micro-batch, those of the
# noise included.
FUSED_INSTRUCTIONS, FUSED_KERNELS = 2.9, 6
# Cross entropy: accesses per logit, in fp32; kernels of a chunk, and those around all of them.
LOGIT_ACCESSES, LOGIT_KERNELS, LOSS_KERNELS = 8, 25, 15
# DeepSpeed's copies of the head's gradient when it reduces it, per parameter; and adding the
# gradient of another micro-batch to the local sums (`parallel.local_gradients`).
ZERO_ACCESSES, LOCAL_SUM_ACCESSES = 13, 3
# FlashAttention computes the scores again: five products backward for two forward.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Work:
    """One part of a micro-batch's work on one rank."""

    products: float = 0.0
    """FLOPs of matrix products."""
    attention: float = 0.0
    """Executed FLOPs of causal attention."""
    traffic: float = 0.0
    """Bytes that element-wise kernels read and write."""
    draws: float = 0.0
    """Number of normal numbers drawn."""
    kernels: float = 0.0
    """Number of kernel launches."""
    instructions: float = 0.0
    """Warp instructions of kernels that neither matrix products nor memory limit."""

    def seconds(self, cluster: Cluster, peak: float) -> float:
        """Roofline: each kind of work at its rate. Launches add to it where they do not overlap
        with it."""
        rates = cluster.rates
        busy = (
            self.products / (peak * rates.matmul_fraction)
            + self.attention / (peak * rates.attention_fraction)
            + self.traffic / (cluster.memory_bandwidth * rates.bandwidth_fraction)
            + self.draws / rates.draws_per_second
            + self.instructions / cluster.instructions_per_second
        )
        return busy + self.launching(cluster) if rates.synchronous else busy

    def launching(self, cluster: Cluster) -> float:
        """Seconds of the host for the kernel launches."""
        return self.kernels * cluster.rates.dispatch_seconds


def micro_batch_work(
    recipe: LanguageModelRecipe, stage: int, layers: int, cluster: Cluster
) -> dict[str, Work]:
    """Work of a rank of a stage with ``layers`` layers for one micro-batch, by part, without
    collectives."""
    model, parallel = recipe.model, recipe.parallel
    forward, both = _layer(recipe, model, cluster)
    parts = {
        "layers": _times(both, layers),
        "gradient accumulation": _accumulation(recipe, stage, layers, cluster),
    }
    if not cluster.on_cpu:
        parts["schedule"] = Work(kernels=SCHEDULE_KERNELS)
    if parallel.recompute:
        parts["recomputation"] = _times(forward, layers)
    if stage == 0 and model.kind == "calm":
        parts["patch compressor"] = _compressor(recipe, model, cluster)
    if stage == parallel.pipeline_parallel_size - 1:
        if model.kind == "calm":
            parts["head"] = _head(recipe, model)
            if model.has_latents and recipe.data.latents == "on_the_fly":
                parts["encoder"] = _encoder(recipe, model, cluster)
            if model.head.spec.scores_energy:
                parts["energy score"] = _score(recipe, model, cluster)
        if last_stage_tables(model):
            parts["output layer"] = _output_layer(recipe, model, cluster)
    return parts


def optimizer_work(recipe: LanguageModelRecipe, stage: int, layers: int, cluster: Cluster) -> Work:
    """Optimizer update and clearing of gradients on a rank of a stage, once a step."""
    model, parallel = recipe.model, recipe.parallel
    parameters = float(backbone_parameters(recipe, stage, layers))
    copies = recipe.data_parallel_size * parallel.context_parallel_size
    parts = copies if parallel.distributed_optimizer else 1
    of_backbone, of_head = recipe.training.optimizer_spec.accesses
    accesses = parameters * of_backbone / parts
    kernels = OPTIMIZER_KERNELS + WEIGHT_KERNELS * layers / parts
    if model.kind == "calm" and stage == parallel.pipeline_parallel_size - 1:
        shards = head_shards(recipe) * recipe.data_parallel_size
        accesses += flops.head_parameters(model) * of_head / shards
        kernels += ENGINE_KERNELS
        if sums_head_gradients(recipe):
            accesses += (ZERO_ACCESSES - LOCAL_SUM_ACCESSES) * flops.head_parameters(model)
    traffic = (accesses + parameters) * FP32_BYTES
    return Work(traffic=traffic, kernels=0 if cluster.on_cpu else kernels)


def positions(recipe: LanguageModelRecipe) -> int:
    """Steps of the backbone that a rank computes for one micro-batch."""
    return (
        recipe.training.micro_batch_size
        * recipe.padded_length
        // recipe.parallel.context_parallel_size
    )


def _layer(
    recipe: LanguageModelRecipe, model: CalmModel | TransformerModel, cluster: Cluster
) -> tuple[Work, Work]:
    """A layer's forward pass, and forward and backward together."""
    parallel = recipe.parallel
    tensor, rows = parallel.tensor_parallel_size, positions(recipe)
    d, f, kv = model.hidden_size, model.intermediate_size, key_value_size(model)
    along_sequence = tensor if parallel.use_sequence_parallel else 1
    products = (flops.attention_flops(d, 0, kv) + flops.mlp_flops(d, f)) * rows / tensor
    # The last of C pieces of a block attends to the most: to all pieces, and half of its own.
    seen = 1 - 1 / (2 * parallel.context_parallel_size)
    attention = seen * 4 * d * recipe.padded_length * rows / tensor
    norm = NORM_COMPOSITE if cluster.on_cpu else NORM_FUSED
    elements = 2 * norm * d / along_sequence
    if cluster.on_cpu:
        elements += (LAYER_HIDDEN * d + LAYER_INTERMEDIATE * f) / tensor
    else:
        elements += (GPU_HIDDEN * d + GPU_INTERMEDIATE * f) / tensor
    if model.qk_norm:
        elements += norm * (d + kv) / tensor
    traffic = elements * rows * element_bytes(recipe)
    kernels = LAYER_KERNELS if cluster.on_cpu else GPU_LAYER_KERNELS
    forward = Work(products, attention, traffic / 3, kernels=kernels / 3)
    both = Work(
        flops.BACKWARD_AND_FORWARD * products,
        (1 + ATTENTION_BACKWARD) * attention,
        traffic,
        kernels=kernels,
    )
    return forward, both


def _compressor(recipe: LanguageModelRecipe, model: CalmModel, cluster: Cluster) -> Work:
    rows, d = positions(recipe), model.hidden_size
    tensor, width = recipe.parallel.tensor_parallel_size, element_bytes(recipe)
    products = flops.compressor_flops(d, model.patch_size) * rows / tensor
    return Work(
        flops.BACKWARD_AND_FORWARD * products,
        traffic=COMPRESSOR_HIDDEN * d * rows * width,
        kernels=COMPRESSOR_KERNELS if cluster.on_cpu else GPU_COMPRESSOR_KERNELS,
    )


def _head(recipe: LanguageModelRecipe, model: CalmModel) -> Work:
    """All samples of this rank's shard of positions."""
    head = model.head
    rows = positions(recipe) / recipe.parallel.tensor_parallel_size
    samples = head.samples_in_training
    products = flops.head_flops(model, samples, share_condition=True) * rows
    elements = model.head_spec.traffic_elements(head, *flops.head_sizes(model))
    width = element_bytes(recipe)
    accesses = LOCAL_SUM_ACCESSES if sums_head_gradients(recipe) else ZERO_ACCESSES
    copies = accesses * flops.head_parameters(model) * width
    return Work(
        flops.BACKWARD_AND_FORWARD * products,
        traffic=elements * samples * rows * width + copies,
        kernels=model.head_spec.kernels(head),
    )


def _encoder(recipe: LanguageModelRecipe, model: CalmModel, cluster: Cluster) -> Work:
    """The frozen autoencoder's forward pass over the tokens of this rank's shard, in fp32."""
    tokens = positions(recipe) / recipe.parallel.tensor_parallel_size * model.patch_size
    encoder = flops.count_autoencoder(model, 0).part("encoder")
    # Work is timed at the peak of the recipe's precision.
    slower = 1.0 if recipe.precision == "fp32" else cluster.peak_flops / cluster.fp32_flops
    size = model.autoencoder_size
    elements = ENCODER_HIDDEN * size.hidden_size + ENCODER_INTERMEDIATE * size.intermediate_size
    return Work(
        encoder.forward_flops_per_token * tokens * slower,
        traffic=elements * tokens * FP32_BYTES,
        kernels=ENCODER_KERNELS,
    )


def _score(recipe: LanguageModelRecipe, model: CalmModel, cluster: Cluster) -> Work:
    """The energy score of all samples against M draws: in one kernel, or chunk by chunk."""
    head, latent = model.head, flops.known_size(model, "latent_size")
    rows = positions(recipe) / recipe.parallel.tensor_parallel_size
    draws = rows * head.posterior_samples * latent
    if not cluster.on_cpu and recipe.training.energy_kernel != "torch":
        per_draw = FUSED_INSTRUCTIONS * max(1.0, head.num_samples / 8)
        return Work(instructions=per_draw * draws, kernels=FUSED_KERNELS)
    # Distances to the draws and between samples, and their gradients.
    others = head.posterior_samples + head.num_samples
    products = 4 * head.num_samples * others * latent * rows
    blocks = recipe.training.micro_batch_size
    chunks = blocks * -(-rows // (blocks * SCORE_POSITIONS))
    return Work(
        products,
        traffic=DRAW_ACCESSES * draws * FP32_BYTES,
        draws=draws,
        kernels=SCORE_KERNELS * chunks,
    )


def _output_layer(
    recipe: LanguageModelRecipe, model: CalmModel | TransformerModel, cluster: Cluster
) -> Work:
    """Logits and cross entropy of every token that a position predicts, chunk by chunk."""
    rows, table = positions(recipe) * model.patch_size, table_parameters(recipe)
    words, width = table // model.hidden_size, element_bytes(recipe)
    chunks = -(-rows // rows_at_once(rows, words, output_logits(cluster.on_cpu)))
    traffic = LOGIT_ACCESSES * FP32_BYTES * words * rows
    # The table's gradient in fp32 is cleared and scaled.
    traffic += 3 * FP32_BYTES * table
    if width < FP32_BYTES:
        # Logits and their gradient are also converted, each chunk's gradient of the table is added,
        # and their sum converted.
        traffic += 2 * (width + FP32_BYTES) * words * rows
        traffic += (chunks * (width + 2 * FP32_BYTES) + FP32_BYTES + width) * table
    return Work(
        flops.BACKWARD_AND_FORWARD * flops.linear_flops(model.hidden_size, words) * rows,
        traffic=traffic,
        kernels=LOGIT_KERNELS * chunks + LOSS_KERNELS,
    )


def _accumulation(recipe: LanguageModelRecipe, stage: int, layers: int, cluster: Cluster) -> Work:
    """Gradients of a micro-batch, added in fp32; an embedding's gradient is a whole table."""
    width, table = element_bytes(recipe), table_parameters(recipe) if stage == 0 else 0
    parameters = backbone_parameters(recipe, stage, layers)
    gpu_kernels = GPU_SUM_KERNELS * layers + GPU_OTHER_SUM_KERNELS
    return Work(
        traffic=parameters * (width + 2 * FP32_BYTES) + 2 * table * width,
        kernels=SUM_KERNELS * layers if cluster.on_cpu else gpu_kernels,
    )


def _times(work: Work, number: float) -> Work:
    return Work(
        work.products * number,
        work.attention * number,
        work.traffic * number,
        work.draws * number,
        work.kernels * number,
        work.instructions * number,
    )
