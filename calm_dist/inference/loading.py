"""Load a trained language model into one plain process: no launcher, no port, no optimizer."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from calm_dist.compat import megatron_cpu
from calm_dist.costs import flops
from calm_dist.errors import CheckpointError, RecipeError, UserError
from calm_dist.files import file_sha256
from calm_dist.inference.decoding import GreedyDecoder
from calm_dist.models.autoencoder import Autoencoder
from calm_dist.models.backbone import Backbone, transformer_config
from calm_dist.models.heads import GenerativeHead, Head, latent_head
from calm_dist.models.heads.tokens import TokensHead
from calm_dist.models.kv_cache import KeyValueCache
from calm_dist.parallel.launch import ALONE, World, join_world
from calm_dist.parallel.topology import Topology, build_topology, destroy_topology
from calm_dist.recipe import CalmModel, LanguageModelRecipe, load_recipe
from calm_dist.released.autoencoder import load_autoencoder
from calm_dist.released.calm import read_calm, released_recipe
from calm_dist.released.files import is_released, weight_files
from calm_dist.runs import checkpoints
from calm_dist.runs.checkpoints.run_state import RunState
from calm_dist.training.build import build_backbone, build_head
from calm_dist.training.checkpoint import model_state
from calm_dist.training.resolve import autoencoder_directory

_ROWS_AT_ONCE = {"cpu": 8, "cuda": 64}
"""Number of texts that take a step together: as many as cost little more than one."""

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_own_groups: Topology | None = None
"""The groups of this process, once they exist."""


@dataclass(frozen=True)
class LoadedModel:
    """A CALM or a discrete Transformer in eval mode on ``device``: backbone and head in ``dtype``,
    the autoencoder in fp32."""

    recipe: LanguageModelRecipe
    checkpoint: Path
    step: int
    tokens_seen: int
    tokenizer_sha256: str | None
    """None if unknown: a released checkpoint does not name its tokenizer."""
    device: torch.device
    backbone: Backbone
    _head: Head | None
    autoencoder: Autoencoder | None
    autoencoder_sha256: str | None

    @property
    def kind(self) -> str:
        """``calm`` or ``transformer``."""
        return self.recipe.model.kind

    @property
    def head(self) -> GenerativeHead:
        """The head of a CALM that predicts latents."""
        assert self._head is not None
        return latent_head(self._head)

    @property
    def has_probabilities(self) -> bool:
        """Whether it is a Transformer, or a CALM whose head predicts tokens; other models provide
        only samples."""
        return not isinstance(self._head, GenerativeHead)

    @cached_property
    def decoder(self) -> GreedyDecoder:
        """Decodes the latents of a CALM to tokens."""
        assert self.autoencoder is not None
        return GreedyDecoder(self.autoencoder)

    def new_cache(self, rows: int, steps: int, *, together: bool = False) -> KeyValueCache:
        """An empty cache for ``rows`` texts of at most ``steps`` steps (patches or tokens) each.

        ``together``: the rows go through the model in one batch, so that their rounding depends on
        each other. Otherwise a text has the same bits alone and in a batch.
        """
        return self.backbone.new_cache(rows, steps, together=together)

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """CALM: hidden states of all patches, tokens [B, T] -> [B, T/K, d].

        Args:
            positions: rotary position of each patch [T/K]; default 0, 1, 2, ..., or the positions
                after those in the cache.
            mask: [T/K, held + T/K], True where a patch may attend to a patch in the cache or to one
                of the new ones; default causal.
            cache: the earlier patches of each row; the new ones are appended, each row at its own
                length.
        """
        assert self.kind == "calm"
        steps = tokens.shape[1] // self.recipe.model.patch_size
        return self._run(tokens, steps, positions, mask, cache)

    def logits(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Transformer: next-token logits, tokens [B, T] -> [B, T, V].

        The arguments are those of `hidden`. With a cache and no ``positions``, only the logits of
        the last token are returned: [B, 1, V].
        """
        assert self.kind == "transformer"
        logits = self._whole(self._run(tokens, tokens.shape[1], positions, mask, cache))
        return logits[..., : self.recipe.model.vocab_size]

    def outputs(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """`hidden` of a CALM, `logits` of a Transformer: what predicts the next step."""
        run = self.hidden if self.kind == "calm" else self.logits
        return run(tokens, positions, mask, cache)

    @torch.no_grad()
    def token_logits(self, outputs: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the next token, for a model that `has_probabilities`.

        Args:
            outputs: outputs of the preceding steps, [S, d] or [S, V].
            previous: already known tokens of the step [S, k], k < K; empty for a Transformer, whose
                steps are single tokens.
        """
        if self.kind == "transformer":
            return outputs
        head, tables = self._head, self.backbone.patch_tokens
        assert isinstance(head, TokensHead) and tables is not None
        embedded = tables.embed(previous.to(self.device)[:, None])
        embedded = None if embedded is None else embedded[:, 0]
        state = head.state(outputs, embedded, previous.shape[1])
        return tables.logits(state[:, None])[:, 0, : self.recipe.model.vocab_size]

    @torch.no_grad()
    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [B, T, V] of all ranks from those of this one, which has a part of the words.

        Every rank then has the same bits, and draws the same tokens.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return logits
        return gather_from_tensor_model_parallel_region(logits, group=group)

    @torch.no_grad()
    def _run(
        self,
        tokens: torch.Tensor,
        steps: int,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: KeyValueCache | None,
    ) -> torch.Tensor:
        """The backbone's outputs [B, steps, ...]; logits are those of this rank's words."""
        tokens = tokens.to(self.device)
        if cache is None or cache.together or steps > 1 or positions is not None:
            return self.backbone(tokens, steps, positions, mask, cache).transpose(0, 1)
        # One step for each text. Matrix products round differently for different numbers of rows;
        # a fixed number gives a text the same bits alone and in a batch.
        size = _ROWS_AT_ONCE[self.device.type]
        outputs = []
        for start in range(0, cache.num_rows, size):
            part = cache.select(slice(start, start + size))
            filled = F.pad(tokens[start : start + size], (0, 0, 0, size - part.num_rows))
            output = self.backbone(filled, 1, None, None, part).transpose(0, 1)
            outputs.append(output[: part.num_rows])
        return torch.cat(outputs)


def load_model(
    path: str | Path,
    autoencoder: str | Path | None = None,
    device: str = "cpu",
    dtype: Dtype = "fp32",
    *,
    world: World = ALONE,
) -> LoadedModel:
    """Load a checkpoint of any layout into this process, or into the processes of ``world``.

    Several processes share the backbone by tensor parallelism, and each holds the head and the
    autoencoder. All of them must load the same model and then make the same calls, each of which
    returns the same on every process.

    Args:
        path: a run directory (its newest valid checkpoint), a checkpoint, or a directory in the
            released layout.
        autoencoder: overrides the recipe's ``model.autoencoder`` (CALM).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``fp32``, or ``bf16`` for backbone and head; the autoencoder, whose arg-max decides
            tokens, stays in fp32.
        world: the processes that share the model, from `parallel.launch.tensor_parallel_world`.

    Raises:
        CheckpointError: the checkpoint or the autoencoder is missing, damaged or does not fit.
        UserError: the model cannot be shared by so many processes.
    """
    if is_released(path):
        if world.size > 1:
            raise UserError(
                f"{path}: a directory in the released layout is loaded by one process; import it "
                "with tools/convert_checkpoint.py import-hf, or start one process"
            )
        return load_released(path, autoencoder, device, dtype)
    directory = checkpoints.find_checkpoint(path)
    trained = load_recipe(directory / checkpoints.RECIPE_FILE)
    if not isinstance(trained, LanguageModelRecipe):
        raise CheckpointError(
            f"{directory}: is an autoencoder; give the checkpoint of a CALM or a Transformer"
        )
    recipe = _shared_recipe(_with_files_found(trained, directory), directory, world.size)
    _check_size(recipe, directory)
    state = RunState.read(directory)
    topology = _topology(recipe, torch.device(device), world)
    decoder, decoder_sha256 = None, None
    if isinstance(recipe.model, CalmModel) and recipe.model.has_latents:
        given = autoencoder or recipe.model.autoencoder
        decoder, decoder_sha256 = _load_autoencoder(given, topology.device)
    backbone, head = _build_model(recipe, topology)
    model_state.load_weights(directory, backbone, head)
    _convert(dtype, backbone, head)
    return LoadedModel(
        recipe,
        directory,
        state.step,
        state.tokens,
        state.tokenizer_sha256,
        topology.device,
        backbone,
        head,
        decoder,
        decoder_sha256,
    )


def _convert(dtype: Dtype, *modules: torch.nn.Module | None) -> None:
    """Convert modules, whose weights were read in fp32."""
    for module in modules:
        if module is not None:
            module.to(_DTYPES[dtype])


def load_released(
    directory: str | Path,
    autoencoder: str | Path | None = None,
    device: str = "cpu",
    dtype: Dtype = "fp32",
) -> LoadedModel:
    """Load a CALM in the authors' layout; see `interop.huggingface.load_calm`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; give the directory of a released checkpoint"
        )
    released = read_calm(directory)
    given = autoencoder or released.autoencoder_directory()
    tokenizer = tokenizer_file(directory)
    recipe = single_process_recipe(
        released_recipe(
            directory,
            run_dir=str(directory),
            autoencoder=str(given) if given else None,
            tokenizer=str(tokenizer) if tokenizer else None,
        )
    )
    released.check_size(recipe)
    topology = single_process_topology(recipe, torch.device(device))
    if given is None:
        decoder, decoder_sha256 = released.autoencoder_inside().to(topology.device), None
    else:
        decoder, decoder_sha256 = _load_autoencoder(given, topology.device)
    recipe = recipe.with_autoencoder(asdict(decoder.config))
    backbone, head = _build_model(recipe, topology)
    assert isinstance(recipe.model, CalmModel) and head is not None
    released.copy_into(recipe.model, backbone, head)
    _convert(dtype, backbone, head)
    return LoadedModel(
        recipe, directory, 0, 0, None, topology.device, backbone, head, decoder, decoder_sha256
    )


def _shared_recipe(
    recipe: LanguageModelRecipe, directory: Path, processes: int
) -> LanguageModelRecipe:
    """The same model for so many processes, which share its backbone."""
    if processes > 1 and isinstance(recipe.model, CalmModel) and not recipe.model.has_latents:
        raise UserError(
            f"{directory}: has the tokens head, which {processes} processes cannot share in "
            "generation and evaluation; start one process"
        )
    try:
        return single_process_recipe(recipe, processes)
    except RecipeError as error:
        raise UserError(
            f"{directory}: cannot be shared by {processes} processes; start fewer, or one: {error}"
        ) from error


def single_process_recipe(recipe: LanguageModelRecipe, processes: int = 1) -> LanguageModelRecipe:
    """The same model without parallelism, or with tensor parallelism over ``processes``, in
    fp32."""
    values = recipe.to_dict()
    values["parallel"] = {"world_size": processes, "tensor_parallel_size": processes}
    values["precision"] = "fp32"
    values["training"]["global_batch_size"] = values["training"]["micro_batch_size"] = 1
    return LanguageModelRecipe.from_dict(values)


def single_process_topology(recipe: LanguageModelRecipe, device: torch.device) -> Topology:
    """Groups of one rank, made without opening a port and shared by all models of the process."""
    return _topology(recipe, device, ALONE)


def _topology(recipe: LanguageModelRecipe, device: torch.device, world: World) -> Topology:
    """The groups of this process, shared by all models that it loads.

    Gloo keeps threads for every group, so a process that made new groups for each model would run
    out of threads.
    """
    global _own_groups
    megatron_cpu.install()
    if device.type == "cuda" and device.index is None:
        # NCCL takes no device without a number.
        device = torch.device("cuda", torch.cuda.current_device())
    if not dist.is_initialized():
        join_world(world, device, timeout_seconds=60.0)
    if parallel_state.is_initialized():
        made = parallel_state.get_tensor_model_parallel_group()
        own = _own_groups
        if own is not None and own.groups.tp is made and own.device == device:
            return own
        destroy_topology()
    _own_groups = build_topology(recipe, device)
    return _own_groups


def tokenizer_file(directory: Path) -> Path | None:
    """The tokenizer file in a directory, if there is one."""
    files = (directory / name for name in ("tokenizer.json", "tokenizer.model"))
    return next(filter(Path.is_file, files), None)


def _build_model(recipe: LanguageModelRecipe, topology: Topology) -> tuple[Backbone, Head | None]:
    """Frozen backbone and head in eval mode, before their weights are loaded."""
    backbone = build_backbone(recipe, transformer_config(recipe, torch.float32), topology, None)
    head = None
    if isinstance(recipe.model, CalmModel):
        head = build_head(recipe.model, recipe.run.seed).to(topology.device)
        head.eval().requires_grad_(False)
    return backbone.eval().requires_grad_(False), head


def _with_files_found(recipe: LanguageModelRecipe, directory: Path) -> LanguageModelRecipe:
    """Replace missing paths of autoencoder and tokenizer by files next to the checkpoint or in the
    run directory, since a run directory may have been moved."""
    values = recipe.to_dict()
    run_dir = checkpoints.run_directory(directory)
    for section, field in (("model", "autoencoder"), ("data", "tokenizer")):
        named = values[section].get(field)
        # Not Path.exists, which raises for invalid file names.
        if named is None or os.path.exists(named):
            continue
        places = [directory, run_dir] if run_dir else [directory]
        near = (place / Path(named).name for place in places)
        if (found := next(filter(os.path.exists, near), None)) is not None:
            values[section][field] = str(found)
    return LanguageModelRecipe.from_dict(values)


def _check_size(recipe: LanguageModelRecipe, directory: Path) -> None:
    """Check the size of the files before memory is allocated for the model.

    Raises:
        CheckpointError: the recipe needs far more than they contain.
    """
    asked = flops.count(recipe, tokens=0).parameters
    files = (directory / checkpoints.TENSORS).rglob("*")
    held = sum(file.stat().st_size for file in files if file.is_file())
    # A parameter takes four bytes in fp32.
    if 2 * asked > held:
        raise CheckpointError(
            f"{directory / checkpoints.RECIPE_FILE}: asks for {asked:.4g} parameters, but the "
            f"checkpoint's tensors have only {held:.4g} bytes"
        )


def _load_autoencoder(
    path: str | Path | None, device: torch.device
) -> tuple[Autoencoder, str | None]:
    """An autoencoder and the sha256 of its weights, None if they are in several files."""
    if path is None or not Path(path).is_dir():
        raise CheckpointError(f"model.autoencoder: {path} is not a directory; give --autoencoder")
    directory = autoencoder_directory(path)
    files = list(weight_files(directory))
    sha256 = file_sha256(files[0]) if len(files) == 1 else None
    return load_autoencoder(directory).to(device), sha256
