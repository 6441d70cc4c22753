"""What submits jobs to the Slurm of the tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster
from launches import ROOT, TIMEOUT_SECONDS

# What the largest default header asks for.
NODES, CPUS, GPUS = 16, 128, 8


class Jobs:
    """Submits jobs from one directory, and waits for them."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self.environment = cluster.environment | {
            "CALM_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *words: str | Path, check: bool = True, **more: str) -> str:
        """Run a command of Slurm, or of ours that uses it; what it prints."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment | more,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, script: str, options: list[str], arguments: list[str], **more: str) -> str:
        """sbatch a script of slurm/; the number of the job."""
        command: list[str | Path] = ["sbatch", "--parsable", *options, ROOT / "slurm" / script]
        return self.call(*command, *arguments, check=True, **more).strip()

    def states(self, *numbers: str) -> list[str]:
        shown = (self.call("scontrol", "show", "job", "--oneliner", number) for number in numbers)
        return [
            line.split("JobState=")[1].split()[0]
            for text in shown
            for line in text.split("\n")
            if line
        ]

    def exit_code(self, number: str) -> int:
        shown = self.call("scontrol", "show", "job", "--oneliner", number)
        return int(shown.split(" ExitCode=")[1].split(":")[0])

    def log(self, number: str) -> str:
        """The log of a job, which the default header puts into the directory of the submission."""
        return "".join(path.read_text() for path in self.directory.glob(f"*-{number}.out"))

    def wait(self, condition: Callable[[], bool], *numbers: str) -> None:
        """Until it is so; the logs of ``numbers`` tell why it never was."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "".join(map(self.log, numbers))
            time.sleep(0.2)

    def wait_for_end(self, *numbers: str) -> list[str]:
        """The state in which each job ended, in the sense of not coming back."""
        on_the_way = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED", "SUSPENDED"}
        self.wait(lambda: not on_the_way & set(self.states(*numbers)), *numbers)
        return self.states(*numbers)
