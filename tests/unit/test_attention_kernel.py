"""`parallel.attention`: the rule of auto, refusals, broken installations, and both kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import ROOT, call, language_recipe, recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from warm import warm_python

from calm_dist.errors import RecipeError
from calm_dist.inference.load import single_process_topology
from calm_dist.models.attention import CoreAttention
from calm_dist.models.attention_kernel import FlashAttention, choose
from calm_dist.models.backbone import transformer_config

AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)
INSTALLED = FlashAttention("2.8.3")
BROKEN = FlashAttention(fault="flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E")


def decide(wanted: str = "auto", **changes: Any) -> Any:
    given: dict[str, Any] = {
        "capability": HOPPER,
        "head_dim": 128,
        "precision": "bf16",
        "context_parallel": False,
        "installed": INSTALLED,
    }
    return choose(wanted, **(given | changes))


@pytest.mark.parametrize(
    ("capability", "head_dim", "context_parallel", "kernel"),
    [
        (AMPERE, 64, False, "flash"),
        (AMPERE, 160, False, "flash"),
        (ADA, 128, True, "flash"),
        (HOPPER, 64, False, "sdpa"),
        (HOPPER, 96, False, "sdpa"),
        (HOPPER, 128, False, "sdpa"),
        (HOPPER, 160, False, "flash"),
        (HOPPER, 256, False, "flash"),
        (HOPPER, 128, True, "flash"),
        (BLACKWELL, 128, False, "sdpa"),
        (BLACKWELL, 160, False, "sdpa"),
        # Without kernels of flash-attn.
        (None, 128, False, "sdpa"),
        ((7, 5), 64, False, "sdpa"),
        (AMPERE, 264, False, "sdpa"),
        (AMPERE, 100, False, "sdpa"),
    ],
)
def test_rule_of_auto(
    capability: tuple[int, int] | None, head_dim: int, context_parallel: bool, kernel: str
) -> None:
    given: dict[str, Any] = {"capability": capability, "head_dim": head_dim}
    given["context_parallel"] = context_parallel
    choice = decide(**given)
    assert (choice.kernel, choice.warning) == (kernel, None)
    assert choice.reason
    assert decide(**given, installed=FlashAttention()).kernel == "sdpa"
    assert decide("sdpa", **given).kernel == "sdpa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capability": None}, "the device is a CPU"),
        ({"capability": (7, 5)}, r"compute capability 8\.0, this one has 7\.5"),
        ({"precision": "fp32"}, "precision fp32"),
        ({"head_dim": 320}, "heads of 320"),
        ({"installed": FlashAttention()}, "not installed; install it: pip install"),
        ({"installed": BROKEN}, "undefined symbol.*install it again"),
        ({"installed": FlashAttention("1.0.9")}, r"1\.0\.9 is older than 2\.1"),
    ],
)
def test_flash_that_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    assert decide(**changes).kernel == "sdpa"
    with pytest.raises(RecipeError, match=f"parallel.attention: flash, but .*{message}"):
        decide("flash", **changes)


def test_flash_that_can_run_is_taken() -> None:
    assert decide("flash", capability=HOPPER).kernel == "flash"
    assert decide("flash", capability=BLACKWELL, installed=FlashAttention("2.1")).kernel == "flash"


def test_broken_installation_is_said() -> None:
    choice = decide(installed=BROKEN)
    assert choice.kernel == "sdpa"
    assert "undefined symbol: _ZN3c10" in choice.warning and "install it again" in choice.warning
    assert decide("sdpa", installed=BROKEN).warning is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.attention=flash"], "precision fp32"),
        (["precision=bf16", "parallel.attention=flash", "parallel.device=cpu"], "device cpu"),
        (["parallel.attention=fast"], "found 'fast'"),
    ],
)
def test_recipes_refuse_it(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s)parallel.attention.*{message}"):
        language_recipe(recipe("calm"), overrides)


def installation(directory: Path) -> FlashAttention:
    """What a new process finds with this directory on its path."""
    script = (
        "import json; from calm_dist.models.attention_kernel import installed_flash_attention;"
        "print(json.dumps(vars(installed_flash_attention())))"
    )
    path = os.pathsep.join((str(directory), str(ROOT)))
    done = subprocess.run(
        [warm_python(), "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return FlashAttention(**json.loads(done.stdout.splitlines()[-1]))


def test_extension_of_another_torch(tmp_path: Path) -> None:
    """A real extension module with a symbol that no library has."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    source = tmp_path / "flash_attn_2_cuda.c"
    source.write_text("extern int c10_gone(void); int PyInit_flash_attn_2_cuda(void)"
                      "{ return c10_gone(); }\n")  # fmt: skip
    library = tmp_path / f"flash_attn_2_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    (package / "__init__.py").write_text("import flash_attn_2_cuda\n")
    found = installation(tmp_path)
    assert found.version is None
    assert found.fault is not None and "undefined symbol: c10_gone" in found.fault


def test_other_installations(tmp_path: Path) -> None:
    assert installation(tmp_path) == FlashAttention()
    # As FlashAttention-4's package, which has other functions.
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    assert installation(tmp_path) == FlashAttention()
    init = tmp_path / "flash_attn" / "__init__.py"
    init.write_text("__version__ = '2.8.3'\n")
    assert "flash_attn_func" in str(installation(tmp_path).fault)
    init.write_text("__version__ = '2.8.3'\ndef flash_attn_func(): ...\n")
    assert installation(tmp_path) == FlashAttention("2.8.3")


def test_run_on_a_cpu(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    """flash ends the start with exit code 2 before anything is written; auto is recorded."""
    train = [sys.executable, str(ROOT / "tools" / "train.py"), recipe("transformer")]
    alone: dict[str, object] = {
        "parallel__tensor_parallel_size": 1,
        "parallel__pipeline_parallel_size": 1,
        "training__steps": 1,
    }
    settings = tiny(tmp_path / "run", "transformer", **alone)
    bf16 = ["precision=bf16", "parallel.attention=flash"]
    refused = call([*train, *settings, *bf16], code=2)
    assert "parallel.attention: flash, but the device is a CPU" in refused.stderr
    assert not (tmp_path / "run" / "environment.json").exists()
    call([*train, *settings])
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["attention"] == "sdpa"
    assert environment["attention_reason"] == "the device is a CPU"


FLASH_STAND_IN = """
import torch
import torch.nn.functional as F

def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    # [B, steps, heads, size]; causal from the last key; fewer heads of keys and values.
    assert causal
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.mT * (softmax_scale or q.shape[-1] ** -0.5)
    allowed = torch.ones(scores.shape[-2:]).tril(k.shape[2] - q.shape[2]).bool()
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)
"""


@pytest.mark.parametrize(("steps", "slots"), [(6, 6), (3, 9), (1, 5)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_kernels_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, slots: int, kv_heads: int
) -> None:
    """flash-attn, by the formula that its documentation gives, and SDPA get the same arguments."""
    (tmp_path / "flash_attn.py").write_text(FLASH_STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    given = language_recipe(
        recipe("transformer"),
        ["parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1"],
    )
    topology = single_process_topology(given, torch.device("cpu"))
    config = transformer_config(given, torch.float32)
    groups: ProcessGroupCollection = topology.groups
    torch.manual_seed(0)
    query = torch.randn(steps, 2, 4, 8)
    key, value = torch.randn(2, slots, 2, kv_heads, 8).unbind()
    outputs = [
        CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups, kernel=kernel)(
            query, key, value
        )
        for kernel in ("sdpa", "flash")
    ]
    assert outputs[0].shape == (steps, 2, 32)
    torch.testing.assert_close(outputs[1], outputs[0])
    monkeypatch.delitem(sys.modules, "flash_attn")
