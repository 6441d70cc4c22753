"""Which implementation of attention a run uses: torch's or the flash-attn package's."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from functools import cache

import torch

from calm_dist.errors import RecipeError
from calm_dist.recipe import LanguageModelRecipe

_INSTALL = "pip install --no-build-isolation '.[flash]'"
# Before 2.1 its causal mask was aligned to the first key, not to the last.
_OLDEST = (2, 1)
_AMPERE, _HOPPER, _BLACKWELL = (8, 0), (9, 0), (10, 0)
# What cuDNN's attention supports, forward and backward.
_LARGEST_CUDNN_HEAD = 128
_LARGEST_FLASH_HEAD = 256


@dataclass(frozen=True)
class FlashAttention:
    """The installed flash-attn package."""

    version: str | None = None
    """None if it is not installed, or cannot be imported."""
    fault: str | None = None
    """Why it cannot be imported."""


@dataclass(frozen=True)
class Choice:
    """The implementation of a run."""

    kernel: str
    """``sdpa`` or ``flash``."""
    reason: str
    warning: str | None = None
    """What the user should know before the run starts."""


def attention_kernel(recipe: LanguageModelRecipe, device: torch.device) -> Choice:
    """What ``parallel.attention`` means for a training on this device.

    Raises:
        RecipeError: flash-attn is asked for and cannot be used here.
    """
    on_gpu = device.type == "cuda"
    return choose(
        recipe.parallel.attention,
        capability=torch.cuda.get_device_capability(device) if on_gpu else None,
        head_dim=recipe.model.head_dim,
        precision=recipe.precision,
        context_parallel=recipe.parallel.context_parallel_size > 1,
        installed=installed_flash_attention() if on_gpu else FlashAttention(),
    )


def choose(
    wanted: str,
    *,
    capability: tuple[int, int] | None,
    head_dim: int,
    precision: str,
    context_parallel: bool,
    installed: FlashAttention,
) -> Choice:
    """What ``wanted`` (auto, sdpa or flash) means.

    Args:
        capability: the GPU's compute capability, (9, 0) for Hopper; None for a CPU.

    Raises:
        RecipeError: flash-attn is asked for and cannot be used.
    """
    if wanted == "sdpa":
        return Choice("sdpa", "set by the recipe")
    obstacle = _obstacle(capability, head_dim, precision, installed)
    if wanted == "flash":
        if obstacle is not None:
            raise RecipeError(f"parallel.attention: flash, but {obstacle}; use auto or sdpa")
        return Choice("flash", "set by the recipe")
    warning = None
    if installed.fault is not None:
        warning = (
            f"flash-attn is installed, but cannot be imported ({installed.fault}); torch's own "
            f"attention is used; install it again for this torch ({_INSTALL}), or uninstall it"
        )
    if obstacle is not None:
        return Choice("sdpa", obstacle, warning)
    assert capability is not None
    kernel, reason = faster(capability, head_dim, context_parallel)
    return Choice(kernel, reason, warning)


def faster(capability: tuple[int, int], head_dim: int, context_parallel: bool) -> tuple[str, str]:
    """The implementation that ``auto`` takes where flash-attn can be used, and why.

    From the kernels that torch's SDPA has, not from measurements of this package:

    - Before Hopper, SDPA's fastest kernel is a copy of FlashAttention-2. The package is the same or
      newer, and needs no transposed views.
    - On Hopper, SDPA has cuDNN's attention for heads up to 128, which FlashAttention-2 does not
      reach: it has no use for the asynchronous products of these GPUs. Larger heads go to SDPA's
      FlashAttention-2 again.
    - SDPA's cuDNN attention does not take a causal mask that is aligned to the last key, as context
      parallelism needs it.
    - Wheels of flash-attn 2 have no kernels for Blackwell.
    """
    if capability >= _BLACKWELL:
        return "sdpa", "SDPA on Blackwell"
    if capability >= _HOPPER and not context_parallel and head_dim <= _LARGEST_CUDNN_HEAD:
        return "sdpa", f"SDPA has cuDNN's attention for heads of {head_dim} on Hopper"
    if capability >= _HOPPER and context_parallel:
        return "flash", "SDPA has only FlashAttention-2 for a mask aligned to the last key"
    return "flash", f"SDPA has only FlashAttention-2 for heads of {head_dim} on this GPU"


def _obstacle(
    capability: tuple[int, int] | None, head_dim: int, precision: str, installed: FlashAttention
) -> str | None:
    """Why flash-attn cannot be used, None if it can."""
    if capability is None:
        return "the device is a CPU"
    if capability < _AMPERE:
        return f"it needs a GPU of compute capability 8.0, this one has {_dotted(capability)}"
    if precision != "bf16":
        return f"it has no kernels for precision {precision}"
    if head_dim > _LARGEST_FLASH_HEAD or head_dim % 8:
        return (
            f"heads of {head_dim} are not multiples of 8 up to {_LARGEST_FLASH_HEAD}, "
            "which its kernels need"
        )
    if installed.fault is not None:
        return (
            f"it cannot be imported ({installed.fault}); install it again for this torch: "
            f"{_INSTALL}"
        )
    if installed.version is None:
        return f"it is not installed; install it: {_INSTALL}"
    numbers = [int(number) for number in re.findall(r"\d+", installed.version)[:2]]
    if tuple(numbers) < _OLDEST:
        return (
            f"its version {installed.version} is older than {_dotted(_OLDEST)}; install: {_INSTALL}"
        )
    return None


@cache
def installed_flash_attention() -> FlashAttention:
    """Import flash-attn, once."""
    spec = importlib.util.find_spec("flash_attn")
    # The package of FlashAttention-4 alone leaves a folder flash_attn without a module.
    if spec is None or spec.origin is None:
        return FlashAttention()
    try:
        package = importlib.import_module("flash_attn")
        version = str(package.__version__)
        _ = package.flash_attn_func
    # Mostly ImportError for an undefined symbol; but what another torch's extension raises when it
    # registers its operators is not limited to that.
    except Exception as error:
        lines = str(error).strip().splitlines()
        return FlashAttention(fault=lines[0] if lines else type(error).__name__)
    return FlashAttention(version)


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
