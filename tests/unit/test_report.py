"""The report of made-up run directories: its numbers, and what it says of missing ones."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from calm_dist.errors import UserError
from calm_dist.flops import count
from calm_dist.recipe import Recipe
from calm_dist.reports.report import write_report
from calm_dist.reports.runs import read_run

TOKENS_PER_STEP = 8 * 256
BACKBONE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "calm": {
        "kind": "calm",
        "patch_size": 4,
        "latent_size": 32,
        "autoencoder_size": {"hidden_size": 64, "intermediate_size": 128},
        **BACKBONE,
    },
    "transformer": {"kind": "transformer", **BACKBONE},
    "autoencoder": {
        "kind": "autoencoder",
        "vocab_size": 512,
        "latent_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
    },
}


def make_run(
    folder: Path, kind: str, records: list[dict[str, Any]], *, name: str | None = None
) -> Path:
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "world_size": 8}
    recipe = Recipe.from_dict(
        {
            "run": {"dir": str(folder), "name": name},
            "model": MODELS[kind],
            "data": {"path": "latents/train", "block_size": 256},
            "training": {"steps": 400, "micro_batch_size": 2, "global_batch_size": 8},
            "parallel": parallel if kind != "autoencoder" else {},
        }
    )
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def training(step: int, loss: float = 1.0, rate: float = 1000.0) -> dict[str, Any]:
    tokens = step * TOKENS_PER_STEP
    return {"step": step, "loss": loss, "tokens": tokens, "tokens_per_second": rate, "skipped": 0}


def evaluation(step: int, brierlm: float, **changes: Any) -> dict[str, Any]:
    result = {
        "brierlm": brierlm,
        "brierlm_stderr": 0.1,
        "brier": [0.08, 0.02, 0.01, 0.005],
        "tokens_seen": step * TOKENS_PER_STEP,
        "data_fingerprint": "e" * 64,
        "protocol": {
            "block_size": 256,
            "patch_size": 4,
            "samples": 8,
            "alignment": "patch",
            "blocks": 32,
            "positions": 2016,
        },
        "seed": 0,
    }
    return {"step": step, "eval": {**result, **changes}}


def autoencoder_evaluation(step: int) -> dict[str, Any]:
    facts = {"token_accuracy": 1 - 1 / step, "token_accuracy_mean": 1 - 0.5 / step}
    kl = [3.0] * 29 + [0.01] * 3
    return {
        "step": step,
        "eval": facts | {"collapsed_dims": 3, "latent_size": 32, "kl_per_dim": kl, "mean_std": 0.3},
    }


@pytest.fixture
def experiment(tmp_path: Path) -> dict[str, Path]:
    steps = range(10, 401, 10)
    return {
        "calm": make_run(
            tmp_path / "calm",
            "calm",
            [training(step, 5 - step / 100, 900 + step) for step in steps]
            + [evaluation(step, step / 200, energy_loss=2.0) for step in (100, 200, 400)],
        ),
        "transformer": make_run(
            tmp_path / "transformer",
            "transformer",
            [training(step, 6 - step / 200) for step in steps]
            + [evaluation(step, step / 100, cross_entropy=4.0) for step in (200, 400)],
            name="Transformer <tiny>",
        ),
        "autoencoder": make_run(
            tmp_path / "autoencoder",
            "autoencoder",
            [training(step) for step in steps]
            + [autoencoder_evaluation(step) for step in (100, 200, 400)],
        ),
    }


def report(experiment: dict[str, Path], out: Path) -> tuple[dict[str, Any], str]:
    runs = [experiment["calm"], experiment["transformer"]]
    summary = write_report(runs, out, autoencoder=experiment.get("autoencoder"))
    assert json.loads((out / "report.json").read_text()) == summary
    return summary, (out / "index.html").read_text()


def test_report_json_has_the_measured_numbers(experiment: dict[str, Path], tmp_path: Path) -> None:
    summary, _ = report(experiment, tmp_path / "report")
    calm, transformer = summary["models"]
    assert (calm["name"], calm["kind"], calm["patch_size"]) == ("calm", "calm", 4)
    assert (transformer["kind"], transformer["patch_size"]) == ("transformer", 1)
    assert calm["brierlm"] == 2.0 and calm["brierlm_stderr"] == 0.1
    assert calm["brier"] == [0.08, 0.02, 0.01, 0.005]
    assert calm["layout"] == {"tensor": 2, "pipeline": 2, "data": 2, "zero_stage": 2}
    assert calm["tokens_per_second"] == 900 + 205
    for entry in (calm, transformer):
        counts = count(read_run(experiment[entry["kind"]]).recipe, tokens=400 * TOKENS_PER_STEP)
        assert entry["tokens_seen"] == 400 * TOKENS_PER_STEP
        assert entry["parameters"] == counts.parameters
        assert entry["train_flops"] == counts.train_flops > 0
        assert entry["inference_flops_per_token"] == counts.inference_flops_per_token > 0
    ratio = calm["train_flops"] / transformer["train_flops"]
    assert summary["comparison"]["train_flops_ratio"] == pytest.approx(ratio)
    ratio = calm["inference_flops_per_token"] / transformer["inference_flops_per_token"]
    assert summary["comparison"]["inference_flops_ratio"] == pytest.approx(ratio)
    assert summary["autoencoder"]["token_accuracy"] == 1 - 1 / 400
    assert summary["autoencoder"]["collapsed_dims"] == 3


def test_flops_follow_the_tokens_really_seen(experiment: dict[str, Path], tmp_path: Path) -> None:
    full = report(experiment, tmp_path / "full")[0]["models"][0]["train_flops"]
    metrics = experiment["calm"] / "metrics.jsonl"
    metrics.write_text(json.dumps(training(100)) + "\n")
    half = report(experiment, tmp_path / "half")[0]["models"][0]["train_flops"]
    assert half == pytest.approx(full / 4)


class Outline(HTMLParser):
    """Collects what matters of a page: attributes, nesting, text."""

    void = ("meta", "br", "path", "use", "image")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_needs_no_network(experiment: dict[str, Path], tmp_path: Path) -> None:
    _, page = report(experiment, tmp_path / "report")
    outline = Outline(page)
    assert outline.stack == [] and page.count("<svg") == 4
    labels = [
        value for tag, name, value in outline.attributes if (tag, name) == ("svg", "aria-label")
    ]
    assert len(labels) == 4 and page.count("<details>") == 4
    links = [value for _, name, value in outline.attributes if name in ("src", "href")]
    assert links == ["report.json"]
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in outline.attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert used and used <= set(ids)
    # Colours come from the page's variables, in both schemes.
    assert not re.search(r"#0[12]0[0-9]{3}", page)
    assert "Transformer &lt;tiny&gt;" in page and "<tiny>" not in page
    assert "2.00 ± 0.10" in outline.text and "There is no" not in outline.text


def test_report_shows_what_is_lacking(tmp_path: Path) -> None:
    calm = make_run(tmp_path / "calm", "calm", [])
    transformer = make_run(tmp_path / "transformer", "transformer", [training(10)])
    summary, page = report({"calm": calm, "transformer": transformer}, tmp_path / "report")
    assert summary["models"][0]["brierlm"] is None
    assert summary["models"][0]["train_flops"] is None
    assert summary["models"][0]["tokens_per_second"] is None
    assert summary["comparison"]["train_flops_ratio"] is None
    assert summary["comparison"]["inference_flops_ratio"] is not None
    assert summary["autoencoder"]["token_accuracy"] is None
    for note in (
        "calm: no training records",
        "transformer: trained, but not evaluated",
        "No autoencoder run was given",
        "not evaluated",
    ):
        assert note in page


def test_one_model_alone_is_reported(experiment: dict[str, Path], tmp_path: Path) -> None:
    summary = write_report([experiment["calm"]], tmp_path / "report")
    assert summary["comparison"] == {"train_flops_ratio": None, "inference_flops_ratio": None}
    assert "no Transformer among the runs" in (tmp_path / "report" / "index.html").read_text()


def test_unlike_evaluations_are_called_incomparable(
    experiment: dict[str, Path], tmp_path: Path
) -> None:
    with (experiment["calm"] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(400, 1.0, data_fingerprint="f" * 64)) + "\n")
    summary, page = report(experiment, tmp_path / "report")
    assert "do not compare" in page
    # The last evaluation of a step counts, and the older ones are not plotted beside it.
    assert summary["models"][0]["brierlm"] == 1.0
    assert [e["step"] for e in read_run(experiment["calm"]).comparable_evaluations] == [400]


def test_resumed_and_broken_metrics_are_read(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "calm", "calm", [training(10, 5.0), training(20, 4.0), training(20, 3.0)]
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    losses = [(record["step"], record["loss"]) for record in read_run(run).training]
    assert losses == [(10, 5.0), (20, 3.0)]


def test_wrong_directories_are_refused(experiment: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        write_report([tmp_path / "nothing"], out)
    with pytest.raises(UserError, match="give it with --autoencoder"):
        write_report([experiment["autoencoder"]], out)
    with pytest.raises(UserError, match="give it with --run"):
        write_report([experiment["calm"]], out, autoencoder=experiment["calm"])
    out.touch()
    with pytest.raises(UserError, match="--out"):
        write_report([experiment["calm"]], out)
