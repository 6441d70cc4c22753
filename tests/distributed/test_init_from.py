"""A training begins with the weights alone of a run, a checkpoint or a released directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import ALONE, autoencoder_recipe, language_recipe, recipe, run_jobs, training_records

from calm_dist.errors import CheckpointError, RecipeError
from calm_dist.interop.convert import export_checkpoint
from calm_dist.parallel.launch import World
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.training.checkpoint import model_state
from calm_dist.training.resolve import resolve

Tiny = Callable[..., list[str]]


def trainer(tiny: Tiny, run_dir: Path, kind: str, **more: object) -> Any:
    """A trainer in this process, with weights of seed 1 if nothing else is said."""
    from calm_dist.inference.load import single_process_topology
    from calm_dist.training.autoencoder import AutoencoderTrainer
    from calm_dist.training.language_model import Trainer

    World(0, 1, 0, 1, "", 0, "test").export()
    run_dir.mkdir(exist_ok=True)
    alone = {} if kind == "autoencoder" else ALONE
    overrides = tiny(run_dir, kind, **(alone | {"parallel__device": "cpu", "run__seed": 1} | more))
    if kind == "autoencoder":
        single_process_topology(
            language_recipe(recipe("calm"), tiny(run_dir, "calm", **ALONE)), torch.device("cpu")
        )
        own = resolve(autoencoder_recipe(recipe(kind), overrides))
        return AutoencoderTrainer(own, torch.device("cpu"))
    given = resolve(language_recipe(recipe(kind), overrides))
    return Trainer(given, single_process_topology(given, torch.device("cpu")))


def modules(made: Any) -> tuple[Any, Any]:
    """Backbone and head of a language model's trainer."""
    head = made.parts.head
    return model_state._unwrap(made.parts.chunks[0]), head and head.module


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def same(one: Any, other: Any) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def written(made: Any, step: int = 3, latents_sha256: str | None = None) -> Path:
    """The run directory of a trainer, with a checkpoint of its weights."""
    temporary = checkpoints.begin(made.run_dir, step)
    model_state.save_weights(temporary, *modules(made))
    state = RunState(step=step, data={"steps_done": step}, latents_sha256=latents_sha256)
    state.write(temporary)
    for directory in (made.run_dir, temporary):
        (directory / checkpoints.RECIPE_FILE).write_text(made.recipe.to_yaml())
    checkpoints.commit(temporary, keep=1)
    return made.run_dir


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Any:
    return trainer(tiny, tmp_path_factory.mktemp("source") / "calm", "calm", run__seed=5)


@pytest.fixture(scope="module")
def places(source: Any) -> dict[str, Path]:
    """A run, its checkpoint, and the same in the released layout."""
    run = written(source)
    export_checkpoint(run, run.parent / "released")
    found = checkpoints.find_checkpoint(run)
    return {"run": run, "checkpoint": found, "released": run.parent / "released"}


def test_weights_alone_are_taken(
    places: dict[str, Path],
    source: Any,
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    """With other numbers of samples, another exponent and batch; the optimizers are fresh."""
    other: dict[str, object] = {
        "model__head__num_samples": 3,
        "model__head__posterior_samples": 5,
        "model__head__beta": 1.5,
        "training__global_batch_size": 4,
    }
    fresh = modules(trainer(tiny, tmp_path / "fresh", "calm", **other))
    assert not same(fresh[0], modules(source)[0])
    for name, place in places.items():
        made = trainer(tiny, tmp_path / name, "calm", run__init_from=place, **other)
        for ours, theirs in zip(modules(made), modules(source), strict=True):
            assert same(ours, theirs), name
        assert (made.progress.step, made.progress.adam_steps) == (0, 0)
        state = made.parts.head.export_state()
        assert all(not t.any() for n, t in state.items() if not n.startswith("fp32."))
    made._batches.read()
    assert made.train_step(made._batches.take()).loss > 0


def test_a_head_that_does_not_fit_starts_anew(
    places: dict[str, Path],
    source: Any,
    tiny: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes: list[dict[str, Any]] = [
        {"model__head__num_mlp_layers": 3},
        {"model__head__kind": "flow"},
    ]
    for number, change in enumerate(changes):
        fresh = modules(trainer(tiny, tmp_path / f"fresh{number}", "calm", **change))
        for name, place in places.items():
            caplog.clear()
            with caplog.at_level("INFO"):
                made = modules(
                    trainer(
                        tiny, tmp_path / f"{name}{number}", "calm", run__init_from=place, **change
                    )
                )
            assert same(made[0], modules(source)[0]), name
            assert same(made[1], fresh[1]), name
            assert "does not fit this recipe's, which starts with new weights: " in caplog.text
            assert "mlp_blocks.2" in caplog.text or number == 1


@pytest.mark.parametrize("place", ["run", "released"])
def test_a_backbone_that_does_not_fit_is_refused(
    place: str, places: dict[str, Path], tiny: Tiny, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"run__init_from": places[place]}
    with pytest.raises(CheckpointError, match=r"run.init_from: .*: its backbone does not fit") as e:
        trainer(tiny, tmp_path / "wide", "calm", model__intermediate_size=96, **given)
    weight = {"run": "fc1", "released": "gate_proj"}[place]
    assert all(part in str(e.value) for part in ("64", "96", weight))
    with pytest.raises(CheckpointError, match="does not fit"):
        trainer(tiny, tmp_path / "deep", "calm", model__num_hidden_layers=6, **given)
    # Weights that would be left over, and heads of the same shapes in all.
    with pytest.raises(CheckpointError, match="does not fit"):
        trainer(tiny, tmp_path / "flat", "calm", model__num_hidden_layers=1, **given)
    with pytest.raises(CheckpointError, match=r"does not fit .*: num_attention_heads is \d there"):
        trainer(tiny, tmp_path / "heads", "calm", model__num_attention_heads=1, **given)
    with pytest.raises(CheckpointError, match=r"run.init_from"):
        trainer(tiny, tmp_path / "other", "transformer", **given)


def test_latents_of_another_autoencoder_are_a_warning(
    source: Any, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = source._stream.metas[0].autoencoder.sha256
    for number, trained in enumerate((data, "0" * 64)):
        source.run_dir, own = tmp_path / f"source{number}", source.run_dir
        source.run_dir.mkdir()
        try:
            run = written(source, latents_sha256=trained)
        finally:
            source.run_dir = own
        caplog.clear()
        trainer(tiny, tmp_path / f"made{number}", "calm", run__init_from=run)
        warned = f"autoencoder of sha256 000000000000…, the data has latents of {data[:12]}…"
        assert (warned in caplog.text) == (number == 1)


def test_wrong_fields(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run.init_from: no/such: no such directory"):
        trainer(tiny, tmp_path / "gone", "calm", run__init_from="no/such")
    both = {"run__init_from": "a", "run__continue_from": "b"}
    with pytest.raises(RecipeError, match="a run starts from one of them"):
        trainer(tiny, tmp_path / "both", "calm", **both)


def test_transformers_and_autoencoders(
    places: dict[str, Path], tiny: Tiny, store: Path, tmp_path: Path
) -> None:
    first = trainer(tiny, tmp_path / "first", "transformer", run__seed=5)
    run = written(first)
    made = trainer(tiny, tmp_path / "second", "transformer", run__init_from=run)
    assert same(modules(made)[0], modules(first)[0])

    # The store's autoencoder, a directory in the released layout, has other sizes than the recipe.
    from calm_dist.interop.huggingface import load_autoencoder

    given = store.parent / "autoencoder"
    theirs = load_autoencoder(given)
    sizes: dict[str, Any] = {
        f"model__{name}": getattr(theirs.config, name)
        for name in ("hidden_size", "intermediate_size", "latent_size", "patch_size", "vocab_size")
    }
    ours = trainer(
        tiny, tmp_path / "ae", "autoencoder", run__init_from=given, model__kl_weight=0.5, **sizes
    )
    assert same(ours.model, theirs) and ours.model.config.kl_weight == 0.5
    sizes["model__hidden_size"] *= 2
    with pytest.raises(
        CheckpointError, match=r"does not fit the recipe's model: .* there, .* here"
    ):
        trainer(tiny, tmp_path / "wide", "autoencoder", run__init_from=given, **sizes)
    with pytest.raises(CheckpointError, match="is not an autoencoder"):
        trainer(tiny, tmp_path / "calm", "autoencoder", run__init_from=places["run"])


@pytest.mark.full
def test_every_layout_takes_the_same_weights(
    places: dict[str, Path], tiny: Tiny, tmp_path: Path
) -> None:
    """TP2 PP2, in one launch: the first losses are those of one process."""
    common: dict[str, object] = {"training__steps": 1, "logging__every": 1}
    expected = trainer(tiny, tmp_path / "one", "calm", run__init_from=places["run"], **common)
    expected._batches.read()
    loss = expected.train_step(expected._batches.take()).loss
    jobs = []
    for name, place in places.items():
        more = common | {"run__init_from": place, "run__seed": 1}
        jobs.append(("calm", tiny(tmp_path / f"four_{name}", "calm", **more)))
    run_jobs(4, jobs, tmp_path)
    for name in places:
        found = training_records(tmp_path / f"four_{name}")[1]["loss"]
        assert found == pytest.approx(loss, rel=1e-5), name
