"""The planner: presets, collectives, storage, failures, search and tool."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launches import language_recipe
from warm import warm_python

from calm_dist.costs import flops
from calm_dist.costs.clusters import PRESETS, Rates, preset
from calm_dist.costs.memory import stage_memory
from calm_dist.data.store import AutoencoderInfo, StorePlan, TokenizerInfo
from calm_dist.errors import RecipeError, UserError
from calm_dist.planner.collectives import Group, groups
from calm_dist.planner.full_plan import BEST, format_full_plan, full_plan, layout_overrides
from calm_dist.planner.predict import predict, training_cost
from calm_dist.planner.published import PUBLISHED
from calm_dist.planner.scaling import MODELS, scaling_recipe
from calm_dist.planner.search import search
from calm_dist.planner.steptime import step_time
from calm_dist.planner.storage import (
    Goodput,
    Reliability,
    checkpoint_bytes,
    goodput,
    latent_bytes_per_token,
)
from calm_dist.recipe import CalmModel

ROOT = Path(__file__).parents[2]
XL = ROOT / "recipes" / "calm_xl_tp2pp2.yaml"
TRANSFORMER = ROOT / "recipes" / "transformer_s.yaml"
H100 = PRESETS["h100-sxm"]
# Every kernel at its peak; launches, waits and links for nothing.
IDEAL = replace(H100, node_latency=0.0, network_latency=0.0).with_rates(
    matmul_fraction=1.0, attention_fraction=1.0, bandwidth_fraction=1e9, link_fraction=1e9,
    dispatch_seconds=0.0, wait_seconds=0.0,
)  # fmt: skip


def test_presets_are_dense_and_of_the_data_sheets() -> None:
    """Peak bf16 and fp32 FLOP/s, memory and its bandwidth, NVLink and network, one way."""
    found = {
        name: (
            gpu.peak_flops / 1e12, gpu.fp32_flops / 1e12, gpu.memory / 1e9,
            gpu.memory_bandwidth / 1e12, gpu.node_bandwidth / 1e9, gpu.network_bandwidth / 1e9,
        )
        for name, gpu in PRESETS.items()
    }  # fmt: skip
    assert found == {
        "a100-sxm-80": (312, 19.5, 80, 2.039, 300, 25),
        "h100-sxm": (989, 67, 80, 3.35, 450, 50),
        "h200-sxm": (989, 67, 141, 4.8, 450, 50),
        "b200": (2250, 75, 180, 8, 900, 50),
    }
    with pytest.raises(UserError, match="--gpu v100: unknown; use one of a100-sxm-80"):
        preset("v100")


def test_collectives_take_the_slower_of_links_and_network() -> None:
    size = 8e9
    # 7/8 of 8 GB through NVLink at 80% of 450 GB/s; 3 steps of a tree.
    assert Group(8, 8).half(size, H100) == pytest.approx(7e9 / 360e9 + 3 * 4e-6)
    # 16 ranks, one on each node: one network card.
    assert Group(16, 1).half(size, H100) == pytest.approx(7.5e9 / 40e9 + 4 * 12e-6)
    # Two on each node use two cards.
    assert Group(16, 2).half(size, H100) == pytest.approx(7.5e9 / 80e9 + 4e-6 + 3 * 12e-6)
    # Eight on each: eight cards are as fast as NVLink's 360 GB/s, or 320.
    assert Group(16, 8).all_reduce(size, H100) == pytest.approx(
        2 * (7.5e9 / 320e9 + 3 * 4e-6 + 12e-6)
    )
    assert Group(1, 1).all_reduce(size, H100) == 0.0


def test_groups_lie_in_nodes_as_ranks_are_ordered() -> None:
    """TP 2, PP 2, DP 32 on nodes of 8: two replicas a node."""
    found = groups(language_recipe(XL), H100)
    assert (found.tensor, found.data, found.head) == (Group(2, 2), Group(32, 2), Group(64, 4))
    wide = language_recipe(XL, ["parallel.tensor_parallel_size=8", "model.num_attention_heads=16"])
    assert groups(wide, H100).data == Group(8, 1)


def test_ideal_kernels_give_the_flops_over_the_peak() -> None:
    """Without a pipeline, a step at full speed is the counted FLOPs, but for attention, of which a
    causal mask leaves half and FlashAttention's backward pass makes 2.5 of 2. The energy score is
    left out: its kernel is limited by instructions, which cost nothing here."""
    recipe = language_recipe(
        XL, ["parallel.pipeline_parallel_size=1", "parallel.tensor_parallel_size=1"]
    )
    counts = flops.count(recipe, tokens=0)
    model = recipe.model
    assert model.kind == "calm"
    core = 16 * 4 * model.hidden_size * recipe.num_patches / model.patch_size
    executed = counts.train_flops_per_token_ours - 3 * core + 3.5 / 2 * core
    seconds = executed * recipe.tokens_per_step / recipe.world_size / H100.peak_flops
    without_score = replace(IDEAL, fp32_flops=1e30)
    assert step_time(recipe, without_score).seconds == pytest.approx(seconds, rel=1e-6)


def test_terms_add_up_and_bubble_has_its_closed_form() -> None:
    overrides = ["training.micro_batch_size=1"]
    recipe = language_recipe(XL, overrides)
    time = step_time(recipe, IDEAL)
    assert sum(time.terms.values()) == pytest.approx(time.seconds)
    stages = [sum(stage.values()) for stage in time.stages]
    # 1F1B: every micro-batch passes the slowest stage, the first and last one the others.
    assert time.seconds == pytest.approx(8 * max(stages) + sum(stages) - max(stages))
    virtual = language_recipe(XL, [*overrides, "parallel.virtual_pipeline_size=2"])
    halves = step_time(virtual, IDEAL).terms["pipeline bubble"]
    assert halves == pytest.approx(time.terms["pipeline bubble"] / 2, rel=0.1)


def test_launches_and_waits_cost_what_nothing_hides() -> None:
    """A host slower than the device: a micro-batch takes as long as its launches, 788 of CALM-M; it
    waits once a step, and with ZeRO-3 after each micro-batch as well."""
    slow = H100.with_rates(dispatch_seconds=1e-3, wait_seconds=2.0)
    path = ROOT / "recipes" / "calm_m.yaml"
    time = step_time(language_recipe(path), slow)
    (stage,) = time.stages
    assert sum(stage.values()) == pytest.approx(0.788)
    number = language_recipe(path).num_micro_batches
    assert time.terms["waits of the host"] == 2.0
    partitioned = step_time(language_recipe(path, ["parallel.zero_stage=3"]), slow)
    assert partitioned.terms["waits of the host"] == 2.0 * (1 + number)
    # All launches are hidden.
    assert "kernel launches" not in step_time(language_recipe(path), H100).terms


def test_launches_of_a_part_are_hidden_as_far_as_the_queue_goes() -> None:
    """The energy score by torch has 35 launches for every 64 positions: more than CUDA holds."""
    recipe = language_recipe(ROOT / "recipes/calm_m.yaml", ["training.energy_kernel=torch"])
    launched = 35 * 8 * 2048 / 64 * H100.rates.dispatch_seconds
    found = step_time(recipe, H100)
    (stage,) = found.stages
    expected = launched - stage["energy score"] - 1024 * H100.rates.dispatch_seconds
    assert stage["kernel launches"] == pytest.approx(expected)
    assert expected > 0.05


def test_recomputation_costs_a_forward_pass_of_the_layers() -> None:
    plain, again = (
        step_time(language_recipe(XL, [f"parallel.recompute={value}"]), IDEAL)
        for value in ("false", "true")
    )
    assert "recomputation" not in plain.terms
    # Products backward are twice those forward, attention's 2.5 times.
    assert 3 < plain.terms["layers"] / again.terms["recomputation"] < 3.5


def test_slower_rates_take_longer() -> None:
    recipe = language_recipe(XL)
    usual = step_time(recipe, H100).seconds
    for name in ("matmul_fraction", "attention_fraction", "bandwidth_fraction", "link_fraction"):
        slower = H100.with_rates(**{name: getattr(Rates(), name) / 2})
        assert step_time(recipe, slower).seconds > usual


def test_storage_and_checkpoint() -> None:
    recipe = language_recipe(XL)
    # 4 bytes of a token, 2 x 128 fp16 numbers for 4 of them.
    assert latent_bytes_per_token(recipe) == 4 + 2 * 2 * 128 / 4
    on_the_fly = language_recipe(
        XL, ["data.latents=on_the_fly", "model.autoencoder=runs/autoencoder"]
    )
    assert latent_bytes_per_token(on_the_fly) == 4
    small = language_recipe(XL, ["model.vocab_size=65536"])
    assert latent_bytes_per_token(small) == 2 + 2 * 2 * 128 / 4
    # A store's own description agrees.
    for planned, dtype in ((recipe, "uint32"), (small, "uint16")):
        plan = StorePlan(
            variant="fp16",
            block_size=planned.block_size,
            patch_size=4,
            latent_size=128,
            vocab_size=flops.known_size(planned.model, "vocab_size"),
            tokenizer=TokenizerInfo(
                sha256="0" * 64, file="tokenizer.json", begin_id=0, end_id=1, pad_id=None
            ),
            autoencoder=AutoencoderInfo(sha256="0" * 64, file="ae"),
            corpus_sha256="0" * 64,
            seed=0,
            token_dtype=dtype,  # type: ignore[arg-type]
        )
        assert latent_bytes_per_token(planned) == plan.sample_bytes / plan.block_size
        plan = plan.model_copy(update={"latent_dtype": "int8"})
        found = latent_bytes_per_token(planned, int8=True)
        assert found == pytest.approx(plan.sample_bytes / plan.block_size)
    # bf16 weights of the backbone, fp32 masters and moments of all.
    head = 170_979_968
    assert checkpoint_bytes(recipe) == 1_829_793_408 * 12 + (1_829_793_408 - head) * 2


def test_latents_stored_or_on_the_fly() -> None:
    """Each is compared with the other; encoding takes what its FLOPs take at the fp32 rate."""
    stored = language_recipe(XL)
    flying = language_recipe(XL, ["data.latents=on_the_fly", "model.autoencoder=ae"])
    one, two = (predict(recipe, H100) for recipe in (stored, flying))
    assert "encoder" not in one.time.terms
    data = [training_cost(prediction, Reliability())["data"] for prediction in (one, two)]
    assert data[0]["other_latents"]["latents"] == "on_the_fly"
    assert data[0]["other_latents"]["bytes_per_token"] == data[1]["bytes_per_token"] == 4
    longer = data[0]["other_latents"]["step_longer_by"]
    assert longer == pytest.approx(two.time.seconds / one.time.seconds - 1)
    assert data[1]["other_latents"]["step_longer_by"] == pytest.approx(1 / (1 + longer) - 1)
    assert longer > 0.001
    assert isinstance(stored.model, CalmModel)
    encoder = flops.count_autoencoder(stored.model, 0).part("encoder").forward_flops_per_token
    ideal = step_time(flying, IDEAL).terms["encoder"]
    # The last of two stages encodes; its tensor-parallel ranks share the tokens.
    tokens = flying.tokens_per_step / flying.data_parallel_size
    shared = flying.parallel.tensor_parallel_size * flying.parallel.pipeline_parallel_size
    assert ideal == pytest.approx(encoder * tokens / shared / IDEAL.fp32_flops, rel=0.01)
    assert (
        training_cost(predict(language_recipe(TRANSFORMER), H100), Reliability())["data"][
            "other_latents"
        ]
        is None
    )


def test_best_interval_is_the_best() -> None:
    """Young's interval against a search over all intervals."""
    write, mtbf = 20.0, 40_000.0

    def at(interval: float) -> float:
        return Goodput(mtbf, write, 5.0, 600.0, interval).goodput

    best = max((at(float(interval)), interval) for interval in range(20, 5000))
    assert at(math.sqrt(2 * 5 * mtbf)) == pytest.approx(best[0], abs=1e-4)
    # Twice the interval, or half, is worse.
    assert best[0] > at(2 * math.sqrt(2 * 5 * mtbf)) and best[0] > at(math.sqrt(5 * mtbf / 2))


def test_goodput_of_a_recipe() -> None:
    recipe, reliability = language_recipe(XL), Reliability()
    found = goodput(recipe, H100, reliability, None)
    assert found.mtbf_seconds == 6300 * 3600 / 16
    assert found.write_seconds == pytest.approx(checkpoint_bytes(recipe) / 16e9)
    assert found.interval_seconds == math.sqrt(2 * found.stall_seconds * found.mtbf_seconds)
    shared = checkpoint_bytes(recipe) / 128 / 1e10
    assert found.stall_seconds == pytest.approx(0.08 + shared)
    # A rank's whole state, 12 bytes a parameter, comes to the first replica.
    sharded = language_recipe(XL, ["parallel.distributed_optimizer=true"])
    plain, gathered = (stage_memory(one, 0).optimizer for one in (recipe, sharded))
    assert plain == pytest.approx(32 * gathered, rel=1e-6)
    stall = goodput(sharded, H100, reliability, None).stall_seconds
    assert stall - found.stall_seconds == pytest.approx(plain / 1e9)
    waiting = language_recipe(XL, ["checkpoint.async=false"])
    assert goodput(waiting, H100, reliability, None).stall_seconds == found.write_seconds
    # A checkpoint begins when the one before is written.
    slow = Reliability(write_bandwidth=1e4)
    assert goodput(recipe, H100, slow, None).interval_seconds == checkpoint_bytes(recipe) / 16e4


def test_cost_is_steps_over_goodput() -> None:
    prediction = predict(language_recipe(XL), H100)
    run = training_cost(prediction, Reliability())
    hours = 250_000 * prediction.time.seconds / 3600
    assert run["gpu_hours"] == pytest.approx(128 * hours / run["failures"]["recipe"]["goodput"])
    best = training_cost(prediction, Reliability(), best_interval=True)
    assert best["gpu_hours"] == pytest.approx(128 * hours / run["failures"]["best"]["goodput"])
    assert run["price"] is None


def test_a_checkpoint_waits_for_the_one_before() -> None:
    """Cycles of training, waiting for the writer and copying, gone through one by one."""
    recipe = language_recipe(XL)
    for interval in (0.3, 1.0, 5.0):
        found = goodput(recipe, H100, Reliability(), interval)
        copying = goodput(recipe, H100, Reliability(), None).stall_seconds
        now, written, trained = 0.0, 0.0, 0.0
        for _ in range(1000):
            now, trained = now + interval, trained + interval
            now = max(now, written) + copying
            written = now + found.write_seconds
        losses = interval / 2 + found.write_seconds + 600
        failures = found.mtbf_seconds / (found.mtbf_seconds + losses)
        assert found.goodput == pytest.approx(trained / now * failures, rel=0.01), interval
    # The whole run is counted with the recipe's own interval.
    often = language_recipe(XL, ["checkpoint.every=1"])
    rare = training_cost(predict(recipe, H100), Reliability())["hours"]
    assert training_cost(predict(often, H100), Reliability())["hours"] > 4 * rare


def test_groups_that_do_not_divide_a_node_wait_for_the_network() -> None:
    recipe = language_recipe(XL, ["parallel.world_size=12", "training.global_batch_size=3"])
    for node, per_node in ((8, 2), (3, 1), (1, 1)):
        assert groups(recipe, replace(H100, gpus_per_node=node)).tensor == Group(2, per_node)


def test_search_proposes_only_what_loads_and_fits() -> None:
    recipe = language_recipe(XL)
    found = search(recipe, H100, 128)
    seconds = [prediction.time.seconds for prediction in found.fitting]
    assert seconds == sorted(seconds) and seconds[0] <= predict(recipe, H100).time.seconds
    for prediction in found.fitting[:20]:
        loaded = language_recipe(XL, layout_overrides(prediction.recipe))
        assert loaded == prediction.recipe
        assert prediction.fits
    assert all(prediction.recipe.world_size == 128 for prediction in found.out_of_memory)
    assert not any(prediction.fits for prediction in found.out_of_memory)
    # The recipe's own words.
    said = found.refused["parallel.virtual_pipeline_size"][0]
    with pytest.raises(RecipeError, match="needs a number of micro-batches that is a"):
        language_recipe(
            XL,
            ["parallel.virtual_pipeline_size=2", "training.micro_batch_size=8"],
        )
    assert "needs a number of micro-batches that is a multiple" in said
    judged = found.slower_by().total() + 1 + found.lacking().total()
    assert judged + sum(map(len, found.refused.values())) == found.tried


def test_search_ends_on_any_number_of_gpus() -> None:
    found = search(language_recipe(XL), H100, 800_000_000)
    # No more stages than layers.
    assert not found.fitting and 0 < found.tried < 400


def test_context_parallelism_leaves_no_room_for_some_layouts() -> None:
    recipe = language_recipe(XL, ["parallel.context_parallel_size=2"])
    found = search(recipe, H100, 16)
    assert found.fitting
    said = found.refused["parallel.world_size"]
    assert any("16 processes cannot be cut into replicas of 32" in text for text in said)


def test_plan_is_plain_and_fits_a_terminal() -> None:
    values = full_plan(language_recipe(XL), H100, Reliability(), 128)
    assert json.loads(json.dumps(values)) == values
    assert values["fits"] and len(values["best"]) == BEST
    text = format_full_plan(values)
    assert max(map(len, text.splitlines())) <= 100
    assert ": fits" in text and "Best layouts" in text


def big() -> dict[str, Any]:
    """70B on eight GPUs."""
    return full_plan(scaling_recipe("CALM 70B"), H100, Reliability(), 8)


def test_out_of_memory_is_said() -> None:
    values = big()
    assert not values["fits"] and values["best"] == [] and values["best_run"] is None
    text = format_full_plan(values)
    assert "DOES NOT FIT: out of memory" in text and "No layout fits" in text
    assert values["search"]["out_of_memory"] > 0


def test_own_layout_that_is_refused_is_said() -> None:
    values = full_plan(language_recipe(XL), H100, Reliability(), 24)
    assert values["recipe"] is None and not values["fits"] and values["best"]
    text = format_full_plan(values)
    assert (
        "is refused on this number of GPUs" in text
        and "training.global_batch_size: 256 is not" in text
    )


def test_scaling_recipes_have_their_sizes() -> None:
    sizes = {name: flops.count(scaling_recipe(name)) for name in MODELS}
    assert sizes["CALM-XL"].parameters == flops.count(language_recipe(XL)).parameters
    assert 69e9 < sizes["CALM 70B"].parameters < 75e9


def test_published_runs_are_within_a_fifth() -> None:
    """Plausibility, not a fit: no constant was chosen for it."""
    for run in PUBLISHED:
        assert run.prediction().mfu() == pytest.approx(run.mfu, rel=0.2), run.name
    gpt = flops.count(PUBLISHED[1].prediction().recipe, tokens=0).parameters
    assert gpt == pytest.approx(175e9, rel=0.01)


def test_autoencoders_are_not_planned() -> None:
    done = plan_tool("recipes/autoencoder.yaml")
    assert done.returncode == 2 and "the planner knows language models" in done.stderr


def plan_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_python(), str(ROOT / "tools" / "plan.py"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_tool(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = plan_tool(str(XL), "--nodes", "16", "--price", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values["recipe"]["run"]["price"] == 2 * values["recipe"]["run"]["gpu_hours"]
    assert "cost" in done.stdout
    assert "Infinity" not in file.read_text(encoding="utf-8")
    assert values["cluster"]["rates"]["draws_per_second"] is None  # no limit
    slower = plan_tool(str(XL), "--matmul-fraction", "0.35", "--json", "-")
    assert json.loads(slower.stdout)["recipe"]["step_seconds"] > values["recipe"]["step_seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RECIPE: missing"),
        (["gone.yaml"], "gone.yaml"),
        ([str(XL), "--gpu", "v100"], "--gpu v100: unknown"),
        ([str(XL), "--price", "0"], "give a number from 1e-12 to 1e18"),
        ([str(XL), "--write-bandwidth", "1e-300"], "give a number from 1e-12 to 1e18"),
        ([str(XL), "--json", ""], "--json: is empty: give a file"),
        ([str(XL), "--price", "abc"], "invalid number value: 'abc'"),
        ([str(XL), "--link-fraction", "1.5"], "give a number from 1e-06 to 1"),
        ([str(XL), "--nodes", "2", "parallel.world_size=32"], "the options, which give 16 GPUs"),
        ([str(XL), "--nodes", "2", "model.hidden_size=x"], "model.hidden_size"),
        ([str(XL), f"training.steps=1{'0' * 400}"], "training.steps: found 1000"),
        ([str(XL), "--published"], f"{XL}: --published does not use it"),
        (["--published", "--price", "2"], "--price: --published does not use it"),
        (["--scaling", "a.svg", "--nodes", "2"], "--nodes: --scaling does not use it"),
        (["--scaling", "a.svg", "--gpu", "local"], "--scaling needs a kind of GPU"),
        (["--scaling", "plot.xyz"], "ends in .svg or .png"),
        ([str(XL), "--gpu", "local", "--nodes", "2"], "measures one machine"),
        ([str(ROOT / "recipes" / "autoencoder.yaml")], "the planner knows language models"),
    ],
)
def test_tool_refuses(arguments: list[str], message: str) -> None:
    done = plan_tool(*arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_the_recipe_is_checked_with_the_nodes_given() -> None:
    """TP 8 does not divide the 4 processes that the recipe plans for by default."""
    eight = ["parallel.tensor_parallel_size=8", "model.num_attention_heads=16"]
    done = plan_tool(str(XL), "--nodes", "2", *eight, "--json", "-")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert (values["gpus"], values["recipe"]["tensor"], values["recipe"]["data"]) == (16, 8, 1)
    # What does not divide them is said beside what does.
    done = plan_tool(str(XL), "--nodes", "3", *eight)
    assert done.returncode == 0 and "24 processes cannot be cut" in done.stdout, done.stderr


def test_words_of_a_plan() -> None:
    small = language_recipe(ROOT / "recipes" / "transformer_s.yaml", ["training.steps=1"])
    cluster = replace(H100, price=0.01)
    text = format_full_plan(full_plan(small, cluster, Reliability(), 8))
    assert "(1 node)" in text and "int8" not in text
    assert re.search(r"0\.00\d+ GPU-hours, cost \d", text), text


def test_this_machine_is_measured(tmp_path: Path) -> None:
    """Two processes at a time; rates of any machine that runs the tests."""
    file = tmp_path / "plan.json"
    tiny = str(ROOT / "recipes" / "calm_tiny.yaml")
    done = plan_tool(tiny, "--gpu", "local", "--gpus-per-node", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    values = json.loads(file.read_text(encoding="utf-8"))
    cluster = values["cluster"]
    assert values["gpus"] == 2 and values["fits"] is False  # TP 2 x PP 2 needs four.
    assert values["best"][0]["step_seconds"] > 0
    assert 1e8 < cluster["peak_flops"] < 1e16 and 1e8 < cluster["memory_bandwidth"] < 1e14
    assert 1e6 < cluster["node_bandwidth"] < 1e13 and 0 < cluster["node_latency"] < 1
    assert 1e5 < cluster["rates"]["draws_per_second"] < 1e14


def test_stages_between_the_first_and_the_last_have_no_table() -> None:
    """Those with as many layers as the first one, too."""
    overrides = ["parallel.pipeline_parallel_size=4", "parallel.world_size=1024",
                 "training.micro_batch_size=1", "parallel.stage_layers=[4,4,4,4]"]  # fmt: skip
    recipe = language_recipe(ROOT / "recipes" / "transformer_m.yaml", overrides)
    first, second, third, _ = (sum(stage.values()) for stage in step_time(recipe, H100).stages)
    assert second == third < first
