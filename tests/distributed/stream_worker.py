"""One rank of tests/distributed/test_stream_ranks.py: plays scenarios, writes what it received.

Usage: stream_worker.py JOB.json RANK OUT.json. The job is {"rendezvous": DIR, "scenarios": [...]};
each scenario has a world of its own of ``ranks`` processes, and higher ranks sit it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from calm_dist.data import guard
from calm_dist.data.stream import open_training_stream
from calm_dist.errors import DataError


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, out = int(sys.argv[2]), Path(sys.argv[3])
    results = {}
    for scenario in job["scenarios"]:
        if rank < scenario["ranks"]:
            join(Path(job["rendezvous"]) / scenario["name"], rank, scenario)
            results[scenario["name"]] = play(scenario, out)
            dist.destroy_process_group()
    out.write_text(json.dumps(results))


def join(rendezvous: Path, rank: int, scenario: dict[str, Any]) -> None:
    ranks = scenario["ranks"]
    local = scenario.get("ranks_per_node", ranks)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank % local),
        LOCAL_WORLD_SIZE=str(local),
    )
    store = dist.FileStore(str(rendezvous), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def play(scenario: dict[str, Any], out: Path) -> dict[str, Any]:
    """The indices of each step and a digest of all contents, or the DataError that came."""
    guard.CHECK_ON_OPEN_BYTES = scenario.get("check_on_open_bytes", guard.CHECK_ON_OPEN_BYTES)
    digest = hashlib.sha256()
    steps: list[list[int]] = []
    try:
        stream = open_training_stream(scenario["paths"], **scenario["options"])
        if "state" in scenario:
            stream.load_state_dict(scenario["state"])
        if dist.get_rank() == 0 and "remove_after_open" in scenario:
            Path(scenario["remove_after_open"]).unlink()
        dist.barrier()
        for batch in islice(stream, scenario["steps"]):
            steps.append(batch["index"].tolist())
            digest.update(batch["tokens"].numpy().tobytes())
            if "ready" in scenario:
                out.with_suffix(".ready").touch()
    except DataError as error:
        return {"error": str(error), "steps": steps}
    state = stream.state_dict(scenario.get("state", {}).get("steps_done", 0) + len(steps))
    return {"steps": steps, "sha256": digest.hexdigest(), "state": state}


if __name__ == "__main__":
    main()
