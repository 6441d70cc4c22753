"""The runs of a plan: trained and scored by the command-line tools, several at a time.

A finished run has a result in ``results/NAME.json`` and is skipped; an interrupted run resumes from
its newest checkpoint. The same command therefore completes whatever is left.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_dist.costs.flops import count
from calm_dist.data.store import read_meta
from calm_dist.errors import EXIT_DIVERGED, RecipeError, UserError
from calm_dist.files import replace_text
from calm_dist.recipe import Recipe, load_recipe
from calm_dist.runs.directory import FINISHED
from calm_dist.runs.listing import describe
from calm_dist.scores import summary_text
from calm_dist.study import data
from calm_dist.study.plan import Plan, PlannedRun, Texts
from calm_dist.study.result import result_of
from calm_dist.training.resolve import resolve

_log = logging.getLogger(__name__)

THREADS = 1
"""Threads of each training: several trainings use several cores better than one does."""


class FailedRunError(UserError):
    """A tool ended with an error, which is in the run's log."""


@dataclass(frozen=True)
class Runner:
    """Trains the runs of a plan below ``out``."""

    plan: Plan
    out: Path

    def run_all(self, runs: list[PlannedRun], jobs: int) -> list[str]:
        """Train and score all runs without a result, ``jobs`` at a time, autoencoders first.

        Returns:
            One line for each run that failed or whose autoencoder failed.
        """
        (self.out / "results").mkdir(parents=True, exist_ok=True)
        (self.out / "logs").mkdir(exist_ok=True)
        self._add_texts(runs)
        waiting = self._left(runs)
        done = len(runs) - len(waiting)
        failed: dict[str, str] = {}
        running: dict[Future[dict[str, Any]], PlannedRun] = {}
        with ThreadPoolExecutor(jobs) as pool:
            while waiting or running:
                for run in list(waiting):
                    if run.autoencoder in failed:
                        failed[run.name] = f"{run.name}: its autoencoder {run.autoencoder} failed"
                        waiting.remove(run)
                    elif len(running) < jobs and self._is_ready(run):
                        running[pool.submit(self.run_one, run)] = run
                        waiting.remove(run)
                if not running:
                    # Whatever is still waiting has an autoencoder that was not trained.
                    for run in waiting:
                        failed[run.name] = (
                            f"{run.name}: its autoencoder {run.autoencoder} has no finished "
                            f"training in {self._run_dir(str(run.autoencoder))}"
                        )
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    try:
                        result = future.result()
                    except UserError as error:
                        failed[run.name] = f"{run.name}: {error}"
                        _log.warning(failed[run.name])
                        continue
                    done += 1
                    _log.info(f"{done}/{len(runs)}  {_line(result)}")
        return list(failed.values())

    def _left(self, runs: list[PlannedRun]) -> list[PlannedRun]:
        """Runs without a result, and autoencoders needed by them that have only a result."""
        used = {run.autoencoder for run in runs if not self.result_file(run.name).is_file()}
        return [
            run
            for run in runs
            if not self.result_file(run.name).is_file()
            or (run.name in used and not self._is_trained(run.name))
        ]

    def run_one(self, run: PlannedRun) -> dict[str, Any]:
        """Train and score one run, and write its result.

        Raises:
            UserError: a tool ended with an error, or the recipe does not fit its data.
        """
        overrides = self._overrides(run)
        recipe = resolve(load_recipe(run.recipe, overrides))
        if run.flops is not None:
            overrides.append(f"training.steps={steps_for(recipe, run.flops)}")
        is_autoencoder = recipe.model.kind == "autoencoder"
        tool = "train_autoencoder.py" if is_autoencoder else "train.py"
        started = time.time()
        code = self._call(run, tool, str(run.recipe), *overrides)
        if code not in (0, EXIT_DIVERGED):
            raise FailedRunError(f"ended with code {code}; see {self._log(run)}")
        diverged = code == EXIT_DIVERGED
        if not diverged and not is_autoencoder:
            self._score(run, recipe)
        result = result_of(
            run.name, self._run_dir(run.name), overrides, diverged=diverged,
            autoencoder=run.autoencoder, seconds=time.time() - started, threads=THREADS,
        )  # fmt: skip
        if self.plan.texts is not None and not diverged and not is_autoencoder:
            result["texts"] = self._write_texts(run, self.plan.texts)
        self._save(run.name, result)
        return result

    def _save(self, name: str, result: dict[str, Any]) -> None:
        replace_text(self.result_file(name), json.dumps(result, indent=1) + "\n")

    def _add_texts(self, runs: list[PlannedRun]) -> None:
        """Write the texts of runs that were trained here before the plan asked for them."""
        for run in runs:
            if self.plan.texts is None or not self._is_trained(run.name):
                continue
            result = json.loads(self.result_file(run.name).read_text(encoding="utf-8"))
            if result["kind"] != "autoencoder" and "texts" not in result:
                result["texts"] = self._write_texts(run, self.plan.texts)
                self._save(run.name, result)

    def _write_texts(self, run: PlannedRun, wanted: Texts) -> list[dict[str, str]]:
        """One text for each temperature and prompt, beginning with the prompt."""
        written = []
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "texts.jsonl"
            for temperature in wanted.temperatures:
                code = self._call(
                    run, "generate.py", "--checkpoint", str(self._run_dir(run.name)),
                    *(word for prompt in wanted.prompts for word in ("--prompt", prompt)),
                    "--temperature", temperature, "--max-new-tokens", str(wanted.tokens),
                    "--json", str(file),
                )  # fmt: skip
                if code != 0:
                    raise FailedRunError(f"writing texts ended with {code}; see {self._log(run)}")
                lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
                written += [
                    {"temperature": temperature, "prompt": one["prompt"], "text": one["text"]}
                    for one in lines
                ]
        return written

    def _score(self, run: PlannedRun, recipe: Recipe) -> None:
        wanted = self.plan.evaluation
        code = self._call(
            run, "evaluate.py", "--checkpoint", str(self._run_dir(run.name)),
            "--data", str(data.store(self.out, store_patch_size(recipe), wanted.split)),
            "--blocks", str(wanted.blocks), "--samples", str(wanted.samples),
            *(["--all-checkpoints"] if run.all_checkpoints else []),
        )  # fmt: skip
        if code != 0:
            raise FailedRunError(f"scoring ended with code {code}; see {self._log(run)}")

    def _call(self, run: PlannedRun, tool: str, *arguments: str) -> int:
        """Run a tool with its output appended to the run's log; returns its exit code."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        with self._log(run).open("a", encoding="utf-8") as log:
            command = [sys.executable, str(data.TOOLS / tool), *arguments]
            print("$", *command, file=log, flush=True)
            return subprocess.run(
                command, stdout=log, stderr=log, env=environment, check=False
            ).returncode

    def _overrides(self, run: PlannedRun) -> list[str]:
        given = load_recipe(run.recipe, run.overrides)
        store = data.store(self.out, store_patch_size(given), "train")
        overrides = [
            *run.overrides,
            f"run.dir={self._run_dir(run.name)}",
            f"data.path={store}",
            f"data.block_size={self.plan.block_size}",
            f"model.vocab_size={read_meta(store).vocab_size}",
        ]
        if run.autoencoder is not None:
            overrides += [
                f"model.autoencoder={self._run_dir(run.autoencoder)}",
                "data.latents=on_the_fly",
            ]
        return overrides

    def _is_ready(self, run: PlannedRun) -> bool:
        return run.autoencoder is None or self._is_trained(run.autoencoder)

    def _is_trained(self, name: str) -> bool:
        """Whether a run was trained here, and is not only a result from elsewhere."""
        finished = describe(self._run_dir(name))["state"] == FINISHED
        return finished and self.result_file(name).is_file()

    def _run_dir(self, name: str) -> Path:
        return self.out / "runs" / name

    def adopt(self, results: list[dict[str, Any]]) -> int:
        """Copy results from elsewhere for runs that have none here; returns their number.

        Autoencoders are trained again if a run without a result needs them.
        """
        (self.out / "results").mkdir(parents=True, exist_ok=True)
        new = [one for one in results if not self.result_file(one["name"]).is_file()]
        for one in new:
            replace_text(self.result_file(one["name"]), json.dumps(one, indent=1) + "\n")
        return len(new)

    def result_file(self, name: str) -> Path:
        """The file of a run's result, which may not exist yet."""
        return self.out / "results" / f"{name}.json"

    def _log(self, run: PlannedRun) -> Path:
        return self.out / "logs" / f"{run.name}.log"


def steps_for(recipe: Recipe, flops: float) -> int:
    """Number of steps of a recipe that cost this many training FLOPs as executed here."""
    one = count(recipe, recipe.tokens_per_step).train_flops_ours
    return max(1, round(flops / one))


def store_patch_size(recipe: Recipe) -> int:
    """K of the store that a run reads; Transformers use the positions of CALMs with K = 4."""
    return 4 if recipe.model.kind == "transformer" else recipe.model.patch_size


def patch_sizes(runs: list[PlannedRun]) -> list[int]:
    """K of all stores that these runs read.

    Raises:
        RecipeError: a recipe cannot be trained.
    """
    sizes = set()
    for run in runs:
        try:
            sizes.add(store_patch_size(load_recipe(run.recipe, run.overrides)))
        except RecipeError as error:
            raise RecipeError(f"run {run.name}: {error}") from error
    return sorted(sizes)


def _line(result: dict[str, Any]) -> str:
    if result["diverged"]:
        return f"{result['name']}: diverged"
    if result["kind"] == "autoencoder":
        return f"{result['name']}: {result['token_accuracy']:.2%} of held-out tokens reconstructed"
    return (
        f"{result['name']}: {summary_text(result, ', ')}  {result['train_flops']:.3g} FLOPs, "
        f"{result['seconds']:.0f} s"
    )
