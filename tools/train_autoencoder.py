#!/usr/bin/env python
"""Train the autoencoder that packs K tokens into one latent.

    python tools/train_autoencoder.py recipes/autoencoder_tiny.yaml training.steps=200
    torchrun --nproc_per_node 8 tools/train_autoencoder.py recipes/autoencoder.yaml

Run the same command again to continue from the newest valid checkpoint of run.dir.
"""

from __future__ import annotations

from calm_dist.cli.console import run
from calm_dist.cli.training_tool import run_training_tool
from calm_dist.recipe import Recipe


def train(recipe: Recipe) -> None:
    # Imported here because it imports torch.
    from calm_dist.training.autoencoder import train_autoencoder

    train_autoencoder(recipe)


def main() -> None:
    run_training_tool(__doc__, train)


if __name__ == "__main__":
    run(main)
