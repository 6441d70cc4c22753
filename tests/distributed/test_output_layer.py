"""The output layer's loss, in chunks of rows and over shards of the vocabulary, against the plain
form and against torch in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import recipe, run_worker
from output_layer_worker import BATCH, STEPS, VOCAB, inputs
from safetensors.torch import load_file

from calm_dist.recipe.checks import padded_vocab_size

WORKER = Path(__file__).with_name("output_layer_worker.py")
PADDED = padded_vocab_size(VOCAB)
ROWS = STEPS * BATCH
# Of the norm of the difference to that of the whole. Measured: 4e-7 and 5e-3, and as much between
# the plain form and fp64.
TOLERANCES = {"float32": 1e-6, "bfloat16": 8e-3}


def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the inputs as rounded to ``dtype``, in fp64."""
    data = inputs(PADDED)
    hidden = data["hidden"].to(dtype).double().requires_grad_()
    layer = data["layer"].to(dtype).double().requires_grad_()
    # Rows that are no words are left out, and so have no gradient.
    logits = F.linear(hidden, layer[:VOCAB])
    losses = F.cross_entropy(logits.flatten(0, 1), data["targets"].T.flatten(), reduction="none")
    loss = (losses.unflatten(0, (STEPS, BATCH)) * data["weight"][:, None]).sum()
    of_hidden, of_layer = torch.autograd.grad(3.5 * loss, (hidden, layer))
    return {"loss": loss.detach(), "hidden": of_hidden, "layer": of_layer}


def jobs(ranks: int, out: Path) -> list[dict[str, Any]]:
    shard = PADDED // ranks
    # All rows at once; 5 and then 3 rows; one row.
    sizes = {"one": shard * ROWS, "several": shard * 5, "rows": 1}
    return [
        {
            "recipe": recipe("transformer"),
            "out": str(out / f"{ranks} {name} {dtype} {'SP' if parallel else ''}"),
            "sequence_parallel": parallel,
            "dtype": dtype,
            "chunk": chunk,
        }
        for name, chunk in sizes.items()
        for dtype in TOLERANCES
        for parallel in ((False, True) if ranks > 1 else (False,))
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_in_chunks_equals_the_plain_form(ranks: int, tmp_path: Path) -> None:
    listed = jobs(ranks, tmp_path)
    run_worker(ranks, WORKER, listed, tmp_path)
    for job in listed:
        found = load_file(job["out"])
        for name, right in expected(getattr(torch, job["dtype"])).items():
            ours = found[f"chunks.{name}"].double()
            for other in (right, found[f"plain.{name}"].double()):
                error = float((ours - other).norm() / right.norm())
                assert error <= TOLERANCES[job["dtype"]], (Path(job["out"]).name, name, error)
        assert not found["chunks.layer"][VOCAB:].any()
        assert not found["chunks.hidden"][[2, STEPS - 1]].any()
        assert found["chunks.loss"].dtype == torch.float32
