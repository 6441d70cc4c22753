"""One Slurm for all tests of this folder, and a directory of jobs for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import PACKAGES, Cluster, missing_programs
from cluster_jobs import CPUS, GPUS, NODES, Jobs
from warm import warm_python


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Sixteen nodes of this one machine."""
    if missing := missing_programs():
        reason = f"Slurm is not installed ({', '.join(missing)}); apt install {PACKAGES}"
        # Set where it must not be left out, as in continuous integration.
        if os.environ.get("CALM_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), NODES, cpus=CPUS, gpus=GPUS) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.fixture
def warm(jobs: Jobs) -> None:
    """For many short jobs: the stack is imported once."""
    jobs.environment["CALM_PYTHON"] = warm_python()
