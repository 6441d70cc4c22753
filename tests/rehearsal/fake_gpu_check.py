"""Parts of `gpu_check` on fake tensors of a GPU that is not there: ``fake_gpu_check.py DIR PART…``.

Runs the code for GPUs at its own sizes; no number means anything. In the environment of
`stand_in.environment`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_dist.compat.deepspeed import import_deepspeed
from calm_dist.gpu_check.worker import Check, run_part
from calm_dist.rehearsal.libraries import adapt, join_fake_world
from calm_dist.rehearsal.observer import Observer


def main() -> None:
    import_deepspeed()
    join_fake_world(0, 1)
    observer = Observer(lambda group: f"{group.size()} ranks")
    adapt(observer)
    place = Path(sys.argv[1])
    with FakeTensorMode(allow_non_fake_inputs=True), observer:
        for part in sys.argv[2:]:
            run_part(part, Check(place / f"{part}.json", torch.device("cuda"), small=False))


if __name__ == "__main__":
    main()
