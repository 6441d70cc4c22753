"""Training of the language models: the common entry point of all launchers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from calm_dist.errors import RecipeError
from calm_dist.recipe import LanguageModelRecipe, Recipe
from calm_dist.training.session import launched

if TYPE_CHECKING:
    import torch

    from calm_dist.training.phases import Phases
    from calm_dist.training.stop import StopRequest


def train(recipe: Recipe) -> None:
    """Train the language model of a recipe in the world that the launcher made.

    Raises:
        UserError: recipe, data, checkpoint or launch are wrong.
        PeerLostError: another process died.
        HungError: another process detected that a rank hangs.
        StoppedError: a signal asked the run to stop; a checkpoint was written.
        TrainingDivergedError: too many steps in a row were not finite.
    """
    if not isinstance(recipe, LanguageModelRecipe):
        raise RecipeError(
            "model.kind: autoencoder; this command trains language models, use "
            "tools/train_autoencoder.py"
        )
    with launched(recipe) as session:
        train_in_world(session.recipe, session.device, session.stop, session.phases, session.begin)


def train_in_world(
    recipe: LanguageModelRecipe,
    device: torch.device,
    stop: StopRequest | None = None,
    phases: Phases | None = None,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """`train` for connected processes; may be called again for another recipe."""
    from calm_dist.compat import megatron_cpu

    megatron_cpu.install()
    from calm_dist.parallel.topology import build_topology, destroy_topology
    from calm_dist.training.language_model import Trainer

    topology = build_topology(recipe, device)
    trainer = Trainer(recipe, topology, stop, phases, begin)
    trainer.run()
    if trainer.parts.head is not None:
        trainer.parts.head.close()
    destroy_topology(topology)
