"""Every field of the backbone's section, changed alone: nothing about the model is missed.

A field that nobody listed here fails `test_every_field_is_changed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import ALONE, WORKER, recipe, run_worker, training_records
from tiny_models import tiny_model

from calm_dist.costs import flops
from calm_dist.costs.memory import backbone_parameters
from calm_dist.errors import CheckpointError
from calm_dist.inference.load import LoadedModel, load_model
from calm_dist.recipe import BackboneModel, CalmModel
from calm_dist.released.calm import ReleasedCalm, released_calm
from calm_dist.released.config import calm_config, calm_values
from calm_dist.released.files import CONFIG_FILE
from calm_dist.released.tensors import Tensors

# Another value of each field for a model of width 16 (32 in the trainings) with 4 heads.
CHANGES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "qk_norm": True,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-2,
    "init": "released",
    "initializer_range": 0.05,
}
# Those whose model the released layout cannot hold, and a weight that it would lose, if any.
NOT_RELEASED: dict[str, str | None] = {
    "qk_norm": "decoder.layers.0.self_attention.q_layernorm.weight"
}
UNCHANGED: dict[str, Any] = {}
STEPS = 3
# |a - b| <= TOLERANCE * max(1, |b|), as in test_layouts.
TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5


def test_every_field_is_changed() -> None:
    assert set(CHANGES) == set(BackboneModel.model_fields)
    default = BackboneModel(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    for name, value in CHANGES.items():
        assert getattr(default, name) != value, name


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_parameters_are_counted(kind: str, field: str) -> None:
    model = tiny_model(kind, **{field: CHANGES[field]})
    recipe = model.recipe
    assert isinstance(recipe.model, BackboneModel) and recipe.model.vocab_size is not None
    held = sum(parameter.numel() for parameter in model.backbone.parameters())
    layers = recipe.model.num_hidden_layers
    assert backbone_parameters(recipe, 0, layers) == held
    counts = flops.count(recipe, tokens=0)
    padding = -recipe.model.vocab_size % 64 * recipe.model.hidden_size
    tables = 2 if kind == "transformer" else 1
    head = counts.part("head").parameters if kind == "calm" else 0
    assert counts.parameters - head + tables * padding == held


@pytest.mark.parametrize("field", CHANGES)
def test_export_and_import_keep_every_weight(tmp_path: Path, field: str) -> None:
    """And every field."""
    change = {field: CHANGES[field]}
    model, other = tiny_model(**change), tiny_model(**change, seed=1)
    assert isinstance(model.recipe.model, CalmModel)
    backbone, head = dict(model.backbone.named_parameters()), dict(model.head.named_parameters())
    if field in NOT_RELEASED:
        with pytest.raises(CheckpointError, match=f"model.{field}={CHANGES[field]}"):
            calm_config(model.recipe, {}, "")
        if (lost := NOT_RELEASED[field]) is None:
            return
        with pytest.raises(CheckpointError, match=lost):
            released_calm(model.recipe.model, backbone, head)
        # The weights of a model without the field lack what this one has.
        without = tiny_model()
        assert isinstance(without.recipe.model, CalmModel)
        tensors = released_calm(
            without.recipe.model,
            dict(without.backbone.named_parameters()),
            dict(without.head.named_parameters()),
        )
        with pytest.raises(CheckpointError, match=lost):
            fill(tensors, other, tmp_path)
        return
    (tmp_path / CONFIG_FILE).write_text(json.dumps(calm_config(model.recipe, {}, "")))
    again = CalmModel.model_validate(calm_values(tmp_path)["model"])
    for name in set(BackboneModel.model_fields) - {"init"}:  # an imported model has its weights
        assert getattr(again, name) == getattr(model.recipe.model, name), name
    # Weights that no initialisation gives, norms included.
    for parameter in (*backbone.values(), *head.values()):
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter))
    with torch.no_grad():
        # Rows that only pad the vocabulary are zero in every model.
        backbone["embedding.embed_tokens.weight"][model.recipe.model.vocab_size :] = 0
    fill(released_calm(model.recipe.model, backbone, head), other, tmp_path)
    for name, parameter in (*other.backbone.named_parameters(), *other.head.named_parameters()):
        expected = backbone[name] if name in backbone else head[name]
        assert torch.equal(parameter, expected), name


class CappedModel(CalmModel):
    """A model with a field that adds no weight, as a contributor would add it."""

    attention_softcap: float | None = None


def test_a_field_without_weights_is_not_lost() -> None:
    recipe = tiny_model().recipe

    def config(softcap: float | None) -> dict[str, Any]:
        model = CappedModel(**recipe.model.model_dump(), attention_softcap=softcap)
        return calm_config(recipe.model_copy(update={"model": model}), {}, "")

    assert config(None) == calm_config(recipe, {}, "")
    with pytest.raises(
        CheckpointError, match=r"model\.attention_softcap=30\.0: .* released layout"
    ):
        config(30.0)


def fill(tensors: dict[str, torch.Tensor], model: LoadedModel, directory: Path) -> None:
    assert isinstance(model.recipe.model, CalmModel)
    file = directory / "model.safetensors"
    released = Tensors(directory, tensors, dict.fromkeys(tensors, file))
    ReleasedCalm(directory, released).copy_into(model.recipe.model, model.backbone, model.head)


LAYOUTS = {
    "tp2": ALONE | {"parallel__tensor_parallel_size": 2},
    "tp2sp": ALONE | {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True},
    "pp2": ALONE | {"parallel__pipeline_parallel_size": 2},
}


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint."""
    model = load_model(run)
    return dict((*model.backbone.named_parameters(), *model.head.named_parameters()))


def shapes(change: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tiny_model(**change).backbone.named_parameters()}


def adds_modules(field: str) -> bool:
    """Whether a model of another value has parameters of other names, numbers of layers aside."""
    before, after = (
        {re.sub(r"\.\d+\.", ".", name) for name in shapes(change)}
        for change in (UNCHANGED, {field: CHANGES[field]})
    )
    return before != after


@pytest.mark.parametrize(
    "only_modules",
    # The layouts of modules that a field merely resizes are those of every test.
    [True, pytest.param(False, marks=pytest.mark.full)],
    ids=["modules", "resized"],
)
def test_layouts_train_the_same_model(
    tmp_path: Path, tiny: Callable[..., list[str]], only_modules: bool
) -> None:
    """TP2 with and without sequence parallelism and PP2 against one process, for each field."""
    fields = [
        name
        for name in CHANGES
        # The store decides the vocabulary.
        if name != "vocab_size"
        and shapes({name: CHANGES[name]}) != shapes(UNCHANGED)
        and adds_modules(name) == only_modules
    ]
    assert ("qk_norm" in fields) == only_modules

    def job(field: str, name: str, settings: dict[str, object]) -> dict[str, object]:
        changed = settings | {f"model__{field}": CHANGES[field]}
        return {
            "recipe": recipe("calm"),
            "overrides": tiny(
                tmp_path / f"{field}_{name}",
                "calm",
                training__steps=STEPS,
                training__warmup_steps=0,
                **changed,
            ),
        }

    run_worker(1, WORKER, [job(field, "alone", ALONE) for field in fields], tmp_path)
    layouts = [(field, name, values) for name, values in LAYOUTS.items() for field in fields]
    run_worker(2, WORKER, [job(*layout) for layout in layouts], tmp_path)
    wrong: list[tuple[object, ...]] = []
    for field in fields:
        trained = weights_of(tmp_path / f"{field}_alone")
        alone = training_records(tmp_path / f"{field}_alone")
        assert len(alone) == STEPS
        for name in LAYOUTS:
            other = training_records(tmp_path / f"{field}_{name}")
            for step, record in alone.items():
                for what in ("loss", "grad_norm"):
                    mine, wanted = other[step][what], record[what]
                    if abs(mine - wanted) > TOLERANCE * max(1.0, abs(wanted)):
                        wrong.append((field, name, step, what, mine, wanted))
            # A gradient that was not summed over the ranks hardly changes the norm, but AdamW's
            # updates, which do not depend on a gradient's size. The mean, since they also enlarge
            # the rounding of single gradients near zero.
            for weight, value in weights_of(tmp_path / f"{field}_{name}").items():
                difference = (value - trained[weight]).abs().mean()
                if difference > WEIGHT_TOLERANCE:
                    wrong.append((field, name, weight, float(difference)))
    assert not wrong, "\n".join(map(str, wrong))
