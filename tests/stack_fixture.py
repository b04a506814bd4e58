"""The embedded stack for tests: `stack`, the whole of it, once a session; `jobs`, on it.

With FANFARE_TEST_HOME set, the tests attach to the stack of that home and leave it running,
which saves its start while one works on a test; without, a stack of their own is brought up in
a temporary home and taken down at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest

from stack import flink_jobs, lifecycle
from stack.jobs import JOBS, start_jobs
from stack.layout import Home, State, home, processes
from stack.supervisor import leftovers


@contextmanager
def running_stack(
    root: Path, only: tuple[str, ...] = (), taskmanagers: int | None = None
) -> Iterator[Home]:
    """A stack in `root` for the length of the block; no process of it remains afterwards."""
    where = home(root)
    try:
        lifecycle.up(where, only, taskmanagers)
        yield where
    finally:
        lifecycle.down(where)
        left = leftovers(where)
        assert not left, f"processes remain: {left}"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The home of a running, whole stack."""
    attached = os.environ.get("FANFARE_TEST_HOME")
    if attached:
        where = home(attached)
        lifecycle.up(where)
        yield where
        return
    with running_stack(tmp_path_factory.mktemp("stack")) as where:
        yield where


@dataclass(slots=True)
class RunningJobs:
    """The jobs of the embedded stack, and their Flink ids by our names."""

    home: Home
    ids: dict[str, str] = field(default_factory=dict)

    def ensure(self) -> None:
        """Have all of them run, each subtask."""
        self.ids = start_jobs(self.home)
        for job_id in self.ids.values():
            flink_jobs.wait_running(self.home, job_id)

    def all_run(self) -> bool:
        """Whether each subtask of each job runs."""
        return all(flink_jobs.tasks_running(self.home, job_id) for job_id in self.ids.values())

    def cancel(self) -> None:
        """End them: the slots are for others now."""
        ours = {job.name for job in JOBS.values()}
        for job in flink_jobs.running_jobs(self.home):
            if job.name in ours:
                flink_jobs.cancel(self.home, job.id)


@pytest.fixture(scope="session")
def running_jobs(stack: Home) -> Iterator[RunningJobs]:
    """The stack's jobs, started once, with nothing between them and Kafka changed."""
    jobs = RunningJobs(stack)
    jobs.ensure()
    yield jobs
    if not os.environ.get("FANFARE_TEST_HOME"):
        jobs.cancel()


def eventually(
    condition: Callable[[], bool], timeout: timedelta = timedelta(seconds=60), what: str = ""
) -> None:
    """Poll until the condition holds; fail with `what` when it does not in time."""
    deadline = time.monotonic() + timeout.total_seconds()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout}: {what}"
        time.sleep(0.05)


def wait_restarted(where: Home, service: str, old_pid: int) -> None:
    """Wait until a service whose process was killed is ready again as another process."""

    def is_back() -> bool:
        info = processes(where)[service]
        return info.state is State.READY and info.pid != old_pid and info.alive

    eventually(is_back, what=f"{service} is ready again")
