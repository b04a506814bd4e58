"""The supervisor: a daemon that starts the services, watches them and starts them again.

`python -m stack.supervisor --home DIR --services a,b,c --taskmanagers N` detaches itself and
holds the home's lock for as long as it lives; a second one for the same home ends at once.
Every change is written to the state file, which is all that others need to read. SIGTERM stops
the services, dependents first, and ends it. Should it be killed, the kernel kills its children.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from schemas.errors import StackFailed
from stack import prerequisites, services
from stack.layout import (
    PROJECT_ROOT,
    Home,
    ProcessInfo,
    StackState,
    State,
    allocate_ports,
    read_state,
    write_state,
)
from stack.layout import home as home_at
from stack.process import MARK, Identity, end, identify, marked
from stack.services import INCARNATION, ServiceSpec

LOGGER = logging.getLogger("fanfare.supervisor")
LAUNCHER = Path(__file__).with_name("launch.py")

PROBE_INTERVAL = timedelta(milliseconds=150)
SILENCE_INTERVAL = timedelta(seconds=2)
STEADY_AFTER = timedelta(seconds=10)
"""A process that was ready for this long and dies is started again at once."""
BACKOFF = tuple(timedelta(seconds=s) for s in (0, 0, 0.5, 1, 2, 4, 8, 15))
"""The wait before the n-th start in a row after a fast death; the last one repeats."""
DIED_FAST, NEVER_READY = 1, 3
"""How many fast deaths one counts as; never getting ready took long enough to count thrice."""
LOG_LIMIT_BYTES = 64 * 1024 * 1024
LOG_CHECK_INTERVAL = timedelta(seconds=30)
LOCK_PATIENCE = timedelta(seconds=2)


def backoff(fast_deaths: int) -> timedelta:
    """How long to wait before starting again after that many fast deaths in a row."""
    return BACKOFF[min(fast_deaths, len(BACKOFF) - 1)]


def take_lock(home: Home, patience: timedelta) -> IO[str] | None:
    """The home's lock, held until the file is closed; None when another holds it."""
    home.create()
    handle = home.lock_file.open("a", encoding="utf-8")
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                handle.close()
                return None
            time.sleep(0.05)
        else:
            return handle


def is_supervised(home: Home) -> bool:
    """Whether a supervisor holds the home's lock now."""
    try:
        with home.lock_file.open("r", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def leftovers(home: Home) -> list[Identity]:
    """Every process of this home that runs: those in the state file and those that bear its mark.

    Two ways, since a server may overwrite its environment, and a starter may die before it
    writes the state.
    """
    state = read_state(home)
    recorded = [info.identity for info in state.services.values()] if state else []
    found = {identity for identity in recorded if identity is not None and identity.alive()}
    return sorted(found | set(marked(home.root)), key=lambda identity: identity.pid)


class Supervisor:
    """The services of one home and what is known of them. One event loop, in the main thread:
    the kernel ties a child's life to the thread that made it."""

    def __init__(
        self,
        home: Home,
        specs: tuple[ServiceSpec, ...],
        ports: Mapping[str, int],
        taskmanagers: int,
    ) -> None:
        self._home = home
        self._specs = {spec.name: spec for spec in specs}
        self._ports = ports
        self._taskmanagers = taskmanagers
        self._myself = identify(os.getpid())
        self._infos = {
            spec.name: ProcessInfo(spec.name, State.WAITING, home.log(spec.name), dict(spec.ports))
            for spec in specs
        }
        self._ready = {spec.name: asyncio.Event() for spec in specs}
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stops: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._unwritten = False

    async def run(self) -> None:
        """Start everything and keep it running until SIGTERM or SIGINT."""
        told_to_stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told_to_stop.set)
        self._write()
        self._tasks = {name: asyncio.create_task(self._keep(name)) for name in self._specs}
        logs = asyncio.create_task(self._bound_logs())
        await told_to_stop.wait()
        LOGGER.info("stopping")
        self._stopping.set()
        self._write()
        logs.cancel()
        await asyncio.gather(*(self._stop_after_dependents(name) for name in self._specs))
        LOGGER.info("stopped")

    # --- keeping one service running ---

    async def _keep(self, name: str) -> None:
        spec = self._specs[name]
        for dependency in spec.depends_on:
            await self._ready[dependency].wait()
        fast_deaths = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await self._set_up(spec)
                why, blame = await self._one_life(spec)
            except Exception as error:
                LOGGER.exception("%s: could not be started", name)
                why, blame = f"could not be started: {error}", DIED_FAST
            if self._stopping.is_set():
                return
            fast_deaths = fast_deaths + blame if blame else 0
            info = self._infos[name]
            LOGGER.warning(
                "%s: %s after %.1f s; starting it again", name, why, time.monotonic() - began
            )
            self._set(
                name,
                state=State.FAILING if blame else State.STARTING,
                identity=None,
                restarts=info.restarts + 1,
                failures=fast_deaths,
                why=why,
            )
            await asyncio.sleep(backoff(fast_deaths).total_seconds())

    async def _set_up(self, spec: ServiceSpec) -> None:
        if not spec.setup or (spec.setup_done and spec.setup_done.exists()):
            return
        process = await self._spawn(spec, spec.setup)
        self._set(spec.name, state=State.STARTING, identity=identify(process.pid))
        code = await self._wait(spec.name, process)
        if code != 0:
            raise StackFailed(f"its set-up ended with {_ending(code)}")

    async def _one_life(self, spec: ServiceSpec) -> tuple[str, int]:
        """Start the process and see it to its end: why it ended, and as how many fast deaths
        that counts."""
        name = spec.name
        incarnation = f"{time.time_ns() // 1_000_000:x}"
        if spec.scratch is not None:
            await asyncio.to_thread(_empty, spec.scratch)
        began = time.monotonic()
        process = await self._spawn(
            spec, tuple(part.replace(INCARNATION, incarnation) for part in spec.command)
        )
        before = self._infos[name]
        self._set(
            name,
            state=State.FAILING if before.failures else State.STARTING,
            identity=identify(process.pid),
            started=datetime.now(UTC),
            ready_after_s=None,
        )
        LOGGER.info("%s: started, pid %d", name, process.pid)
        last_probe_error = ["it was never asked"]
        ended = asyncio.create_task(self._wait(name, process))
        ready = asyncio.create_task(_until_ready(spec, incarnation, last_probe_error))
        await asyncio.wait(
            {ended, ready},
            timeout=spec.start_timeout.total_seconds(),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if ended.done():
            ready.cancel()
            return f"{_ending(ended.result())} before it was ready", DIED_FAST
        if not ready.done():
            ready.cancel()
            _kill_group(process.pid)
            await ended
            waited = spec.start_timeout.total_seconds()
            return f"not ready after {waited:.0f} s: {last_probe_error[0]}", NEVER_READY
        ready_at = time.monotonic()
        self._set(name, state=State.READY, ready_after_s=round(ready_at - began, 2), why="")
        self._ready[name].set()
        LOGGER.info("%s: ready after %.1f s", name, ready_at - began)
        silent = asyncio.create_task(_until_silent(spec, incarnation, last_probe_error))
        try:
            await asyncio.wait({ended, silent}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            silent.cancel()
        if not ended.done():
            _kill_group(process.pid)
            await ended
            return f"no good answer for {spec.silence}: {last_probe_error[0]}", 0
        code = ended.result()
        steady = time.monotonic() - ready_at >= STEADY_AFTER.total_seconds()
        return _ending(code), 0 if steady else DIED_FAST

    async def _spawn(
        self, spec: ServiceSpec, command: tuple[str, ...]
    ) -> asyncio.subprocess.Process:
        with self._home.log(spec.name).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=spec.cwd,
                env=_child_environment(self._home, spec),
                start_new_session=True,
            )
        self._running[spec.name] = process
        return process

    async def _wait(self, name: str, process: asyncio.subprocess.Process) -> int:
        code = await process.wait()
        self._running.pop(name, None)
        # What the server left behind (a Python worker, a rewrite of the append-only file)
        # would hold its files or ports.
        _kill_group(process.pid)
        return code

    # --- stopping ---

    def _stop_after_dependents(self, name: str) -> asyncio.Task[None]:
        if name not in self._stops:
            dependents = [other for other, spec in self._specs.items() if name in spec.depends_on]
            self._stops[name] = asyncio.create_task(
                self._stop(name, [self._stop_after_dependents(other) for other in dependents])
            )
        return self._stops[name]

    async def _stop(self, name: str, first: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*first)
        spec, process = self._specs[name], self._running.get(name)
        if process is not None:
            self._set(name, state=State.STOPPING)
            _signal(process.pid, spec.stop_signal)
            # A stopped process cannot end before it is continued.
            _signal(process.pid, signal.SIGCONT)
            try:
                await asyncio.wait_for(process.wait(), spec.stop_timeout.total_seconds())
            except TimeoutError:
                LOGGER.warning("%s: did not stop within %s; killed", name, spec.stop_timeout)
                _kill_group(process.pid)
                await process.wait()
            _kill_group(process.pid)
        self._tasks[name].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._tasks[name]
        self._set(name, state=State.STOPPED, identity=None, why="")

    # --- state and logs ---

    def _set(self, name: str, **changes: Any) -> None:
        self._infos[name] = replace(self._infos[name], **changes)
        self._write()

    def _write(self) -> None:
        """Write down how everything is; where that fails (a full disk) it is tried again, and
        the services are looked after all the same."""
        state = StackState(
            self._infos, self._ports, self._taskmanagers, self._myself, self._stopping.is_set()
        )
        try:
            write_state(self._home, state)
            self._unwritten = False
        except OSError:
            self._unwritten = True
            LOGGER.exception("the state of the stack could not be written")

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_INTERVAL.total_seconds())
            if self._unwritten:
                self._write()
            for name in self._specs:
                try:
                    await asyncio.to_thread(bound_log, self._home.log(name), LOG_LIMIT_BYTES)
                except OSError:
                    LOGGER.exception("%s: its log could not be shortened", name)


def bound_log(log: Path, limit_bytes: int) -> None:
    """Move a log's content to `NAME.log.1` when it has passed the limit. Its writer goes on
    writing to the same, emptied file (it was opened for appending)."""
    if log.exists() and log.stat().st_size > limit_bytes:
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)


async def _until_ready(spec: ServiceSpec, incarnation: str, last_error: list[str]) -> None:
    while True:
        try:
            await asyncio.to_thread(spec.probe, incarnation)
        except Exception as error:
            # Any answer but a good one means not ready; it is told when time runs out.
            last_error[0] = f"{type(error).__name__}: {error}"
            await asyncio.sleep(PROBE_INTERVAL.total_seconds())
        else:
            return


async def _until_silent(spec: ServiceSpec, incarnation: str, last_error: list[str]) -> None:
    """Return when a server has failed every probe for as long as it may."""
    if spec.silence is None:
        await asyncio.Event().wait()
        return
    answered = time.monotonic()
    while time.monotonic() - answered < spec.silence.total_seconds():
        await asyncio.sleep(SILENCE_INTERVAL.total_seconds())
        try:
            await asyncio.to_thread(spec.probe, incarnation)
        except Exception as error:
            last_error[0] = f"{type(error).__name__}: {error}"
        else:
            answered = time.monotonic()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _child_environment(home: Home, spec: ServiceSpec) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **spec.env, MARK: str(home.root)}


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def supervise(home: Home, chosen: tuple[str, ...], taskmanagers: int) -> None:
    """Hold the lock, clean what a crashed predecessor left, and run until told to stop."""
    lock = take_lock(home, LOCK_PATIENCE)
    if lock is None:
        LOGGER.info("another supervisor runs in %s", home.root)
        return
    with lock:
        left = leftovers(home)
        if left:
            LOGGER.warning("ending what was left: %s", [identity.pid for identity in left])
            stubborn = end(left)
            if stubborn:
                raise StackFailed(f"processes {[i.pid for i in stubborn]} could not be ended")
        before = read_state(home)
        remembered = before.ports if before else {}
        ports = allocate_ports(services.port_names(chosen), remembered)
        moved = sorted(key for key in remembered if ports[key] != remembered[key])
        if moved:
            LOGGER.warning("ports in use by others, new ones taken for: %s", moved)
        java = services.needs_java(chosen)
        tools = prerequisites.find(need_java=java, need_redis="redis" in chosen)
        specs = services.declare(home, tools, ports, chosen)

        async def run() -> None:
            await Supervisor(home, specs, ports, taskmanagers).run()

        asyncio.run(run())


def _detach() -> None:
    """Leave the starter: its session, and its list of children."""
    if os.fork() > 0:
        os._exit(0)
    os.setsid()
    if os.fork() > 0:
        os._exit(0)


def main() -> None:
    """The daemon's entry point."""
    parser = argparse.ArgumentParser(prog="stack.supervisor")
    parser.add_argument("--home", required=True)
    parser.add_argument("--services", required=True)
    parser.add_argument("--taskmanagers", type=int, required=True)
    arguments = parser.parse_args()
    _detach()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s %(message)s"
    )
    logging.getLogger("kafka").setLevel(logging.ERROR)
    try:
        supervise(
            home_at(arguments.home), tuple(arguments.services.split(",")), arguments.taskmanagers
        )
    except Exception:
        LOGGER.exception("the supervisor failed")
        raise


if __name__ == "__main__":
    main()
