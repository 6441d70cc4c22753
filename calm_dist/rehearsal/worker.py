"""One rank of a rehearsal, in a process of its own: ``python -m calm_dist.rehearsal.worker FILE``.

FILE holds the request as JSON, and gets the result in its place. The environment is that of
`stand_in.environment`, plus the rank's variables as a launcher sets them.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_dist.compat.deepspeed import import_deepspeed
from calm_dist.errors import UserError
from calm_dist.parallel.launch import read_world, select_device
from calm_dist.parallel.topology import Topology, build_topology
from calm_dist.recipe import AutoencoderRecipe, LanguageModelRecipe, Recipe
from calm_dist.rehearsal.accounting import EventCounts
from calm_dist.rehearsal.libraries import adapt, join_fake_world
from calm_dist.rehearsal.observer import Observer
from calm_dist.rehearsal.places import relative
from calm_dist.rehearsal.steps import rehearse_steps
from calm_dist.rehearsal.trainers import RehearsedAutoencoder, RehearsedRun, RehearsedTrainer

_GROUPS = {
    "tp": "TP",
    "cp": "CP",
    "pp": "PP",
    "dp": "DP",
    "dp_cp": "DP x CP",
    "tp_cp": "TP x CP",
    "mp": "TP x PP",
    "embd": "first and last stage",
    "intra_dist_opt": "all of the optimizer",
}


def main() -> None:
    file = Path(sys.argv[1])
    request = json.loads(file.read_text(encoding="utf-8"))
    try:
        result = _rehearse(request)
    except UserError as error:
        result = {"refused": str(error)}
    except Exception as error:
        result = {"failed": _failure(error)}
    file.write_text(json.dumps(result), encoding="utf-8")


def _rehearse(request: Mapping[str, Any]) -> dict[str, Any]:
    recipe = Recipe.from_dict(request["recipe"])
    world = read_world()
    device = select_device(world, recipe.parallel.device)
    import_deepspeed()
    join_fake_world(world.rank, world.size)
    names: dict[str, str] = {}
    observer = Observer(lambda group: names.get(group.group_name, f"{group.size()} ranks"))
    adapt(observer)
    topology = build_topology(recipe, device)
    names.update(_group_names(topology))
    # Libraries make small tensors while they are imported.
    with FakeTensorMode(allow_non_fake_inputs=True), observer:
        result = rehearse_steps(recipe, _trainer(recipe, topology), observer)
    counts = result.pop("counts")
    step = counts.step(result["micro_batches"])
    return {
        **result,
        "rank": topology.rank,
        "stage": topology.pp_rank,
        "each": _plain(counts.each),
        "step": _plain(step),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device),
    }


def _trainer(recipe: Recipe, topology: Topology) -> RehearsedRun:
    if isinstance(recipe, LanguageModelRecipe):
        return RehearsedTrainer(recipe, topology)
    assert isinstance(recipe, AutoencoderRecipe)
    return RehearsedAutoencoder(recipe, topology.device)


def _group_names(topology: Topology) -> dict[str, str]:
    """Names of process groups by torch's own."""
    world = dist.group.WORLD
    groups = [(f"world ({topology.world_size})", world)]
    # Where this rank is not in the group, it has a placeholder.
    groups.append((f"head ({len(topology.head_ranks)})", topology.head_group))
    groups += [(name, getattr(topology.groups, field, None)) for field, name in _GROUPS.items()]
    return {
        group.group_name: name if name.endswith(")") else f"{name} ({group.size()})"
        for name, group in reversed(groups)
        if isinstance(group, dist.ProcessGroup)
    }


def _plain(counts: EventCounts) -> dict[str, Any]:
    """Counts as values of JSON."""
    parts = dict.fromkeys(part.name for part in counts.kernels)
    return {
        "kernels": [
            {
                "part": name,
                **{
                    which: counts.kernels[key]
                    for key, which in ((p, _direction(p.backward)) for p in counts.kernels)
                    if key.name == name
                },
            }
            for name in parts
        ],
        "waits": [
            {"what": wait.what, "where": wait.where, "count": count}
            for wait, count in counts.waits.most_common()
        ],
        "collectives": [
            {
                "operation": key.operation,
                "group": key.group,
                "calls": calls,
                "bytes": counts.bytes[key],
            }
            for key, calls in counts.calls.items()
        ],
    }


def _direction(backward: bool) -> str:
    return "backward" if backward else "forward"


def _failure(error: BaseException) -> dict[str, Any]:
    """What failed, and at which line of this package or of the libraries under it."""
    frames = traceback.extract_tb(error.__traceback__)
    known = [(relative(frame.filename), frame) for frame in frames]
    lines = [
        f"{file}:{frame.lineno}: {frame.line}"
        for file, frame in known
        if file is not None and not file.startswith("calm_dist/rehearsal/")
    ]
    own = [line for line in lines if line.startswith("calm_dist/")]
    return {
        "error": f"{type(error).__name__}: {error}",
        "where": list(dict.fromkeys((*lines[-1:], *own[-1:]))),
        "traceback": "".join(traceback.format_exception(error)),
    }


if __name__ == "__main__":
    main()
