"""Progress without a terminal: lines with counts, rate and time left, and none too many."""

import pytest

from calm_dist.data import progress as module
from calm_dist.data.progress import progress


def test_lines_show_count_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert list(progress("abcdefgh", 8, label="OUT", unit="documents")) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    # Items come every 4 seconds, so a line is due with the third of them, at second 12.
    assert len(lines) == 2
    assert lines[0].startswith("OUT:") and "2/8" in lines[0]
    assert "[00:12<00:36" in lines[0] and "documents" in lines[0]
