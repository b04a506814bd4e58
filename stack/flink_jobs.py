"""Submitting jobs to a Flink cluster and telling them to stop: the embedded one or one's own.

Submission is `flink run -d -py`, done by Flink's own client; the rest is its REST interface.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from schemas.errors import StackFailed, Unavailable
from stack import flink_conf, prerequisites
from stack.layout import PROJECT_ROOT, Home, endpoints, environment

CLIENT_HEAP = "-Xmx256m"
SUBMIT_TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the cluster lists it; `state` is Flink's name (RUNNING, RESTARTING, …)."""

    id: str
    name: str
    state: str


_LATE = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """How a job's checkpoints fare."""

    completed: int
    failed: int
    at: datetime | None
    """When the last one that was completed was; None where the job has none."""
    failing: str
    """Why the newest one that has ended failed; empty where it did not."""


def submit(
    home: Home,
    job_module_path: Path,
    *,
    parallelism: int,
    args: Sequence[str] = (),
    savepoint: str | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run `flink run -d -py JOB` against the stack in `home` and return the job's id.

    The job's process gets the FANFARE_ variables, with `parallelism` among them: what a job's
    script says prevails over the client's `-p`. `env` is added to them, or replaces some.
    `savepoint` is the path to resume from.
    Raises StackFailed with the end of the client's output when the job was not accepted.
    """
    tools = prerequisites.find(need_redis=False)
    python_path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [
            *(tools.java, CLIENT_HEAP, *flink_conf.LEAN_JVM),
            *flink_conf.java_module_options(),
            f"-Dlog.file={home.log('flink-client')}",
            f"-Dlog4j.configurationFile={(home.flink / 'conf' / 'log4j-cli.properties').as_uri()}",
            *("-cp", f"{home.flink / 'lib'}/*"),
            *("org.apache.flink.client.cli.CliFrontend", "run", "-d"),
            *("-p", str(parallelism)),
            *(("-s", savepoint) if savepoint else ()),
            *("-pyclientexec", sys.executable, "-pyexec", sys.executable),
            *("-py", str(Path(job_module_path).resolve()), *args),
        ],
        capture_output=True,
        text=True,
        timeout=SUBMIT_TIMEOUT.total_seconds(),
        check=False,
        cwd=PROJECT_ROOT,
        env={
            **os.environ,
            **environment(home),
            **flink_conf.process_environment(home, tools),
            "PYTHONPATH": python_path,
            "FANFARE_PARALLELISM": str(parallelism),
            **(env or {}),
        },
    )
    output = done.stdout + done.stderr
    found = re.search(r"Job has been submitted with JobID ([0-9a-f]{32})", output)
    if done.returncode != 0 or not found:
        # The job script's own traceback is what matters, not Java's around it.
        java_frames = ("\tat ", "\t...")
        lines = [
            line
            for line in output.splitlines()
            if line.strip() and not line.startswith(java_frames)
        ]
        shown = "\n".join(f"    {line[:400]}" for line in lines[-25:])
        raise StackFailed(
            f"{job_module_path} was not submitted (the client ended with {done.returncode}):\n"
            f"{shown}"
        )
    return found.group(1)


def jobs(home: Home) -> list[Job]:
    """Every job that the cluster knows, ended ones too."""
    listed = rest(home, "GET", "/jobs/overview")["jobs"]
    return [Job(job["jid"], job["name"], job["state"]) for job in listed]


def running_jobs(home: Home) -> list[Job]:
    """The jobs that run or will (created, running, restarting), not those that have ended."""
    ended = {"FINISHED", "CANCELED", "FAILED", "SUSPENDED"}
    return [job for job in jobs(home) if job.state not in ended]


def tasks_running(home: Home, job_id: str) -> bool:
    """Whether every subtask of the job runs (a job counts as RUNNING before they do)."""
    job = rest(home, "GET", f"/jobs/{job_id}")
    return job["state"] == "RUNNING" and all(
        vertex["tasks"]["RUNNING"] == vertex["parallelism"] for vertex in job["vertices"]
    )


def checkpoints(home: Home, job_id: str) -> Checkpoints:
    """How a job's checkpoints fare. What keeps one from beginning, Flink counts and does not name:
    it shows in how long ago the newest one was."""
    found = rest(home, "GET", f"/jobs/{job_id}/checkpoints")
    counts, latest = found["counts"], found["latest"]
    done, failed = latest.get("completed"), latest.get("failed")
    at = datetime.fromtimestamp(done["latest_ack_timestamp"] / 1000, UTC) if done else None
    interval = rest(home, "GET", f"/jobs/{job_id}/checkpoints/config")["interval"]
    failing = ""
    if failed is not None and (done is None or failed["id"] > done["id"]):
        failing = str(failed.get("failure_message") or "it is not said why")
    elif at is not None:
        late = datetime.now(UTC) - at
        if late > max(_LATE, 5 * timedelta(milliseconds=interval)):
            failing = f"none for {late.total_seconds():.0f} s"
    if failing:
        failing = (
            f"checkpoints fail, {counts['failed']} until now: {failing} They go to "
            f"{home.flink / 'checkpoints'}: is it full or not writable? See the JobManager's log"
        )
    return Checkpoints(int(counts["completed"]), int(counts["failed"]), at, failing)


def parallelism_of(home: Home, job_id: str) -> int:
    """How many subtasks the widest operator of a job has."""
    vertices = rest(home, "GET", f"/jobs/{job_id}")["vertices"]
    return max((int(vertex["parallelism"]) for vertex in vertices), default=1)


def wait_running(home: Home, job_id: str, timeout: timedelta = timedelta(seconds=60)) -> None:
    """Wait until every subtask runs. Raises StackFailed with Flink's reason when they don't."""
    deadline = time.monotonic() + timeout.total_seconds()
    while not tasks_running(home, job_id):
        if time.monotonic() > deadline:
            raise StackFailed(
                f"job {job_id} does not run after {timeout}: {last_failure(home, job_id)}; "
                f"see {endpoints(home).flink}/#/job/running/{job_id}"
            )
        time.sleep(0.1)


def wait_checkpoint(home: Home, job_id: str, timeout: timedelta = timedelta(seconds=60)) -> None:
    """Wait for a job's first checkpoint. Raises StackFailed with Flink's reason for none."""
    deadline = time.monotonic() + timeout.total_seconds()
    while not (found := checkpoints(home, job_id)).completed:
        if time.monotonic() > deadline:
            why = last_failure(home, job_id) or found.failing or "it is not said why"
            raise StackFailed(f"job {job_id} has made no checkpoint after {timeout}: {why}")
        time.sleep(0.1)


def failures(home: Home, job_id: str) -> list[tuple[datetime, str]]:
    """When and why a job failed, the newest first; Flink keeps the last sixteen."""
    entries = rest(home, "GET", f"/jobs/{job_id}/exceptions")["exceptionHistory"]["entries"]
    return [
        (datetime.fromtimestamp(one["timestamp"] / 1000, UTC), str(one["stacktrace"]))
        for one in entries
    ]


def last_failure(home: Home, job_id: str) -> str:
    """The latest root exception of a job; empty when it had none."""
    found = failures(home, job_id)
    return found[0][1] if found else ""


def wait_ended(home: Home, job_id: str, timeout: timedelta = timedelta(seconds=60)) -> str:
    """Wait until the job has ended and return its last state."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        state = next((job.state for job in jobs(home) if job.id == job_id), None)
        if state in {"FINISHED", "CANCELED", "FAILED"}:
            return state
        if time.monotonic() > deadline:
            raise StackFailed(f"job {job_id} has not ended after {timeout}; it is {state}")
        time.sleep(0.1)


def cancel(home: Home, job_id: str) -> None:
    """Cancel a job and wait until it has ended. Its last checkpoint is kept."""
    rest(home, "PATCH", f"/jobs/{job_id}?mode=cancel")
    wait_ended(home, job_id)


def stop_with_savepoint(
    home: Home, job_id: str, *, drain: bool = False, timeout: timedelta = timedelta(minutes=2)
) -> str:
    """Stop a job behind a savepoint and return the savepoint's path, to resume from."""
    trigger = rest(
        home,
        "POST",
        f"/jobs/{job_id}/stop",
        {"drain": drain, "targetDirectory": (home.flink / "savepoints").as_uri()},
    )["request-id"]
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        answer = rest(home, "GET", f"/jobs/{job_id}/savepoints/{trigger}")
        if answer["status"]["id"] == "COMPLETED":
            operation = answer["operation"]
            if "location" not in operation:
                reason = operation.get("failure-cause", {}).get("stack-trace", "no reason given")
                raise StackFailed(f"job {job_id} was not stopped: {reason[:2000]}")
            wait_ended(home, job_id)
            return str(operation["location"])
        time.sleep(0.1)
    raise StackFailed(f"job {job_id} has taken no savepoint within {timeout}")


def taskmanagers_of(home: Home, job_id: str) -> set[str]:
    """The names of the services (`flink-taskmanager-N`) whose process runs a part of the job."""
    names = set()
    for vertex in rest(home, "GET", f"/jobs/{job_id}")["vertices"]:
        subtasks = rest(home, "GET", f"/jobs/{job_id}/vertices/{vertex['id']}")["subtasks"]
        names |= {subtask["taskmanager-id"].rsplit(".", 1)[0] for subtask in subtasks}
    return names


def rest(home: Home, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What Flink's REST interface answers.

    Raises:
        StackFailed: it refuses.
        Unavailable: it does not answer, or has no leader.
    """
    url = endpoints(home).flink + path
    request = urllib.request.Request(  # noqa: S310 (Flink's REST address)
        url,
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=15) as answer:  # noqa: S310
            content = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            detail = error.read().decode("utf-8", errors="replace")[:500]
        if error.code == 503:
            raise Unavailable(f"Flink at {url} has no leader now: {detail}") from error
        raise StackFailed(f"Flink refused {method} {url} ({error.code}): {detail}") from error
    except OSError as error:
        raise Unavailable(f"Flink at {url} does not answer: {error}") from error
    return json.loads(content) if content else {}
