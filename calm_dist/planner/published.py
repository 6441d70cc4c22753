"""Dense Transformers whose size, layout and speed were published, for comparison with predictions.

The shapes are translated to this package's architecture: SwiGLU of 2/3 the width has the FLOPs of
the GPT models' MLP. The published runs had features that this package does not: fused kernels,
overlap of tensor-parallel collectives with products, weights sharded by FSDP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_dist.costs import flops
from calm_dist.costs.clusters import PRESETS
from calm_dist.planner.predict import Prediction, predict
from calm_dist.recipe import LanguageModelRecipe


@dataclass(frozen=True)
class Published:
    """A run of a paper."""

    name: str
    source: str
    gpu: str
    mfu: float
    """As the paper states it: with full attention for the GPT models; Llama 3's paper only says
    "model FLOPs"."""
    model: dict[str, Any]
    block_size: int
    blocks: int
    """Number of blocks in a global batch."""
    tensor: int
    pipeline: int
    virtual: int | None
    gpus: int
    sharded_optimizer: bool = False

    def prediction(self) -> Prediction:
        """The planner's prediction for the run."""
        return predict(self._recipe(), PRESETS[self.gpu])

    def _recipe(self) -> LanguageModelRecipe:
        return dense_recipe(
            self.name,
            self.model,
            block_size=self.block_size,
            global_batch_size=self.blocks,
            parallel={
                "tensor_parallel_size": self.tensor,
                "pipeline_parallel_size": self.pipeline,
                "virtual_pipeline_size": self.virtual,
                "sequence_parallel": True,
                "world_size": self.gpus,
                "distributed_optimizer": self.sharded_optimizer,
                "overlap_grad_reduce": self.gpus > self.tensor * self.pipeline,
            },
        )


def dense_recipe(
    name: str,
    model: dict[str, Any],
    *,
    block_size: int,
    global_batch_size: int,
    parallel: dict[str, Any],
) -> LanguageModelRecipe:
    """A recipe of a dense Transformer that names no data."""
    return LanguageModelRecipe.from_dict(
        {
            "run": {"dir": f"runs/{name}"},
            "model": {"kind": "transformer", **model},
            "data": {"path": "data/latents/train", "block_size": block_size},
            "parallel": parallel,
            "training": {
                "steps": 1000,
                "micro_batch_size": 1,
                "global_batch_size": global_batch_size,
            },
            "precision": "bf16",
        }
    )


def _gpt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Hidden size, layers and heads of a GPT with an MLP four times as wide."""
    return {
        "vocab_size": 51200,
        "hidden_size": hidden,
        # 3 d f = 8 d^2, in multiples of 64.
        "intermediate_size": round(8 * hidden / 3 / 64) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


_LLAMA_405B = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
}
# Korthikanti et al. 2022 (arXiv 2205.05198), tables 3 and 5: sequence parallelism and selective
# recomputation. Llama 3 (arXiv 2407.21783), table 4; it interleaves, but does not say how often: 4
# chunks a stage are our guess.
_MEGATRON, _LLAMA = "arXiv 2205.05198, table 5", "arXiv 2407.21783, table 4"
PUBLISHED = (
    Published(
        "GPT 22B", _MEGATRON, "a100-sxm-80", 0.415, _gpt(6144, 48, 64), 2048, 4, 8, 1, None, 8
    ),
    Published(
        "GPT 175B", _MEGATRON, "a100-sxm-80", 0.514, _gpt(12288, 96, 96), 2048, 64, 8, 8, 3, 64
    ),
    Published(
        "GPT 530B", _MEGATRON, "a100-sxm-80", 0.560, _gpt(20480, 105, 128), 2048, 280, 8, 35, 3, 280
    ),
    Published(
        "GPT 1T",
        _MEGATRON,
        "a100-sxm-80",
        0.563,
        _gpt(25600, 128, 160),
        2048,
        512,
        8,
        64,
        None,
        512,
    ),
    Published(
        "Llama 3 405B, 8k GPUs",
        _LLAMA,
        "h100-sxm",
        0.43,
        _LLAMA_405B,
        8192,
        2048,
        8,
        16,
        4,
        8192,
        True,
    ),
    Published(
        "Llama 3 405B, 16k GPUs",
        _LLAMA,
        "h100-sxm",
        0.41,
        _LLAMA_405B,
        8192,
        2048,
        8,
        16,
        4,
        16384,
        True,
    ),
)


def compare_with_published() -> list[dict[str, Any]]:
    """Published and predicted MFU of each run, as plain values."""
    rows = []
    for run in PUBLISHED:
        prediction = run.prediction()
        rows.append(
            {
                "name": run.name,
                "source": run.source,
                "gpu": run.gpu,
                "gpus": run.gpus,
                "parameters": flops.count(prediction.recipe, tokens=0).parameters,
                "published_mfu": run.mfu,
                "mfu": prediction.mfu(),
                "step_seconds": prediction.time.seconds,
                "step_terms": prediction.time.terms,
                "memory_bytes": prediction.peak_memory,
                "fits": prediction.fits,
            }
        )
    return rows


def format_published(rows: list[dict[str, Any]]) -> str:
    """`compare_with_published` as a table."""
    lines = [
        f"{'run':<24}{'GPUs':>7}  {'GPU':<13}{'MFU published':>14}{'predicted':>11}{'ratio':>7}"
        f"{'memory':>10}  source"
    ]
    lines += [
        f"{row['name']:<24}{row['gpus']:>7,}  {row['gpu']:<13}{row['published_mfu']:>14.1%}"
        f"{row['mfu']:>11.1%}{row['mfu'] / row['published_mfu']:>7.2f}"
        f"{row['memory_bytes'] / 1e9:>7.0f} GB  {row['source']}"
        for row in rows
    ]
    return "\n".join(lines)
