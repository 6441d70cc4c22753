#!/usr/bin/env python
"""Train CALM or the discrete baseline.

    deepspeed tools/train.py recipes/calm_m.yaml training.steps=1000
    torchrun --nproc_per_node 4 tools/train.py recipes/calm_tiny.yaml
    python tools/train.py recipes/calm_xl.yaml --dry-run

Run the same command again to continue from the newest valid checkpoint of run.dir.
"""

from __future__ import annotations

from calm_dist.cli.console import run
from calm_dist.cli.training_tool import run_training_tool
from calm_dist.training.run import train


def main() -> None:
    run_training_tool(__doc__, train)


if __name__ == "__main__":
    run(main)
