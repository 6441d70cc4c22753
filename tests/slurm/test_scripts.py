"""The scripts as they stand: headers that Slurm accepts and recipes fit, and a clear end without
data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster_jobs import CPUS, GPUS, NODES, Jobs
from launches import ROOT

from calm_dist.recipe import load_recipe

TRAININGS = [
    *("calm_s", "calm_m", "calm_l", "calm_xl"),
    *("transformer_s", "transformer_m", "transformer_l", "autoencoder"),
]
SCRIPTS = [*TRAININGS, "encode", "evaluate", "report"]
# What each says without data, besides how to make it.
WITHOUT_DATA = {
    "encode": "DATA=data: has no corpus/train.jsonl",
    "evaluate": "runs/calm_m",
    "report": "RUNS=",
}
STORE = {"calm": "latents", "transformer": "tokens", "autoencoder": "tokens"}


def header(name: str) -> dict[str, str]:
    text = (ROOT / "slurm" / f"{name}.sh").read_text()
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))


def test_every_script_is_known() -> None:
    with_header = {p.stem for p in (ROOT / "slurm").glob("*.sh") if "#SBATCH" in p.read_text()}
    assert with_header == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_asks_for_what_every_site_has(name: str) -> None:
    asked = header(name)
    assert int(asked["nodes"]) <= NODES
    assert int(asked.get("gpus-per-node", 0)) <= GPUS
    assert int(asked["cpus-per-task"]) * int(asked["ntasks-per-node"]) <= CPUS
    # Known only to the site; without the last two a job is neither warned nor requeued.
    assert not {"partition", "account", "qos", "constraint", "mem", "mem-per-gpu"} & asked.keys()
    assert {"signal", "requeue"} <= asked.keys()
    # A folder that does not exist would end the job without a word.
    assert "/" not in asked["output"]


@pytest.mark.parametrize("name", TRAININGS)
def test_header_fits_the_recipe(name: str) -> None:
    asked, recipe = header(name), load_recipe(ROOT / "recipes" / f"{name}.yaml")
    ranks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert ranks == recipe.parallel.world_size
    assert ranks % recipe.parallel.model_parallel_size == 0
    replicas = ranks // recipe.parallel.model_parallel_size
    assert recipe.training.global_batch_size % (recipe.training.micro_batch_size * replicas) == 0


@pytest.mark.usefixtures("warm")
def test_every_script_as_it_stands_reaches_its_tool(jobs: Jobs) -> None:
    """All submitted unchanged, from a directory without data: each ends at once and says how to
    make what it lacks."""
    numbers = {name: jobs.submit(f"{name}.sh", [], []) for name in SCRIPTS}
    assert jobs.wait_for_end(*numbers.values()) == ["FAILED"] * len(SCRIPTS)
    for name, number in numbers.items():
        log = jobs.log(number)
        assert jobs.exit_code(number) == 2, log
        store = f"data/{STORE[name.split('_')[0]]}/train" if name in TRAININGS else ""
        assert WITHOUT_DATA.get(name, f"error: data store {store}: no such directory") in log
        if name in TRAININGS:
            assert f"python tools/encode_latents.py --out {store} --corpus" in log
        assert "Traceback" not in log and "requeued" not in log.replace("not requeued", "")


def test_outside_of_a_job(jobs: Jobs) -> None:
    said = jobs.call("bash", ROOT / "slurm" / "calm_xl.sh", check=False, CALM_DIST_ROOT=str(ROOT))
    assert "this is not a Slurm job; submit it: sbatch slurm/NAME.sh" in said


@pytest.mark.usefixtures("warm")
def test_a_script_finds_its_launcher_wherever_it_is_submitted_from(
    jobs: Jobs, tmp_path: Path
) -> None:
    """And takes nodes from the command line, and a recipe of the user's own."""
    mine, other = tmp_path / "mine.yaml", tmp_path / "a b"
    mine.write_text((ROOT / "recipes" / "calm_tiny.yaml").read_text())
    other.symlink_to(ROOT)
    options = ["--nodes=1", "--ntasks-per-node=4", "--gpus-per-node=4", "--output=%x-%j.out"]
    command = ["sbatch", "--parsable", *options, f"--chdir={tmp_path}"]
    arguments = ["data.path=nowhere"]
    numbers = []
    for directory, script in ((ROOT / "slurm", "./calm_s.sh"), (other, "slurm/calm_s.sh")):
        shell = f'cd "{directory}" && exec "$@"'
        words = ["bash", "-c", shell, "bash", *command, script, *arguments]
        numbers.append(jobs.call(*words, RECIPE=str(mine)).strip())
    # As sites do that set SBATCH_EXPORT.
    exported = f"--export=CALM_PYTHON,RECIPE={mine}"
    numbers.append(jobs.submit("calm_s.sh", [*options, exported], arguments))
    assert jobs.wait_for_end(*numbers) == ["FAILED"] * 3
    for number in numbers:
        assert "error: data store nowhere: no such directory" in jobs.log(number)


def test_settings_that_contradict_are_refused(jobs: Jobs) -> None:
    numbers = [
        jobs.submit("calm_s.sh", ["--ntasks=2"], []),
        jobs.submit("calm_s.sh", [], [], CALM_MAX_FAILURES="none"),
        jobs.submit("calm_s.sh", [], [], CALM_LAUNCHER="mpirun"),
        jobs.submit("calm_s.sh", [], [], CALM_LAUNCHER="deepspeed", CALM_CONTAINER="image.sif"),
    ]
    assert jobs.wait_for_end(*numbers) == ["FAILED"] * 4
    tasks, failures, launcher, container = map(jobs.log, numbers)
    assert "error: --ntasks=2: 1 nodes have 8 tasks each" in tasks
    assert "error: CALM_MAX_FAILURES=none: give a number from 1" in failures
    assert "error: CALM_LAUNCHER=mpirun: give srun or deepspeed" in launcher
    assert "error: CALM_CONTAINER: needs CALM_LAUNCHER=srun" in container
