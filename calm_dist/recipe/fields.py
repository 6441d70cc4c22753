"""All sections of a recipe, and the sizes derived from them."""

from __future__ import annotations

from typing import Any, Literal

from calm_dist.errors import RecipeError
from calm_dist.recipe.sections import (
    Checkpoint,
    Data,
    Evaluation,
    Health,
    Logging,
    Model,
    Parallel,
    Run,
    Training,
)
from calm_dist.schema import Section


class RecipeFields(Section):
    """The sections of a recipe; `recipe.checks` decides whether their values fit together."""

    run: Run
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    training: Training
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: matrix products in bfloat16, the optimizer's weights in fp32; for autoencoders,
    only on GPUs. Fixed for the life of a run."""
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    health: Health = Health()
    evaluation: Evaluation = Evaluation()

    def to_dict(self) -> dict[str, Any]:
        """All fields, defaults included, as plain values that YAML and JSON can hold."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def world_size(self) -> int:
        """Processes launched, or planned for: ``parallel.world_size``, or one replica."""
        return self.parallel.world_size or self.parallel.model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Model replicas."""
        return self.world_size // self.parallel.model_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of each replica per optimizer step."""
        training = self.training
        return training.global_batch_size // (training.micro_batch_size * self.data_parallel_size)

    @property
    def block_size(self) -> int:
        """Tokens per block.

        Raises:
            RecipeError: the recipe does not set it, and no store has filled it in.
        """
        if self.data.block_size is None:
            raise RecipeError("data.block_size: absent; set it, or give a data.path that exists")
        return self.data.block_size

    @property
    def num_patches(self) -> int:
        """Steps of the backbone per block: T/K (K is 1 for the Transformer)."""
        return self.block_size // self.model.patch_size

    @property
    def padded_length(self) -> int:
        """`num_patches` rounded up to a multiple of TP x CP: the backbone's sequence length."""
        multiple = self.parallel.tensor_parallel_size * self.parallel.context_parallel_size
        return -(-self.num_patches // multiple) * multiple

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.training.global_batch_size * self.block_size
