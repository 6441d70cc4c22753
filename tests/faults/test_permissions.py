"""Files of runs, stores and exports have the permissions that the umask gives: a colleague who may
read or write a directory can resume what is in it."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import ALONE, ROOT, SMALL, TIMEOUT_SECONDS, environment, recipe
from warm import warm_python


def run(umask: int, tool: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [warm_python(), str(ROOT / "tools" / tool), *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        umask=umask,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr


def modes(root: Path) -> dict[str, int]:
    """Of every file and directory, those that a library would do without included."""
    return {
        str(path.relative_to(root)): stat.S_IMODE(path.lstat().st_mode)
        for path in sorted(root.rglob("*"))
        if not path.is_symlink()
    }


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_files_follow_the_umask(
    umask: int, tmp_path: Path, store: Path, tiny: Callable[..., list[str]]
) -> None:
    root = tmp_path / "all"
    short = {"training__steps": 2, "checkpoint__every": 1, "logging__every": 1}
    calm = tiny(root / "calm", "calm", **(ALONE | SMALL | short))
    run(umask, "train.py", recipe("calm"), *calm)
    autoencoder = tiny(root / "autoencoder", "autoencoder", **short)
    run(umask, "train_autoencoder.py", recipe("autoencoder"), *autoencoder)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "some text " * 200}) + "\n")
    tokenizer = store.parent / "t.json"
    encode: list[str | Path] = ["--corpus", corpus, "--tokenizer", tokenizer, "--block-size", "64"]
    run(umask, "encode_latents.py", *encode, "--variant", "tokens", "--patch-size", "4",
        "--out", root / "tokens")  # fmt: skip
    run(umask, "encode_latents.py", *encode, "--autoencoder", root / "autoencoder",
        "--out", root / "latents")  # fmt: skip
    run(umask, "convert_checkpoint.py", "export-hf", root / "calm", root / "exported")

    found = modes(root)
    for name in ("optimizer.safetensors", "model.safetensors", ".distcp", ".mds", ".lock"):
        assert any(path.endswith(name) for path in found), name
    for path, mode in found.items():
        everything = 0o777 if (root / path).is_dir() else 0o666
        assert mode == everything & ~umask, f"{path}: {mode:o}"
