"""Damage for the tests of readers: the same for the same seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# What stands where another value belongs; text of JSON, since Python cannot write all of it.
_VALUES = ["null", "true", "-1", "0", "3", "0.5", "1e400", "-1e400", "NaN", "1e15", str(10**15)]
_VALUES += [str(2**63), str(-(2**63)), "9" * 400, "9" * 5000, '""', '"x"', '"\\ud800"', '"\\u0000"']
_VALUES += ['"a\\nb"', '"../x"', json.dumps("x" * 10_000), "[]", "{}", "[[1]]", '{"a": {"b": 1}}']
_VALUES += ["[" * 500 + "]" * 500, "[" * 100_000 + "]" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000]
_VALUES += ["[" + ",".join(["1"] * 5000) + "]"]


def mutations(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """Endlessly many damaged forms of a file: nothing, less, other bytes, more."""
    yield b""
    yield data[: len(data) // 2]
    while True:
        kind = rng.randrange(6)
        place = rng.randrange(max(1, len(data)))
        if kind < 3:
            damaged = bytearray(data)
            for _ in range(1 if kind else rng.randint(2, 20)):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
            yield bytes(damaged)
        elif kind == 3:
            yield data[:place]
        elif kind == 4:
            end = place + rng.randint(1, 50)
            yield data[:place] + data[end:]
        else:
            more = rng.choice([rng.randbytes(8), b"\0" * 64, data[place : place + 40], b"\xff\xfe"])
            yield data[:place] + more + data[place:]


def json_mutations(rng: random.Random, value: Any) -> Iterator[bytes]:
    """Endlessly many texts of JSON: ``value`` with a part of it replaced, taken out or added, and
    some that replace it as a whole."""
    while True:
        if rng.randrange(6) == 0:
            yield rng.choice(_VALUES).encode()
            continue
        changed = copy.deepcopy(value)
        places = list(_places(changed))
        container, key = rng.choice(places)
        kind = rng.randrange(6)
        replaced = rng.choice(_VALUES)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container["unknown"] = "@"
        elif kind == 1:
            container.append(container[key])
        elif kind == 2 and isinstance(container[key], int):
            container[key] = -container[key]
        else:
            container[key] = "@"
        yield json.dumps(changed).replace('"@"', replaced).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each list or object in a value, with each of its keys."""
    if isinstance(value, dict):
        keys: Any = list(value)
    else:
        keys = range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
