"""Every command in README.md and docs/*.md is run, or stands in a list with the reason why not.

They run in the order of the pages, in one directory, as a user would type them: on a small corpus,
with the tiny recipes under the large ones' names (`SMALLER`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from launches import TIMEOUT_SECONDS, free_port, kill_tree
from warm import warm_python

ROOT = Path(__file__).parents[2]
# The README comes first: it makes what the other pages' commands use.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("apptainer", "bash", "chmod", "deepspeed", "docker", "for", "pip", "printf", "python",
            "sbatch", "srun", "tensorboard", "torchrun", "wandb")  # fmt: skip

# The first that matches the whole command decides.
RUN = [
    r"python tools/(prepare_corpus|runs|evaluate|generate|encode_text|report|flops_report)\.py\b"
    r"(?!.* (runs/(ablation|released_m)|--checkpoint CALM-M|--inference)).*",
    r"python tools/(verify|inspect)_data\.py .*",
    r"python tools/plan\.py (?!.*--gpu local|--scaling \S+$).*",
    r"for split in (?!.* runs/(ablation|released_m)).*encode_latents.*done",
    r"torchrun --nproc_per_node 8 tools/train_autoencoder\.py recipes/autoencoder\.yaml",
    r"deepspeed --quiet tools/train\.py recipes/(calm_m|transformer_s)\.yaml",
    r"python tools/train\.py recipes/.* --dry-run",
    r"python tools/train\.py recipes/calm_m\.yaml run\.dir=\S+ run\.continue_from=.*",
    r"python tools/encode_latents\.py .* --begin",
    r"python tools/encode_latents\.py --append-to .*",
    r"bash slurm/study\.sh --dry-run",
    r"wandb sync runs/calm_m/wandb/offline-run-\*",
]
# With --full only: more launches of several processes, and what continues from the others' results.
FULL = [
    r"python tools/plan\.py .*--gpu local.*",
    r"deepspeed --quiet --num_accelerators [24] tools/train\.py recipes/calm_tiny\.yaml .*",
    r"python tools/prepare_corpus\.py --out runs/ablation .*",
    r"for split in .* runs/(ablation|released_m).*done",
    r"python tools/train_autoencoder\.py recipes/autoencoder_tiny\.yaml .* SWITCHES",
    r"python tools/convert_checkpoint\.py (import|export)-hf .*",
    r"python tools/(evaluate|generate)\.py --checkpoint (CALM-M|runs/released_m) .*",
    r"deepspeed --quiet tools/train\.py runs/released_m/recipe\.yaml .*",
    r"python tools/encode_latents\.py .* --out data/tokens_8192/train",
    r"deepspeed --quiet tools/train\.py recipes/calm_m\.yaml .* data\.latents=on_the_fly .*",
]
NOT_RUN = {
    r"python tools/plan\.py --scaling \S+": "a minute: the same with --json is run",
    r"bash tools/quickstart\.sh.*": "minutes: tests/quickstart does, with --full",
    r"bash tools/run_tests\.sh.*": "it runs this test",
    r"python3\.11 -m venv .*|pip install .*": "tools/_venv.sh has installed what runs this test",
    r"(docker|apptainer) build .*": "gigabytes: tests/unit/test_image.py checks its commands",
    r"printf .*|chmod \+x calm_python": "a script around an image that is not built here",
    r"((RECIPE|CALM_PYTHON)=\S+ )?sbatch .*": "tests/slurm submits every script to a real Slurm",
    r"python tools/benchmark\.py .*": "minutes, and 5 GB: tests/unit/test_benchmark.py, smaller",
    r"python tools/flops_report\.py --inference .*": "shows what the benchmark has measured: "
    "tests/unit/test_report_inference.py",
    r"(torchrun --nnodes|deepspeed --quiet --hostfile) .*": "several machines: "
    "tests/slurm has them, with srun",
    r"torchrun --nproc-per-node 2 tools/(evaluate|generate)\.py .*": "tests/distributed/"
    "test_shared_models.py does",
    r"PYTHONPATH=\. python tests/distributed/planner_validation\.py .*": "half an hour: "
    "tests/distributed/test_planner_bytes.py compares the bytes of smaller trainings",
    r"python tools/rehearse\.py .*": "needs a CUDA build of torch: tests/rehearsal, with --full",
    r"python tools/gpu_check\.py .*": "needs a GPU: tests/unit/test_gpu_check.py, on a CPU",
    r"python tools/study\.py .*": "an hour: tests/unit/test_study.py, a smaller plan",
    r"srun --ntasks 64 .*": "64 tasks: tests/unit/test_units.py and test_latents_parts.py, fewer",
    r"tensorboard .*": "a server; tests/unit/test_schedule_metrics.py reads the event files",
}
SMALLER = [
    (r"/data/books|'hf://\S+'", "text"),
    (r"tokenizer\.model", "tokenizer.json"),
    (r"--block-size [0-9]+", "--block-size 64"),
    # `python` has the stack imported, and so have the ranks that it starts. That `deepspeed` has
    # not shows what a user sees of the imports.
    (
        r"torchrun --nproc_per_node 8",
        'python "$(command -v torchrun)" --standalone --nproc_per_node 2',
    ),
    (r"^deepspeed", "deepspeed --master_port PORT"),
    (r"^(?!.*(?:--dry-run|tools/plan))(.*)recipes/", r"\1small/"),
    (r"docs/scaling\.svg", "scaling.svg"),
    (r"training\.steps=\d+", "training.steps=2"),
    (r"prepare_corpus\.py(?= --out runs/ablation)", "prepare_corpus.py --corpus text"),
    (r"data/latents/selected", "data/latents/train"),
    (r"^wandb sync", "wandb sync --dry-run"),
    (r"SWITCHES", "model.kl_weight=0"),
    # flops.md: the quickstart is not run here, but its models have been trained.
    (r"runs/quickstart/calm runs/quickstart/transformer", "runs/calm_m"),
    (r"runs/quickstart/autoencoder --out", "runs/autoencoder --out"),
    # An imported model trains on the paper's batches where nothing else is said.
    (
        r"(train\.py runs/released_m/recipe\.yaml)",
        r"\1 training.global_batch_size=8 training.micro_batch_size=4",
    ),
    (r"wikitext_document_level-test\.json (.*)", r"text \1 --block-size 64"),
    # paper.md: what the README's commands have trained takes the place of the released models.
    (r"--autoencoder CALM-Autoencoder", "--autoencoder runs/autoencoder"),
]


@dataclass(frozen=True)
class Command:
    """A command as it stands on a page."""

    page: str
    text: str

    def small(self) -> str:
        """What is run in its place."""
        return self.replaced()[0].replace("PORT", str(free_port()))

    def replaced(self) -> tuple[str, set[str]]:
        """The command after SMALLER, and the patterns that changed it."""
        text, used = self.text, set()
        for pattern, replacement in SMALLER:
            text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            used |= {pattern} if count else set()
        return text, used


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a page's code blocks: without comments, with continued lines joined."""
    fences = re.findall(
        r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    for block in (text for language, text in fences if language in ("", "bash")):
        text = re.sub(r"\s+#\s.*$", "", block.replace("\\\n", " "), flags=re.MULTILINE)
        loop: list[str] = []
        for line in map(str.strip, text.splitlines()):
            line = re.sub(r"\s+", " ", line)
            if loop or line.startswith("for "):
                loop.append(line)
                if line == "done":
                    yield Command(page.name, "\n".join(loop))
                    loop = []
            elif re.match(rf"([A-Z_]+=\S+ )?({'|'.join(PROGRAMS)})[0-9.]* ", line):
                yield Command(page.name, line)


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def matches(patterns: list[str], command: Command) -> bool:
    return any(re.fullmatch(pattern, command.text, re.DOTALL) for pattern in patterns)


def test_no_command_is_overlooked() -> None:
    known = [*RUN, *FULL, *NOT_RUN]
    unknown = [f"{command.page}: {command.text}" for command in COMMANDS
               if not matches(known, command)]  # fmt: skip
    assert not unknown, f"add them to RUN, FULL or NOT_RUN in {Path(__file__).name}"
    unused = [pattern for pattern in known
              if not any(matches([pattern], command) for command in COMMANDS)]  # fmt: skip
    used = set().union(*(command.replaced()[1] for command in COMMANDS))
    unused += [pattern for pattern, _ in SMALLER if pattern not in used]
    assert not unused, "these match no command of a page: remove or correct them"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fences(page: Path) -> None:
    """Only there are they looked for: code that is only indented would not be run."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(rf"^ {{4,}}(?:{'|'.join(PROGRAMS)}) .*", text, re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a small corpus and a tokenizer, and ``small/`` beside ``recipes/``. In it
    ``login/``, one without any data, where dry runs of the large recipes work, too."""
    from calm_dist.text.tokenizer import train_tokenizer

    place = tmp_path_factory.mktemp("docs")
    (place / "login").mkdir()
    for name in ("tools", "recipes", "slurm"):
        (place / name).symlink_to(ROOT / name)
        (place / "login" / name).symlink_to(ROOT / name)
    # The page of results and what it is made from.
    shutil.copytree(ROOT / "docs" / "results", place / "docs" / "results")
    shutil.copy(ROOT / "docs" / "results.md", place / "docs")
    (place / "text").mkdir()
    library = Path(json.__file__).parents[1]
    texts = sorted((*library.glob("json/*.py"), *library.glob("email/*.py")))
    for file in texts:
        shutil.copy(file, place / "text" / f"{file.stem}.{file.parent.name}.txt")
    read = (file.read_text(encoding="utf-8") for file in texts)
    train_tokenizer(read, 300, place / "tokenizer.json")
    (place / "small").mkdir()
    for kind, names in (("autoencoder", ("autoencoder", "autoencoder_tiny")),
                        ("calm", ("calm_m", "calm_tiny")),
                        ("transformer", ("transformer_s",))):  # fmt: skip
        for name in names:
            (place / "small" / f"{name}.yaml").write_text(small_recipe(kind, name))
    # What the quickstart would have made.
    (place / "runs" / "quickstart").mkdir(parents=True)
    (place / "runs" / "quickstart" / "latents").symlink_to(place / "data" / "latents")
    (place / "runs" / "quickstart" / "tokens").symlink_to(place / "data" / "tokens")
    (place / "runs" / "quickstart" / "autoencoder").symlink_to(place / "runs" / "autoencoder")
    return place


def small_recipe(kind: str, name: str) -> str:
    """The tiny recipe of a kind, smaller, with the places of recipe ``name``."""
    values, large = (
        yaml.safe_load((ROOT / "recipes" / f"{file}.yaml").read_text(encoding="utf-8"))
        for file in (f"{kind}_tiny", name)
    )
    values["run"], values["data"]["path"] = large["run"], large["data"]["path"]
    if name == "autoencoder_tiny":
        values["run"] = {"dir": "runs/never"}
    values["data"]["block_size"] = 64
    values["model"] |= {"vocab_size": None, "hidden_size": 32, "intermediate_size": 64}
    if kind == "calm":
        values["model"] |= {"latent_size": 16, "autoencoder_size": None}
        del values["model"]["autoencoder_size"]
    elif kind == "autoencoder":
        values["model"] |= {"latent_size": 16}
    if not name.endswith("_tiny"):
        values.pop("parallel", None)
    values["training"] |= {"steps": 2, "global_batch_size": 8, "micro_batch_size": 4}
    values["evaluation"] = {"blocks": 4, "samples": 2}
    return yaml.safe_dump(values)


def run(command: str, place: Path) -> str:
    """Run a command as in a shell; returns what it printed.

    Fails where it fails, warns, or prints lines of steps that no terminal of 80 columns holds.
    """
    started = subprocess.Popen(
        ["bash", "-euc", command],
        cwd=place / "login" if re.search(r"train.py .*--dry-run|tools/plan", command) else place,
        env={
            **os.environ,
            # `python` with the stack imported; deepspeed starts the real one.
            "PATH": os.pathsep.join(
                [
                    str(Path(warm_python()).parent),
                    str(Path(sys.executable).parent),
                    os.environ["PATH"],
                ]
            ),
            "PYTHONPATH": str(ROOT),
            "CALM_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A launcher that fails signals the group that it is in.
        start_new_session=True,
        text=True,
    )
    try:
        printed = started.communicate(timeout=TIMEOUT_SECONDS)[0]
    finally:
        if started.poll() is None:
            kill_tree(started)
    shown = f"$ {command}\n{printed[-3000:]}"
    assert started.returncode == 0, shown
    # Every score of an imported model says so, which paper.md explains.
    rest = re.sub(r"warning: .* training block size of an imported model is not known", "", printed)
    assert not re.search(r"warning|Traceback|\[INFO\]", rest, re.IGNORECASE), shown
    steps = [line for line in printed.splitlines() if line.startswith("step ")]
    assert max(map(len, steps), default=0) < 80, shown
    return printed


def test_commands(place: Path) -> None:
    """One test, since each continues from what those before it have made."""
    printed: dict[str, str] = {}
    for command in COMMANDS:
        if matches(RUN, command) and command.text not in printed:
            printed[command.text] = run(command.small(), place)
    assert "step 2/2  loss " in printed["deepspeed --quiet tools/train.py recipes/calm_m.yaml"]
    states = [line.split()[:4] for line in printed["python tools/runs.py"].splitlines()]
    assert ["runs/autoencoder", "autoencoder", "finished", "2/2"] in states
    assert ["runs/calm_m", "calm", "finished", "2/2"] in states
    assert (place / "runs" / "report" / "index.html").is_file()


@pytest.mark.full
def test_commands_that_go_on(place: Path) -> None:
    """Those of FULL, after those of `test_commands`."""
    if not (place / "runs" / "calm_m").is_dir():
        test_commands(place)
    run("python tools/convert_checkpoint.py export-hf runs/calm_m CALM-M", place)
    for command in COMMANDS:
        if matches(FULL, command):
            run(command.small(), place)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    """Links, and files that inline code or a command names."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
    for file in re.findall(r"\b(?:tools|recipes|slurm|tests|calm_dist)/[\w/]+\.\w+", text):
        assert (ROOT / file).exists(), f"{page.name}: {file}"
