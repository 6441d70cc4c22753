"""What a recipe would do before anything is started: sizes, FLOPs, layout and memory per rank.

Memory follows what the trainer keeps: the backbone under Megatron's mixed-precision optimizer,
copied on every replica (the distributed one shards its own state); the head under a ZeRO engine
over all ranks of the last stage. Activations
are an estimate of what autograd keeps; buffers of the libraries and of the allocator come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calm_dist import flops
from calm_dist.recipe import AutoencoderRecipe, CalmRecipe, Recipe, TransformerRecipe
from calm_dist.recipe_checks import TIME_FEATURES, VOCAB_MULTIPLE
from calm_dist.stages import stage_layers, work_shares

ADAM_MOMENTS_BYTES = 8
FP32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline stage."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __add__(self, other: Memory) -> Memory:
        mine, theirs = asdict(self), asdict(other)
        return Memory(**{name: mine[name] + theirs[name] for name in mine})


def plan(recipe: Recipe) -> dict[str, Any]:
    """Everything that ``--dry-run`` shows, as plain values.

    Raises:
        RecipeError: the recipe leaves a size to its data store; `Recipe.with_store` fills it in.
    """
    counts = flops.count(recipe)
    shares = work_shares(recipe)
    stages = [
        {**_stage(recipe, counts, stage), "train_flops_share": share}
        for stage, share in enumerate(shares)
    ]
    chunks = recipe.num_micro_batches * recipe.parallel.chunks_per_stage
    return {
        "name": recipe.run.display_name,
        "kind": recipe.model.kind,
        "parameters": counts.parameters,
        "steps": recipe.training.steps,
        "tokens": counts.tokens,
        "tokens_per_step": recipe.tokens_per_step,
        "train_flops": counts.train_flops_ours,
        "train_flops_released": counts.train_flops,
        "inference_flops_per_token": counts.inference_flops_per_token,
        "parts": [asdict(part) for part in counts.parts],
        "layout": _layout(recipe),
        "stages": stages,
        "stage_balance": sum(shares) / len(shares) / max(shares),
        "pipeline_bubble": (len(stages) - 1) / (chunks + len(stages) - 1),
        "data": [
            {"path": source.path, "weight": source.weight, "found": _found(source.path)}
            for source in recipe.data.sources
        ],
    }


def format_plan(values: dict[str, Any]) -> str:
    """`plan` as text for a terminal."""
    layout = values["layout"]
    lines = [
        f"{values['name']}: {values['kind']}, {values['parameters']:,} parameters",
        f"training: {values['steps']:,} steps x {values['tokens_per_step']:,} tokens = "
        f"{values['tokens']:.3g} tokens, {values['train_flops']:.3g} FLOPs "
        f"({values['train_flops_released']:.3g} as the released code counts)",
        f"inference: {values['inference_flops_per_token']:.3g} FLOPs a token",
        f"layout: {layout['world_size']} ranks = tensor {layout['tensor']} x pipeline "
        f"{layout['pipeline']} x context {layout['context']} x data {layout['data']}, "
        f"{layout['num_micro_batches']} micro-batches of {layout['micro_batch_size']} blocks, "
        f"{layout['precision']}"
        + (", sequence parallel" if layout["sequence_parallel"] else "")
        + (", distributed optimizer" if layout["distributed_optimizer"] else "")
        + (f", ZeRO-{layout['zero_stage']} head" if layout["zero_stage"] else ""),
        "",
        f"{'part':<26}{'parameters':>16}{'training FLOPs':>16}{'inference':>11}",
    ]
    total_inference = values["inference_flops_per_token"]
    total_training = sum(part["train_flops_per_token_ours"] for part in values["parts"])
    lines += [
        f"{part['name']:<26}{part['parameters']:>16,}"
        f"{part['train_flops_per_token_ours'] / total_training:>16.1%}"
        f"{part['inference_flops_per_token'] / total_inference:>11.1%}"
        for part in values["parts"]
    ]
    lines += [
        "",
        f"{'stage':<7}{'layers':<14}{'FLOPs':>7}{'weights':>11}{'gradients':>11}{'optimizer':>11}"
        f"{'activations':>13}{'per rank':>11}",
    ]
    for stage in values["stages"]:
        memory = stage["memory_bytes"]
        lines.append(
            f"{stage['stage']:<7}{_ranges(stage['layers']):<14}{stage['train_flops_share']:>7.1%}"
            f"{_size(memory['weights']):>11}{_size(memory['gradients']):>11}"
            f"{_size(memory['optimizer']):>11}{_size(memory['activations']):>13}"
            f"{_size(memory['total']):>11}"
        )
    lines.append(
        f"stage balance {values['stage_balance']:.0%} (mean / largest), pipeline bubble "
        f"{values['pipeline_bubble']:.0%}; activations are an estimate"
    )
    found = {True: "found", False: "NOT FOUND", None: "remote, not looked up"}
    lines += [f"data: {source['path']}: {found[source['found']]}" for source in values["data"]]
    return "\n".join(lines)


def _layout(recipe: Recipe) -> dict[str, Any]:
    parallel, training = recipe.parallel, recipe.training
    return {
        "world_size": recipe.world_size,
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "virtual_pipeline": parallel.chunks_per_stage,
        "context": parallel.context_parallel_size,
        "data": recipe.data_parallel_size,
        "sequence_parallel": parallel.use_sequence_parallel,
        "distributed_optimizer": parallel.distributed_optimizer,
        "zero_stage": parallel.zero_stage if recipe.model.kind == "calm" else None,
        "precision": recipe.precision,
        "micro_batch_size": training.micro_batch_size,
        "num_micro_batches": recipe.num_micro_batches,
    }


def _stage(recipe: Recipe, counts: flops.Counts, stage: int) -> dict[str, Any]:
    layers = stage_layers(recipe, stage)
    if recipe.model.kind == "autoencoder":
        memory = _autoencoder_memory(recipe, recipe.model, counts)
    else:
        memory = _body_memory(recipe, recipe.model, stage)
        if recipe.model.kind == "calm" and stage == _pipeline_size(recipe) - 1:
            memory += _head_memory(recipe, recipe.model)
    return {
        "stage": stage,
        "layers": layers,
        "memory_bytes": {**asdict(memory), "total": memory.total},
    }


def _body_memory(recipe: Recipe, model: CalmRecipe | TransformerRecipe, stage: int) -> Memory:
    """Backbone, embedding and output layer of one stage, on one rank."""
    tensor, last = recipe.parallel.tensor_parallel_size, _pipeline_size(recipe) - 1
    d, f, layers = model.hidden_size, model.intermediate_size, len(stage_layers(recipe, stage))
    table = _padded(flops.known_size(model, "vocab_size")) * d // tensor
    key_value_size = d * model.key_value_heads // model.num_attention_heads
    parameters = layers * ((2 * d * (d + key_value_size) + 3 * d * f) // tensor + 2 * d)
    if stage == 0:
        parameters += table
        if model.kind == "calm":
            # Column- and row-parallel linears; the second bias and the norm are on every rank.
            split = 2 * (model.patch_size + 1) * d * d + 2 * d
            parameters += split // tensor + 3 * d
    if stage == last:
        parameters += d
        if model.kind == "transformer":
            parameters += table
    precise = recipe.precision == "fp32"
    state = parameters * (ADAM_MOMENTS_BYTES + (0 if precise else FP32_BYTES))
    if recipe.parallel.distributed_optimizer:
        state //= recipe.data_parallel_size * recipe.parallel.context_parallel_size
    return Memory(
        weights=parameters * (FP32_BYTES if precise else 2),
        # bf16 accumulates gradients in fp32 and keeps fp32 master weights.
        gradients=parameters * FP32_BYTES,
        optimizer=state,
        activations=_body_activations(recipe, model, stage),
    )


def _body_activations(recipe: Recipe, model: CalmRecipe | TransformerRecipe, stage: int) -> int:
    """Bytes that autograd keeps for all micro-batches in flight on a stage, without the head."""
    parallel, stages = recipe.parallel, _pipeline_size(recipe)
    tensor, d, f = parallel.tensor_parallel_size, model.hidden_size, model.intermediate_size
    width, pieces = _element_bytes(recipe), parallel.context_parallel_size
    block = recipe.training.micro_batch_size * recipe.padded_length
    positions = block // pieces
    along_sequence = tensor if parallel.use_sequence_parallel else 1
    # Inputs and outputs of both norms; then q, k, v, attention output, and of the MLP both halves
    # of the first linear, SiLU of the gate, and the product.
    layer = positions * (4 * d / along_sequence + (4 * d + 4 * f) / tensor)
    if pieces > 1:
        # Keys and values of all pieces, as the last piece attends to.
        layer += block * 2 * d / tensor
    kept = positions * d / along_sequence if parallel.recompute else layer
    layers_per_chunk = len(stage_layers(recipe, stage)) / parallel.chunks_per_stage
    in_flight = _chunks_in_flight(recipe, stage)
    elements = in_flight * layers_per_chunk * kept + (layer if parallel.recompute else 0)
    if stage == 0 and model.kind == "calm":
        # Concatenated embeddings, both sides of SiLU, both sides of the LayerNorm.
        elements += in_flight * positions * (model.patch_size * d + 4 * d / tensor + 2 * d)
    total = elements * width
    if stage == stages - 1 and model.kind == "transformer":
        # Logits, and their softmax in fp32.
        rows = _padded(flops.known_size(model, "vocab_size")) // tensor
        total += positions * rows * (width + FP32_BYTES)
    return int(total)


def _chunks_in_flight(recipe: Recipe, stage: int) -> int:
    """Forward passes whose backward is still due, at most, in 1F1B or its interleaved form."""
    stages, chunks = _pipeline_size(recipe), recipe.parallel.chunks_per_stage
    forwards = recipe.num_micro_batches * chunks
    if chunks == 1:
        return min(stages - stage, forwards)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, forwards)


def _head_memory(recipe: Recipe, model: CalmRecipe) -> Memory:
    """The generative head in its ZeRO engine, on one rank of the last stage."""
    parallel, head, d = recipe.parallel, model.head, model.hidden_size
    parameters = flops.head_parameters(model)
    shards = parallel.tensor_parallel_size * parallel.context_parallel_size
    ranks, stage = shards * recipe.data_parallel_size, parallel.zero_stage
    width = _element_bytes(recipe)
    positions = recipe.training.micro_batch_size * recipe.padded_length
    latent = flops.known_size(model, "latent_size")
    if head.kind == "energy":
        # A block keeps both sides of its norm, both sides of two SiLUs, the gated linear's 2d, SiLU
        # of the gate and the product; the first and final layers keep six more rows.
        per_sample = (10 * head.num_mlp_layers + 6) * d + head.noise_size + latent
    else:
        # A block keeps its norm's input, the modulation's 3d and its input, what is modulated and
        # the MLP's rows; then the embeddings, the final layer and the loss's terms.
        per_sample = (11 * head.num_mlp_layers + 8) * d + TIME_FEATURES
        per_sample += latent * (20 if head.kind == "diffusion" else 2)
    elements = positions / shards * head.num_samples * per_sample
    # ZeRO-1 and 2 keep fp32 master weights in fp32 training, too.
    master = 0 if stage == 3 and recipe.precision == "fp32" else FP32_BYTES
    return Memory(
        weights=parameters * width // (ranks if stage == 3 else 1),
        gradients=parameters * FP32_BYTES // (ranks if stage >= 2 else 1),
        optimizer=parameters * (ADAM_MOMENTS_BYTES + master) // ranks,
        activations=int(elements * width),
    )


def _autoencoder_memory(recipe: Recipe, model: AutoencoderRecipe, counts: flops.Counts) -> Memory:
    """The autoencoder with fp32 weights on every rank; bf16 applies to activations only."""
    width, patch_size = _element_bytes(recipe), model.patch_size
    layers = model.num_encoder_layers + model.num_decoder_layers
    # Rows of a patch that go through MLP blocks: half of the layers see K tokens, half see one.
    rows = layers * (patch_size + 1) / 2
    elements = rows * (2 * model.hidden_size + 4 * model.intermediate_size)
    logits = patch_size * flops.known_size(model, "vocab_size") * (width + FP32_BYTES)
    patches = recipe.training.micro_batch_size * recipe.num_patches
    return Memory(
        weights=counts.parameters * FP32_BYTES,
        gradients=counts.parameters * FP32_BYTES,
        optimizer=counts.parameters * ADAM_MOMENTS_BYTES,
        activations=int(patches * (elements * width + logits)),
    )


def _pipeline_size(recipe: Recipe) -> int:
    return recipe.parallel.pipeline_parallel_size


def _element_bytes(recipe: Recipe) -> int:
    return FP32_BYTES if recipe.precision == "fp32" else 2


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _found(path: str) -> bool | None:
    """Whether a store is there; None for a remote one, which is not looked up."""
    return None if "://" in path else (Path(path) / "meta.json").is_file()


def _ranges(numbers: list[int]) -> str:
    """``0-3,8-11`` for a list of rising numbers; ``-`` for none."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "-"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
