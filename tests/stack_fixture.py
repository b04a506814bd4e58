"""The embedded stack for tests: `stack`, the whole of it, once a session.

With FANFARE_TEST_HOME set, the tests attach to the stack of that home and leave it running,
which saves its start while one works on a test; without, a stack of their own is brought up in
a temporary home and taken down at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from stack import lifecycle
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
