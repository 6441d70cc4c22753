"""An exported autoencoder is one matrix in the authors' class, before and after training.

`load_as_the_authors` states the rules by which their class loads a file; see
`released_autoencoder`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from calm_dist.errors import CheckpointError
from calm_dist.interop.convert import export_checkpoint, import_checkpoint
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.released.autoencoder import load_autoencoder

GOLDEN = Path(__file__).parents[1] / "golden"
EMBEDDING, OUTPUT = "encoder.embed_tokens.weight", "decoder.lm_head_weight"


def load_as_the_authors(weights: dict[str, torch.Tensor]) -> Autoencoder:
    """A model with one parameter under two names; transformers 4.43 replaces parameters where the
    file has the first of them in the same dtype, and copies into them elsewhere."""
    torch.manual_seed(0)
    model = Autoencoder(load_autoencoder(GOLDEN / "ae_k4").config)
    model.decoder.lm_head_weight = model.encoder.embed_tokens.weight
    first, tensor = next(iter(model.state_dict().items()))
    assert first == EMBEDDING
    replaces = first in weights and weights[first].dtype == tensor.dtype
    model.load_state_dict(weights, strict=False, assign=replaces)
    return model.requires_grad_(True)


def matrices(model: Autoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    output = model.decoder.lm_head_weight
    assert isinstance(output, nn.Parameter)
    return model.encoder.embed_tokens.weight, output


def train(model: Autoencoder) -> None:
    embedding, output = matrices(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(12)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(F.linear(F.embedding(tokens, embedding), output), tokens + 1).backward()
        optimizer.step()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    import_checkpoint(GOLDEN / "ae_k4", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "exported")
    return tmp_path / "exported"


def test_export_is_one_matrix_before_and_after_training(exported: Path, tmp_path: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    model = load_as_the_authors(weights)
    embedding, output = matrices(model)
    assert embedding is output and embedding.data_ptr() == output.data_ptr()
    expected = load_autoencoder(GOLDEN / "ae_k4").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    train(model)
    assert matrices(model)[0] is matrices(model)[1]
    assert not torch.equal(matrices(model)[0], expected[EMBEDDING])

    # Their class saves it with either name or both, and each comes back.
    for number, lost in enumerate(([], [EMBEDDING], [OUTPUT])):
        target = tmp_path / f"trained_{number}"
        target.mkdir()
        shutil.copyfile(exported / "config.json", target / "config.json")
        kept = {n: t.detach().clone() for n, t in model.state_dict().items() if n not in lost}
        save_file(kept, target / "model.safetensors")
        import_checkpoint(target, tmp_path / f"again_{number}")
        again = load_autoencoder(tmp_path / f"again_{number}")
        assert torch.equal(again.encoder.embed_tokens.weight, matrices(model)[0])


def test_matrices_that_were_trained_apart_are_refused(exported: Path, tmp_path: Path) -> None:
    """A file with both names, as exports once were, becomes two parameters in their class."""
    weights = load_file(exported / "model.safetensors")
    model = load_as_the_authors(weights | {EMBEDDING: weights[OUTPUT].clone()})
    train(model)
    embedding, output = matrices(model)
    largest = float((embedding - output).detach().abs().max())
    assert largest > 0
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(exported, tmp_path / "again")
    for part in (EMBEDDING, OUTPUT, f"{largest:.3g}"):
        assert part in str(caught.value), caught.value
    assert "damaged" not in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_embedding_alone_would_leave_the_output_random(exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    weights[EMBEDDING] = weights.pop(OUTPUT)
    embedding, output = matrices(load_as_the_authors(weights))
    assert not torch.equal(embedding, output)


def test_autoencoder_inside_an_exported_calm(tmp_path: Path) -> None:
    import_checkpoint(GOLDEN / "calm_k4", tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    inside = {
        name.removeprefix("ae_model."): tensor
        for name, tensor in load_file(tmp_path / "exported" / "model.safetensors").items()
        if name.startswith("ae_model.")
    }
    embedding, output = matrices(load_as_the_authors(inside))
    assert embedding is output
    assert torch.equal(embedding, load_autoencoder(GOLDEN / "ae_k4").encoder.embed_tokens.weight)
    config = json.loads((tmp_path / "exported" / "config.json").read_text(encoding="utf-8"))
    beside = load_file(Path(config["ae_path"]) / "model.safetensors")
    assert beside.keys() == inside.keys() and OUTPUT in beside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_copies_of_other_dtypes_are_one(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "ae_k4", source)
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    rounded = weights[EMBEDDING].to(torch.bfloat16)
    weights |= {EMBEDDING: rounded.float(), OUTPUT: rounded.to(dtype)}
    torch.save(weights, source / "pytorch_model.bin")
    assert torch.equal(load_autoencoder(source).encoder.embed_tokens.weight, rounded.float())
