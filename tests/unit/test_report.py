"""The report of made-up run directories: its numbers, and what it says of missing ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_runs import (
    H100,
    TOKENS_PER_STEP,
    autoencoder_evaluation,
    evaluation,
    make_run,
    training,
)
from warm import warm_python

from calm_dist.costs.flops import count, encoder_flops
from calm_dist.errors import UserError
from calm_dist.reports.analysis import (
    Point,
    correlation,
    executed_flops_per_token,
    pareto_front,
)
from calm_dist.reports.content import missing_and_incomparable
from calm_dist.reports.markdown import render_markdown
from calm_dist.reports.report import read_runs, report_content, summarize, write_report
from calm_dist.runs.records import read_run
from calm_dist.scores import MARK_EXPLAINED

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def experiment(tmp_path: Path) -> dict[str, Path]:
    return made_experiment(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """Several tests look at one report, since to draw its plots takes seconds."""
    folder = tmp_path_factory.mktemp("reported")
    experiment = made_experiment(folder)
    return Reported(experiment, folder / "report", *report(experiment, folder / "report"))


class Reported(NamedTuple):
    experiment: dict[str, Path]
    out: Path
    summary: dict[str, Any]
    page: str


def made_experiment(tmp_path: Path) -> dict[str, Path]:
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
    models = ("calm", "transformer", "tokens_head")
    runs = [experiment[name] for name in models if name in experiment]
    summary = write_report(runs, out, autoencoder=experiment.get("autoencoder"))
    assert json.loads((out / "report.json").read_text()) == summary
    return summary, (out / "index.html").read_text()


def words_of(runs: list[Path], autoencoder: Path | None = None) -> tuple[dict[str, Any], str]:
    """Summary and text of a report whose plots are not drawn."""
    models, autoencoder_run = read_runs(runs, autoencoder)
    summary = summarize(models, autoencoder_run)
    return summary, render_markdown(report_content(summary, models, autoencoder_run))


def test_report_json_has_the_measured_numbers(reported: Reported) -> None:
    experiment, _, summary, _ = reported
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


def test_totals_bear_the_autoencoder_and_its_pass_over_the_text(reported: Reported) -> None:
    experiment, _, summary, page = reported
    calm, transformer = summary["models"]
    tokens = 400 * TOKENS_PER_STEP
    model = read_run(experiment["calm"]).recipe.model
    assert model.kind == "calm" and model.latent_size is not None
    encoding = tokens * encoder_flops(model.autoencoder_size, 4, model.latent_size) / 4
    assert calm["encoding_flops"] == pytest.approx(encoding)
    assert calm["autoencoder_train_flops"] == summary["autoencoder"]["train_flops"] > 0
    total = calm["train_flops"] + calm["autoencoder_train_flops"] + encoding
    assert calm["train_flops_with_autoencoder"] == pytest.approx(total)
    saved = total - calm["train_flops_with_autoencoder_ours"]
    assert saved == pytest.approx(calm["head_flops_saved"]) and saved > 0
    assert transformer["train_flops_with_autoencoder"] == transformer["train_flops"]
    ratio = summary["comparison"]["train_flops_with_autoencoder_ratio"]
    assert ratio == pytest.approx(total / transformer["train_flops"])
    ours = summary["comparison"]["train_flops_with_autoencoder_ours_ratio"]
    assert f"it took {ours:.2f} times the training FLOPs" in page
    # Without the autoencoder's run its training is not known, and no total either.
    summary, words = words_of([experiment["calm"], experiment["transformer"]])
    (calm, transformer), comparison = summary["models"], summary["comparison"]
    assert calm["encoding_flops"] == pytest.approx(encoding)
    assert calm["autoencoder_train_flops"] is None is calm["train_flops_with_autoencoder"]
    assert comparison["train_flops_with_autoencoder_ratio"] is None and "it took" not in words


def test_the_control_stands_beside_the_two(experiment: dict[str, Path], tmp_path: Path) -> None:
    """Whatever the order of the runs, it is not taken for the CALM."""
    records = [training(400), evaluation(400, 3.0, cross_entropy=2.5)]
    control = make_run(tmp_path / "patches", "tokens", records)
    runs = [control, experiment["transformer"], experiment["calm"]]
    summary, words = words_of(runs, experiment["autoencoder"])
    entry = summary["models"][0]
    assert entry["kind"] == "tokens" and entry["layout"]["zero_stage"] == 2
    assert entry["autoencoder_train_flops"] == entry["encoding_flops"] == 0
    counts = count(read_run(control).recipe, tokens=400 * TOKENS_PER_STEP)
    comparison, transformer = summary["comparison"], summary["models"][1]
    ratio = counts.train_flops / transformer["train_flops"]
    assert comparison["tokens_train_flops_ratio"] == pytest.approx(ratio)
    assert comparison["train_flops_ratio"] == pytest.approx(
        summary["models"][2]["train_flops"] / transformer["train_flops"]
    )
    assert "patches is the control" in words and "patches, discrete head" in words
    assert "output layer" in words


def test_a_run_given_twice_is_one(experiment: dict[str, Path], tmp_path: Path) -> None:
    calm = experiment["calm"]
    (tmp_path / "link").symlink_to(calm)
    models, _ = read_runs([calm, f"{calm}/", tmp_path / "link"], None)
    assert [str(run.path) for run in models] == [str(calm)]
    # The first one named stays the first.
    other = experiment["transformer"]
    summary, _ = words_of([other, calm, other])
    assert [entry["path"] for entry in summary["models"]] == [str(other), str(calm)]


def test_flops_follow_the_tokens_really_seen(experiment: dict[str, Path]) -> None:
    full = words_of([experiment["calm"]])[0]["models"][0]["train_flops"]
    metrics = experiment["calm"] / "metrics.jsonl"
    metrics.write_text(json.dumps(training(100)) + "\n")
    part = words_of([experiment["calm"]])[0]["models"][0]["train_flops"]
    assert part == pytest.approx(full / 4)


class Outline(HTMLParser):
    """Collects what matters of a page: attributes, nesting, text."""

    void = ("meta", "link", "br", "path", "use", "image")

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


def test_page_is_whole_and_needs_no_network(reported: Reported) -> None:
    _, out, _, page = reported
    outline = Outline(page)
    plots = sorted(path.stem for path in (out / "plots").iterdir())
    assert plots == [
        *("brierlm", "flops_inference", "flops_training", "information"),
        *("loss_autoencoder", "loss_calm", "loss_transformer", "reconstruction", "throughput"),
    ]
    assert outline.stack == [] and page.count("<svg") == len(plots)
    labels = [
        value for tag, name, value in outline.attributes if (tag, name) == ("svg", "aria-label")
    ]
    assert len(labels) == len(plots) and page.count("<details>") == 5
    links = [value for _, name, value in outline.attributes if name in ("src", "href")]
    assert links == ["data:,", "report.json", "report.md"]
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in outline.attributes if name == "xlink:href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert used and used <= set(ids)
    # Colours come from the page's variables, in both schemes.
    drawings = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == len(plots) and not re.search(r"#[0-9a-f]{6}\b", "".join(drawings))
    assert "Transformer &lt;tiny&gt;" in page and "<tiny>" not in page
    assert "2.00 ± 0.10" in outline.text and "There is no" not in outline.text


def test_markdown_and_images_say_the_same(reported: Reported) -> None:
    words = (reported.out / "report.md").read_text()
    images = re.findall(r"!\[([^]]+)\]\((plots/\w+\.png)\)", words)
    assert len(images) == 9 and all(len(alternative) > 40 for alternative, _ in images)
    for _, image in images:
        assert (reported.out / image).read_bytes().startswith(b"\x89PNG")
    # Names are no markup, and a table's rows have as many cells as its head.
    assert "Transformer \\<tiny\\>" in words
    for block in re.findall(r"(?:^\|.*\n)+", words, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_cost_and_mfu_of_known_hardware(tmp_path: Path) -> None:
    records = [training(step, rate=50_000.0) for step in range(10, 401, 10)]
    run = read_run(make_run(tmp_path / "calm", "calm", records, environment=H100))
    (entry,) = summarize([run], None)["models"]
    executed = count(run.recipe, tokens=0).train_flops_per_token_ours
    assert entry["device"] == "NVIDIA H100 80GB HBM3" and entry["ranks"] == 8
    assert entry["flops_per_second_per_device"] == pytest.approx(50_000 * executed / 8)
    # The recipe trains in fp32, so its peak counts: 67 TFLOP/s.
    assert entry["mfu"] == pytest.approx(50_000 * executed / 8 / 67e12)
    # Every tenth step is logged, and stands for ten: 400 steps of 2,048 tokens at 50,000 a second.
    assert entry["training_seconds"] == pytest.approx(400 * TOKENS_PER_STEP / 50_000)
    assert entry["gpu_hours"] == pytest.approx(8 * entry["training_seconds"] / 3600)
    (given,) = summarize([run], None, peak_tflops=0.5)["models"]
    assert given["mfu"] == pytest.approx(50_000 * executed / 8 / 0.5e12)


def test_latents_made_on_the_fly_cost_the_encoder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "calm", "calm", [training(10)], environment=H100)
    stored = read_run(folder)
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(
        recipe.replace("latents: stored", "latents: on_the_fly").replace(
            "autoencoder: null", "autoencoder: runs/autoencoder"
        )
    )
    # Encoder of d 64, f 128, K 4, l 32, a token: (5 rows of an MLP, 256 to 64, 64 to 64) / 4.
    encoder = (5 * 6 * 64 * 128 + 2 * 256 * 64 + 2 * 64 * 64) / 4
    added = executed_flops_per_token(read_run(folder)) - executed_flops_per_token(stored)
    assert added == encoder


@pytest.mark.parametrize(
    ("environment", "device", "note"),
    [
        ({"world_size": 4, "gpu": None}, "cpu", "No peak FLOP/s is known for CPUs"),
        ({"world_size": 4, "libraries": {"torch": "2.13.0+cpu"}}, "cpu", "known for CPUs"),
        ({"world_size": 4, "gpu": "Some GPU"}, "Some GPU", "No peak FLOP/s is known for Some GPU"),
        ({"world_size": 4, "libraries": {"torch": "2.13.0"}}, None, "does not give the device"),
        (None, None, "does not give the number of processes"),
    ],
)
def test_unknown_hardware_is_not_guessed(
    environment: dict[str, Any] | None, device: str | None, note: str, tmp_path: Path
) -> None:
    run = read_run(make_run(tmp_path / "calm", "calm", [training(10)], environment=environment))
    summary = summarize([run], None)
    (entry,) = summary["models"]
    assert entry["device"] == device
    assert entry["mfu"] is None and entry["peak_flops_per_second_per_device"] is None
    assert (entry["device_hours"] is None) == (environment is None)
    assert (entry["gpu_hours"] is None) == (device in (None, "cpu"))
    assert note in " ".join(missing_and_incomparable(summary, [run], None))


def point(flops: float | None, brierlm: float, **changes: Any) -> Point:
    return Point(0, "run", 1, None, flops, brierlm, None, changes.get("entropy"),
                 changes.get("comparable", True))  # fmt: skip


def test_pareto_front() -> None:
    points = [
        point(1.0, 1.0),
        point(2.0, 0.5),  # more FLOPs, lower score
        point(2.0, 3.0),
        point(2.0, 2.0),  # as many FLOPs, lower score
        point(4.0, 3.0),  # more FLOPs, no higher score
        point(5.0, 4.0),
        point(0.1, 9.0, comparable=False),
        point(None, 9.0),
    ]
    front = pareto_front(points)
    assert [(p.train_flops_ours, p.brierlm) for p in front] == [(1, 1), (2, 3), (5, 4)]
    # By definition: no other point is at least as good in both, and better in one.
    known = [
        (p.train_flops_ours, p.brierlm, p) for p in points[:6] if p.train_flops_ours is not None
    ]
    assert len(known) == 6
    best = [
        (cost, p)
        for cost, score, p in known
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s, _ in known)
    ]
    assert front == [p for _, p in sorted(best, key=lambda pair: pair[0])]


def test_correlations_equal_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    entropies, scores = [4.0, 3.5, 3.5, 3.1, 2.9], [0.0, 0.3, 0.2, 1.0, 1.0]
    points = [point(1.0, s, entropy=e) for e, s in zip(entropies, scores, strict=True)]
    points += [point(1.0, 9.0), point(1.0, 9.0, entropy=9.0, comparable=False)]
    found = correlation(points)
    assert found["points"] == 5 and found["undefined"] is None
    assert found["pearson"] == pytest.approx(stats.pearsonr(entropies, scores).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(entropies, scores).statistic)
    few = correlation(points[:2])
    assert few["pearson"] is None and "3 are needed" in few["undefined"]
    assert correlation([points[0]] * 3)["undefined"] == "all evaluations have the same value"


def test_cross_entropy_is_correlated_over_several_evaluations(tmp_path: Path) -> None:
    records = [training(step) for step in range(10, 401, 10)]
    records += [
        evaluation(step, step / 100, cross_entropy=5 - step / 100) for step in (100, 200, 300, 400)
    ]
    run = make_run(tmp_path / "transformer", "transformer", records)
    summary = write_report([run], tmp_path / "report")
    assert summary["correlation"]["pearson"] == pytest.approx(-1)
    assert [p["step"] for p in summary["pareto_front"]] == [100, 200, 300, 400]
    assert (tmp_path / "report" / "plots" / "correlation.png").is_file()
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Over 4 evaluations: Pearson -1.000, Spearman -1.000" in page


def test_many_runs_with_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [
        make_run(
            tmp_path / str(number) / "calm",
            "calm",
            [training(step) for step in (10, 20)] + [evaluation(20, 1 + number / 10)],
        )
        for number in range(9)
    ]
    summary = write_report(runs, tmp_path / "report")
    names = [entry["name"] for entry in summary["models"]]
    assert len(set(names)) == 9 and all(
        str(run) in name for run, name in zip(runs, names, strict=True)
    )
    assert summary["pareto_front"][0]["name"] == names[-1] and len(summary["pareto_front"]) == 1


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
    assert set(summary["comparison"].values()) == {None}
    assert "no Transformer among the runs" in (tmp_path / "report" / "index.html").read_text()


def test_unlike_evaluations_are_called_incomparable(
    experiment: dict[str, Path], tmp_path: Path
) -> None:
    with (experiment["calm"] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(400, 1.0, data_fingerprint="f" * 64)) + "\n")
    summary, page = report(experiment, tmp_path / "report")
    assert "Their last BrierLM were taken in different ways and are not comparable." in page
    assert summary["comparison"]["brierlm_compares"] is False
    # The last evaluation of a step counts, and the older ones are not plotted beside it.
    assert summary["models"][0]["brierlm"] == 1.0
    assert [e["step"] for e in read_run(experiment["calm"]).comparable_evaluations] == [400]


def test_scores_of_noise_are_marked_everywhere_and_explained_once(
    experiment: dict[str, Path], tmp_path: Path
) -> None:
    brier = {"brier": [0.0592, 0.0081, 0.0026, 0.001]}
    noisy = evaluation(400, 0.6, **brier, brier_stderr=[0.0014, 0.0005, 0.0003, 0.0006])
    with (experiment["calm"] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(noisy) + "\n")
    summary, page = report(with_control(experiment), tmp_path / "report")
    calm, transformer, _ = summary["models"]
    assert calm["noisy_brier"] == [4] == calm["evaluations"][-1]["noisy_brier"]
    assert calm["brier_stderr"] == noisy["eval"]["brier_stderr"]
    # Of the others, as of all of early versions, no errors of Brier-n are known.
    assert transformer["brier_stderr"] is None and transformer["noisy_brier"] == []
    text, words = Outline(page).text, (tmp_path / "report" / "report.md").read_text()
    for shown in (text, words.replace("\\*", "*")):
        # Headline, the table of models, all evaluations.
        assert shown.count("0.60*") >= 2 and shown.count("0.600* ± 0.100") == 2
        assert shown.count(f"{MARK_EXPLAINED} (calm).") == shown.count(MARK_EXPLAINED) == 1
        assert shown.count("5.92 ± 0.14") == 2 and "0.81 ± 0.05" in shown
        assert "4.00 ± 0.10" in shown and "8.00" in shown
    assert 'aria-label="BrierLM over training FLOPs. Last points: calm 0.60* at' in page
    done = quickstart_summary(tmp_path)
    assert (
        "calm           BrierLM 0.60* ± 0.10 | Brier-1 5.92 ± 0.14 | Brier-2 0.81 ± 0.05 | " in done
    )
    assert "transformer    BrierLM 4.00 ± 0.10 | Brier-1 8.00 | Brier-2 2.00 | " in done
    assert done.count(MARK_EXPLAINED) == 1


def test_reports_without_noise_explain_no_mark(
    reported: Reported, experiment: dict[str, Path], tmp_path: Path
) -> None:
    models = with_control(experiment)
    autoencoder = models.pop("autoencoder")
    summary, words = words_of(list(models.values()), autoencoder)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(summary))
    done = quickstart_summary(tmp_path)
    assert MARK_EXPLAINED not in reported.page + words + done and "BrierLM 2.00 ± 0.10 | " in done
    ratios = summary["comparison"]
    for name, key in (("calm", ""), ("tokens", "tokens_")):
        training = ratios[f"{key}train_flops_ours_ratio"]
        assert f"{name} : transformer" in done and f"training FLOPs {training:.2f}" in done


def with_control(experiment: dict[str, Path]) -> dict[str, Path]:
    """The three models of the quickstart."""
    directory = experiment["calm"].with_name("tokens_head")
    records = [training(400), evaluation(400, 3.0, cross_entropy=2.5)]
    return experiment | {"tokens_head": make_run(directory, "tokens", records)}


def quickstart_summary(out: Path) -> str:
    """What the quickstart prints of ``out / "report"``."""
    script = (TOOLS / "quickstart.sh").read_text()
    function = script[script.index("summary() {") :]
    function = function[: function.index("\n}\n") + 3]
    return subprocess.run(
        ["bash", "-ec", f"OUT={out}\n{function}summary"],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


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


def call(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_python(), TOOLS / tool, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(TOOLS.parent)},
    )


def test_scores_that_are_none_are_not_shown(tmp_path: Path) -> None:
    records = [training(10, 1.0), *(evaluation(step, 5.0) for step in (20, 30, 40))]
    records[1]["eval"]["brierlm"] = True
    records[2]["eval"]["brierlm"] = -3.0
    records[3]["eval"]["protocol"] |= {"blocks": {}, "positions": None}
    run = read_run(make_run(tmp_path / "run", "calm", records))
    assert [e.get("brierlm") for e in run.evaluations] == [None, None, 5.0]
    assert "protocol" not in run.last_evaluation
    assert run.damage == ("Damaged lines in metrics.jsonl: 3; the damaged parts are left out.",)


def test_a_recipe_without_sizes_is_named(experiment: dict[str, Path], tmp_path: Path) -> None:
    recipe = experiment["calm"] / "recipe.yaml"
    for name in ("vocab_size", "block_size"):
        whole = recipe.read_text()
        recipe.write_text(re.sub(rf"{name}: \d+", f"{name}: null", whole, count=1))
        done = call("flops_report.py", "--run", *experiment.values(), "--out", tmp_path / "report")
        assert done.returncode == 2 and f"error: {recipe}: " in done.stderr, done.stderr
        assert name in done.stderr
        recipe.write_text(whole)


def test_names_in_any_script_are_drawn_without_noise(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", "calm", [training(10, 1.0), training(20, 1.0)])
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(re.sub(r"name: .*", "name: 模型🚀", recipe.read_text(), count=1))
    done = call("flops_report.py", "--run", run_dir, "--out", tmp_path / "report")
    assert done.returncode == 0 and done.stderr == ""
    assert "模型🚀" in (tmp_path / "report" / "index.html").read_text()


def test_both_tools_write_the_same_report(experiment: dict[str, Path], tmp_path: Path) -> None:
    common: list[str | Path] = ["--run", experiment["calm"], experiment["transformer"]]
    common += ["--autoencoder", experiment["autoencoder"], "--peak-tflops", "1"]
    one = call("report.py", *common, "--out", tmp_path / "one")
    other = call("flops_report.py", *common, "--out", tmp_path / "other", "--json", "-")
    assert one.returncode == other.returncode == 0, one.stderr + other.stderr
    assert one.stdout.strip() == str(tmp_path / "one" / "index.html")
    written = (tmp_path / "one" / "report.json").read_text()
    assert written == (tmp_path / "other" / "report.json").read_text() == other.stdout
    # Without a place to write, the report is printed.
    printed = call("flops_report.py", *common)
    assert printed.returncode == 0 and printed.stdout.startswith("# Next patch against next token")
    assert "plots/" not in printed.stdout and "Throughput and cost" in printed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--out: is for a report of runs"),
        (["--peak-tflops", "9"], "--peak-tflops: is for a report of runs"),
        (["--run", "nowhere"], "nowhere: has no recipe.yaml"),
        (["--run", "nowhere", "--peak-tflops", "0"], "0: give a number from 0.001 to 1e06"),
        (["--run", "nowhere", "--peak-tflops", "1e-320"], "1e-320: give a number from 0.001"),
        (["--run", "nowhere", "--out", ""], "--out: is empty: give a directory"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    done = call("flops_report.py", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_without_runs_the_papers_models_are_compared(tmp_path: Path) -> None:
    done = call("flops_report.py", "--json", tmp_path / "flops.json")
    assert done.returncode == 0 and "CALM-XL" in done.stdout
    values = json.loads((tmp_path / "flops.json").read_text())
    assert {"models", "headline", "unexplained"} <= set(values)


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    good = '{"step": 3, "loss": 1.5, "tokens": "many", "eval": {"brierlm": "x", "protocol": 7}}'
    lines = [b"\xf6\xff", b"[" * 100_000, b'{"step": "4"}', b'{"step": 1e400}',
             b'{"step": true}', b'{"step": 5, "loss": 1e400}',
             b'{"step": 6, "eval": null}', b'{"step": 7, "loss": null}',
             good.encode()]  # fmt: skip
    run_dir = make_run(tmp_path / "run", "calm", [])
    (run_dir / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run = read_run(run_dir)
    assert run.training == [{"step": 3, "loss": 1.5, "eval": {}}, {"step": 7, "loss": None}]
    assert run.evaluations == [{"step": 3}]
    write_report([run_dir], tmp_path / "report")
    words = (tmp_path / "report" / "report.md").read_text()
    assert "Damaged lines in metrics.jsonl: 8; the damaged parts are left out." in words
    assert "1 of 2 records have a loss that is not finite." in words


def test_damaged_environments_are_unknown(experiment: dict[str, Path], tmp_path: Path) -> None:
    run_dir = Path(os.fsdecode(bytes(tmp_path) + b"/r\xf6n"))
    shutil.copytree(experiment["calm"], run_dir)
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(re.sub(r"name: .*", r"name: a $\\frac{a}$ _{", recipe.read_text(), count=1))
    environment = {"world_size": "4", "gpu": 7, "libraries": [1]}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 90, "eval": {"brierlm": 1.0, "data_fingerprint": [1]}}\n')
        file.write('{"step": 91, "loss": 1.0, "tokens": null}\n')
    out = tmp_path / "report"
    done = call("flops_report.py", "--run", run_dir, "--out", out)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((out / "report.json").read_text())["models"]
    assert (entry["ranks"], entry["device"], entry["mfu"]) == (None, None, None)
    words = (out / "report.md").read_text()
    assert "environment.json: the value of world\\_size, gpu, libraries is damaged." in words
    (run_dir / "environment.json").write_text("{")
    done = call("flops_report.py", "--run", run_dir)
    assert done.returncode == 0 and "environment.json is damaged." in done.stdout


def test_a_look_at_a_few_blocks_replaces_no_evaluation(tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path / "run", "calm", [training(10), evaluation(10, 0.6), evaluation(10, 0.7)]
    )
    (*_, last) = (run_dir / "metrics.jsonl").read_text().splitlines()
    record = json.loads(last)
    whole = record["eval"]["brierlm"]
    record["eval"]["protocol"]["blocks"] -= 1
    record["eval"]["brierlm"] = 0.1
    odd = {"step": 10, "eval": {"brier": [1, "x"], "reconstruction_accuracy": "x", "protocol": {}}}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n" + json.dumps(odd) + "\n")
    run = read_run(run_dir)
    assert [e.get("brierlm") for e in run.evaluations] == [whole, None]
    write_report([run_dir], tmp_path / "report")
