"""The jobs of the embedded stack: which there are, and having them run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from schemas.errors import StackFailed, Unavailable
from sinks.clickhouse import connect, create_tables
from stack.flink_jobs import (
    jobs,
    last_failure,
    parallelism_of,
    running_jobs,
    submit,
    wait_running,
)
from stack.layout import PROJECT_ROOT, Home, endpoints, replace_file
from stack.layouts import note_layouts, require_readable
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


PATIENCE = timedelta(seconds=60)
"""How long servers that are starting are waited for."""

Progress = Callable[[str], None]
_Answer = TypeVar("_Answer")
_NOTES = Lock()


@dataclass(frozen=True, slots=True)
class JobNote:
    """What is remembered of a job when it is submitted: its state is found by it when it has ended.

    `started_from` is the checkpoint or savepoint it went on from, None if it began with nothing.
    `parallelism` is None in notes of before it was written down.
    """

    job_id: str
    started_from: str | None = None
    parallelism: int | None = None


def _notes(home: Home) -> Path:
    return home.flink / "jobs.json"


def remember(home: Home, name: str, note: JobNote) -> None:
    """Write down under which id a job runs, from what state and how wide."""
    with _NOTES:
        notes = {**remembered(home), name: note}
        replace_file(_notes(home), json.dumps({name: asdict(note) for name, note in notes.items()}))


def remembered(home: Home) -> dict[str, JobNote]:
    """The notes by our names; a note that is a bare string is an id, as it was written once.

    Raises StackFailed when the file is there and is no such thing.
    """
    try:
        raw = json.loads(_notes(home).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _unreadable(home, error) from error
    try:
        return {
            name: JobNote(note) if isinstance(note, str) else JobNote(**note)
            for name, note in raw.items()
        }
    except (TypeError, AttributeError) as error:
        raise _unreadable(home, error) from error


def _unreadable(home: Home, error: Exception) -> StackFailed:
    return StackFailed(
        f"{_notes(home)}, which says what state jobs go on from, can't be read ({error!r}); mend "
        "it, or delete it if the jobs may begin with an empty state"
    )


def remember_running(home: Home, name: str, job_id: str) -> JobNote:
    """The note of a job that runs, made now if another one or none was remembered."""
    note = remembered(home).get(name)
    if note is None or note.job_id != job_id:
        note = JobNote(job_id)
    elif note.parallelism is not None:
        return note
    note = replace(note, parallelism=parallelism_of(home, job_id))
    remember(home, name, note)
    return note


def broken_off_upgrade(home: Home) -> Path:
    """Where an upgrade notes the savepoints of what it has stopped; gone when it is done."""
    return home.flink / "upgrade.json"


def state_to_go_on_from(home: Home, name: str) -> str | None:
    """The newest state of a job that has ended; None if no such job was ever started here.

    That is its last checkpoint or savepoint, or what it was itself started from if it made none.

    Raises:
        StackFailed: the job ran here, and nothing of its state is found.
    """
    note = remembered(home).get(name)
    if note is None:
        return None
    made = [
        *(home.flink / "checkpoints" / note.job_id).glob("chk-*/_metadata"),
        *(home.flink / "savepoints").glob(f"savepoint-{note.job_id[:6]}-*/_metadata"),
    ]
    if made:
        return max(made, key=lambda file: file.stat().st_mtime_ns).parent.as_uri()
    if note.started_from is not None and _is_there(note.started_from):
        return note.started_from
    raise StackFailed(
        f"job {name} ran here as {note.job_id}, and no checkpoint or savepoint of it is found in "
        f"{home.flink}{f', nor is {note.started_from} there' if note.started_from else ''}. It is "
        "not started with an empty state unless you say so: `fanfare jobs start --forget-state`"
    )


def _is_there(state: str) -> bool:
    place = urlsplit(state)
    if place.scheme not in ("", "file"):
        return True  # Flink finds out.
    return (Path(unquote(place.path)) / "_metadata").exists()


def answered(
    what: str, ask: Callable[[], _Answer], progress: Progress, patience: timedelta = PATIENCE
) -> _Answer:
    """Ask until a server that is starting answers; says once what is waited for.

    Raises Unavailable when it does not within ``patience``.
    """
    deadline = time.monotonic() + patience.total_seconds()
    told = False
    while True:
        try:
            return ask()
        except Unavailable:
            if time.monotonic() >= deadline:
                raise
        if not told:
            progress(f"waiting for {what}")
            told = True
        time.sleep(0.25)


def _create_tables(url: str) -> None:
    client = connect(url)
    try:
        create_tables(client)
    finally:
        client.close()


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
    progress: Progress = lambda line: None,
    timeout: timedelta = timedelta(seconds=60),
    *,
    forget: bool = False,
    names: Sequence[str] = STANDARD,
    parallelism: int = 1,
) -> dict[str, str]:
    """Create topics and tables, submit those of ``names`` that don't run, wait until all do.

    A job that ran here before goes on from its newest checkpoint or savepoint, whatever ended it,
    with the parallelism it had; with ``forget`` it begins with an empty state: no consents, no
    caps, no runs. ``parallelism`` is of jobs of which none is remembered. Servers that are still
    starting are waited for.

    Returns the Flink job ids by our names. Raises StackFailed (also where a job that ran here
    has left no state that is found), Unavailable.
    """
    if broken_off_upgrade(home).exists():
        raise StackFailed(
            "an upgrade was broken off, and its savepoints are what the jobs go on from: "
            "`fanfare upgrade` finishes it"
        )
    found = endpoints(home)
    created = answered("Kafka", lambda: create_topics(found.kafka), progress)
    if created:
        progress(f"created {len(created)} Kafka topics")
    answered("ClickHouse", lambda: _create_tables(found.clickhouse), progress)
    running = answered("Flink's REST interface", lambda: running_jobs(home), progress)
    listed = {job.name: job.id for job in running}
    missing = {name: JOBS[name] for name in names if JOBS[name].name not in listed}
    for name, job in JOBS.items():
        if job.name in listed:
            remember_running(home, name, listed[job.name])
    # All of them before any is submitted: what can't go on is told while nothing has changed.
    if missing and not forget:
        require_readable(home)
    states = {name: None if forget else state_to_go_on_from(home, name) for name in missing}
    notes = remembered(home)

    def start(name: str) -> tuple[str, str]:
        state, job = states[name], missing[name]
        wide = (notes[name].parallelism if name in notes else None) or parallelism
        job_id = submit(home, job.script, parallelism=wide, savepoint=state, env=job.variables)
        remember(home, name, JobNote(job_id, state, wide))
        wait_running(home, job_id, timeout)
        progress(f"job {name} goes on from {state}" if state else f"job {name} runs")
        return name, job_id

    # Each submission is a JVM and an interpreter that wait for one another: together they overlap.
    with ThreadPoolExecutor(max_workers=len(JOBS)) as pool:
        started = dict(pool.map(start, missing))
    if missing:
        note_layouts(home)
    return {name: started.get(name) or listed[JOBS[name].name] for name in names}
