"""What a rehearsal adds up, on small examples by hand."""

from __future__ import annotations

from calm_dist.rehearsal.accounting import (
    Collective,
    EventCounts,
    KernelOrigin,
    MemoryLedger,
    Wait,
    separate,
)

HEAD = KernelOrigin("head")
WAIT = Wait("a number is read", "calm_dist/x.py:1")
REDUCE = Collective("all-reduce", "DP (8)")


def test_peak_is_the_most_that_was_live_at_once() -> None:
    ledger = MemoryLedger()
    ledger.add("weight", 1024, "weights")
    ledger.add("first", 512, "activations")
    ledger.remove("first")
    ledger.add("second", 256, "activations")
    assert (ledger.now, ledger.peak) == (1536, 1536)
    ledger.add("third", 1, "other")
    # A byte takes as much as the allocator's smallest block.
    assert (ledger.now, ledger.peak) == (2048, 2048)
    assert ledger.at_peak == {"weights": 1024, "activations": 512, "other": 512}
    ledger.remove("weight")
    assert ledger.now == 1024
    assert ledger.peak == 2048


def test_a_new_peak_begins_with_what_is_live() -> None:
    ledger = MemoryLedger()
    ledger.add("gone", 4096, "activations")
    ledger.add("kept", 1024, "activations")
    ledger.remove("gone")
    ledger.relabel_all("other")
    ledger.relabel("kept", "weights")
    ledger.relabel("unknown", "weights")
    ledger.restart()
    assert ledger.peak == 1024
    assert {label: size for label, size in ledger.at_peak.items() if size} == {"weights": 1024}


def counts(kernels: int, waits: int, calls: int) -> EventCounts:
    found = EventCounts()
    found.kernels[HEAD] = kernels
    found.waits[WAIT] = waits
    found.calls[REDUCE] = calls
    found.bytes[REDUCE] = 100 * calls
    return found


def test_work_of_a_micro_batch_and_of_a_step_are_separated() -> None:
    # 7 kernels and a wait in each micro-batch; 3 kernels and a reduction in each step.
    two, four = counts(3 + 2 * 7, 2, 1), counts(3 + 4 * 7, 4, 1)
    for found in (separate(two, 2, four, 4), separate(four, 4, two, 2)):
        assert found.each.kernels == {HEAD: 7}
        assert found.once.kernels == {HEAD: 3}
        assert found.each.waits == {WAIT: 1}
        # What happens once in a step costs a micro-batch nothing.
        assert not found.once.waits
        assert not found.each.calls
        whole = found.step(32)
        assert whole.kernels == {HEAD: 3 + 32 * 7}
        assert whole.waits == {WAIT: 32}
        assert whole.bytes == {REDUCE: 100}
