"""tools/train.py or tools/train_autoencoder.py, with something that goes wrong in it.

FAULT in the environment is JSON: {"kind": a function below, "rank": on which rank, -1 for all,
"step": in which step, counted from 1, and further arguments of the function}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from calm_dist.cli.console import run
from calm_dist.cli.training_tool import run_training_tool
from calm_dist.recipe import Recipe

FOREVER = 10_000.0


def stuck_here() -> None:
    """What a hang of our own looks like in a stack."""
    time.sleep(FOREVER)


def in_step(action: Any, step: int, last: int | None = None) -> None:
    """Call ``action(trainer, batch)`` at the beginning of steps ``step`` to ``last``."""
    from calm_dist.training.autoencoder import AutoencoderTrainer
    from calm_dist.training.language_model import Trainer

    for kind in (Trainer, AutoencoderTrainer):

        def train_step(self: Any, batch: Any, original: Any = kind.train_step) -> Any:
            if step <= self.progress.step + 1 <= (last or step):
                action(self, batch)
            return original(self, batch)

        kind.train_step = train_step  # type: ignore[method-assign]


def modules(trainer: Any) -> list[Any]:
    """The models of a trainer, as far as they are on this rank."""
    if hasattr(trainer, "model"):
        return [trainer.model]
    head = trainer.parts.head
    return [*trainer.parts.chunks, *([head.module] if head is not None else [])]


def nothing(step: int) -> None:
    """All goes well."""


def sleep_in_forward(step: int) -> None:
    def action(trainer: Any, batch: Any) -> None:
        modules(trainer)[0].register_forward_pre_hook(lambda *_: stuck_here())

    in_step(action, step)


def sleep_in_reader(step: int) -> None:
    """``step`` is the one whose batch does not come: it is read before the step before ends."""
    from calm_dist.data.guard import GuardedDataset

    original, samples = GuardedDataset.get_item, 0

    def get_item(self: Any, sample_id: int, retry: int = 7) -> Any:
        nonlocal samples
        samples += 1
        if samples > (step - 1) * self.batch_size:
            stuck_here()
        return original(self, sample_id, retry)

    GuardedDataset.get_item = get_item  # type: ignore[method-assign]


def sleep_in_checkpoint(step: int) -> None:
    """Whatever writes it, it syncs; the start's own files are already written."""
    in_step(lambda *_: setattr(os, "fsync", lambda descriptor: stuck_here()), step - 1)


def hold_interpreter(step: int) -> None:
    """A library that does not return, and lets no other thread of Python run."""
    import ctypes

    in_step(lambda trainer, batch: ctypes.PyDLL(None).sleep(int(FOREVER)), step)


def bad_gradient(step: int, last: int, part: int, value: str = "nan") -> None:
    """The gradient of the first parameter of module ``part`` is not finite."""

    def action(trainer: Any, batch: Any) -> None:
        parameter = next(modules(trainer)[part].parameters())

        def spoil(gradient: Any) -> Any:
            spoilt = gradient.clone()
            spoilt.view(-1)[0] = float(value)
            handle.remove()
            return spoilt

        handle = parameter.register_hook(spoil)

    in_step(action, step, last)


def skip(step: int) -> None:
    """Take loss and gradient of a step for not finite, as they are: a skip on purpose."""
    import math
    from types import SimpleNamespace

    from calm_dist.training import autoencoder, optimizer

    def action(trainer: Any, batch: Any) -> None:
        taken = iter([False])

        def isfinite(value: float) -> bool:
            return next(taken, math.isfinite(value))

        for module in (autoencoder, optimizer):
            module.math = SimpleNamespace(isfinite=isfinite, sqrt=math.sqrt)  # type: ignore

    in_step(action, step)


def huge_rate(step: int) -> None:
    """One step with a rate that ruins the weights, though all its own numbers are finite."""
    from calm_dist.training import autoencoder, optimizer
    from calm_dist.training.schedule import learning_rate

    def rate(training: Any, number: int) -> float:
        return 1e30 if number + 1 == step else learning_rate(training, number)

    autoencoder.learning_rate = optimizer.learning_rate = rate  # type: ignore[assignment]


def bad_weights(step: int) -> None:
    """Weights that are not finite after a step whose own numbers were."""
    import torch

    from calm_dist.training.autoencoder import AutoencoderTrainer
    from calm_dist.training.language_model import Trainer

    for kind in (Trainer, AutoencoderTrainer):

        def train_step(self: Any, batch: Any, original: Any = kind.train_step) -> Any:
            result = original(self, batch)
            if self.progress.step + 1 == step:
                with torch.no_grad():
                    next(modules(self)[0].parameters()).fill_(float("nan"))
            return result

        kind.train_step = train_step  # type: ignore[method-assign]


def signal_in(step: int, number: int) -> None:
    """A signal in the middle of a run."""
    in_step(lambda *_: os.kill(os.getpid(), number), step)


def bad_batch(step: int, last: int, value: str = "nan") -> None:
    """A latent that is to be predicted is not finite."""

    def action(trainer: Any, batch: Any) -> None:
        batch["mean"][0, 5, 0] = float(value)

    in_step(action, step, last)


def bad_loss(step: int, last: int, value: str = "nan") -> None:
    """An autoencoder's logits, and with them its loss, are not finite."""

    def action(trainer: Any, batch: Any) -> None:
        def spoil(module: Any, given: Any, logits: Any) -> Any:
            handle.remove()
            return logits * float(value)

        handle = trainer.model.decoder.register_forward_hook(spoil)

    in_step(action, step, last)


def jumping_clock(step: int) -> None:
    """The clock on the wall jumps by a day, back and forth."""
    real, calls = time.time, 0

    def jump() -> float:
        nonlocal calls
        calls += 1
        return real() + 86_400 * (-1) ** calls

    time.time = jump


def bad_shard(step: int, shard: str, flipped: bool = False, hashed: bool = True) -> None:
    """In the middle of a step a shard is gone, or a byte of it differs; what it was is ``.whole``.

    ``hashed``: whether the store is one whose shards are all read when it is opened.
    """
    import shutil
    from pathlib import Path

    from calm_dist.data import guard

    if not hashed:
        guard.CHECK_ON_OPEN_BYTES = 0
    path = Path(shard)

    def action(trainer: Any, batch: Any) -> None:
        if int(os.environ["RANK"]) != 0:
            return
        shutil.copy(path, path.with_suffix(".whole"))
        if not flipped:
            path.unlink()
            return
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    in_step(action, step)


def full_disk(step: int, last: int, bytes: int) -> None:
    """From the beginning of step ``step`` to that of ``last`` no file grows beyond ``bytes``."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # A module's compiled form that is cut off at the limit would break every later import.
    sys.dont_write_bytecode = True

    def action(trainer: Any, batch: Any) -> None:
        limit = bytes if trainer.progress.step + 1 < last else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    in_step(action, step, last)


def full_disk_for_common(step: int) -> None:
    """There is room for nothing of what a state has besides tensors."""
    from calm_dist.training.checkpoint.tensor_files import _CommonFile

    original = _CommonFile.save_common

    def save(self: Any, state: Any, directory: Any) -> None:
        with _file_size_limited(f"{step:08d}" in str(directory)):
            original(self, state, directory)

    _CommonFile.save_common = save  # type: ignore[assignment,method-assign]


def full_disk_at_the_end(step: int) -> None:
    """There was room for the tensors, but there is none for what describes them."""
    from calm_dist.training.checkpoint.tensor_files import TensorWriter

    original = TensorWriter._finalize

    def finalize(self: Any, finish: Any, directory: Any, commit: Any) -> None:
        write = finish()

        def write_to_full_disk() -> None:
            with _file_size_limited(f"{step:08d}" in str(directory)):
                write()

        original(self, lambda: write_to_full_disk, directory, commit)

    TensorWriter._finalize = finalize  # type: ignore[method-assign]


@contextlib.contextmanager
def _file_size_limited(limited: bool) -> Iterator[None]:
    import resource

    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    sys.dont_write_bytecode = True
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def no_process(step: int) -> None:
    """The machine has no room for another process in step ``step``."""
    import errno

    real = os.fork

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    in_step(lambda *_: setattr(os, "fork", refuse), step)
    in_step(lambda *_: setattr(os, "fork", real), step + 1)


def lost_forks(step: int, times: int) -> None:
    """The first processes that are forked from step ``step`` on never run their own code."""
    import resource

    # As many descriptors as a rank of a large world has.
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    for _ in range(1100):
        os.open(os.devnull, os.O_RDONLY)
    real, left = os.fork, [times]

    def lose() -> int:
        lost = left[0] > 0
        left[0] -= 1
        if (pid := real()) == 0 and lost:
            time.sleep(FOREVER)
        return pid

    in_step(lambda *_: setattr(os, "fork", lose), step)


def no_directory(step: int) -> None:
    """Nothing can be made in the directory of the checkpoints any more; for all ranks."""

    def action(trainer: Any, batch: Any) -> None:
        trainer._checkpoints.wait()
        if trainer.topology.rank == 0:
            checkpoints = trainer.run_dir / "checkpoints"
            checkpoints.rename(checkpoints.with_name("moved"))
            checkpoints.touch()

    in_step(action, step)


def patient_start() -> None:
    """Ranks of a busy machine come later than the short limits of these tests allow."""
    from calm_dist.training import session

    join_world = session.join_world
    session.join_world = lambda world, device, timeout_seconds: join_world(world, device, 300.0)


def train(recipe: Recipe) -> None:
    patient_start()
    fault = json.loads(os.environ["FAULT"])
    kind, rank = fault.pop("kind"), fault.pop("rank")
    number, at = fault.pop("signal", None), fault.pop("at", None)
    if rank in (-1, int(os.environ.get("RANK", "0"))):
        globals()[kind](**fault)
        if number is not None:
            signal_in(at, number)
    if recipe.model.kind == "autoencoder":
        from calm_dist.training.autoencoder import train_autoencoder

        train_autoencoder(recipe)
    else:
        from calm_dist.training.run import train as train_language_model

        train_language_model(recipe)


def main() -> None:
    run_training_tool(__doc__, train)


if __name__ == "__main__":
    run(main)
