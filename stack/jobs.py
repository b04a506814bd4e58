"""The jobs of the embedded stack: which there are, and having them run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Lock

from schemas.errors import StackFailed
from sinks.clickhouse import connect, create_tables
from stack.flink_jobs import jobs, last_failure, running_jobs, submit, wait_running
from stack.layout import PROJECT_ROOT, Home, endpoints, replace_file
from stack.topics import create_topics


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A job's script, the name under which Flink lists it, and variables of its own."""

    script: Path
    name: str
    variables: Mapping[str, str] = field(default_factory=dict)


_DELIVERY = PROJECT_ROOT / "jobs" / "delivery.py"
JOBS: Mapping[str, JobEntry] = {
    "campaigns": JobEntry(PROJECT_ROOT / "jobs" / "campaigns.py", "fanfare-campaigns"),
    "delivery": JobEntry(_DELIVERY, "fanfare-delivery-promotional"),
    "webhook-ingest": JobEntry(
        PROJECT_ROOT / "jobs" / "webhook_ingest.py", "fanfare-webhook-ingest"
    ),
    "delivery-critical": JobEntry(
        _DELIVERY, "fanfare-delivery-critical", {"FANFARE_LANE": "critical"}
    ),
}
STANDARD = ("campaigns", "delivery", "webhook-ingest")
"""The jobs that campaigns need, started unless others are asked for."""


_NOTES = Lock()


def _notes(home: Home) -> Path:
    return home.flink / "jobs.json"


def remember(home: Home, name: str, job_id: str) -> None:
    """Write down under which id a job runs: its checkpoints are found by it when it has ended."""
    with _NOTES:
        replace_file(_notes(home), json.dumps({**_remembered(home), name: job_id}))


def _remembered(home: Home) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(_notes(home).read_text())
    except FileNotFoundError:
        return {}
    return found


def broken_off_upgrade(home: Home) -> Path:
    """Where an upgrade notes the savepoints of what it has stopped; gone when it is done."""
    return home.flink / "upgrade.json"


def last_checkpoint(home: Home, name: str) -> str | None:
    """The last checkpoint of a job that has ended, to go on from; None if it never made one."""
    job_id = _remembered(home).get(name)
    if job_id is None:
        return None
    made = [
        (int(folder.name.removeprefix("chk-")), folder)
        for folder in (home.flink / "checkpoints" / job_id).glob("chk-*")
        if (folder / "_metadata").exists()
    ]
    return max(made)[1].as_uri() if made else None


def require_running(home: Home) -> None:
    """Raise StackFailed, with Flink's reason, where one of the jobs has ended."""
    alive = {job.name for job in running_jobs(home)}
    ended = {job.name: job.id for job in reversed(jobs(home))}
    for job in map(JOBS.__getitem__, STANDARD):
        if job.name not in alive:
            why = last_failure(home, ended[job.name]) if job.name in ended else "it was not started"
            raise StackFailed(f"job {job.name} does not run: {why}; `fanfare jobs start`")


def start_jobs(
    home: Home,
    progress: Callable[[str], None] = lambda line: None,
    timeout: timedelta = timedelta(seconds=60),
    *,
    forget: bool = False,
    names: Sequence[str] = STANDARD,
) -> dict[str, str]:
    """Create topics and tables, submit those of ``names`` that don't run, wait until all do.

    A job that ran here before goes on from its last checkpoint, whatever ended it; with ``forget``
    it begins with an empty state: no consents, no caps, no runs.

    Returns the Flink job ids by our names. Raises StackFailed, Unavailable.
    """
    if broken_off_upgrade(home).exists():
        raise StackFailed(
            "an upgrade was broken off, and its savepoints are what the jobs go on from: "
            "`fanfare upgrade` finishes it"
        )
    found = endpoints(home)
    created = create_topics(found.kafka)
    if created:
        progress(f"created {len(created)} Kafka topics")
    client = connect(found.clickhouse)
    try:
        create_tables(client)
    finally:
        client.close()
    listed = {job.name: job.id for job in running_jobs(home)}
    missing = {name: JOBS[name] for name in names if JOBS[name].name not in listed}

    def start(name: str) -> tuple[str, str]:
        state = None if forget else last_checkpoint(home, name)
        job = missing[name]
        job_id = submit(home, job.script, parallelism=1, savepoint=state, variables=job.variables)
        wait_running(home, job_id, timeout)
        remember(home, name, job_id)
        progress(f"job {name} goes on from {state}" if state else f"job {name} runs")
        return name, job_id

    # Each submission is a JVM and an interpreter that wait for one another: together they overlap.
    with ThreadPoolExecutor(max_workers=len(JOBS)) as pool:
        started = dict(pool.map(start, missing))
    return {name: started.get(name) or listed[JOBS[name].name] for name in names}
