"""`fanfare upgrade` to code with other state layouts and another parallelism, in mid-campaign.

The project is copied, a stack is started with the copy's code, the copy gets a new layout, and the
commands that an operator would type put it into the running jobs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schemas.reasons import RunStatus
from stack import lifecycle
from stack.flink_jobs import parallelism_of, running_jobs
from stack.jobs import JOBS
from stack.layout import PROJECT_ROOT, home
from stack.supervisor import leftovers
from tests.e2e.world import World
from tests.stack_fixture import RunningJobs

PACKAGES = ("gateway", "jobs", "pipelines", "schemas", "sinks", "stack", "transforms")
MARK = "kept in the new layout"
ALL_ARRIVE = {
    "delivered": 1.0,
    "bounce": 0.0,
    "dropped": 0.0,
    "spamreport": 0.0,
    "unsubscribe": 0.0,
}
WIDER = {"campaigns": 2, "delivery": 2, "webhook-ingest": 1}

Command = Callable[..., str]


def give_a_new_layout(project: Path) -> None:
    """A field more in what coordinate keeps of a run and of its pages, and code that tells it."""
    for name in ("RunState", "PageState"):
        path = project / "schemas" / "avro" / f"{name}.avsc"
        shutil.copy(path, path.parent / "old" / f"{name}-before.avsc")
        schema = json.loads(path.read_text())
        schema["fields"].append({"name": "added_later", "type": "string", "default": MARK})
        path.write_text(json.dumps(schema))
    path = project / "schemas" / "state.py"
    classes = path.read_text().split("@dataclass")
    for position, text in enumerate(classes):
        if "class RunState" in text or "class PageState" in text:
            classes[position] = f'{text.rstrip()}\n    added_later: str = "{MARK}"\n\n\n'
    path.write_text("@dataclass".join(classes))
    path = project / "transforms" / "coordinate.py"
    told = 'note=_short(problem or (command.note if command else "")),'
    text = path.read_text()
    assert told in text
    path.write_text(text.replace(told, told.replace('""))', '"") or run.added_later)')))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copy = tmp_path / "project"
    for package in PACKAGES:
        shutil.copytree(
            PROJECT_ROOT / package,
            copy / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return copy


@pytest.fixture
def fanfare(project: Path, tmp_path: Path) -> Iterator[Command]:
    """Types a command of the copy, of a stack of its own; no process of it remains."""
    where = tmp_path / "home"

    def typed(*words: str, status: int = 0) -> str:
        # The copy is found before the project that is installed, by every process.
        done = subprocess.run(
            [sys.executable, "-c", "from stack.cli import main; main()", *words],
            env={**os.environ, "PYTHONPATH": str(project), "FANFARE_HOME": str(where)},
            cwd=project,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        told = done.stdout + done.stderr
        assert done.returncode == status, f"fanfare {' '.join(words)}: {told}"
        return told if status else done.stdout

    yield typed
    lifecycle.down(home(where))
    assert not leftovers(home(where))


def test_campaigns_go_on_in_a_new_layout_and_wider(
    project: Path, fanfare: Command, tmp_path: Path
) -> None:
    """Coordinate's pages and windows, decide's caps, delivery's owed sends, ingest's buffer."""
    fanfare("up", "--taskmanagers", str(sum(WIDER.values())))
    fanfare("jobs", "start")
    world = World(RunningJobs(home(tmp_path / "home")), tmp_path)
    try:
        # Nobody's address is suppressed meanwhile: only the cap is to refuse them.
        with world.provider(webhooks={"proportions": ALL_ARRIVE}):
            check_upgraded(world, project, fanfare)
    finally:
        world.close()


def check_refused(world: World, project: Path, fanfare: Command, run: str) -> None:
    """A layout that does not read what is there: said before anything is stopped."""
    path = project / "schemas" / "avro" / "RunState.avsc"
    sound = path.read_text()
    schema = json.loads(sound)
    schema["fields"].append({"name": "added_later", "type": "string"})
    path.write_text(json.dumps(schema))
    old = path.parent / "old" / "RunState-before.avsc"
    before = {job.name: job.id for job in running_jobs(world.home)}
    assert "has no schema here" in fanfare("upgrade", status=1)
    old.write_text(sound)
    said = fanfare("upgrade", status=1)
    assert "a RunState of the layout" in said and "added_later" in said
    assert "Nothing was stopped" in said
    assert {job.name: job.id for job in running_jobs(world.home)} == before
    count = world.stats(run)["unique"]
    world.wait_accepted(run, count + 20)
    path.write_text(sound)
    old.unlink()


def check_broken_off(world: World, project: Path, fanfare: Command) -> None:
    """New code that does not start: its job's savepoint is kept, and the others go on."""
    path = project / "jobs" / "campaigns.py"
    sound = path.read_text()
    path.write_text("raise SystemExit('not finished')\n")
    said = fanfare("upgrade", status=1)
    assert "The savepoints are kept" in said and "not finished" in said
    assert JOBS["campaigns"].name not in {job.name for job in running_jobs(world.home)}
    assert JOBS["delivery"].name in {job.name for job in running_jobs(world.home)}
    path.write_text(sound)


def check_upgraded(world: World, project: Path, fanfare: Command) -> None:
    crowd, other = world.crowd(4_000), world.crowd(1_000)
    run, category = world.run_name("upgraded"), world.run_name("category")
    event = world.launch(run, crowd.name, category=category, rate_per_second=60.0)
    assert event.accepted, event.note
    world.wait_accepted(run, 100)
    paused = world.run_name("paused-meanwhile")
    assert world.launch(paused, other.name, rate_per_second=50.0).accepted
    assert world.control("pause", paused).accepted
    assert all(one.note != MARK for one in world.events())

    check_refused(world, project, fanfare, run)
    give_a_new_layout(project)
    check_broken_off(world, project, fanfare)
    widths = [f"--parallelism={name}={wide}" for name, wide in WIDER.items()]
    ids = json.loads(fanfare("upgrade", "--json", *widths))
    assert {name: parallelism_of(world.home, ids[name]) for name in WIDER} == WIDER
    assert world.stats(run)["unique"] < len(crowd.consenting()), "it was in the middle"

    assert world.control("set_rate", run, rate_per_second=1_000.0).note == MARK
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    assert set(world.accepted(run)) == {one.message(run) for one in crowd.consenting()}
    assert world.stats(run)["duplicates"] == 0
    # A stop is no kill: requests in flight were answered and settled before it.
    assert found["unknown"] == found["failed"] == found["expired"] == 0

    # Reservations made before the savepoint and after it count alike.
    cap = {
        "name": "once", "limit": 1, "window": "rolling", "length": 86_400_000, "channel": "email",
        "category": category, "when_capped": "drop",
    }  # fmt: skip
    second = world.run_name("caps-of-before")
    assert world.launch(second, crowd.name, category=category, caps=[cap]).accepted
    world.wait_status(second)
    capped = world.check_balanced(second, crowd).as_json()
    assert capped["accepted"] == 0
    assert capped["skipped"]["frequency_cap"] == len(crowd.consenting())

    # A run that was paused is paused still, and goes on when it is told to.
    assert world.events(paused)[-1].status is RunStatus.PAUSED
    count = world.stats(paused)["unique"]
    time.sleep(1)
    assert world.stats(paused)["unique"] == count
    assert world.control("resume", paused).note == MARK
    world.wait_status(paused)
    world.check_balanced(paused, other)
