"""What this package relies on inside other libraries; an upgrade fails here first."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

from calm_dist.compat import streaming
from calm_dist.errors import PeerLostError

# (library, version that the names were looked up in).
TESTED = {"mosaicml-streaming": "0.13.0", "megatron-core": "0.16.1", "deepspeed": "0.19.8"}


def test_versions_are_those_that_the_names_were_looked_up_in() -> None:
    assert {name: version(name) for name in TESTED} == TESTED


def test_names_of_streaming() -> None:
    for name in streaming.__all__:
        assert getattr(streaming, name) is not None, name
    assert streaming.ShardState.REMOTE.name == "REMOTE"
    assert streaming.shared_path(3, "locals") == "000003_locals"
    assert callable(streaming.dataset_module.get_shm_prefix)
    assert callable(streaming.dataset_module._Iterator.non_blocking_exit)


def test_attaching_waits_until_the_memory_has_its_size() -> None:
    """Another rank is creating it, and was interrupted before it could say how large it is."""
    from calm_dist.compat.streaming import SharedArray, memory_module, patient_attaching

    name = f"calm_test_{os.getpid()}"
    path = Path("/dev/shm") / name
    path.touch()

    def grow() -> None:
        time.sleep(0.3)
        os.truncate(path, 8)

    thread = threading.Thread(target=grow)
    try:
        with pytest.raises(ValueError, match="empty file"):
            SharedArray(2, np.int32, name)
        thread.start()
        with patient_attaching():
            array = SharedArray(2, np.int32, name)
        array[1] = 7
        assert array[1] == 7
        thread.join()
    finally:
        path.unlink()
    assert memory_module.BuiltinSharedMemory is SharedMemory


def test_memory_of_a_process_that_has_ended() -> None:
    from calm_dist.compat.streaming import SharedArray, memory_module, patient_attaching

    def vanishing(name: str, create: bool, size: int) -> None:
        """As it is for a process that meets the memory just before its creator dies."""
        raise FileExistsError if create else FileNotFoundError(name)

    with pytest.MonkeyPatch.context() as patch, patient_attaching():
        patch.setattr(SharedMemory, "__init__", lambda self, *args: vanishing(*args))
        with pytest.raises(PeerLostError, match="calm_test_gone is gone"):
            SharedArray(2, np.int32, "calm_test_gone")
    assert memory_module.BuiltinSharedMemory is SharedMemory


def attributes_of(kind: type) -> set[str]:
    """Names of a class and of what its own methods set on ``self``."""
    found = set(dir(kind))
    for base in kind.__mro__:
        if base.__module__.split(".")[0] not in ("megatron", "deepspeed", "streaming"):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        found |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    return found


def test_names_that_subclasses_of_streaming_use() -> None:
    """Private attributes that datasets and streams of ours inherit, found by looking at ours."""
    from calm_dist.data import cache, guard

    ours = [cache.EvictingDataset, guard.GuardedDataset, guard._CheckedStream]
    used: set[str] = set()
    own: set[str] = set()
    for kind in ours:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        own |= set(vars(kind)) | set(getattr(kind, "__annotations__", {}))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
                stored = isinstance(node.ctx, ast.Store)
                (own if stored else used).add(node.attr)
    inherited = {name for name in used - own if name.startswith("_")}
    theirs = attributes_of(streaming.StreamingDataset) | attributes_of(streaming.Stream)
    assert {"_shard_states", "_cache_filelock_path"} <= inherited <= theirs
    assert "_ready_thread" in own & theirs


def test_a_fused_rotation_takes_the_place_of_transformer_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megatron calls it where ``apply_rope_fusion`` is set; on CPUs it stays Megatron's own."""
    import torch
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import TransformerConfig

    from calm_dist.compat.megatron import use_rotation

    def config(fused: bool) -> TransformerConfig:
        return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2,
                                 apply_rope_fusion=fused)  # fmt: skip

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", None)
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        config(True)
    use_rotation(lambda states, angles: states + 1)
    group = object()
    states = torch.randn(3, 1, 2, 4)
    angles = torch.rand(3, 1, 1, 2).repeat(1, 1, 1, 2)
    rotated = [
        rope_utils.apply_rotary_pos_emb(states, angles, config(fused), cp_group=group)
        for fused in (True, False)
    ]
    assert torch.equal(*rotated)


def test_names_of_megatron() -> None:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import attention, mlp

    from calm_dist.compat import megatron, megatron_cpu
    from calm_dist.models.attention import CachedSelfAttention

    assert hasattr(parallel_state, "_global_process_group_list")
    assert hasattr(filesystem_async, "_results_queue")
    assert hasattr(torch_strategy, "FileSystemWriterAsync")
    save = megatron.SaveStrategy._get_save_and_finalize_callbacks
    original = torch_strategy.TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks
    assert len(inspect.signature(save).parameters) == len(inspect.signature(original).parameters)
    assert {"get_save_function_and_args", "retrieve_write_results", "write_preloaded_data"} <= set(
        dir(megatron.AsyncFileWriter)
    )
    assert {
        *("buffers", "model_param_group_index_map", "_get_model_param_range_map"),
        *("get_parameter_state_dp_zero", "ddp_config", "model_chunks"),
    } <= attributes_of(DistributedOptimizer)
    assert {"float16_groups", "fp32_from_fp32_groups"} <= attributes_of(
        Float16OptimizerWithFloat16Params
    )
    assert "chained_optimizers" in attributes_of(ChainedOptimizer)
    # Ours takes the place of theirs, which `Attention.forward` calls; a new name would bypass it.
    adjust = attention.Attention._adjust_key_value_for_inference
    ours = CachedSelfAttention._adjust_key_value_for_inference
    assert ours is not adjust
    assert list(inspect.signature(adjust).parameters)[:6] == [
        *("self", "inference_context", "query", "key", "value", "rotary_pos_emb")
    ]
    assert (
        list(inspect.signature(ours).parameters)[:6]
        == (list(inspect.signature(adjust).parameters)[:6])
    )
    assert " self._adjust_key_value_for_inference(" in inspect.getsource(
        attention.Attention.forward
    )
    # Megatron's MLP calls it by this name, with these arguments.
    arguments = inspect.getsource(mlp.MLP.forward).split(" bias_swiglu_impl(")[1].split(",")
    assert [name.strip() for name in arguments[:2]] == ["intermediate_parallel", "bias_parallel"]
    assert mlp.bias_swiglu_impl is bias_swiglu_impl
    for name in (
        *("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED"),
        *("_get_cuda_rng_state", "_set_cuda_rng_state", "_MODEL_PARALLEL_RNG_TRACKER_NAME"),
        *("initialize_rng_tracker", "CudaRNGStatesTracker"),
    ):
        assert hasattr(random, name), name
    for name in megatron_cpu.MODULES_WITH_LITERAL_CUDA:
        module = importlib.import_module(name)
        assert hasattr(module, "torch"), name
        assert "cuda" in inspect.getsource(module), f"{name}: needs no shim any more"


def test_names_of_deepspeed() -> None:
    from calm_dist.compat.deepspeed import import_deepspeed

    deepspeed = import_deepspeed()
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert hasattr(deepspeed.utils.groups, "mpu")
    assert {
        *("averaged_gradients", "all_grad_tensors", "micro_step_id", "zero_grad", "optimizer"),
        *("_release_preflattened_grad_buffers", "round_robin_bit16_groups"),
        "single_partition_of_fp32_groups",
    } <= attributes_of(DeepSpeedZeroOptimizer)
    assert {
        *("averaged_gradients", "_partition_all_parameters", "persistent_parameters", "optimizer"),
        *("fp16_groups", "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat"),
        "_get_norm_groups",
    } <= attributes_of(DeepSpeedZeroOptimizer_Stage3)


def private_names(file: Path) -> Iterator[str]:
    """What a file uses of megatron, deepspeed or streaming that begins with an underscore."""
    tree, theirs = ast.parse(file.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for name in node.names:
                if (module or name.name).split(".")[0] in ("megatron", "deepspeed", "streaming"):
                    theirs.add(name.asname or name.name.split(".")[0])
                    if name.name.startswith("_"):
                        yield f"{file.name}:{node.lineno}: {name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in theirs:
                yield f"{file.name}:{node.lineno}: {node.attr}"


def test_private_names_are_used_nowhere_else() -> None:
    package = Path(__file__).parents[2] / "calm_dist"
    files = (file for file in package.rglob("*.py") if file.parent.name != "compat")
    assert [name for file in files for name in private_names(file)] == []
    assert list(private_names(package / "compat" / "streaming.py"))


def test_other_packages_stay_as_they_are() -> None:
    """Streaming's own modules load for others in the process, and nothing heavy loads for us."""
    code = """
import sys
import calm_dist.data.stream, calm_dist.runs.listing
print([name for name in ("transformers", "torchvision") if name in sys.modules])
import streaming
print(streaming.StreamingDataLoader.__module__, streaming.base.StreamingDataLoader.__name__)
from streaming.text import StreamingC4
print(StreamingC4.__name__, streaming.text.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "[]",
        "streaming.base.dataloader StreamingDataLoader",
        "StreamingC4 streaming.text",
    ]


def test_libraries_are_imported_without_compiler_and_wandb() -> None:
    """In a fresh process; what it decorates is compiled when it is called, and wandb works."""
    code = """
import functools, sys, torch
from calm_dist.compat import deepspeed, lazy_compile, megatron_import
real = torch.compile
megatron_import.import_megatron()
deepspeed.import_deepspeed()
# As its engine does.
from deepspeed.runtime.zero.muon import original_muon
import calm_dist.inference.generate
loaded = [name for name in ("torch._dynamo", "wandb") if name in sys.modules]
assert torch.compile is real and loaded == [], loaded
# The eager backend needs no C++ compiler.
compiled = []
def compile_eagerly(function, **settings):
    compiled.append(function)
    return real(function, backend="eager")

lazy_compile._compile = compile_eagerly
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu
values, bias = torch.randn(5, 8), torch.randn(8)
for _ in range(2):
    first, second = torch.chunk(values + bias, 2, -1)
    torch.testing.assert_close(bias_swiglu(values, bias), torch.nn.functional.silu(first) * second)
# Orthogonal rows up to the iteration's tolerance.
near = original_muon.zeropower_via_newtonschulz5(torch.randn(4, 8), 5)
torch.testing.assert_close(near.float() @ near.float().T, torch.eye(4), atol=0.5, rtol=0)
assert [f.__name__ for f in compiled] == ["bias_swiglu", "zeropower_via_newtonschulz5"]
import wandb
assert wandb.__version__
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
