"""The training stream and random access in one process: order, resumption, and every fault.

FACTS of Streaming 0.13.0 that these tests hold down: a damaged or missing shard ends an epoch
early, local data is never hashed, a pickle in the index is unpickled by LocalDataset, a name like
``../x`` is written outside the cache.
"""

import builtins
import errno
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from calm_dist.data import guard
from calm_dist.data.latents import plan_store, write_store
from calm_dist.data.store import fingerprint, read_meta
from calm_dist.data.stream import TrainingStream, open_store, open_training_stream
from calm_dist.errors import DataError, LaunchError, UnreachableError
from calm_dist.files import file_sha256
from calm_dist.interop.huggingface import load_autoencoder, save_autoencoder
from calm_dist.models.autoencoder import Autoencoder, AutoencoderConfig
from calm_dist.text.tokenizer import train_tokenizer


def write(root: Path, name: str, *, variant: str = "tokens", block_size: int = 16) -> Path:
    texts = [f"{name} {i}: " + "some words " * (1 + i % 7) for i in range(20)]
    corpus = root / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(["some words"], 265, root / "tokenizer.json")
    folder, model = None, None
    if variant == "fp16":
        folder = root / "autoencoder"
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        config = AutoencoderConfig(
            vocab_size=265, patch_size=4, latent_size=6, hidden_size=16, intermediate_size=32
        )
        save_autoencoder(Autoencoder(config), folder)
        model = load_autoencoder(folder)
    plan = plan_store(
        [corpus],
        tokenizer,
        variant=variant,  # type: ignore[arg-type]
        block_size=block_size,
        patch_size=4,
        autoencoder=folder,
    )
    write_store(root / name, [corpus], tokenizer, plan, autoencoder=model, shard_bytes=512)
    return root / name


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    write(root, "tokens")
    write(root, "latents", variant="fp16")
    write(root, "long", block_size=32)
    return root


@pytest.fixture
def store(stores: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; several shards of 8 blocks."""
    shutil.copytree(stores / "tokens", tmp_path / "store")
    return tmp_path / "store"


def indices(stream: TrainingStream, steps: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in islice(stream, steps)]


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def sign(store: Path, index: Any) -> None:
    """Give a changed index a meta.json that fits it, as its author could."""
    raw = json.dumps(index).encode()
    (store / "index.json").write_bytes(raw)
    fields = json.loads((store / "meta.json").read_text())
    fields["fingerprint"] = fingerprint(fields, raw)
    (store / "meta.json").write_text(json.dumps(fields))


def test_batches_hold_what_the_store_holds(stores: Path) -> None:
    store = open_store(stores / "latents")
    stream = open_training_stream([stores / "latents"], batch_size=5, seed=1)
    for batch in islice(stream, 3):
        assert {name: value.dtype for name, value in batch.items()} == {
            "index": torch.int64,
            "tokens": torch.int64,
            "mean": torch.float32,
            "log_std": torch.float32,
        }
        assert batch["tokens"].shape == (5, 16) and batch["mean"].shape == (5, 4, 6)
        for row, index in enumerate(batch["index"].tolist()):
            for name in ("tokens", "mean", "log_std"):
                np.testing.assert_array_equal(batch[name][row].numpy(), store[index][name])
    assert store[0]["index"] == 0 and store[0]["mean"].dtype == np.float16
    assert stream.metas[0] == store.meta
    assert set(next(iter(open_training_stream([stores / "tokens"], batch_size=2)))) == {
        "index",
        "tokens",
    }


@pytest.mark.parametrize("batch_size", [1, 5, 7, 16])
def test_epochs_are_permutations_of_whole_batches(stores: Path, batch_size: int) -> None:
    num_blocks = len(open_store(stores / "tokens"))
    stream = open_training_stream([stores / "tokens"], batch_size=batch_size, seed=2)
    assert stream.steps_per_epoch == num_blocks // batch_size
    received = np.array(indices(stream, 3 * stream.steps_per_epoch)).reshape(3, -1)
    for epoch in received:
        assert len(set(epoch.tolist())) == len(epoch)
        assert set(epoch.tolist()) <= set(range(num_blocks))
    assert not np.array_equal(received[0], received[1])
    if num_blocks % batch_size == 0:
        assert set(received[0].tolist()) == set(range(num_blocks))
    # A shuffle, not the order of the store, and another one for another seed.
    assert np.corrcoef(received[0], np.arange(len(received[0])))[0, 1] < 0.9
    other = open_training_stream([stores / "tokens"], batch_size=batch_size, seed=3)
    assert indices(other, stream.steps_per_epoch) != received[0].reshape(-1, batch_size).tolist()


def reading_threads() -> int:
    """Threads of Streaming that read ahead in this process."""
    count = 0
    for frame in sys._current_frames().values():
        at: FrameType | None = frame
        while at is not None and at.f_code.co_name not in ("_prepare_thread", "_ready_thread"):
            at = at.f_back
        count += at is not None
    return count


def test_reading_that_is_given_up_leaves_no_threads(stores: Path) -> None:
    """They would wake again and again until the process ends."""
    before = reading_threads()
    batches = iter(open_training_stream([stores / "tokens"], batch_size=1))
    next(batches)
    assert reading_threads() == before + 2
    del batches
    deadline = time.monotonic() + 60
    while reading_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reading_threads() <= before


@pytest.mark.parametrize("steps_done", [0, 3, 12, 30])
def test_resume_continues_exactly(stores: Path, steps_done: int) -> None:
    stream = open_training_stream([stores / "tokens"], batch_size=4)
    unbroken = indices(stream, steps_done + 20)
    assert stream.steps_per_epoch < 20
    state = json.loads(json.dumps(stream.state_dict(steps_done)))
    resumed = open_training_stream([stores / "tokens"], batch_size=4)
    resumed.load_state_dict(state)
    assert indices(resumed, 20) == unbroken[steps_done:]


def test_state_of_another_run_is_refused(stores: Path) -> None:
    state = open_training_stream([stores / "tokens"], batch_size=4).state_dict(1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 2}, "global_batch_size=4, this run has 2"),
        ({"batch_size": 4, "seed": 9}, "seed=0, this run has 9"),
    ]
    for changes, name in cases:
        stream = open_training_stream([stores / "tokens"], **changes)
        with pytest.raises(DataError, match=name):
            stream.load_state_dict(state)
    with pytest.raises(DataError, match="stores="):
        open_training_stream([stores / "long"], batch_size=4).load_state_dict(state)


def test_a_longer_list_of_stores_begins_a_new_order(stores: Path, tmp_path: Path) -> None:
    old, new = stores / "tokens", write(tmp_path, "more")
    size = len(open_store(old))
    options: dict[str, Any] = {"batch_size": 4, "seed": 1}
    before = open_training_stream([old], **options)
    first = indices(before, 7)
    state = json.loads(json.dumps(before.state_dict(7)))

    longer = open_training_stream([old, new], **options)
    note = longer.load_state_dict(state)
    assert note is not None
    assert f"1 more store(s), {new} ({len(open_store(new))} blocks): from step 8 on" in note
    assert "the present epoch ends after 7 of its steps" in note
    steps = longer.steps_per_epoch
    assert steps == (size + len(open_store(new))) // 4
    received = indices(longer, 2 * steps)
    for epoch in (received[:steps], received[steps:]):
        flat = np.ravel(epoch)
        assert len(set(flat.tolist())) == len(flat) and flat.max() >= size
    # It is the same order after another resume, and a run that never saw the old store alone has
    # another one.
    state = json.loads(json.dumps(longer.state_dict(7 + 5)))
    again = open_training_stream([old, new], **options)
    assert again.load_state_dict(state) is None
    assert indices(again, steps) == received[5 : 5 + steps]
    assert indices(open_training_stream([old, new], **options), 7) not in (first, received[:7])
    # The old store alone still continues.
    alone = open_training_stream([old], **options)
    assert alone.load_state_dict(before.state_dict(7)) is None
    for paths in ([new, old], [new]):
        with pytest.raises(DataError, match="further stores at the end of the list"):
            open_training_stream(paths, **options).load_state_dict(before.state_dict(7))
    for stream, line in (
        (
            longer,
            f"data: {new}: {len(open_store(new))} blocks, 0.474 of each batch; 0 epochs read, ",
        ),
        (alone, f"data: {old}: {size} blocks; {7 * 4 / size:.3g} epochs read, "),
    ):
        assert any(one.startswith(line) for one in stream.describe(7, 90)), stream.describe(7, 90)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_weights_that_change_and_limits(stores: Path, tmp_path: Path, num_workers: int) -> None:
    paths = [stores / "tokens", write(tmp_path, "more")]
    sizes = [len(open_store(path)) for path in paths]
    options: dict[str, Any] = {
        "weights": [[(0, 3.0), (9, 1.0)], [(0, 1.0), (9, 1.0)]],
        "most_epochs": [1.5, None],
        "batch_size": 4,
        "num_workers": num_workers,
    }
    stream = open_training_stream(paths, **options)
    received = np.array(indices(stream, 40))
    old = (received < sizes[0]).sum(axis=1)
    assert old[:9].sum() == 27
    assert 1.5 * sizes[0] - 2 < old.sum() <= 1.5 * sizes[0]
    last = int(np.flatnonzero(old)[-1])
    assert last < 39 and abs(old[9 : last + 1].sum() / (last - 8) - 2) < 0.1
    assert stream.describe_read(40).startswith("data: read 1.49 epochs of ")
    with pytest.raises(DataError, match="the stores give data for"):
        open_training_stream(paths, **{**options, "most_epochs": [1.5, 1.0]}).describe(0, 40)
    # A resume anywhere, also with weights that change later than before.
    for step in (4, 9, 20, 30):
        state = json.loads(json.dumps(stream.state_dict(step)))
        again = open_training_stream(paths, **options)
        assert again.load_state_dict(state) is None
        assert indices(again, 10) == received[step : step + 10].tolist()
    later = [[(0, 3.0), (9, 1.0)], [(0, 1.0), (9, 1.0), (30, 0.0)]]
    other = open_training_stream(paths, **{**options, "weights": later, "most_epochs": None})
    note = other.load_state_dict(stream.state_dict(20))
    assert note is not None and "other weights or limits: from step 21 on" in note
    assert (np.array(indices(other, 15))[10:] < sizes[0]).all()
    state = open_training_stream(paths, **{**options, "most_epochs": None}).state_dict(20)
    # Of the present stretch, and of one that has ended.
    for earlier in ([(0, 3.0), (9, 2.0)], [(0, 2.0), (9, 1.0)]):
        changed = {**options, "weights": [earlier, [(0, 1.0), (9, 1.0)]]}
        for limits in (options["most_epochs"], None):
            with pytest.raises(DataError, match="weights="):
                open_training_stream(paths, **{**changed, "most_epochs": limits}).load_state_dict(
                    state
                )


MIXTURES: dict[str, dict[str, Any]] = {
    "weights": {"weights": [1.0, 1.7]},
    "weights that change": {"weights": [[(0, 3.0), (7, 1.0)], [(0, 1.0), (17, 0.0), (25, 2.0)]]},
    "limit": {"weights": [4.0, 1.0], "most_epochs": [2.0, None]},
    "limit without weights": {"most_epochs": [1.5, None]},
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", MIXTURES)
def test_blocks_of_a_mixture_repeat_only_after_all_of_their_store(
    stores: Path, tmp_path: Path, name: str, num_workers: int
) -> None:
    paths = [stores / "tokens", write(tmp_path, "more")]
    sizes = [len(open_store(path)) for path in paths]
    options = {**MIXTURES[name], "batch_size": 4, "seed": 5, "num_workers": num_workers}
    stream = open_training_stream(paths, **options)
    received = indices(stream, 60)
    whole = [stretch for stretch in stream.mixture.until(59) if stretch.end <= 60]
    assert len(whole) > 1
    for stretch in whole:
        times = np.bincount(np.ravel(received[: stretch.end]), minlength=sum(sizes))
        for store in np.split(times, [sizes[0]]):
            assert np.ptp(store) <= 1
    most = options.get("most_epochs", [None])[0]
    assert most is None or times[: sizes[0]].max() == np.ceil(most)
    for step in (1, whole[0].end, whole[0].end + 2):
        state = json.loads(json.dumps(stream.state_dict(step)))
        again = open_training_stream(paths, **options)
        assert again.load_state_dict(state) is None
        assert indices(again, 25) == received[step : step + 25]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_an_earlier_version_keeps_its_order(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In them Streaming drew the blocks of each stretch."""
    paths = [stores / "tokens", write(tmp_path, "more")]
    options = {**MIXTURES[name], "batch_size": 4, "seed": 5}
    stream = open_training_stream(paths, **options)
    state = json.loads(json.dumps(stream.state_dict(9)))
    assert state.pop("order") == "passes"
    later = open_training_stream(paths, **options)
    assert later.load_state_dict(state) is None
    assert "order" not in later.state_dict(12)
    found = indices(later, 30)
    assert found != indices(stream, 39)[9:]
    with monkeypatch.context() as patch:
        patch.delattr(guard.GuardedDataset, "resample_streams")
        assert found == indices(open_training_stream(paths, **options), 39)[9:]


def test_a_run_that_has_read_all_it_may_read_can_be_started_again(stores: Path) -> None:
    def opened(most: float) -> TrainingStream:
        return open_training_stream([stores / "tokens"], batch_size=4, most_epochs=[most])

    stream = opened(1.0)
    last = stream.steps_per_epoch
    assert len(indices(stream, last)) == last
    state = json.loads(json.dumps(stream.state_dict(last)))
    again = opened(1.0)
    assert again.load_state_dict(state) is None
    assert "epochs read" in again.describe(last, last)[0]
    with pytest.raises(DataError, match=f"give data for {last} steps"):
        again.describe(last, last + 1)
    more = opened(1.5)
    assert more.load_state_dict(state) is not None
    assert len(indices(more, 2)) == 2


def test_stores_that_do_not_fit_together_are_refused(stores: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"differ in block_size \(16 and 32\)"):
        open_training_stream([stores / "tokens", stores / "long"], batch_size=4)
    with pytest.raises(DataError, match=r"differ in variant \(tokens and fp16\)"):
        open_training_stream([stores / "tokens", stores / "latents"], batch_size=4)
    with pytest.raises(DataError, match="named twice"):
        open_training_stream([stores / "tokens", f"{stores}/./tokens"], batch_size=4)
    shutil.copytree(stores / "tokens", tmp_path / "copy")
    with pytest.raises(DataError, match=r"weights \[1.0\]: give a number above 0 for each of"):
        open_training_stream([stores / "tokens", tmp_path / "copy"], [1.0], batch_size=4)
    with pytest.raises(DataError, match="fewer than one global batch of 1000"):
        open_training_stream([stores / "tokens"], batch_size=1000)


def test_world_that_would_hang_is_refused(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="1 ranks cannot be divided into groups of 2"):
        open_training_stream([stores / "tokens"], batch_size=4, replication=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="LOCAL_WORLD_SIZE is not set"):
        open_training_stream([stores / "tokens"], batch_size=4)


def remove(name: str) -> Callable[[Path], None]:
    return lambda store: (store / name).unlink()


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        (store / name).write_text(text)

    return damage


def change_meta(**changes: Any) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        fields = json.loads((store / "meta.json").read_text())
        (store / "meta.json").write_text(json.dumps({**fields, **changes}))

    return damage


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage done by someone who makes meta.json fit."""

    def damage(store: Path) -> None:
        index = json.loads((store / "index.json").read_text())
        change(index)
        sign(store, index)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no store": (shutil.rmtree, "store: no such directory"),
    "no meta": (remove("meta.json"), r"store: has no readable meta\.json"),
    "no index": (remove("index.json"), r"index\.json: cannot be read"),
    "no shard": (remove("shard.00001.mds"), r"shard\.00001\.mds: is missing"),
    "meta is not JSON": (rewrite("meta.json", "{"), r"meta\.json: JSON: "),
    "other format": (change_meta(format=2), r"meta\.json: format"),
    "field unknown": (change_meta(extra=1), r"meta\.json: extra"),
    "field changed": (change_meta(seed=7), r"index\.json: does not belong to .*meta\.json"),
    "index changed": (rewrite("index.json", "{}"), r"index\.json: does not belong to"),
    "byte flipped": (lambda s: flip(s / "shard.00002.mds"), r"shard\.00002\.mds: is damaged"),
    "cut off": (
        lambda s: os.truncate(s / "shard.00000.mds", 100),
        r"shard\.00000\.mds: has 100 bytes instead of",
    ),
    "pickle": (
        change_index(lambda index: index["shards"][1].update(column_encodings=["pkl"])),
        r"index\.json: .*column_encodings \['pkl'\] instead of",
    ),
    "outside": (
        change_index(lambda index: index["shards"][0]["raw_data"].update(basename="../x.mds")),
        r"index\.json: .*shard name '\.\./x\.mds'",
    ),
    "other hash": (
        change_index(lambda index: index["shards"][0].update(hashes=["md5"])),
        r"index\.json: .*hashes \['md5'\]",
    ),
    "compressed": (
        change_index(lambda index: index["shards"][0].update(compression="zstd")),
        r"index\.json: .*compression 'zstd'",
    ),
    "shard left out": (
        change_index(lambda index: index["shards"].pop()),
        r"index\.json: .*samples do not add up to",
    ),
    "not an index": (change_index(lambda index: index.pop("shards")), r"index\.json: is not"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_on_opening(store: Path, kind: str) -> None:
    damage, message = DAMAGES[kind]
    damage(store)
    with pytest.raises(DataError, match=message):
        open_training_stream([store], batch_size=4)
    with pytest.raises(DataError, match=message):
        open_store(store)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["byte flipped", "no shard"])
def test_damage_in_a_large_store_is_found_on_first_use(
    store: Path, kind: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "CHECK_ON_OPEN_BYTES", 0)
    stream = open_training_stream([store], batch_size=4, num_workers=num_workers)
    damage, message = DAMAGES[kind]
    damage(store)
    with pytest.raises(DataError, match=message) as error:
        indices(stream, 2 * stream.steps_per_epoch)
    assert "Traceback" not in str(error.value)
    if num_workers:
        # Left to the garbage collector inside pytest's traceback, torch waits 10 s for them.
        stream.close()


def test_random_access_to_a_large_store_checks_each_shard_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "CHECK_ON_OPEN_BYTES", 0)
    flip(store / "shard.00001.mds")
    opened = open_store(store)
    assert opened[0]["tokens"].shape == (16,)
    per_shard = 512 // (4 * 16)
    with pytest.raises(DataError, match=r"shard\.00001\.mds: is damaged"):
        opened[per_shard]
    with pytest.raises(IndexError):
        opened[len(opened)]


def test_shard_that_vanishes_while_reading_is_an_error(store: Path) -> None:
    stream = open_training_stream([store], batch_size=2)
    batches = iter(stream)
    next(batches)
    for shard in store.glob("shard.*"):
        shard.unlink()
    with pytest.raises(DataError, match=r"shard\.\d+\.mds: is missing"):
        for _ in range(stream.steps_per_epoch):
            next(batches)


def lose(patch: pytest.MonkeyPatch, ending: str, number: int) -> None:
    """The mount of files with this ending of their path is lost: no call of the system finds it."""
    for owner, name in ((os, "stat"), (os, "open"), (io, "open"), (builtins, "open")):
        original = getattr(owner, name)

        def call(path: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            if isinstance(path, str | Path) and str(path).endswith(ending):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *args, **kwargs)

        patch.setattr(owner, name, call)


NUMBERS = [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("ending", ["/store", "/meta.json", "/index.json", "/shard.00001.mds"])
def test_a_lost_mount_is_no_lasting_fault(
    store: Path, monkeypatch: pytest.MonkeyPatch, ending: str, number: int
) -> None:
    lose(monkeypatch, ending, number)
    message = rf"store.*: cannot be read \({os.strerror(number)}\).*start the same command again"
    for opened in (lambda: open_training_stream([store], batch_size=4), lambda: open_store(store)):
        with pytest.raises(UnreachableError, match=message):
            opened()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mount_that_is_lost_while_reading_is_no_lasting_fault(
    store: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(guard, "CHECK_ON_OPEN_BYTES", 0)
    stream = open_training_stream([store], batch_size=4, num_workers=num_workers)
    random_access = open_store(store)
    assert random_access[0]["index"] == 0
    lose(monkeypatch, ".mds", errno.ESTALE)
    with pytest.raises(UnreachableError, match=r"shard\.\d+\.mds: cannot be read"):
        indices(stream, stream.steps_per_epoch)
    stream.close()
    with pytest.raises(UnreachableError, match=r"shard\.00000\.mds: block 1: cannot be read"):
        random_access[1]


def test_the_systems_own_error_of_a_read() -> None:
    """Page zero of a process cannot be read: EIO, from the read itself."""
    with pytest.raises(UnreachableError, match=r"mem: cannot be read \(Input/output error\)"):
        file_sha256(Path("/proc/self/mem"))


def test_waiting_for_a_shard_that_another_reader_cannot_prepare_ends(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader gets the shard's fault itself, or continues to see that another met it."""
    monkeypatch.setattr(guard, "CHECK_ON_OPEN_BYTES", 0)
    dataset = open_training_stream([store], batch_size=4)._dataset
    flip(store / "shard.00001.mds")
    preparing, waiting = Event(), Event()
    check = guard.Shard.check

    def slow_check(shard: guard.Shard) -> None:
        preparing.set()
        assert waiting.wait(60)
        # The other reader is in the parent's loop by now, or will find the shard given back.
        time.sleep(0.1)
        check(shard)

    def prepare(blocking: bool) -> None:
        if blocking:
            waiting.set()
        try:
            dataset.prepare_shard(1, blocking)
        except DataError as error:
            faults.append(str(error))

    monkeypatch.setattr(guard.Shard, "check", slow_check)
    faults: list[str] = []
    failing, other = (Thread(target=prepare, args=[wait], daemon=True) for wait in (False, True))
    failing.start()
    assert preparing.wait(60)
    other.start()
    for reader in (failing, other):
        reader.join(60)
        assert not reader.is_alive()
    assert faults and all("shard.00001.mds: is damaged" in fault for fault in faults)


def test_reader_process_that_dies_is_an_error(stores: Path) -> None:
    stream = open_training_stream([stores / "tokens"], batch_size=1, num_workers=1)
    batches = iter(stream)
    next(batches)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    workers = [int(pid) for pid in children if "resource_tracker" not in cmdline(pid)]
    os.kill(workers[-1], signal.SIGKILL)
    with pytest.raises(DataError, match="reader process died"):
        for _ in range(200):
            next(batches)
    stream.close()
    stream.close()


def cmdline(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def test_meta_describes_the_store(stores: Path) -> None:
    meta = read_meta(stores / "latents")
    assert (meta.num_patches, meta.latent_size, meta.vocab_size) == (4, 6, 265)
    assert meta.num_blocks == len(open_store(stores / "latents"))
