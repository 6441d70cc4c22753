"""The description of a generative head, its fields in a recipe, and the registry of heads.

Another package adds a head by naming an instance of `HeadSpec` in the entry-point group
``calm_dist.heads``::

    [project.entry-points."calm_dist.heads"]
    my_head = "my_package.spec:MY_HEAD"

Symbols: d hidden size, l latent size, N samples per position in training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from calm_dist.registry import known_kind, with_installed
from calm_dist.schema import Positive, Section

GROUP = "calm_dist.heads"

_own: dict[str, HeadSpec] = {}


class HeadRecipe(Section):
    """The generative head: one step with the energy score, or the iterative alternatives.

    All heads of this package share this type, so that ``model.head.kind=flow`` alone changes the
    head of a recipe. A head of another package may add fields (`HeadSpec.fields`).
    """

    kind: Annotated[str, Field(examples=["energy", "chain", "diffusion", "flow", "tokens"])] = (
        "energy"
    )
    """``energy`` is the paper's head; ``chain`` draws the latent slot by slot; ``tokens`` is
    discrete and has no latents; heads.md compares their costs. An installed package may register
    others."""
    num_mlp_layers: Positive = 4
    """Residual blocks."""
    noise_size: Positive = 64
    """Energy, chain: components of the uniform noise (chain: of each slot). Flow and diffusion
    start from normal latents."""
    num_samples: Positive = 8
    """Energy, chain: head samples N per position in training, at least two for the score's second
    term.
    Diffusion and flow: noisy latents per position in training."""
    posterior_samples: Positive = 100
    """Energy, chain: draws M from the autoencoder's posterior per position."""
    beta: Annotated[float, Field(gt=0, lt=2)] = 1.0
    """Energy, chain: exponent of the score; strictly proper inside (0, 2)."""
    sampling_steps: Positive | None = None
    """Steps to draw one sample. Flow: midpoint steps of two evaluations each, 10 by default.
    Diffusion: 100 by default, at most 1,000. Other heads do not use it."""
    width: Positive | None = None
    """Chain: width of its blocks, which run once for each slot; by default the hidden size."""
    independent: bool = False
    """Tokens: predict each token of a patch without the earlier ones of the same patch."""

    @field_validator("kind")
    @classmethod
    def _is_registered(cls, kind: str) -> str:
        return known_kind(kind, all_specs(), GROUP, "a head")

    @property
    def spec(self) -> HeadSpec:
        """The description of this kind of head."""
        return head_spec(self.kind)

    @property
    def steps_per_sample(self) -> int:
        """``sampling_steps``, or the default of this kind of head."""
        return self.sampling_steps or self.spec.default_sampling_steps

    @property
    def samples_in_training(self) -> int:
        """``num_samples``, or 1 for a head that predicts tokens."""
        return self.num_samples if self.spec.predicts == "latents" else 1

    @property
    def evaluations_per_sample(self) -> int:
        """How often the network runs to draw one sample."""
        return self.steps_per_sample * self.spec.evaluations_per_step


@dataclass(frozen=True)
class Released:
    """Names of a head in the authors' released checkpoints.

    Attributes:
        architecture: the class in ``config.json``.
        prefixes: prefixes of the head's tensors; the released class may store one head under
            several names.
        model_type: the key in ``config.json``; None if the authors omit it.
        required: fields of a recipe's head that ``config.json`` must have.
    """

    architecture: str
    prefixes: tuple[str, ...]
    model_type: str | None = None
    required: tuple[str, ...] = ()


class HeadSpec(ABC):
    """One kind of generative head, described without torch.

    Every number is exact for the module named in `module` unless documented otherwise; tests count
    parameters, FLOPs and bytes of the real module.
    """

    kind: ClassVar[str]
    """``model.head.kind``."""
    module: ClassVar[str]
    """``package.module:Class`` of the `calm_dist.models.heads.GenerativeHead`, which is called with
    (fields, d, l) and `module_arguments`."""
    predicts: ClassVar[Literal["latents", "tokens"]] = "latents"
    """``tokens``: no autoencoder; methods and module get latent size 0."""
    fields: ClassVar[type[HeadRecipe]] = HeadRecipe
    """Fields in a recipe, with their defaults."""
    released: ClassVar[Released | None] = None
    """None: the released layout has no such head, and exports are refused."""
    scores_energy: ClassVar[bool] = False
    """Whether it is trained with the energy score of N samples against ``posterior_samples`` draws,
    for which ``training.energy_kernel`` selects the kernel."""
    default_sampling_steps: ClassVar[int] = 1
    evaluations_per_step: ClassVar[int] = 1
    """Passes through the network in one sampling step."""

    @property
    def module_arguments(self) -> tuple[Any, ...]:
        """Arguments of the module after fields, d and l."""
        return ()

    @property
    def runs_per_evaluation(self) -> int:
        """How often the blocks run one after the other in an evaluation, which counts as one pass
        in FLOPs."""
        return 1

    def for_patches(self, patch_size: int) -> HeadSpec:
        """The description for patches of K tokens; self for a head that does not depend on K."""
        return self

    def problems(self, head: HeadRecipe) -> list[str]:
        """Messages about values of fields that cannot be trained: field, value and remedy."""
        return []

    def latent_problems(self, latent_size: int) -> list[str]:
        """Like `problems`, about a latent size that the head cannot predict."""
        return []

    @abstractmethod
    def parameters(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """Weights, biases and norms."""

    @abstractmethod
    def condition_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """FLOPs per position of the part that depends only on the hidden state. Our heads compute
        it once for all samples and evaluations, the released code once for each."""

    @abstractmethod
    def sample_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """All other FLOPs of one evaluation for one sample."""

    @abstractmethod
    def input_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """Part of `sample_flops` in layers whose input needs no gradient: noise, times, latents."""

    def shared_input_flops(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """Part of `condition_flops` in layers whose input needs no gradient."""
        return 0

    @abstractmethod
    def activation_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """Elements that autograd keeps per position, for all N samples, in the run's precision."""

    def loss_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """Elements that the loss keeps per position, for all N samples, always in fp32."""
        return 0

    @abstractmethod
    def traffic_elements(self, head: HeadRecipe, hidden_size: int, latent_size: int) -> int:
        """Elements that element-wise kernels read and write for one sample, forward and backward,
        without the energy score."""

    @abstractmethod
    def kernels(self, head: HeadRecipe) -> int:
        """Kernels that a micro-batch launches, forward and backward, without the energy score."""

    def weight_std(self, init: str, name: str, shape: Sequence[int], std: float) -> float:
        """Standard deviation of an initial weight; ``std`` is what ``model.init`` gives for it."""
        return std

    def vector_value(self, name: str) -> float | None:
        """Initial value of all elements of a parameter of at most one dimension, whose ``name``
        begins with ``head.``; what its module sets is overwritten. None: zero if the name ends in
        ``bias``, one if it ends in ``weight``; other names are then refused."""
        return None


def unused_width(head: HeadRecipe) -> list[str]:
    """The message about ``width`` for a head that is as wide as the hidden states."""
    if head.width is None:
        return []
    return [
        f"model.head.width: {head.width}, but the {head.kind} head is as wide as the hidden "
        "states; leave it out"
    ]


def register(spec: HeadSpec) -> None:
    """Add a head of this package."""
    _own[spec.kind] = spec


@cache
def all_specs() -> dict[str, HeadSpec]:
    """Every kind of head and its description, this package's first.

    Raises:
        RecipeError: an installed package registers something that is not a head, or a name that is
            already used.
    """
    return with_installed(_own, GROUP, HeadSpec, "head")


def head_spec(kind: str) -> HeadSpec:
    """The description of a kind of head; `KeyError` for an unknown kind."""
    return all_specs()[kind]
