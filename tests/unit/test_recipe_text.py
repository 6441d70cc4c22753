"""Text of every kind arrives in a recipe as it was typed, through real shells and through YAML; and
files and messages that would have no end have one."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from calm_dist.errors import RecipeError, listed, shortened, shown
from calm_dist.files import on_one_line
from calm_dist.recipe import LARGEST_FILE, Recipe, load_recipe

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "recipes" / "calm_4_layers.yaml"

ODD = [
    *("/x/exp #3/auto", " a", "a ", '"q"', "'q'", "a: b", "[x", "{x", "*", "&", "!", "@", "~", "-"),
    *("- a", "-x", "C:\\new\\t", "ünï", "数", "🙂", "Null", "true", "1", "3e-4", "1e5", ".5"),
    *("0x1f", "1:30", "on", "off", "yes", "2024-01-01", "%x", "`a`", "|", ">", "?", "? a", "="),
    *("<<", "...", "---", "--- a", "$HOME", "$(id)", "a #", "#a", "a:", "\\", "\\n", ",", "]", "}"),
    *("a*b?c[d]", "x" * 300, "a b " * 60, " " * 200, "/a  b/c"),
]  # fmt: skip
# Not of a run's name, which is one line, but of a path.
ODD_PATHS = ["a\nb", "a\n", "\n", "\t", "a\tb", "\r", "a\r\nb", "\x85", "\u2028", "\ufeff", "\x7f"]
ODD_PATHS += ["\x1b[1m", "a\n---\nb", "a\\nb\n"]


def random_texts(number: int) -> list[str]:
    rng = random.Random(0)
    letters = " #:'\"[]{},&*!|>%@`-?~\n\t\r\\=.0123eExnulü\u2028\x85\ufeff🙂\x01\x7f$"
    return ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(number)]


@pytest.mark.parametrize("text", ODD + ODD_PATHS, ids=ascii)
def test_a_path_is_what_was_typed(text: str) -> None:
    recipe = load_recipe(TINY, [f"run.dir={text}", f"model.autoencoder={text}"])
    assert recipe.run.dir == recipe.model.autoencoder == text  # type: ignore[union-attr]
    assert load_recipe(TINY, [f"data.path={text}"]).data.sources[0].path == text


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_a_name_is_what_was_typed(text: str) -> None:
    assert load_recipe(TINY, [f"run.name={text}"]).run.display_name == text


def test_the_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    texts = iter(ODD + ODD_PATHS + random_texts(150))
    for first in texts:
        fields = {
            "run.dir": first,
            "data.cache_dir": next(texts, "x"),
            "data.path": next(texts, "y"),
        }
        values = load_recipe(TINY).to_dict()
        for name, text in fields.items():
            section, field = name.split(".")
            values[section][field] = text
        recipe = Recipe.from_dict(values)
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(file) == recipe
        # As tools of others read it.
        assert yaml.safe_load(file.read_text(encoding="utf-8")) == values


def test_text_that_may_be_absent() -> None:
    for absent in ("", "null"):
        assert load_recipe(TINY, [f"model.autoencoder={absent}"]).model.autoencoder is None  # type: ignore[union-attr]
    # A run directory may not, so that it is a name like any other.
    assert load_recipe(TINY, ["run.dir=null"]).run.dir == "null"


def test_a_mixture_is_yaml_and_a_path_with_a_bracket_is_a_path() -> None:
    mixture = load_recipe(TINY, ["data.path=[{path: 'a #1'}, {path: b, weight: 2}]"]).data.sources
    assert [(s.path, s.weight) for s in mixture] == [("a #1", 1.0), ("b", 2.0)]
    for path in ("[x", "{a", "[a] b", "[x]/y", "./[a]"):
        assert load_recipe(TINY, [f"data.path={path}"]).data.sources[0].path == path
    with pytest.raises(RecipeError, match=r"data.path: found"):
        load_recipe(TINY, ["data.path={path: a}"])


def test_other_fields_stay_yaml() -> None:
    recipe = load_recipe(
        TINY,
        ["training.steps= 7 # short", "logging.wandb='off'", "parallel.stage_layers=[2, 2]",
         "run={dir: 'a #b', name: c}"],
    )  # fmt: skip
    assert (recipe.training.steps, recipe.logging.wandb) == (7, "off")
    assert recipe.parallel.stage_layers == (2, 2)
    assert (recipe.run.dir, recipe.run.name) == ("a #b", "c")


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"run.dir: found 'x\\udcff'.*unicode"):
        load_recipe(TINY, [f"run.dir={os.fsdecode(b'x' + bytes([255]))}"])


def test_a_task_of_slurm_hands_arguments_on_as_they_are(tmp_path: Path) -> None:
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    environment = os.environ | {
        "SLURM_PROCID": "0", "SLURMD_NODENAME": "n", "CALM_LOGS": str(tmp_path),
        "SLURM_STEP_NUM_TASKS": "1",
    }  # fmt: skip
    arguments = [f"run.dir={text}" for text in ["tools/encode_latents.py", *ODD, *ODD_PATHS]]
    rank: list[str | Path] = ["bash", ROOT / "slurm" / "rank.sh", sys.executable, "-c", show]
    subprocess.run([*rank, *arguments], env=environment, check=True, timeout=60)
    assert json.loads((tmp_path / "rank0000.n.restart0.log").read_text()) == arguments


def test_a_study_submits_what_was_typed(tmp_path: Path) -> None:
    """The commands that it shows, read by a shell, are those that it would run."""
    data = tmp_path / "data#1'$x\"&;%j"
    for split in ("train", "valid", "test"):
        (data / "corpus").mkdir(parents=True, exist_ok=True)
        (data / "corpus" / f"{split}.jsonl").write_text("")
    names = [*ODD, "x parallel.device=cpu y", "a=b:c"]
    given = [f"calm_tiny:run.name={name}" for name in names]
    script = ROOT / "slurm" / "study.sh"
    command: list[str | Path] = ["bash", script, "--dry-run", "--models", "calm_tiny"]
    done = subprocess.run(
        [*command, "--autoencoder", "autoencoder_tiny", *given],
        env=os.environ | {"CALM_PYTHON": sys.executable, "DATA": str(data), "RUNS": f"{data}/runs"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown_commands = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    training = next(text for name, text in shown_commands.items() if name.startswith("calm_tiny"))
    words = json.loads(
        subprocess.run(
            ["bash", "-c", f"{shlex.quote(sys.executable)} -c "
             f"'import json, sys; print(json.dumps(sys.argv[1:]))' {training}"],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert [word for word in words if word.startswith("run.name=")] == [
        f"run.name={name}" for name in names
    ]
    assert f"data.path={data}/latents/train" in words
    assert f"--output={str(data).replace('%', '%%')}/runs/logs/%x-%j.out" in words
    # No training was asked to compute on CPUs: a name that says so does not count.
    assert "--device cpu" not in done.stdout


@pytest.mark.parametrize("name", ["a b", "a*", "a?", "a[b", "a\\b"])
def test_a_study_refuses_places_that_its_report_would_not_find(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "study.sh", "--dry-run"],
        env=os.environ | {"CALM_PYTHON": sys.executable, "RUNS": str(tmp_path / name)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "a path with blanks or one of" in done.stderr


@pytest.mark.parametrize("text", ODD + ODD_PATHS, ids=ascii)
def test_the_run_directory_reaches_the_job_script(text: str) -> None:
    """As slurm/launch.sh reads the last line of the preflight."""
    read = next(
        line
        for line in (ROOT / "slurm" / "launch.sh").read_text().splitlines()
        if line.strip().startswith("printf -v RUN_DIR")
    )
    script = f'RUN_DIR=$(printf "%s\\n" noise "$1" | tail -n 1)\n{read}\nprintf "%s|" "$RUN_DIR"'
    words = ["bash", "-c", script, "bash", on_one_line(text)]
    assert subprocess.check_output(words, timeout=60).decode() == f"{text}|"


def test_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    laughs = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi",
                                                                          strict=True)]  # fmt: skip
    text = "\n".join(["data:", *(f"  {line}" for line in laughs), "  path: *i"])
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"line 3: alias \*a: write the value itself"):
        load_recipe(file)
    with pytest.raises(RecipeError, match="alias"):
        load_recipe(TINY, ["parallel.stage_layers=[&a [1], *a]"])


def test_a_message_names_the_first_of_very_many(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    keys = "".join(f"key{i}: 1\n" for i in range(5_000))
    file.write_text(TINY.read_text() + keys)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    message = str(error.value)
    assert "5,000 problems" in message and "and 4,990 more" in message
    assert "key9: unknown key" in message and "key10:" not in message
    assert len(message) < 3000


@pytest.mark.parametrize(
    "override",
    [
        f"training.steps={'9' * 5000}",
        f"training.steps={'x' * 100_000}",
        f"training.steps={'[' * 50_000}",
        f"training.steps=[{', '.join(['1'] * 10_000)}]",
        f"training={{{', '.join(f'k{i}: 1' for i in range(5000))}}}",
        f"{'k' * 100_000}=1",
        f"training.{'k' * 100_000}=1",
        f"data.path=[{', '.join(['1'] * 5000)}]",
        f"model.kind={'k' * 100_000}",
        f"no.{'k' * 100_000}",
        f"health=[{'k' * 100_000}: {{a: 1, a: 1}}",
    ],
    ids=lambda text: text[:20],
)
def test_a_message_stays_short_however_large_the_value(override: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(TINY, [override])
    assert len(str(error.value)) < 4000


@pytest.mark.parametrize(
    "text",
    ["!!timestamp x", "!!binary x", "!!int ''", "!!float x", "!!bool 3", "!!map 3", "!!set {[a]}",
     "!!omap [a]", "!!python/object:os.system x", "? [a]\n: b", "<<: 3", "1: 2", "~: x", "[a]: b",
     "\x01", "\ud800", "run: !!set {a}", "model: {kind: [calm]}", "data: {path: !!set {a}}"],
    ids=ascii,
)  # fmt: skip
def test_yaml_of_every_other_kind_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(RecipeError, match=str(file)):
        load_recipe(file)


def test_a_huge_file_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(RecipeError, match=f"huge.yaml: has 104,857,600 bytes.*{LARGEST_FILE:,}"):
        load_recipe(huge)
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        refusals: list[str] = []

        def load(path: Path = path, refusals: list[str] = refusals) -> None:
            with pytest.raises(RecipeError) as error:
                load_recipe(path)
            refusals.append(str(error.value))

        # In a thread: whoever waited for the pipe would wait for ever.
        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        thread.join(20)
        assert refusals == [f"{path}: is a pipe or a device; give a file"]
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(tmp_path)


def test_what_messages_are_made_of() -> None:
    assert shown("a\nb") == "'a\\nb'" and shown([1, "x"]) == "[1, 'x']"
    assert len(shown("x" * 10**6)) < 250 and len(shown({i: [i] * 99 for i in range(99)})) < 500
    assert shown(10**5000) == f"a number of {(10**5000).bit_length()} bits"
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert listed(["a\nb"]) == "'a\\nb'" and len(listed(["x" * 10**6])) < 250
    assert shortened("short") == "short"
    assert shortened("x" * 10_000).endswith("… (2,000 more characters)")
