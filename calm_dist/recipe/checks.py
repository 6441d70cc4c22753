"""Checks of a recipe, with messages that tell a user how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from calm_dist.errors import listed, shown
from calm_dist.recipe.fields import RecipeFields
from calm_dist.recipe.sections import AutoencoderSize, Data

VOCAB_MULTIPLE = 64
"""Rows of vocabulary-parallel tables are padded to a multiple of this, whatever the layout, so that
a checkpoint has the same shapes for every tensor-parallel size."""
NO_OVERLAP_ON_CPU = "true on CPUs, where gloo gave silently wrong losses with it; leave it out"
"""Why ``parallel.overlap_p2p`` is refused once the device is known."""

_UNION_TAGS = {
    "model": ("calm", "transformer", "autoencoder"),
    "path": ("store", "stores", "mixture"),
    "weight": ("constant", "changing"),
}


_MOST_PROBLEMS = 10


def padded_vocab_size(vocab_size: int) -> int:
    """Number of rows of a vocabulary-parallel table: rounded up to `VOCAB_MULTIPLE` in every
    layout, so that a checkpoint has the same shapes for every tensor-parallel size."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def join_problems(problems: Sequence[str], count: int | None = None) -> str:
    """One message for all problems: a single one verbatim, several as a list.

    Args:
        count: number of all problems, if ``problems`` are only the first of them.
    """
    count = len(problems) if count is None else count
    if count == 1:
        return problems[0]
    lines = list(problems[:_MOST_PROBLEMS])
    if count > len(lines):
        lines.append(f"and {count - len(lines):,} more")
    return f"{count:,} problems" + "".join(f"\n  - {line}" for line in lines)


def describe_validation_errors(error: ValidationError, recipe_type: type[BaseModel]) -> str:
    """A message with one line per pydantic error: dotted field, value, remedy."""
    given = error.errors(include_url=False)
    # An entry of a list that has errors of its own is missing from the list.
    found = [
        one
        for one in given
        if one["type"] != "too_short"
        or not any(o["loc"] != one["loc"] == o["loc"][: len(one["loc"])] for o in given)
    ]
    first = [_describe(dict(details), recipe_type) for details in found[:_MOST_PROBLEMS]]
    return join_problems(first, len(found))


def _describe(details: dict[str, Any], recipe_type: type[BaseModel]) -> str:
    location, kind = details["loc"], details["type"]
    field = _dotted(location)
    value = details["input"]
    if kind == "extra_forbidden":
        tag = str(location[1]) if location[0] == "model" else None
        return f"{field}: unknown key{_suggestion(field, tag, recipe_type)}"
    if kind == "missing":
        return f"{field}: missing; add it to the recipe"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        found = value.get("kind", "nothing") if isinstance(value, dict) else value
        return f"{field}.kind: found {shown(found)}; use {' or '.join(_UNION_TAGS['model'])}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{field}: found {shown(value)}; give a mapping of fields"
    if kind == "tuple_type":
        wanted = (
            "a path, or a list of paths or {path, weight}" if field == "data.path" else "a list"
        )
        return f"{field}: found {shown(value)}; give {wanted}"
    if kind in ("byte_size", "byte_size_unit"):
        return f"{field}: found {shown(value)}; give a number of bytes, alone or with a unit: 200GB"
    remedy = details["msg"]
    return f"{field}: found {shown(value)}; {remedy[:1].lower()}{remedy[1:]}"


def _dotted(location: Sequence[str | int]) -> str:
    """``model.hidden_size`` for ("model", "calm", "hidden_size"): a union's tag is not a key."""
    parts = [
        listed([part])
        for index, part in enumerate(location)
        if index == 0 or part not in _UNION_TAGS.get(str(location[index - 1]), ())
    ]
    return ".".join(parts)


def _suggestion(field: str, kind: str | None, recipe_type: type[BaseModel]) -> str:
    """A remedy for an unknown key: a similar key, or the same key in another section."""
    section, dot, leaf = field.rpartition(".")
    # All entries of a list have the same keys.
    place = ".".join(part for part in section.split(".") if not part.isdigit())
    everywhere = _field_names(recipe_type)
    if kind and field in everywhere:
        return f" for model.kind {kind}; remove it"
    siblings = [
        name.rpartition(".")[2]
        for name in _field_names(recipe_type, kind)
        if name.rpartition(".")[0] == place
    ]
    if near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7):
        return f"; did you mean {section}{dot}{near[0]}?"
    if elsewhere := [name for name in everywhere if name.rpartition(".")[2] == leaf]:
        return f"; did you mean {elsewhere[0]}?"
    return f"; remove it, or use one of {', '.join(siblings)}" if siblings else "; remove it"


def _field_names(
    section: type[BaseModel], kind: str | None = None, prefix: str = ""
) -> dict[str, None]:
    """All dotted field names, of one ``model.kind`` or of all, in order and without repetitions."""
    names: dict[str, None] = {}
    for attribute, info in section.model_fields.items():
        name = info.alias or attribute
        names[prefix + name] = None
        for option in _sections_in(info.annotation):
            if kind and prefix + name == "model":
                tags = get_args(option.model_fields["kind"].annotation)
                if kind not in tags:
                    continue
            names |= _field_names(option, kind, f"{prefix}{name}.")
    return names


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field's type may hold, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _sections_in(part)


def impossible_combinations(recipe: RecipeFields) -> list[str]:
    """A message for every combination of well-typed fields that cannot be trained."""
    checks = [
        _text_problems,
        _shape_problems,
        _layout_problems,
        _attention_problems,
        _overlap_problems,
        _batch_problems,
        _schedule_problems,
        _head_problems,
    ]
    return [problem for check in checks for problem in check(recipe)]


def _may_have_null(recipe: RecipeFields) -> bool:
    # JSON is made much faster than the texts are looked at one by one, and planners check thousands
    # of recipes.
    try:
        return r"\u0000" in recipe.model_dump_json()
    except ValueError:  # a file name that is not UTF-8 cannot be JSON
        return True


def _text_problems(recipe: RecipeFields) -> list[str]:
    problems = []
    if _may_have_null(recipe):
        problems = [
            f"{name}: {shown(value)} has a null character, which file names cannot have; remove it"
            for name, value in _texts(recipe.to_dict())
            if "\0" in value
        ]
    if recipe.run.continue_from is not None and recipe.run.init_from is not None:
        problems.append(
            "run.continue_from and run.init_from: a run starts from one of them; the former takes "
            "weights and optimizer state, the latter weights alone"
        )
    name = recipe.run.name
    if name is not None and not name.isprintable():
        problems.append(
            f"run.name: {shown(name)} has a line break or another character that cannot be "
            "printed; give one line of text"
        )
    return problems


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and value of each field that holds text."""
    if isinstance(value, str):
        yield name, value
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from _texts(inner, f"{name}.{key}" if name else str(key))


def _weight_problems(data: Data) -> list[str]:
    """What is wrong with weights that change."""
    problems, changes = [], {0}
    for i, source in enumerate(data.sources):
        if isinstance(source.weight, float):
            continue
        steps = [change.step for change in source.weight]
        changes |= set(steps)
        if steps != sorted(set(steps)):
            problems.append(
                f"data.path[{i}].weight: its steps are {steps}; give each once, in ascending order"
            )
    for step in sorted(changes) if data.sources and not problems else ():
        if not any(source.weight_at(step) for source in data.sources):
            problems.append(
                f"data.path: all weights are 0 from step {step} on; give one store a weight there"
            )
    return problems


def _shape_problems(recipe: RecipeFields) -> list[str]:
    model, block_size = recipe.model, recipe.data.block_size
    problems = []
    if not recipe.data.sources:
        problems.append("data.path: an empty list; give at least one store")
    problems += _weight_problems(recipe.data)
    if block_size is not None and block_size % model.patch_size:
        problems.append(
            f"data.block_size: {block_size} is not a multiple of model.patch_size "
            f"{model.patch_size}; use {_round_up(block_size, model.patch_size)}"
        )
    elif model.kind != "autoencoder" and block_size == model.patch_size:
        unit = "patch" if model.kind == "calm" else "token"
        problems.append(
            f"data.block_size: {block_size} is a single {unit}, which leaves nothing to predict; "
            f"use at least {2 * model.patch_size}"
        )
    if model.kind == "autoencoder":
        token, vocabulary = model.replaced_token_id, model.vocab_size
        if token is not None and vocabulary is not None and token >= vocabulary:
            problems.append(
                f"model.replaced_token_id: {token} is outside the vocabulary of {vocabulary}; use "
                "the id of a token that never occurs in text, or leave it out"
            )
        if model.latent_slots not in (1, model.patch_size):
            problems.append(
                f"model.latent_slots: {model.latent_slots}; use 1, or one slot per token: "
                f"model.patch_size {model.patch_size}"
            )
        if model.latent_size % model.latent_slots:
            problems.append(
                f"model.latent_size: {model.latent_size} is not a multiple of model.latent_slots "
                f"{model.latent_slots}; use {_round_up(model.latent_size, model.latent_slots)}"
            )
        return problems + _odd_layers(model, "model")
    if model.kind == "calm":
        problems += _odd_layers(model.autoencoder_size, "model.autoencoder_size")
    if model.hidden_size % (2 * model.num_attention_heads):
        problems.append(
            f"model.hidden_size: {model.hidden_size} is not a multiple of twice "
            f"model.num_attention_heads {model.num_attention_heads}: rotary positions need heads "
            "of an even size; use "
            f"{_round_up(model.hidden_size, 2 * model.num_attention_heads)}"
        )
    if model.num_attention_heads % model.key_value_heads:
        problems.append(
            f"model.num_key_value_heads: {model.key_value_heads} does not divide "
            f"model.num_attention_heads {model.num_attention_heads}; use a divisor of it"
        )
    return problems


def _odd_layers(size: AutoencoderSize, section: str) -> list[str]:
    return [
        f"{section}.{name}: {layers} is odd, but half of the layers work on tokens and half on "
        f"patches; use {layers + 1}"
        for name in ("num_encoder_layers", "num_decoder_layers")
        if (layers := getattr(size, name)) % 2
    ]


def _layout_problems(recipe: RecipeFields) -> list[str]:
    parallel, model = recipe.parallel, recipe.model
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    problems = []
    if recipe.world_size % parallel.model_parallel_size:
        problems.append(
            f"parallel.world_size: {recipe.world_size} processes cannot be cut into replicas "
            f"of {parallel.model_parallel_size} (tensor {tensor} x pipeline {pipeline} x context "
            f"{parallel.context_parallel_size}); use a multiple of that"
        )
    if model.kind == "autoencoder":
        problems += [
            f"parallel.{name}: {size}; the autoencoder is trained with data parallelism only; use 1"
            for name in (
                "tensor_parallel_size",
                "pipeline_parallel_size",
                "context_parallel_size",
            )
            if (size := getattr(parallel, name)) != 1
        ]
        problems += [
            f"parallel.{name}: true, but the autoencoder is trained by plain data parallelism; "
            "leave it out"
            for name in (
                "distributed_optimizer",
                "overlap_grad_reduce",
                "overlap_param_gather",
                "overlap_p2p",
                "recompute",
            )
            if getattr(parallel, name)
        ]
        if parallel.stage_layers is not None:
            problems.append("parallel.stage_layers: the autoencoder has no stages; leave it out")
        return problems
    problems += [
        f"parallel.tensor_parallel_size: {tensor} does not divide model.{name} {size}; use a "
        "common divisor of heads and intermediate size"
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        if (size := getattr(model, name)) is not None and size % tensor
    ]
    if VOCAB_MULTIPLE % tensor:
        problems.append(
            f"parallel.tensor_parallel_size: {tensor} does not divide {VOCAB_MULTIPLE}, and "
            "vocabulary tables are padded to multiples of that; use a power of two"
        )
    layers, chunks = model.num_hidden_layers, parallel.chunks_per_stage
    if pipeline * chunks > layers:
        problems.append(
            f"parallel.pipeline_parallel_size: {pipeline} stages x {chunks} chunks need at least "
            f"one layer each, but model.num_hidden_layers is {layers}; use fewer stages or chunks"
        )
    if parallel.distributed_optimizer and not recipe.training.optimizer_spec.can_be_distributed:
        problems.append(
            f"parallel.distributed_optimizer: true, but Megatron cannot gather the state of "
            f"training.optimizer {recipe.training.optimizer} for a checkpoint; leave it out"
        )
    given = parallel.stage_layers
    if given is not None and (
        len(given) != pipeline or sum(given) != layers or min(given) < chunks
    ):
        problems.append(
            f"parallel.stage_layers: {list(given)}; give {pipeline} numbers of at least {chunks} "
            f"that add up to model.num_hidden_layers {layers}, or leave it out"
        )
    return problems


def _attention_problems(recipe: RecipeFields) -> list[str]:
    parallel, model = recipe.parallel, recipe.model
    if parallel.attention != "auto" and model.kind == "autoencoder":
        return [
            f"parallel.attention: {parallel.attention}, but the autoencoder has no attention; "
            "leave it out"
        ]
    if parallel.attention != "flash":
        return []
    problems = []
    if recipe.precision != "bf16":
        problems.append(
            f"parallel.attention: flash with precision {recipe.precision}, for which flash-attn "
            "has no kernels; use sdpa"
        )
    if parallel.device == "cpu":
        problems.append("parallel.attention: flash with parallel.device cpu; use sdpa")
    return problems


def _overlap_problems(recipe: RecipeFields) -> list[str]:
    parallel = recipe.parallel
    problems: list[str] = []
    if recipe.model.kind == "autoencoder":
        return problems
    needed = ("distributed_optimizer", "overlap_grad_reduce")
    if parallel.overlap_param_gather and not all(getattr(parallel, name) for name in needed):
        problems.append(
            "parallel.overlap_param_gather: true, but only the distributed optimizer gathers "
            "weights, bucket by bucket as overlap_grad_reduce cuts them; set "
            + " and ".join(f"parallel.{name}=true" for name in needed)
        )
    if parallel.overlap_p2p and parallel.virtual_pipeline_size is None:
        problems.append(
            "parallel.overlap_p2p: true, but only the interleaved schedule has other work to do "
            "during a transfer; set parallel.virtual_pipeline_size, or leave it out"
        )
    if parallel.overlap_p2p and parallel.device == "cpu":
        problems.append(f"parallel.overlap_p2p: {NO_OVERLAP_ON_CPU}")
    return problems


def _batch_problems(recipe: RecipeFields) -> list[str]:
    training, parallel = recipe.training, recipe.parallel
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    problems = []
    replicas = max(recipe.data_parallel_size, 1)
    unit = training.micro_batch_size * replicas
    if training.global_batch_size % unit:
        problems.append(
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of "
            f"micro_batch_size x replicas = {training.micro_batch_size} x {replicas}; use "
            f"{_round_up(training.global_batch_size, unit)}, or another micro_batch_size"
        )
    if virtual is not None and pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline_size: {virtual} with pipeline_parallel_size 1 has nothing "
            "to interleave; leave it out"
        )
    elif virtual is not None and (micro_batches := training.global_batch_size // unit) % pipeline:
        problems.append(
            f"parallel.virtual_pipeline_size: {virtual} needs a number of micro-batches that is a "
            f"multiple of pipeline_parallel_size {pipeline}, found {micro_batches}; "
            "change training.global_batch_size or micro_batch_size, or leave it out"
        )
    return problems


def _schedule_problems(recipe: RecipeFields) -> list[str]:
    training = recipe.training
    steps, decay, warmup = training.steps, training.decay_steps, training.warmup_steps
    if training.schedule != "wsd" and decay is not None:
        return [
            f"training.decay_steps: {decay}, but training.schedule is {training.schedule}, and "
            "only wsd ends in a decay of a given length; leave it out, or use wsd"
        ]
    if training.schedule != "wsd":
        return []
    if decay is None:
        return [
            "training.decay_steps: absent, but training.schedule is wsd; give the steps of the "
            f"final decay, such as a tenth of training.steps: {max(steps // 10, 1)}"
        ]
    if warmup + decay > steps:
        return [
            f"training.decay_steps: {decay} plus training.warmup_steps {warmup} is more than "
            f"training.steps {steps}; change one of the three"
        ]
    return []


def _head_problems(recipe: RecipeFields) -> list[str]:
    parallel, model = recipe.parallel, recipe.model
    stage, pipeline = parallel.zero_stage, parallel.pipeline_parallel_size
    problems = []
    if stage not in (1, 2, 3):
        problems.append(
            f"parallel.zero_stage: {stage}; the head's engine takes its gradient from the "
            "backbone's pipeline, which ZeRO 1, 2 and 3 support; use 2"
        )
    if stage == 3 and pipeline > 1:
        problems.append(
            f"parallel.zero_stage: 3 with pipeline_parallel_size {pipeline}; ZeRO-3 needs the head "
            "on every rank, but only the last stage has it; use 2"
        )
    scores_energy = model.kind == "calm" and model.head.spec.scores_energy
    if recipe.training.energy_kernel == "triton" and not scores_energy:
        problems.append(
            "training.energy_kernel: triton, but only a CALM with the energy head has an energy "
            "score; leave it out"
        )
    if model.kind != "calm":
        return problems
    problems += model.head_spec.problems(model.head)
    if model.latent_size is not None and model.has_latents:
        problems += model.head_spec.latent_problems(model.latent_size)
    if model.head.independent and model.has_latents:
        problems.append(
            f"model.head.independent: true, but the {model.head.kind} head predicts a latent, not "
            "tokens; leave it out, or use model.head.kind=tokens"
        )
    if recipe.data.latents == "on_the_fly" and not model.has_latents:
        problems.append(
            f"data.latents: on_the_fly, but the {model.head.kind} head has no latents; leave it out"
        )
        return problems
    if stage == 1 and recipe.precision == "bf16":
        problems.append(
            "parallel.zero_stage: 1 with precision bf16 gives no access to the averaged gradients "
            "that joint clipping needs; use 2"
        )
    if recipe.data.latents == "on_the_fly" and model.autoencoder is None:
        problems.append(
            "model.autoencoder: absent, but data.latents is 'on_the_fly'; give the autoencoder's "
            "checkpoint, or use stored latents"
        )
    return problems


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
