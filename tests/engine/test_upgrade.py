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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stack import lifecycle
from stack.flink_jobs import parallelism_of
from stack.layout import PROJECT_ROOT, home
from stack.supervisor import leftovers
from tests.e2e.world import World
from tests.stack_fixture import RunningJobs

pytestmark = pytest.mark.engine
PACKAGES = ("gateway", "jobs", "pipelines", "schemas", "sinks", "stack", "transforms")
MARK = "kept in the new layout"
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

    def typed(*words: str) -> str:
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
        assert done.returncode == 0, f"fanfare {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    yield typed
    lifecycle.down(home(where))
    assert not leftovers(home(where))


def test_a_campaign_goes_on_in_a_new_layout_and_wider(
    project: Path, fanfare: Command, tmp_path: Path
) -> None:
    fanfare("up", "--taskmanagers", str(sum(WIDER.values())))
    fanfare("jobs", "start")
    world = World(RunningJobs(home(tmp_path / "home")), tmp_path)
    try:
        crowd = world.crowd(4_000)
        run = world.run_name("upgraded")
        event = world.launch(run, crowd.name, rate_per_second=100.0)
        assert event.accepted, event.note
        world.wait_accepted(run, 200)
        assert all(one.note != MARK for one in world.events(run))

        give_a_new_layout(project)
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
    finally:
        world.close()
