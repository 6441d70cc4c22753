"""The plain formulations compute what ours do, and a comparison says so."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import Tiny, language_recipe, recipe, untrained_run
from tiny_models import VOCAB, tiny_model

from calm_dist.benchmark import growth, heads, inference, model, plain, ranks, reading, tokenizing
from calm_dist.benchmark.compare import Pair, compare, table
from calm_dist.benchmark.pairs import zipf_tokens
from calm_dist.benchmark.scoring_pairs import pairs_of_runs
from calm_dist.costs import flops
from calm_dist.data.stream import open_training_stream
from calm_dist.errors import UserError
from calm_dist.evaluation.block_scores import draw_latents
from calm_dist.evaluation.brier_softmax import scores_from_softmax
from calm_dist.evaluation.brier_tree import cache_size, scores_from_patches
from calm_dist.inference.generate import decode_latents
from calm_dist.recipe import CalmModel

RECIPES = Path(__file__).parents[2] / "recipes"
CPU = torch.device("cpu")


def test_a_comparison_measures_time_memory_and_difference() -> None:
    def ours() -> list[torch.Tensor]:
        return [torch.ones(3)]

    def wasteful() -> list[torch.Tensor]:
        return [torch.ones(64 << 20)[:3] * 1.5]

    row = compare(Pair("ones", ours, wasteful, 3, "numbers", {}), 2, CPU)
    assert row["largest_difference"] == pytest.approx(1 / 3)
    assert row["plain"]["peak_mib"] > 200 > 20 > row["ours"]["peak_mib"]
    assert row["speedup"] > 1 and len(row["ours"]["all_seconds"]) == 2
    assert "| ones |" in table([row])


def test_plain_brier_has_the_same_expectation() -> None:
    """Brier-1..4 of a Transformer at five starts, within 4.5 standard errors of 300 runs."""
    tiny = tiny_model("transformer", block_steps=12, num_hidden_layers=1)
    tiny.backbone.output_layer.weight.data.mul_(20)
    tokens = torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(2, 7)
    generator = torch.Generator().manual_seed(1)
    # The starts are scored one after the other, each with draws of its own.
    scores, _ = plain.transformer_brier(
        tiny.logits, tiny.new_cache, tokens, starts.repeat(300), generator
    )
    runs = scores.unflatten(0, (300, -1)).mean(1)
    ours = scores_from_softmax(
        tiny.logits, tiny.new_cache, tokens, starts, num_draws=500, seed=0
    ).scores.mean(0)
    assert runs[:, 3].std() > 0
    error = runs.std(0) / 300**0.5
    assert ((runs.mean(0) - ours).abs() < 4.5 * error + 1e-3).all()


def test_plain_brier_of_a_calm_has_the_same_expectation() -> None:
    """Brier-1..4 with patches of two tokens at three starts, within 4.5 standard errors."""
    tiny = tiny_model(
        "calm", patch_size=2, block_steps=6, vocab_size=5, noise=0.3, num_hidden_layers=1
    )
    tokens = torch.randint(5, (12,), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(1, 4)
    generator = torch.Generator().manual_seed(1)

    def draw(hidden: torch.Tensor, number: int) -> torch.Tensor:
        latents = draw_latents(tiny, hidden, number, generator)
        return decode_latents(tiny, latents.flatten(0, 1)).view(number, len(hidden), -1)

    cache = tiny.new_cache(1, cache_size(5, 2))
    hidden = tiny.hidden(tokens[None, :10], torch.arange(5), None, cache)[0]
    target = tokens[2 * starts[:, None] + torch.arange(4)]

    def ours() -> torch.Tensor:
        return scores_from_patches(
            tiny.hidden, cache, lambda h, starts, depth: draw(h, 2), draw(hidden, 2), starts, target
        )

    def run(tokens: torch.Tensor, positions: Any, mask: Any, held: Any) -> torch.Tensor:
        # The text's states are the same in all runs.
        return hidden[None] if held is cache else tiny.hidden(tokens, positions, mask, held)

    def released() -> torch.Tensor:
        assert tiny.autoencoder is not None
        cache.truncate(5)
        scores, _ = plain.calm_evaluation(
            run, lambda *_: cache, tiny.head, tiny.autoencoder, tokens, starts, 2, generator
        )
        return scores

    first, second = (
        torch.stack([scores() for _ in range(400)]).mean(1) for scores in (ours, released)
    )
    assert first[:, 3].std() > 0 < second[:, 3].std()
    error = ((first.var(0) + second.var(0)) / 400).sqrt()
    assert ((first.mean(0) - second.mean(0)).abs() < 4.5 * error + 1e-6).all()
    assert (error > 0).all(), error


def test_the_plain_form_continues_one_text_at_a_time() -> None:
    """Nothing is padded to more rows, which would make it slower than what it stands for."""
    models = tiny_model("transformer", vocab_size=5), tiny_model("calm", patch_size=2, noise=0.0)
    generator = torch.Generator().manual_seed(1)
    for tiny in models:
        seen: list[tuple[int, ...]] = []
        tiny.backbone.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(tuple(inputs[0].shape))
        )
        size = tiny.recipe.model.patch_size
        tokens, starts = torch.zeros(9 * size, dtype=torch.long), torch.arange(1, 6)
        if size == 1:
            plain.transformer_brier(tiny.logits, tiny.new_cache, tokens, starts, generator)
        else:
            assert tiny.autoencoder is not None
            plain.calm_evaluation(
                tiny.hidden, tiny.new_cache, tiny.head, tiny.autoencoder, tokens, starts, 2,
                generator,
            )  # fmt: skip
        assert len(seen) > 1 and set(seen[1:]) == {(1, size)}


def test_the_plain_form_keeps_its_numbers_on_the_device() -> None:
    """Tensors of another device than the host's, which need no GPU: they have no values."""
    tokens, pairs = torch.empty(24, device="meta"), torch.empty(2, 5, 4, device="meta")
    cache = tiny_model().new_cache(1, 5)
    draw: Any = None  # patches of four tokens are not continued
    scores = plain.calm_brier(draw, cache, draw, pairs, tokens, torch.arange(1, 6))
    assert (scores.device.type, scores.shape) == ("meta", (5, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["brier", "--cpu-time"], "--cpu-time: is for one thread on the CPU"),
        (["sampling", "--runs", "runs/calm"], "--runs and --data: go together"),
        (["inference", "runs/calm", "--temperature", "0.3"], "0.3: give 1, or 1/n"),
        (["inference", "runs/calm", "--temperature", "0"], "--temperature"),
    ],
)
def test_wrong_options_of_the_tool(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = runpy.run_path(str(RECIPES.parent / "tools" / "benchmark.py"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool["parse_arguments"]()
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert tool["one_over_n"]("1/3") == tool["one_over_n"]("0.3333333333333333") == 1 / 3


def test_zipf_tokens_fall_as_one_over_rank() -> None:
    counts = zipf_tokens(50, 200_000, seed=0).bincount(minlength=50).double()
    expected = 200_000 / torch.arange(1, 51) / (1 / torch.arange(1, 51)).sum()
    assert ((counts - expected).square() / expected).sum() < 100  # chi², 49 degrees: p < 1e-4


def test_growth_is_tabled_and_drawn(tmp_path: Path) -> None:
    points: list[dict[str, Any]] = [
        {"size": n, "ours": {"seconds": n / 1e3, "peak_mib": n}, "plain": {"seconds": n / 1e2}}
        for n in (10, 1000)
    ]
    for point in points:
        point["plain"]["peak_mib"] = None
    series = [{"what": "energy score", "over": "positions", "points": points}]
    assert "| 1,000 | 1 (10) | 1e+03 (?) |" in growth.table(series)
    growth.plot(series, tmp_path / "growth.svg")
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_bubble_is_what_the_stages_do_not_work() -> None:
    """Two stages, one micro-batch of 1 s each: one half waits; unequal stages wait longer."""
    ranks_of = lambda busy: [{"busy": part, "schedule": 2.0} for part in busy]  # noqa: E731
    equal = ranks._pipeline(
        {"micro_batches": 1, "work_shares": [0.5, 0.5], "ranks": ranks_of([1.0, 1.0])}
    )
    assert equal["bubble"] == equal["predicted_bubble"] == 0.5
    unequal = ranks._pipeline(
        {"micro_batches": 3, "work_shares": [0.25, 0.75], "ranks": ranks_of([0.5, 1.5])}
    )
    assert unequal["stage_shares"] == unequal["predicted_stage_shares"] == [0.25, 0.75]
    assert unequal["predicted_bubble"] == pytest.approx(1 - (2 / 3) * 3 / 4)


def test_every_part_has_what_the_tool_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = runpy.run_path(str(RECIPES.parent / "tools" / "benchmark.py"))["parse_arguments"]

    def parsed(*arguments: str) -> argparse.Namespace:
        monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
        return parse()

    with pytest.raises(SystemExit):
        parsed("no such part")
    _, _, choices = capsys.readouterr().err.partition("choose from")
    parts = re.findall(r"[a-z]+", choices)
    assert {"energy", "ranks", "inference"} <= set(parts)
    for part in parts:
        args = parsed(part, *(["RUN"] if part == "inference" else []))
        assert args.part == part and args.device == "cpu" and args.json is None and args.repeats > 0


@pytest.mark.full
def test_processes_are_timed(tmp_path: Path) -> None:
    tool = [sys.executable, str(RECIPES.parent / "tools" / "benchmark.py")]
    file = tmp_path / "ranks.json"
    subprocess.run([*tool, "ranks", "--repeats", "1", "--json", str(file)], check=True)
    result = json.loads(file.read_text())
    assert [row["micro_batches"] for row in result["pipeline"]] == list(ranks.MICRO_BATCHES)
    assert all(0 < row["bubble"] < 1 for row in result["pipeline"])
    assert len(result["scaling"]) == 5
    assert "pipeline" not in ranks.table(result) and "| 16 |" in ranks.table(result)


def test_a_random_store_is_read_in_training_order(tmp_path: Path) -> None:
    reading.write_random_store(tmp_path, 6, shard_bytes=1, block_size=64)
    stream = open_training_stream([tmp_path], batch_size=2)
    batches = list(itertools.islice(stream, 3))
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(6))
    assert batches[0]["mean"].shape == (2, 16, 128) and batches[0]["mean"].dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "overrides", "parts"),
    [
        ("calm", [], {"embedding", "head", "energy score"}),
        ("calm", ["parallel.recompute=true", "model.head.kind=flow"], {"embedding", "head"}),
        ("transformer", [], {"embedding", "output layer"}),
    ],
)
def test_a_recipe_is_timedby_part(kind: str, overrides: list[str], parts: set[str]) -> None:
    """Structure and arithmetic; times are those of any machine."""
    sizes = ["model.vocab_size=512", "data.block_size=64", "training.micro_batch_size=2"]
    recipe = language_recipe(RECIPES / f"{kind}_tiny.yaml", [*sizes, *overrides])
    recipe = model.one_device(recipe, micro_batches=3)
    assert (recipe.world_size, recipe.num_micro_batches) == (1, 3)
    result = model.measure_model(recipe, CPU, repeats=2, peak_tflops=0.5)
    assert result["tokens_per_step"] == 3 * 2 * 64
    rate = result["tokens_per_step"] / result["step_seconds"]
    assert result["tokens_per_second"] == pytest.approx(rate)
    per_token = flops.count(recipe, tokens=0).train_flops_per_token_ours
    assert result["mfu"] == pytest.approx(rate * per_token / 0.5e12)
    assert 0 < result["mfu_causal"] < result["mfu"]
    assert set(result["parts"]) == parts | {"attention", "MLP", "optimizer", "other"}
    for name, part in result["parts"].items():
        assert part["forward"] > 0, name
        assert (part["backward"] > 0) == (name != "optimizer"), name
    text = model.table(result)
    assert "| attention |" in text and f"MFU {result['mfu']:.1%}" in text
    without = model.table(result | {"mfu": None, "peak_mib": None})
    assert "MFU unknown" in without


def test_time_belongs_to_the_part_that_spends_it() -> None:
    """Backward passes too, also of what is recomputed there; nothing counts twice."""

    class MLP(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x).tanh()

    class OutputLayer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    layers = torch.nn.Sequential(MLP(), OutputLayer())
    x = torch.randn(700, 700, requires_grad=True)
    for recomputed in (False, True):
        handles = model._annotate(layers)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            hidden = (
                torch.utils.checkpoint.checkpoint(layers[0], x, use_reentrant=True)
                if recomputed
                else layers[0](x)
            )
            layers[1](hidden).backward()
        for handle in handles:
            handle.remove()
        events = profiler.events()
        assert events is not None
        parts = model.by_part(list(events), on_gpu=False)
        whole = sum(e.cpu_time_total for e in events if e.cpu_parent is None) / 1e6
        assert sum(map(sum, (part.values() for part in parts.values()))) == pytest.approx(whole)

        def taken(*names: str) -> float:
            return sum(e.cpu_time_total for e in events if e.name in names) / 1e6  # noqa: B023

        engine = "autograd::engine::evaluate_function: "
        assert parts["MLP"]["forward"] == pytest.approx(taken("part: MLP"))
        backward = taken(f"{engine}MmBackward0", f"{engine}TanhBackward0")
        assert parts["MLP"]["backward"] == pytest.approx(backward) and backward > 0
        assert parts["output layer"]["backward"] == pytest.approx(taken(f"{engine}SumBackward0"))


def test_models_generate_in_turns(tmp_path: Path) -> None:
    """Rows for each model, context and batch; the cache of a CALM has K times fewer steps."""
    calm = tiny_model(patch_size=4, block_steps=9)
    transformer = tiny_model("transformer", block_steps=36)
    result = inference.measure_inference(
        [calm, transformer], batches=[1, 3], contexts=[8, 16], tokens=8, repeats=1
    )
    rows = result["rows"]
    keys = [(row["kind"], row["context"], row["batch"]) for row in rows]
    assert sorted(keys) == sorted(itertools.product(("calm", "transformer"), (8, 16), (1, 3)))
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert min(ours["tokens_per_second"], ours["first_token_seconds"]) > 0
        # Two layers of keys and values of 16 numbers in fp32.
        assert ours["cache_bytes_per_text"] == (ours["context"] + 8) / 4 * 2 * 2 * 16 * 4
        assert theirs["cache_bytes_per_text"] == 4 * ours["cache_bytes_per_text"]
        data = theirs["context"]
        given = transformer.recipe.to_dict()
        given["data"]["block_size"] = data
        expected = flops.count(type(transformer.recipe).from_dict(given), tokens=0)
        assert theirs["flops_per_token"] == expected.inference_flops_per_token
    assert inference.table(result).count("\n") == 1 + len(rows)
    inference.plot(result, str(tmp_path / "speed.svg"))
    assert "<svg" in (tmp_path / "speed.svg").read_text()
    with pytest.raises(UserError, match="--contexts 30: with 8 new tokens more than the 32"):
        inference.measure_inference([calm, transformer], batches=[1], contexts=[30], tokens=8)


def test_a_recipe_stands_for_random_weights() -> None:
    model = inference.open_model(str(RECIPES / "transformer_tiny.yaml"), CPU)
    assert (model.kind, model.step) == ("transformer", 0)
    with pytest.raises(UserError, match="give the recipe of a language model"):
        inference.open_model(str(RECIPES / "autoencoder_tiny.yaml"), CPU)


def test_trained_runs_are_timed_beside_the_released_form(
    tiny: Tiny, store: Path, tmp_path: Path
) -> None:
    runs = {
        kind: str(untrained_run(tiny, tmp_path / kind, kind))
        for kind in ("calm", "transformer", "tokens")
    }
    models = [runs["calm"], runs["transformer"]]
    pairs = [*pairs_of_runs("brier", models, str(store), CPU)]
    pairs += pairs_of_runs("sampling", [runs["calm"]], str(store), CPU)
    for pair in pairs:
        pair.ours()
        pair.plain()
    names = ["evaluation, .*calm, block 64", "evaluation, .*transformer", "generation, draws agree"]
    assert all(re.match(name, pair.name) for name, pair in zip(names, pairs, strict=True))
    for part, kind in (("sampling", "transformer"), ("brier", "tokens")):
        # Before the first one is timed.
        with pytest.raises(UserError, match=rf"{kind}: "):
            next(pairs_of_runs(part, [runs["calm"], runs[kind]], str(store), CPU))


def test_both_forms_of_tokenizing_give_the_same_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizing, "TEXT_BYTES", 20_000)
    monkeypatch.setattr(tokenizing, "VOCAB_SIZE", 300)
    names = []
    for pair in tokenizing.tokenizing_pairs([], None):
        if "datatrove" in pair.name:
            continue
        (ours,), (plain,) = pair.ours() or [], pair.plain() or []
        assert ours == plain > 5000
        names.append(pair.name)
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        ("model.head.kind=chain model.head.width=24", []),
        ("model.head.kind=flow model.head.sampling_steps=3", []),
        ("model.head.kind=tokens model.head.independent=true", []),
        ("model.head.kind=flow model.head.num_samples=1", ["energy", "chain"]),
        ("model.latent_size=15", ["chain"]),
        ("model.patch_size=1", ["tokens"]),
    ],
)
def test_heads_are_measured_beside_that_of_the_recipe(
    tmp_path: Path,
    tiny: Tiny,
    caplog: pytest.LogCaptureFixture,
    overrides: str,
    left_out: list[str],
) -> None:
    """Fields of the recipe's own head hold for it alone; a head that does not fit is named."""
    own = language_recipe(recipe("calm"), [*tiny(tmp_path, "calm"), *overrides.split()])
    with caplog.at_level(logging.WARNING):
        result = heads.measure_heads(own, positions=2, samples=2, repeats=1, device=CPU)
    rows = {(row["kind"], row["sampling_steps"]): row for row in result["heads"]}
    kinds = ["energy", "chain", "flow", "diffusion", "tokens"]
    assert list(dict.fromkeys(kind for kind, _ in rows)) == [k for k in kinds if k not in left_out]
    assert {("flow", 2), ("flow", 4), ("flow", 10), ("diffusion", 100)} <= rows.keys()
    warned = [message.split()[0] for message in caplog.messages if "left out" in message]
    assert warned == left_out
    assert isinstance(own.model, CalmModel)
    if own.model.head.kind == "chain":
        assert rows["chain", 1]["parameters"] == flops.head_parameters(own.model)
    parts = {part.name: part.parameters for part in flops.count(own, tokens=0).parts}
    if own.model.head.kind == "tokens":
        # An independent head embeds no tokens of its own patch.
        assert "patch_embedding" not in parts
        assert rows["tokens", 1]["parameters"] == parts["head"] + parts["output_layer"]
