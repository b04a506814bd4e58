"""What safety costs, and what it gives: ``make bench SECTION=safety``.

- how long after a pause was *written* the last request of the run started, and how many did
- how long no message reaches the provider when delivery's TaskManager is killed
- how long checkpoints take under full load, how many complete, how often anything failed over
- delivery's rate with the ledger beside the same loop without claim and settle, side by side
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import delivery
from bench.harness import SMTP, audience, campaign, command, follow, own_stack
from schemas.records import CommandKind
from sinks.store import FileStore
from stack import flink_jobs
from stack.jobs import JOBS, STANDARD
from stack.layout import Home, endpoints, processes
from stack.simulator.client import Control

PEOPLE = int(os.environ.get("FANFARE_BENCH_PEOPLE", "150000"))
KILLS = 3
PAUSES = 5
SPARE = 1
_LOAD = timedelta(minutes=int(os.environ.get("FANFARE_BENCH_LOAD_MINUTES", "10")))
"""How long full load lasts where failovers are counted."""


def _sent(control: Control, run: str) -> int:
    return int(control.stats(run)["unique"])


def _wait_sent(control: Control, run: str, count: int) -> None:
    until = time.monotonic() + 120
    while _sent(control, run) < count:
        if time.monotonic() > until:
            raise RuntimeError(f"{run} does not reach {count} messages")
        time.sleep(0.05)


def _pauses(where: Home, snapshot: str) -> dict[str, float]:
    """Pause and resume one run at full rate; times from the moment a command was written."""
    control = Control(endpoints(where).simulator)
    run = "bench-pause"
    command(where, CommandKind.LAUNCH, run, campaign(run, snapshot, SMTP))
    last_ms: list[float] = []
    after: list[float] = []
    for _ in range(PAUSES):
        _wait_sent(control, run, _sent(control, run) + 2_000)
        written = command(where, CommandKind.PAUSE, run)
        time.sleep(3)
        at_ms = round(written.issued_at.timestamp() * 1000)
        found = control.ask(f"/starts?run={run}&after_ms={at_ms}")
        after.append(found["count"])
        last_ms.append(max(0, found["last_start_ms"] - at_ms) if found["count"] else 0)
        command(where, CommandKind.RESUME, run)
    command(where, CommandKind.CANCEL, run)
    follow(where, run, timedelta(minutes=5))
    return {
        "pause_last_start_ms": max(last_ms),
        "pause_last_start_median_ms": statistics.median(last_ms),
        "pause_requests_after_max": max(after),
    }


def _delivery_process(where: Home) -> tuple[str, int]:
    ids = {job.name: job.id for job in flink_jobs.running_jobs(where)}
    name = min(flink_jobs.taskmanagers_of(where, ids[JOBS["delivery"].name]))
    pid = processes(where)[name].pid
    if pid is None:
        raise RuntimeError(f"{name} does not run")
    return name, pid


def _kills(where: Home, snapshot: str) -> dict[str, float]:
    """Kill delivery's TaskManager in a steady run; the longest time without an acceptance."""
    control = Control(endpoints(where).simulator)
    run = "bench-kill"
    command(where, CommandKind.LAUNCH, run, campaign(run, snapshot, SMTP, rate=300.0))
    still: list[float] = []
    for _ in range(KILLS):
        _wait_sent(control, run, _sent(control, run) + 1_500)
        _, pid = _delivery_process(where)
        killed_ms = time.time() * 1000
        os.kill(pid, signal.SIGKILL)
        time.sleep(3)
        _wait_sent(control, run, _sent(control, run) + 600)
        accepted = sorted(int(one["accepted_at_ms"]) for one in control.messages(run))
        around = [at for at in accepted if at > killed_ms - 1_000]
        gaps = [later - earlier for earlier, later in pairwise(around)]
        still.append(max(gaps) / 1000)
        time.sleep(10)  # the supervisor's new TaskManager becomes the spare one
    command(where, CommandKind.CANCEL, run)
    follow(where, run, timedelta(minutes=5))
    return {
        "taskmanager_kill_standstill_s": max(still),
        "taskmanager_kill_standstill_median_s": statistics.median(still),
    }


def _checkpoints(where: Home, snapshot: str) -> dict[str, float]:
    """Checkpoints of all jobs while delivery runs as fast as it can."""
    control = Control(endpoints(where).simulator)
    jobs = {job.name: job.id for job in flink_jobs.running_jobs(where)}
    before = {name: _statistics(where, job) for name, job in jobs.items()}
    since = datetime.now(UTC)
    until = time.monotonic() + _LOAD.total_seconds()
    number, sent = 0, 0
    seen: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in jobs}
    began = time.monotonic()
    while time.monotonic() < until:
        number += 1
        run = f"bench-load-{number}"
        command(where, CommandKind.LAUNCH, run, campaign(run, snapshot, SMTP))
        ended = False
        while not ended and time.monotonic() < until:
            time.sleep(2)
            for name, job in jobs.items():
                for one in _statistics(where, job)["history"]:
                    seen[name][int(one["id"])] = one
            sent_now = _sent(control, run)
            ended = sent_now >= PEOPLE
        sent += sent_now
    took = time.monotonic() - began
    command_if_running(where, run)
    found: dict[str, float] = {"load_messages_per_s": sent / took}
    completed = failed = 0
    durations: list[float] = []
    for name, job in jobs.items():
        counts, earlier = _statistics(where, job)["counts"], before[name]["counts"]
        completed += counts["completed"] - earlier["completed"]
        failed += counts["failed"] - earlier["failed"]
        mine = [
            float(one["end_to_end_duration"])
            for at, one in seen[name].items()
            if one["status"] == "COMPLETED" and at > max(_ids(before[name]), default=0)
        ]
        durations += mine
        short = name.removeprefix("fanfare-")
        if len(mine) > 1:
            found[f"checkpoint_p95_ms_{short}"] = statistics.quantiles(mine, n=20)[-1]
    found["checkpoint_p95_ms"] = statistics.quantiles(durations, n=20)[-1]
    found["checkpoint_p50_ms"] = statistics.median(durations)
    found["checkpoints_complete_share"] = completed / max(1, completed + failed)
    found["checkpoints"] = completed
    found["failovers"] = 0
    for name, job in jobs.items():
        # Not the metric of restarts, which tells of those before the load ten seconds late.
        for at, why in flink_jobs.failures(where, job):
            if at > since:
                found["failovers"] += 1
                print(f"{name} failed over at {at}: {why}", file=sys.stderr)
    found["load_minutes"] = took / 60
    return found


def command_if_running(where: Home, run: str) -> None:
    """Cancel a run that may have ended meanwhile."""
    try:
        command(where, CommandKind.CANCEL, run)
    except RuntimeError:
        return
    follow(where, run, timedelta(minutes=5))


def _ids(statistics_of: Mapping[str, Any]) -> list[int]:
    return [int(one["id"]) for one in statistics_of["history"]]


def _statistics(where: Home, job: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = flink_jobs.rest(where, "GET", f"/jobs/{job}/checkpoints")
    return found


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    figures: dict[str, float] = {}
    with own_stack(STANDARD, taskmanagers=len(STANDARD) + SPARE) as where:
        with tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder:
            built = audience(FileStore(where.store), Path(folder), PEOPLE)
        control = Control(endpoints(where).simulator)
        control.configure({"webhooks": {"url": None}})
        figures |= _pauses(where, built.snapshot)
        figures |= _kills(where, built.snapshot)
        figures |= _checkpoints(where, built.snapshot)
    figures |= delivery.ledger_ratio()
    return figures
