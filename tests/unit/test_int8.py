"""Latents as int8 with scales of their own for each dimension of a block."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_latents import contents, inputs, plan_for, tokenizer_of, write

from calm_dist.data.inspection import check_store, read_block
from calm_dist.data.int8 import dequantize, quantize
from calm_dist.data.latents import write_parts
from calm_dist.data.stream import open_store, open_training_stream
from calm_dist.errors import DataError
from calm_dist.interop.huggingface import load_autoencoder

# A fixture.
__all__ = ["inputs"]


@pytest.mark.parametrize("spread", [1e-6, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("centre", [0.0, 5.0, -3e3])
def test_the_error_is_half_a_step(spread: float, centre: float) -> None:
    rng = np.random.default_rng(1)
    mean = (centre + spread * rng.normal(size=(64, 5))).astype(np.float32)
    log_std = (-2 + 0.5 * rng.normal(size=(64, 5))).astype(np.float32)
    log_std[:, 2] = -1.5
    columns = quantize(mean, log_std)
    assert {name: (c.dtype.name, c.shape) for name, c in columns.items()} == {
        "mean": ("int8", (64, 5)), "log_std": ("int8", (64, 5)), "scales": ("float16", (4, 5)),
    }  # fmt: skip
    back = dequantize(columns)
    for name, values, row in (("mean", mean, 0), ("log_std", log_std, 2)):
        step = columns["scales"][row].astype(np.float32)
        # The scale is rounded to fp16, and its smallest value is that of normal fp16 numbers.
        assert (abs(back[name] - values) <= step * (0.5 + 127 / 1024) + 1e-6 * abs(centre)).all()
        spans = values.max(axis=0) - values.min(axis=0)
        assert (step <= spans / 250 + 2**-10 * abs(values).max(axis=0) / 100 + 7e-5).all()
    stacked = {name: np.stack([column] * 3) for name, column in columns.items()}
    assert all((dequantize(stacked)[name][1] == back[name]).all() for name in back)


def test_a_store_of_int8(inputs: Path, tmp_path: Path) -> None:
    meta = write(inputs, tmp_path / "fp16")
    write(inputs, tmp_path / "int8", latent_dtype="int8")
    fields = json.loads((tmp_path / "int8" / "meta.json").read_text())
    assert fields["latent_dtype"] == "int8" and "latent_dtype" not in meta.to_dict()
    exact, rounded = open_store(tmp_path / "fp16"), open_store(tmp_path / "int8")
    assert rounded.meta.sample_bytes < exact.meta.sample_bytes
    for i in range(len(exact)):
        one, two = exact[i], rounded[i]
        assert (one["tokens"] == two["tokens"]).all()
        for name in ("mean", "log_std"):
            assert two[name].dtype == np.float32
            span = np.ptp(one[name].astype(np.float32), axis=0)
            assert (abs(two[name] - one[name]) <= span / 200 + 4e-3 * abs(one[name])).all()
    assert not check_store(str(tmp_path / "int8")).problems
    assert (read_block(str(tmp_path / "int8"), 3)["mean"] == rounded[3]["mean"]).all()

    # Readers, in a mixture with fp16 as well.
    def batches(*names: str) -> list[dict[str, Any]]:
        stream = open_training_stream([tmp_path / name for name in names], batch_size=4)
        return list(islice(stream, stream.steps_per_epoch))

    for batch in batches("int8"):
        for row, index in enumerate(batch["index"].tolist()):
            assert (batch["mean"][row].numpy() == rounded[index]["mean"]).all()
    assert {str(batch["mean"].dtype) for batch in batches("fp16", "int8")} == {"torch.float32"}

    # Several workers write the store of one.
    plan = plan_for(inputs, latent_dtype="int8", parts=2)
    write(inputs, tmp_path / "one", latent_dtype="int8", parts=2)
    model = load_autoencoder(inputs / "autoencoder")
    for number in (1, 0):
        write_parts(
            tmp_path / "two", [inputs / "corpus.jsonl"], tokenizer_of(inputs), plan,
            worker=(number, 2), autoencoder=model, batch_size=5, shard_bytes=4096,
        )  # fmt: skip
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(DataError, match="--variant tokens has no latents"):
        plan_for(inputs, variant="tokens", patch_size=4, autoencoder=None, latent_dtype="int8")
    with pytest.raises(DataError, match=r"another latent_dtype \(int8 there, float16 now\)"):
        write(inputs, tmp_path / "int8")
