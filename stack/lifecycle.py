"""Bringing the embedded stack up and down, and looking at it: what the commands call."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from schemas.errors import StackFailed
from stack import prerequisites, services
from stack.layout import PROJECT_ROOT, Home, ProcessInfo, StackState, State, read_state
from stack.process import Identity, end, wait_gone
from stack.supervisor import is_supervised, leftovers

DEFAULT_TASKMANAGERS = 4
START_DEADLINE = timedelta(minutes=3)
STOP_DEADLINE = timedelta(seconds=75)
GIVE_UP_AFTER_FAILURES = 3
"""`up` reports a service as failed after this many fast deaths; the supervisor goes on trying."""

Progress = Callable[[StackState], None]


def up(
    home: Home,
    only: tuple[str, ...] = (),
    taskmanagers: int | None = None,
    progress: Progress = lambda _: None,
) -> StackState:
    """Start the stack, or attach to the one that runs, and return when all of it is ready.

    `only` names services (with `flink` for all of Flink's), their dependencies come along; empty
    means all. Raises StackFailed for a missing prerequisite, a part that does not start (with
    the end of its log), or when another choice of services runs already.
    """
    home.create()
    deadline = time.monotonic() + START_DEADLINE.total_seconds()
    _wait_while_stopping(home)
    held = is_supervised(home)
    state = _state_of_running(home, deadline, seen_locked=True) if held else None
    if state is not None:
        chosen = _attach(state, only, taskmanagers)
    else:
        count = DEFAULT_TASKMANAGERS if taskmanagers is None else taskmanagers
        chosen = services.choose(only, count)
        check(chosen)
        _start_supervisor(home, chosen, count)
        if _state_of_running(home, deadline) is None:
            raise _not_started(home)
    return _wait_ready(home, chosen, deadline, progress)


def check(chosen: tuple[str, ...]) -> None:
    """Raises StackFailed when something that these services need is missing."""
    for name in chosen:
        if name in services.MODULES:
            prerequisites.check_module(services.MODULES[name])
    prerequisites.find(need_java=services.needs_java(chosen), need_redis="redis" in chosen)


def _start_supervisor(home: Home, chosen: tuple[str, ...], taskmanagers: int) -> None:
    with (home.logs / "supervisor.log").open("ab") as log:
        subprocess.run(
            [
                *(sys.executable, "-m", "stack.supervisor", "--home", str(home.root)),
                *("--services", ",".join(chosen), "--taskmanagers", str(taskmanagers)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=PROJECT_ROOT,
            check=True,
        )


def _wait_while_stopping(home: Home) -> None:
    deadline = time.monotonic() + STOP_DEADLINE.total_seconds()
    while time.monotonic() < deadline:
        state = read_state(home)
        if not (is_supervised(home) and state is not None and state.stopping):
            return
        time.sleep(0.1)
    raise StackFailed(f"the stack in {home.root} does not finish stopping; run `fanfare down`")


def _state_of_running(
    home: Home, deadline: float, *, seen_locked: bool = False
) -> StackState | None:
    """The state written by the supervisor that runs now, waiting for its first word.

    None where the home's lock is let go meanwhile: by one that failed to start, or by the last
    threads of one that was killed.
    """
    began = time.monotonic()
    while time.monotonic() < deadline:
        state = read_state(home)
        if state is not None and state.supervisor is not None and state.supervisor.alive():
            return state
        locked = is_supervised(home)
        if seen_locked and not locked:
            return None
        if time.monotonic() - began > 30:
            break
        seen_locked = seen_locked or locked
        time.sleep(0.05)
    raise _not_started(home)


def _not_started(home: Home) -> StackFailed:
    log = home.logs / "supervisor.log"
    return StackFailed(f"the supervisor did not start; its log {log} ends:\n{tail(log)}")


def _attach(state: StackState, only: tuple[str, ...], taskmanagers: int | None) -> tuple[str, ...]:
    if taskmanagers is not None and taskmanagers != state.taskmanagers:
        raise StackFailed(
            f"the stack runs with {state.taskmanagers} TaskManagers, not {taskmanagers}; "
            "run `fanfare down` first to change that"
        )
    chosen = services.choose(only, state.taskmanagers)
    absent = [name for name in chosen if name not in state.services]
    if absent:
        raise StackFailed(
            f"the stack runs without {', '.join(absent)} (it was started with --only); "
            "run `fanfare down` first, then `fanfare up`"
        )
    return chosen


def _wait_ready(
    home: Home, chosen: tuple[str, ...], deadline: float, progress: Progress
) -> StackState:
    while True:
        state = read_state(home)
        if state is None or state.supervisor is None or not state.supervisor.alive():
            log = home.logs / "supervisor.log"
            raise StackFailed(f"the supervisor ended; its log {log} ends:\n{tail(log)}")
        progress(state)
        infos = [state.services[name] for name in chosen]
        if all(info.state is State.READY for info in infos):
            return state
        broken = [info for info in infos if info.failures >= GIVE_UP_AFTER_FAILURES]
        if broken:
            raise StackFailed("\n".join(map(explain, broken)))
        if time.monotonic() > deadline:
            late = [info for info in infos if info.state not in (State.READY, State.WAITING)]
            raise StackFailed("\n".join(map(explain, late)))
        time.sleep(0.1)


def explain(info: ProcessInfo) -> str:
    """Which part is not ready, why, where its log is, and how that ends."""
    why = info.why or f"still {info.state.value}"
    return (
        f"{info.name} is not ready: {why} (it is tried again until `fanfare down`). "
        f"Its log {info.log} ends:\n{tail(info.log)}"
    )


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    try:
        with log.open("rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - 16_384))
            text = handle.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return "    (no log was written)"
    last = [line[:400] for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(f"    {line}" for line in last) or "    (the log is empty)"


def down(home: Home) -> list[str]:
    """Stop everything of this home, dependents first; what does not stop in time is killed.

    Returns the names of the services that ran. Doing it twice is harmless. Raises StackFailed
    when a process remains.
    """
    state = read_state(home)
    running = [i.name for i in state.services.values() if i.alive] if state else []
    deadline = time.monotonic() + 10
    while is_supervised(home):
        state = read_state(home)
        if state is not None and state.supervisor is not None and state.supervisor.alive():
            _stop_supervisor(state.supervisor)
            break
        if time.monotonic() > deadline:
            raise StackFailed(
                f"a process holds {home.lock_file} but has written no state; find it with "
                f"`fuser {home.lock_file}` and end it"
            )
        time.sleep(0.1)
    left = end(leftovers(home))
    if left:
        raise StackFailed(f"processes {[identity.pid for identity in left]} could not be ended")
    return running


def _stop_supervisor(supervisor: Identity) -> None:
    supervisor.send(signal.SIGTERM)
    supervisor.send(signal.SIGCONT)
    if wait_gone([supervisor], STOP_DEADLINE):
        supervisor.send(signal.SIGKILL)
        if wait_gone([supervisor], timedelta(seconds=10)):
            raise StackFailed(f"the supervisor, process {supervisor.pid}, could not be ended")


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One line of `fanfare status`. Memory and CPU are the process's with its children."""

    name: str
    state: str
    pid: int | None
    ports: dict[str, int]
    uptime_s: float | None
    ready_after_s: float | None
    restarts: int
    rss_mb: float | None
    cpu_percent: float | None
    log: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """As `status --json` prints it."""
        return {name: getattr(self, name) for name in self.__slots__}


def status(home: Home, sample: timedelta = timedelta(milliseconds=200)) -> list[ServiceStatus]:
    """How every service stands now; CPU is measured over `sample` (percent of one core)."""
    state = read_state(home)
    if state is None:
        return []
    supervised = state.supervisor is not None and state.supervisor.alive()
    alive = {name: info for name, info in state.services.items() if info.alive}
    before = {name: _usage(info) for name, info in alive.items()}
    began = time.monotonic()
    time.sleep(sample.total_seconds())
    spent_s = time.monotonic() - began
    found = []
    for name, info in state.services.items():
        rss_mb = cpu = uptime = None
        if name in alive:
            first, then = before[name], _usage(info)
            rss_mb = round(then[1] / 1e6, 1)
            cpu = round(max(0.0, then[0] - first[0]) / spent_s * 100, 1)
            if info.started is not None:
                uptime = round((datetime.now(UTC) - info.started).total_seconds(), 1)
        found.append(
            ServiceStatus(
                name=name,
                state=_shown_state(info, supervised, name in alive),
                pid=info.pid if name in alive else None,
                ports=dict(info.ports),
                uptime_s=uptime,
                ready_after_s=info.ready_after_s,
                restarts=info.restarts,
                rss_mb=rss_mb,
                cpu_percent=cpu,
                log=str(info.log),
                why=info.why,
            )
        )
    return found


def _shown_state(info: ProcessInfo, supervised: bool, alive: bool) -> str:
    if not supervised:
        return "unsupervised" if alive else State.STOPPED.value
    if alive and info.pid is not None:
        try:
            if psutil.Process(info.pid).status() == psutil.STATUS_STOPPED:
                return "suspended"
        except psutil.NoSuchProcess:
            return info.state.value
    return info.state.value


def _usage(info: ProcessInfo) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process and its children; zeros once it is gone."""
    cpu_s, rss = 0.0, 0
    try:
        process = psutil.Process(info.pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return cpu_s, rss
    for member in family:
        try:
            times = member.cpu_times()
            cpu_s += times.user + times.system
            rss += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return cpu_s, rss
