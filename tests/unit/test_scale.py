"""`tests/scale.py` at a small size; by hand it takes any."""

from pathlib import Path

import pytest
import scale


@pytest.mark.full
def test_killed_workers_lose_and_double_nothing(tmp_path: Path) -> None:
    found = scale.measure(tmp_path / "scale", 50)
    assert max(found["largest_rss_mib"]) < 1000
    assert set(found["faults_by_reason"]) == {"no text", "not JSON"}
