"""The chain of a whole study with the tiny recipes, and encoding by an array of jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cluster_jobs import Jobs
from launches import ROOT
from warm import warm_python

pytestmark = pytest.mark.usefixtures("warm")

MODELS = ("calm_tiny", "transformer_tiny")
CHAIN = ["tokens", "autoencoder_tiny", "latents", "calm_tiny", "score-calm_tiny"]
CHAIN += ["transformer_tiny", "score-transformer_tiny", "report"]
SMALL = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
SMALL += ["--time=20", "--signal=B:USR1@20"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library, as tools/prepare_corpus.py prepares it."""
    from calm_dist.text.prepare import prepare_corpus

    directory = tmp_path_factory.mktemp("corpus")
    texts = [path.read_text(encoding="utf-8") for path in Path(json.__file__).parent.glob("*.py")]
    lines = (json.dumps({"text": text[:15000]}) for text in texts * 3)
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n")
    prepare_corpus(directory / "data", [str(directory / "text.jsonl")], vocab_size=512)
    return directory / "data"


class Study:
    """slurm/study.sh in a directory of its own, on a copy of the corpus."""

    def __init__(self, jobs: Jobs, corpus: Path) -> None:
        self.jobs, self.runs = jobs, jobs.directory / "runs"
        self.data = jobs.directory / "data"
        if not self.data.exists():
            self.data.mkdir()
            for path in corpus.iterdir():
                (self.data / path.name).symlink_to(path)

    def start(self, *options: str) -> str:
        settings = "training.steps=6 checkpoint.every=2 parallel.device=cpu logging.wandb=off "
        settings += "evaluation.blocks=2 evaluation.samples=2 model.vocab_size=512"
        own = "autoencoder_tiny:training.micro_batch_size=2 autoencoder_tiny:training.steps=20 "
        own += " ".join(f"{model}:parallel.pipeline_parallel_size=1" for model in MODELS)
        return self.jobs.call(
            *("bash", ROOT / "slurm" / "study.sh", "--models", " ".join(MODELS)),
            *("--autoencoder", "autoencoder_tiny", "--sbatch", " ".join(SMALL)),
            *(*settings.split(), *own.split(), *options),
            check=False,
            PARTS="4",
            CALM_PREFLIGHT="0",
        )

    def numbers(self, said: str) -> dict[str, str]:
        lines = (
            line.split(": submitted as job ") for line in said.splitlines() if "as job" in line
        )
        return {name: rest.split(",")[0] for name, rest in lines}


def test_the_study_runs_to_its_report_though_a_node_dies(jobs: Jobs, corpus: Path) -> None:
    study = Study(jobs, corpus)
    shown = study.start("--dry-run")
    assert [line.split(":")[0].split(" ")[0] for line in shown.splitlines()] == CHAIN
    assert not study.runs.exists()

    numbers = study.numbers(study.start())
    assert list(numbers) == CHAIN
    jobs.wait(lambda: jobs.states(numbers["autoencoder_tiny"]) == ["RUNNING"])
    node = jobs.call("squeue", "-h", "-j", numbers["autoencoder_tiny"], "-o", "%N").strip()
    jobs.cluster.kill_node(node)
    # In the meantime it is started again: nothing is submitted twice.
    assert "submitted" not in study.start()

    ended = dict(zip(CHAIN, jobs.wait_for_end(*numbers.values()), strict=True))
    jobs.cluster.start_node(node)
    logs = "".join(path.read_text() for path in (study.runs / "logs").glob("*.out"))
    assert ended == dict.fromkeys(CHAIN, "COMPLETED"), logs
    report = json.loads((study.runs / "report" / "report.json").read_text())
    assert {model["kind"] for model in report["models"]} == {"calm", "transformer"}
    assert all(model["train_flops"] > 0 for model in report["models"])
    assert report["comparison"]["brierlm_compares"] is True
    assert report["autoencoder"]["token_accuracy"] > 0

    again = study.start()
    assert list(study.numbers(again)) == ["report"] and again.count("already there") == 7
    jobs.wait_for_end(*study.numbers(again).values())


def test_a_study_whose_first_job_fails_leaves_nothing_pending(jobs: Jobs, corpus: Path) -> None:
    study = Study(jobs, corpus)
    (study.data / "tokens").write_text("in the way")
    numbers = study.numbers(study.start())
    ended = jobs.wait_for_end(*numbers.values())
    assert ended[0] == "FAILED" and set(ended[1:-1]) == {"CANCELLED"} and ended[-1] == "FAILED"


def test_an_array_of_jobs_encodes_into_one_store(jobs: Jobs, corpus: Path) -> None:
    """As one process does, to the byte, though all jobs are asked to end before their ranks have
    begun; these find the manifest and search nothing."""
    data = jobs.directory / "data"
    data.mkdir()
    for path in corpus.iterdir():
        (data / path.name).symlink_to(path)
    python = jobs.directory / "python"
    python.write_text(
        "#!/bin/bash\n[[ ${SLURM_RESTART_COUNT:-0} != 0 || $* = *--begin ]] || exec sleep 600\n"
        f'exec "{warm_python()}" "$@"\n'
    )
    python.chmod(0o755)
    environment = {"STORE": "tokens", "BLOCK_SIZE": "512", "PARTS": "6", "CALM_PYTHON": str(python)}
    number = jobs.submit("encode.sh", [*SMALL, "--array=0-1"], [], **environment)
    jobs.wait(lambda: jobs.log("*").count("ranks log to") == 2)
    assert (data / "tokens" / "train" / ".parts" / "manifest.json").is_file()
    jobs.call("scancel", "--batch", "--signal=USR1", number)
    assert set(jobs.wait_for_end(number)) == {"COMPLETED"}, jobs.log("*")
    logs = [file.read_text() for file in (data / "logs").glob("*/rank*.restart1.log")]
    # One that came late finds a finished store.
    joined = ["corpus: its files as they were found" in log or "complete" in log for log in logs]
    assert len(logs) == 4 and all(joined), logs
    # Each job itself and no other.
    assert jobs.log("*").count("exit code 75; requeued") == 2
    jobs.call(
        *(sys.executable, ROOT / "tools" / "encode_latents.py", "--variant", "tokens"),
        *("--tokenizer", data / "tokenizer.json", "--corpus", data / "corpus" / "train.jsonl"),
        *("--block-size", "512", "--patch-size", "4", "--parts", "6", "--out", data / "alone"),
    )
    made, alone = ({p.name: p.read_bytes() for p in (data / d).iterdir() if p.is_file()}
                   for d in ("tokens/train", "alone"))  # fmt: skip
    assert made == alone
    assert (data / "tokens" / "test" / "meta.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "calm_tiny transformer_tiny nosuch"], "nosuch.yaml"),
        (["--models", " "], "--models: is empty"),
        (["typo:training.steps=9"], "typo is not a recipe of this study"),
        (["calm_tiny:training.stepz=9"], "training.stepz"),
        (["--modles", "calm_tiny"], "--modles: unknown option"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    jobs: Jobs, corpus: Path, options: list[str], message: str
) -> None:
    said = Study(jobs, corpus).start(*options)
    assert "error: " in said and message in said and "submitted" not in said
