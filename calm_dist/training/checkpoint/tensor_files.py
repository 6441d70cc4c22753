"""Megatron's distributed checkpoint format, written during the training and read without trust.

All ranks plan a write together, each rank forks a process that does it, and all ranks finish it
together. A failure on one rank fails all of them, at the same point: in Megatron-core 0.16.1, rank
0 writes its own files between two collectives, in which the others would wait for it forever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from calm_dist.compat.megatron import (
    AsyncFileWriter,
    SaveStrategy,
    use_file_writer,
    use_results_queue,
)
from calm_dist.errors import CheckpointError, is_lost_connection
from calm_dist.parallel.processes import stand_back
from calm_dist.parallel.rank_zero import RankZeroTask
from calm_dist.runs.checkpoints import describe_files
from calm_dist.runs.checkpoints.trusted import DESCRIPTION, read_description
from calm_dist.training.checkpoint import forks
from calm_dist.training.checkpoint.staging import Staging

State = dict[str, Any]


class TensorWriter:
    """Plans writes of sharded states. Use one per run: plans of equal states are reused.

    Args:
        replicas: the ranks that hold the same tensors and share the writing; default: all.
    """

    def __init__(self, replicas: dist.ProcessGroup | None = None) -> None:
        self._strategy = _Strategy("torch_dist", 1, thread_count=1, cached_metadata=True)
        # Without other replicas, this would gather and compare the shapes of all ranks for each
        # checkpoint, because it has no distribution that it could keep.
        self._sharing = (
            FullyParallelSaveStrategyWrapper(self._strategy, replicas, do_cache_distribution=True)
            if dist.get_world_size(replicas) > 1
            else None
        )
        self._common = _CommonFile("torch", 1)
        # Rank 0 writes the parts of a state dict that are not tensors (the optimizer's groups).
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, self._common)
        self._staging = Staging()
        self._validated = False
        self._end: RankZeroTask | None = None

    @property
    def has_copies(self) -> bool:
        """Whether the planned write no longer needs the state itself."""
        return self._staging.has_copies

    def prepare(self, state: State) -> None:
        """Do the work that only the first write needs: compare the shapes of all ranks, distribute
        the writing, and allocate memory for the copies. A collective of the world."""
        tensors, _ = save_preprocess(state, validate_access_integrity=True)
        if self._sharing is not None:
            self._sharing.apply_saving_parallelization(tensors)
        self._validated = True
        mine = [
            entry.data
            for entry in nested_values(tensors)
            if isinstance(entry, ShardedTensor)
            and is_main_replica(entry.replica_id)
            and entry.data.device.type == "cpu"
        ]
        self._staging.reserve(sum(tensor.nbytes for tensor in mine), len(mine))
        self._staging.touch()

    def plan(
        self, state: State, directory: Path, urgent: bool, commit: Callable[[], object]
    ) -> AsyncRequest:
        """Plan to write ``state`` into an existing directory; a collective of the world.

        Args:
            urgent: the caller waits for it, so it need not yield to the training.
            commit: called by rank 0, in a thread, when everything is written.

        Returns:
            A request for Megatron's `AsyncCallsQueue`. Once the queue has finalized it, `is_ending`
            is true until `ended` returns true.

        Raises:
            CheckpointError: it cannot be planned; on every rank.
        """
        self._common.error = None
        self._strategy.target, self._strategy.urgent = directory, urgent
        # The strategy makes a writer for each plan.
        _Writer.staging = self._staging
        use_results_queue(_ResultsFile())
        try:
            request = dist_checkpointing.save(
                state,
                str(directory),
                sharded_strategy=self._sharing or self._strategy,
                # This gathers the shapes of all ranks, which do not change.
                validate_access_integrity=not self._validated,
                async_sharded_save=True,
            )
        except CheckpointException as error:
            raise CheckpointError(_first_failure(directory, error.failures)) from error
        self._validated = True
        finish = self._strategy.finish
        return request._replace(finalize_fns=[partial(self._finalize, finish, directory, commit)])

    @property
    def is_ending(self) -> bool:
        """Whether all ranks have written their tensors, and rank 0 is describing and committing
        them."""
        return self._end is not None

    def ended(self, wait: bool) -> bool:
        """Whether a write that `is_ending` has ended; a collective of the world.

        Raises:
            CheckpointError, OSError: a rank could not write; on every rank.
        """
        assert self._end is not None
        ended = True
        try:
            ended = self._end.ended(wait)
        finally:
            if ended:
                self._end = None
        return ended

    def _finalize(
        self,
        finish: Callable[[], Callable[[], None]],
        directory: Path,
        commit: Callable[[], object],
    ) -> None:
        write_description = finish()

        def write() -> None:
            if self._common.error is not None:
                raise self._common.error
            write_description()
            save_config(CheckpointingConfig("torch_dist", 1), str(directory))
            commit()

        self._end = RankZeroTask(write)


class _Strategy(SaveStrategy):
    """Megatron's strategy, which leaves the last part of a write to the caller."""

    target: Path
    urgent: bool
    finish: Callable[[], Callable[[], None]]
    in_use: Any = None

    def change(self, request: AsyncRequest, writer: Any, metadata: Any, ranks: Any) -> AsyncRequest:
        directory, preload = self.target, request.preload_fn

        def preload_and_keep() -> Any:
            """Copy tensors from the GPU to pinned memory, which the forked writer shares with this
            process instead of getting a copy of it. Until the writer has ended, the copies must not
            return to torch's allocator, or the next batch would overwrite them."""
            self.in_use = preload()
            return self.in_use

        def finish() -> Callable[[], None]:
            """Gather the results of all ranks; returns the function with which rank 0 finishes."""
            self.in_use = None
            results = ranks.gather_object(writer.retrieve_write_results())

            def write_description() -> None:
                failures = {r: x for r, x in enumerate(results) if isinstance(x, tuple)}
                if failures:
                    raise CheckpointError(_first_failure(directory, failures))
                # Without the plans of all ranks, which Megatron attaches to it.
                writer.finish(dataclasses.replace(metadata), results)

            return write_description

        self.finish = finish
        if request.async_fn is None:
            return request
        # The first argument of Megatron's function concerns other ways to write, unused here.
        return request._replace(
            async_fn=partial(_write_and_hash, self.urgent, request.async_fn.args[0]),
            preload_fn=preload and preload_and_keep,
        )


class _Writer(AsyncFileWriter):
    """Copies host tensors for the process that writes them."""

    staging = Staging()

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        staging, resolve = self.staging, planner.resolve_data
        tensors = [
            data
            for item in plan.items
            if item.type != WriteItemType.BYTE_IO
            and isinstance(data := resolve(item), torch.Tensor)
            and data.device.type == "cpu"
        ]
        staging.reserve(sum(tensor.nbytes for tensor in tensors), len(tensors))

        def resolve_copy(item: WriteItem) -> Any:
            data = resolve(item)
            if isinstance(data, torch.Tensor) and data.device.type == "cpu":
                return staging.copy(data)
            return data

        planner.resolve_data = resolve_copy  # type: ignore[assignment,method-assign]
        super().prepare_write_data(plan, planner)


use_file_writer(_Writer)


class _CommonFile(TorchCommonSaveStrategy):
    """Keeps an error of rank 0 until all ranks can be told."""

    error: CheckpointError | None = None

    def save_common(self, common_state_dict: State, checkpoint_dir: str | Path) -> None:
        try:
            super().save_common(common_state_dict, checkpoint_dir)
        except (OSError, RuntimeError) as error:
            # torch's zip writer turns a full disk into a RuntimeError.
            self.error = CheckpointError(f"{checkpoint_dir}/common.pt: cannot be written ({error})")


class _ResultsFile:
    """A queue for one item from a forked writer to its rank.

    A pipe holds only 64 KiB and would block the writer, because its rank reads only after the
    writer has ended.
    """

    def __init__(self) -> None:
        # A rank without room for it must not fail alone, before a collective of all ranks: it takes
        # part in that, and then has written nothing. A file in memory needs no directory.
        self._file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            self._file = os.fdopen(os.memfd_create("results"), "w+b")

    def put(self, item: Any) -> None:
        if self._file is None:
            return
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        if self._file is None:
            raise queue.Empty
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            # The writer died before or during its report.
            raise queue.Empty from None


def _write_and_hash(
    urgent: bool, transforms: list[Any], rank: int, buckets: list[Any], results: _ResultsFile
) -> None:
    """Write this rank's files, then describe them for the manifest; runs in the forked process.

    Megatron's own function would fork again for each file, and wait forever for a killed process.
    """
    # OpenMP's threads do not exist in a forked process, and it would wait for them.
    torch.set_num_threads(1)
    if not urgent:
        stand_back()
    written: dict[int, Any] = {}
    outcome: dict[int, Any] | Exception = written
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(number)
        _Writer.write_preloaded_data(transforms, number, bucket, answers, running, True)
        _, answer = answers.get()
        if isinstance(answer, Exception):
            outcome = answer
            break
        written[number] = answer
    results.put(outcome)
    files = [Path(path) for path, *_ in buckets]
    describe_files(files[0].parent.parent, files, rank)


def _first_failure(directory: Path, failures: dict[int, Any]) -> str:
    rank, (error, _) = min(failures.items())
    return f"{directory}: rank {rank} cannot write ({error})"


def write_now(state: State, directory: Path) -> None:
    """Write the state of a single process."""
    calls, writer = AsyncCallsQueue(), TensorWriter()
    forks.schedule(calls, writer.plan(state, directory, urgent=True, commit=lambda: None))
    calls.maybe_finalize_async_calls(blocking=True)
    writer.ended(wait=True)


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The names and whole shapes of the tensors in a directory.

    Raises:
        CheckpointError: it holds more than tensors, or is damaged.
    """
    read_description(directory / DESCRIPTION)
    found = dist_checkpointing.load_tensors_metadata(str(directory))
    return {name: tuple(tensor.global_shape) for name, tensor in found.items()}


def read(state: State, directory: Path) -> State:
    """Fill a sharded state from a directory; a collective of the world.

    Raises:
        CheckpointError: it is of another model, damaged, or holds more than tensors.
        RuntimeError: another rank is lost.
    """
    read_description(directory / DESCRIPTION)
    try:
        return dist_checkpointing.load(state, str(directory))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{directory}: refused, it holds more than tensors; use another checkpoint"
        ) from error
    except CheckpointException as error:
        # torch derives it from BaseException.
        raise CheckpointError(f"{directory}: cannot be read ({error.failures})") from error
    except (EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
        if is_lost_connection(error):
            raise
        raise CheckpointError(f"{directory}: cannot be read ({error})") from error
    except (CheckpointingException, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{directory}: does not fit the model of the recipe ({reason}); use the recipe next "
            "to it, or another run.dir"
        ) from error
