"""What state a job that has ended goes on from, and that none begins with nothing unasked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from schemas.errors import StackFailed, Unavailable
from stack import flink_jobs, jobs, prerequisites, upgrade
from stack.flink_jobs import Checkpoints, Job
from stack.jobs import JOBS, STANDARD, JobNote, answered, remember, remembered, state_to_go_on_from
from stack.layout import Home, StackState, home, write_state

OLD, NEW = "a" * 32, "b" * 32


@pytest.fixture
def where(tmp_path: Path) -> Home:
    found = home(tmp_path / "a stack")  # A space: states are named by URIs.
    found.create()
    write_state(found, StackState({}, {}, 1))
    return found


def made(folder: Path, at: int) -> str:
    """A complete checkpoint or savepoint of that moment; its URI."""
    folder.mkdir(parents=True)
    (folder / "_metadata").write_bytes(b"state")
    os.utime(folder / "_metadata", (at, at))
    return folder.as_uri()


def checkpoint(where: Home, job_id: str, number: int, at: int) -> str:
    return made(where.flink / "checkpoints" / job_id / f"chk-{number}", at)


def savepoint(where: Home, job_id: str, at: int) -> str:
    return made(where.flink / "savepoints" / f"savepoint-{job_id[:6]}-{at:012d}", at)


# --- which state ---


def test_a_job_that_never_ran_here_begins_with_nothing(where: Home) -> None:
    checkpoint(where, OLD, 1, at=1)
    assert state_to_go_on_from(where, "delivery") is None


def test_the_last_checkpoint_by_time_and_not_by_name(where: Home) -> None:
    remember(where, "delivery", JobNote(OLD))
    checkpoint(where, OLD, 9, at=100)
    last = checkpoint(where, OLD, 10, at=200)
    checkpoint(where, NEW, 11, at=300)
    (where.flink / "checkpoints" / OLD / "chk-12").mkdir()  # Never completed.
    assert state_to_go_on_from(where, "delivery") == last


@pytest.mark.parametrize("savepoint_at", [50, 150])
def test_the_newer_of_checkpoint_and_savepoint(where: Home, savepoint_at: int) -> None:
    remember(where, "delivery", JobNote(OLD))
    kept = checkpoint(where, OLD, 1, at=100)
    stopped = savepoint(where, OLD, at=savepoint_at)
    savepoint(where, NEW, at=300)
    assert state_to_go_on_from(where, "delivery") == (stopped if savepoint_at > 100 else kept)


def test_a_job_that_made_no_state_goes_on_from_what_it_was_started_from(where: Home) -> None:
    before = savepoint(where, OLD, at=100)
    remember(where, "delivery", JobNote(NEW, before))
    assert state_to_go_on_from(where, "delivery") == before


@pytest.mark.parametrize("started_from", [None, "file:/gone/savepoint-aaaaaa-1"])
def test_where_a_job_ran_and_nothing_is_found_it_is_said(
    where: Home, started_from: str | None
) -> None:
    remember(where, "delivery", JobNote(OLD, started_from))
    with pytest.raises(StackFailed, match="--forget-state"):
        state_to_go_on_from(where, "delivery")


def test_notes_of_before_are_read_and_go_on(where: Home) -> None:
    (where.flink / "jobs.json").write_text(json.dumps({"delivery": OLD}))
    last = checkpoint(where, OLD, 1, at=1)
    assert state_to_go_on_from(where, "delivery") == last
    note = JobNote(NEW, last, 2)
    remember(where, "campaigns", note)
    assert remembered(where) == {"delivery": JobNote(OLD), "campaigns": note}


def test_notes_that_can_not_be_read_are_no_empty_notes(where: Home) -> None:
    for text in ("{", "[]", '{"delivery": {"id": 1}}'):
        (where.flink / "jobs.json").write_text(text)
        with pytest.raises(StackFailed, match=r"jobs\.json"):
            remembered(where)


# --- starting and upgrading, with a cluster that is made up ---


class Cluster:
    """What the stack asks of Flink: ids by the name that Flink lists, and each submission."""

    def __init__(self) -> None:
        self.running: dict[str, str] = {}
        self.submitted: dict[str, tuple[int, str | None]] = {}
        self.runs = True
        self.without_checkpoint: set[str] = set()
        """Ids of jobs whose tasks fail over and over."""
        self.cancelled: list[str] = []
        self.ids = (f"{number:06x}".ljust(32, "0") for number in range(1, 99))
        self.lock = Lock()

    def submit(
        self,
        home: Home,
        script: Path,
        *,
        parallelism: int,
        savepoint: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        (name,) = (
            name
            for name, job in JOBS.items()
            if job.script == script and dict(job.variables) == dict(env or {})
        )
        with self.lock:
            self.submitted[name] = (parallelism, savepoint)
            self.running[JOBS[name].name] = next(self.ids)
            return self.running[JOBS[name].name]

    def listed(self, home: Home) -> list[Job]:
        return [Job(job_id, name, "RUNNING") for name, job_id in self.running.items()]

    def wait_running(self, home: Home, job_id: str, *_: Any) -> None:
        if not self.runs:
            raise StackFailed("it does not run")

    def wait_checkpoint(self, home: Home, job_id: str) -> None:
        if job_id in self.without_checkpoint:
            raise StackFailed("it has made no checkpoint")

    def checkpoints(self, home: Home, job_id: str) -> Checkpoints:
        return Checkpoints(int(job_id not in self.without_checkpoint), 0, None, "")

    def tasks_running(self, home: Home, job_id: str) -> bool:
        return job_id not in self.without_checkpoint

    def stop(self, home: Home, job_id: str) -> str:
        if job_id in self.without_checkpoint:
            raise StackFailed("not all of its tasks run")
        self._end(job_id)
        return savepoint(home, job_id, at=1_000)

    def cancel(self, home: Home, job_id: str) -> None:
        self._end(job_id)
        self.cancelled.append(job_id)

    def _end(self, job_id: str) -> None:
        (name,) = (name for name, found in self.running.items() if found == job_id)
        del self.running[name]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    for module in (jobs, upgrade):
        monkeypatch.setattr(module, "running_jobs", found.listed)
        monkeypatch.setattr(module, "submit", found.submit)
        monkeypatch.setattr(module, "wait_running", found.wait_running)
    monkeypatch.setattr(jobs, "create_topics", lambda servers: [])
    monkeypatch.setattr(jobs, "_create_tables", lambda url: None)
    monkeypatch.setattr(jobs, "parallelism_of", lambda home, job_id: 3)
    monkeypatch.setattr(upgrade, "stop_with_savepoint", found.stop)
    for name in ("wait_checkpoint", "checkpoints", "tasks_running", "cancel"):
        monkeypatch.setattr(upgrade, name, getattr(found, name))
    monkeypatch.setattr(upgrade, "_restart_taskmanagers", lambda home, progress: None)
    return found


def test_a_job_is_remembered_although_it_never_ran(where: Home, cluster: Cluster) -> None:
    before = savepoint(where, OLD, at=1)
    for name in STANDARD:
        remember(where, name, JobNote(OLD, None, 2))
    cluster.runs = False
    with pytest.raises(StackFailed, match="does not run"):
        jobs.start_jobs(where)
    assert cluster.submitted
    for name in cluster.submitted:
        assert remembered(where)[name] == JobNote(cluster.running[JOBS[name].name], before, 2)


def test_nothing_is_submitted_where_one_has_lost_its_state(where: Home, cluster: Cluster) -> None:
    remember(where, "delivery", JobNote(OLD))
    with pytest.raises(StackFailed, match="--forget-state"):
        jobs.start_jobs(where)
    assert not cluster.submitted
    jobs.start_jobs(where, forget=True)
    assert cluster.submitted == dict.fromkeys(STANDARD, (1, None))


def test_what_was_rescaled_stays_so(where: Home, cluster: Cluster) -> None:
    jobs.start_jobs(where)
    upgrade.upgrade(where, parallelism={"delivery": 2})
    wide = {name: wide for name, (wide, _) in cluster.submitted.items()}
    assert wide == {"campaigns": 1, "delivery": 2, "webhook-ingest": 1}
    upgrade.upgrade(where)
    assert {name: wide for name, (wide, _) in cluster.submitted.items()} == wide
    cluster.running.clear()
    jobs.start_jobs(where)
    assert {name: wide for name, (wide, _) in cluster.submitted.items()} == wide
    assert all(state is not None for _, state in cluster.submitted.values())


def test_an_upgrade_remembers_what_it_finds_running(where: Home, cluster: Cluster) -> None:
    cluster.running[JOBS["delivery"].name] = OLD
    upgrade.upgrade(where)
    (wide, state) = cluster.submitted["delivery"]
    assert wide == 3
    assert remembered(where)["delivery"] == JobNote(
        cluster.running[JOBS["delivery"].name], state, 3
    )


class Broken:
    """A cluster where the new code of one job fails over and over, until it is mended."""

    def __init__(self, where: Home, cluster: Cluster, name: str) -> None:
        self.where, self.cluster, self.name = where, cluster, name
        jobs.start_jobs(where)
        self.before = cluster.running[JOBS[name].name]

    def upgrade(self) -> None:
        """The first one: the job is stopped, its new code makes no checkpoint."""
        submit = self.cluster.submit

        def failing(home: Home, script: Path, **words: Any) -> str:
            job_id = submit(home, script, **words)
            if job_id == self.cluster.running.get(JOBS[self.name].name):
                self.cluster.without_checkpoint.add(job_id)
            return job_id

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upgrade, "submit", failing)
            with pytest.raises(StackFailed, match="it has made no checkpoint"):
                upgrade.upgrade(self.where)

    @property
    def now(self) -> str:
        return self.cluster.running[JOBS[self.name].name]

    @property
    def noted(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.where.flink / "upgrade.json").read_text())
        return found


def test_the_savepoint_of_what_does_not_come_through_is_kept(where: Home, cluster: Cluster) -> None:
    broken = Broken(where, cluster, "campaigns")
    broken.upgrade()
    (state,) = broken.noted.values()
    assert set(broken.noted) == {"campaigns"}
    assert f"savepoint-{broken.before[:6]}" in state
    with pytest.raises(StackFailed, match="an upgrade was broken off"):
        jobs.start_jobs(where)

    # The others came through and are stopped anew; what failed has its savepoint alone.
    failed, delivery = broken.now, cluster.running[JOBS["delivery"].name]
    assert set(upgrade.upgrade(where)) == set(STANDARD)
    assert cluster.cancelled == [failed]
    assert cluster.submitted["campaigns"][1] == state
    assert f"savepoint-{delivery[:6]}" in (cluster.submitted["delivery"][1] or "")
    assert not (where.flink / "upgrade.json").exists()


def test_what_came_through_after_all_goes_on_from_where_it_is(
    where: Home, cluster: Cluster
) -> None:
    """Its savepoint is old by then: what it has done since would be forgotten."""
    broken = Broken(where, cluster, "campaigns")
    broken.upgrade()
    late = broken.now
    cluster.without_checkpoint.clear()
    upgrade.upgrade(where)
    assert not cluster.cancelled
    assert f"savepoint-{late[:6]}" in (cluster.submitted["campaigns"][1] or "")


def test_what_fails_over_and_over_is_upgraded_from_its_last_checkpoint(
    where: Home, cluster: Cluster
) -> None:
    jobs.start_jobs(where)
    failing = cluster.running[JOBS["delivery"].name]
    cluster.without_checkpoint.add(failing)
    last = checkpoint(where, failing, 7, at=500)
    upgrade.upgrade(where)
    assert cluster.cancelled == [failing]
    assert cluster.submitted["delivery"][1] == last


def test_what_runs_and_can_not_be_stopped_runs_on(
    where: Home, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(home: Home, job_id: str) -> str:
        raise StackFailed("the folder of savepoints is full")

    jobs.start_jobs(where)
    running = dict(cluster.running)
    monkeypatch.setattr(upgrade, "stop_with_savepoint", refuse)
    with pytest.raises(StackFailed, match="is full"):
        upgrade.upgrade(where)
    assert cluster.running == running


def test_the_job_is_told_its_parallelism(where: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}

    class Tools:
        java = "java"

    class Done:
        returncode, stderr = 0, ""
        stdout = f"Job has been submitted with JobID {OLD}"

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> Done:
        told.update(env)
        return Done()

    monkeypatch.setenv("FANFARE_PARALLELISM", "7")
    monkeypatch.setattr(prerequisites, "find", lambda **_: Tools())
    monkeypatch.setattr(flink_jobs.flink_conf, "process_environment", lambda home, tools: {})
    monkeypatch.setattr(flink_jobs.subprocess, "run", run)
    script = JOBS["delivery"].script
    assert flink_jobs.submit(where, script, parallelism=2, env={"FANFARE_LANE": "critical"}) == OLD
    assert told["FANFARE_PARALLELISM"] == "2"
    assert told["FANFARE_LANE"] == "critical"


# --- servers that are still starting ---


def failing(times: int) -> Callable[[], str]:
    left = iter(range(times))

    def ask() -> str:
        if next(left, None) is not None:
            raise Unavailable("not yet")
        return "here"

    return ask


def test_a_server_that_is_starting_is_waited_for_and_named_once() -> None:
    lines: list[str] = []
    assert answered("Kafka", failing(2), lines.append) == "here"
    assert lines == ["waiting for Kafka"]


def test_a_server_that_does_not_come_is_not_waited_for_for_ever() -> None:
    with pytest.raises(Unavailable, match="not yet"):
        answered("Kafka", failing(9), lambda line: None, timedelta(0))
