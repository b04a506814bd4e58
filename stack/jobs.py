"""The jobs of the embedded stack: which there are, and having them run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sinks.clickhouse import connect, create_tables
from stack.flink_jobs import running_jobs, submit, wait_running
from stack.layout import PROJECT_ROOT, Home, endpoints
from stack.topics import create_topics


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A job's script, and the name under which Flink lists it."""

    script: Path
    name: str


JOBS: Mapping[str, JobEntry] = {
    "campaigns": JobEntry(PROJECT_ROOT / "jobs" / "campaigns.py", "fanfare-campaigns"),
    "delivery": JobEntry(PROJECT_ROOT / "jobs" / "delivery.py", "fanfare-delivery-promotional"),
    "webhook-ingest": JobEntry(
        PROJECT_ROOT / "jobs" / "webhook_ingest.py", "fanfare-webhook-ingest"
    ),
}


def start_jobs(
    home: Home,
    progress: Callable[[str], None] = lambda line: None,
    timeout: timedelta = timedelta(seconds=60),
) -> dict[str, str]:
    """Create topics and tables, submit the jobs that don't run, wait until all do.

    Returns the Flink job ids by our names. Raises StackFailed, Unavailable.
    """
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
    missing = {name: job for name, job in JOBS.items() if job.name not in listed}

    def start(name: str) -> tuple[str, str]:
        job_id = submit(home, missing[name].script, parallelism=1)
        wait_running(home, job_id, timeout)
        progress(f"job {name} runs")
        return name, job_id

    # Each submission is a JVM and an interpreter that wait for one another: together they overlap.
    with ThreadPoolExecutor(max_workers=len(JOBS)) as pool:
        started = dict(pool.map(start, missing))
    return {name: started.get(name) or listed[job.name] for name, job in JOBS.items()}
