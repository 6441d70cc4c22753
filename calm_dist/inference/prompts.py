"""Prompts of a file, one JSON object on each line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_dist.errors import UserError, shown

_KEYS = {"prompt", "seed"}


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    seed: int | None = None
    """None: the seed of all prompts."""


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file of lines such as ``{"prompt": "The sea", "seed": 1}``, whose ``seed``
    is optional; empty lines are left out, other keys refused.

    Raises:
        UserError: the file cannot be read, or a line is not such an object.
    """
    try:
        # Lines end at a new line only: strings in JSON may hold U+2028 as it is.
        # Windows' editors begin a file with a byte order mark.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read as UTF-8 text ({error})") from error
    prompts = [
        _prompt(line, f"--prompts {file}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise UserError(f'--prompts {file}: holds no prompt; write lines {{"prompt": "..."}}')
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # also too many digits, or brackets
        raise UserError(f'{where}: not JSON ({error}); write {{"prompt": "..."}}') from error
    if isinstance(value, dict) and (unknown := sorted(value.keys() - _KEYS)):
        raise UserError(
            f'{where}: {shown(unknown[0])}: unknown key; write {{"prompt": "...", "seed": 1}}, '
            "where seed is optional"
        )
    text, seed = (value.get("prompt"), value.get("seed")) if isinstance(value, dict) else (None, 0)
    if not isinstance(text, str):
        raise UserError(f'{where}: {shown(line)}: has no text "prompt"; write {{"prompt": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {shown(text)}: a lone surrogate is not text") from error
    if seed is not None and (type(seed) is not int or seed < 0):
        raise UserError(f"{where}: seed: {shown(seed)} must be a whole number of at least 0")
    return Prompt(text, seed)
