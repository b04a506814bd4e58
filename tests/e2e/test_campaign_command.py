"""`fanfare campaign` as an operator types it: from the file to the end of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from schemas.errors import FanfareError, InvalidCampaign
from schemas.reasons import RunStatus
from stack.cli_campaign import app
from stack.demo import EXAMPLE
from tests.e2e.world import TENANT, Crowd, World
from tests.stack_fixture import eventually

Said = tuple[int, dict[str, Any]]


@pytest.fixture
def type_in(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Types a command; its exit status and JSON. What it raises, `fanfare` prints."""
    # An explicit home outranks what somebody exported for another stack.
    monkeypatch.setenv("FANFARE_KAFKA", "127.0.0.1:1")

    def typed(*words: str) -> Said:
        options = ["--home", str(world.home.root), "--json", "--tenant", TENANT]
        result = CliRunner().invoke(app, [*words, *options])
        if isinstance(result.exception, FanfareError):
            raise result.exception
        assert result.exit_code in (0, 1, 3), result.output
        return result.exit_code, json.loads(result.stdout)

    return typed


def campaign_file(folder: Path, crowd: Crowd, **changes: str) -> Path:
    lines = {
        "snapshot": crowd.name,
        "tenant": TENANT,
        "quiet_hours": "",
        "holdout_percent": "0",
        **changes,
    }
    text = EXAMPLE.read_text().splitlines()
    text = [line for line in text if line.partition(":")[0] not in lines]
    head = [f"{name}: {value}" for name, value in lines.items() if value]
    path = folder / "spring.yaml"
    path.write_text("\n".join([*head, *text]) + "\n")
    return path


def in_an_hour() -> str:
    return (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")


def test_a_campaign_is_launched_scheduled_paused_slowed_and_resumed(
    world: World, type_in: Callable[..., Said], tmp_path: Path
) -> None:
    crowd = world.crowd(1_000)
    run = world.run_name("typed")
    file = campaign_file(tmp_path, crowd, start_at=in_an_hour())

    status, found = type_in("launch", str(file), "--run", run, "--dry-run")
    assert (status, found["dry_run"]) == (0, True)
    counts = found["legs"]["email"]
    assert sum(counts.values()) == len(crowd)
    # Whoever has no address is found out when the time has come.
    assert counts["defer:schedule"] >= len(crowd.consenting())

    status, found = type_in("launch", str(file), "--run", run)
    assert (status, found["accepted"], found["status"]) == (0, True, "scheduled")
    assert found["audience"] == len(crowd)
    status, found = type_in("launch", str(file), "--run", run)
    assert (status, found["accepted"]) == (1, False)
    assert "exists already" in found["note"]

    assert type_in("rate", run, "100")[0] == 0
    assert type_in("schedule", run, "--at", "now")[1]["accepted"]
    eventually(lambda: bool(world.accepted(run)), timedelta(seconds=60), "the run has begun")
    assert "has begun" in type_in("schedule", run, "--at", "+1h")[1]["note"]
    status, found = type_in("pause", run, "--note", "a wrong price")
    assert (status, found["status"], found["note"]) == (0, "paused", "a wrong price")
    assert type_in("pause", run)[0] == 1
    assert type_in("rate", run)[0] == 0
    assert type_in("resume", run)[1]["status"] == "running"
    world.wait_status(run)
    assert type_in("status", run)[1]["pending"] == 0
    found = world.check_balanced(run, crowd).as_json()
    assert found["accepted"] == len(crowd.consenting())
    assert set(world.accepted(run)) == {one.message(run) for one in crowd.consenting()}
    status, found = type_in("cancel", run)
    assert (status, "the run is completed" in found["note"]) == (1, True)
    who = {one.by for one in world.events(run) if one.command_id}
    assert len(who) == 1 and all(who)


def test_a_cancelled_run_and_one_that_is_not_there(
    world: World, type_in: Callable[..., Said], tmp_path: Path
) -> None:
    crowd = world.crowd(1_000)
    run = world.run_name("typed-cancel")
    file = campaign_file(tmp_path, crowd, start_at=in_an_hour())
    assert type_in("launch", str(file), "--run", run)[0] == 0
    assert type_in("cancel", run)[1]["status"] == "cancelled"
    world.wait_status(run, RunStatus.CANCELLED)
    assert world.check_balanced(run, crowd).as_json()["cancelled"] == len(crowd)
    status, found = type_in("pause", "nobody-knows-it")
    assert (status, found["accepted"]) == (1, False)
    assert "there is no run" in found["note"]
    with pytest.raises(InvalidCampaign, match="there is no run"):
        type_in("status", "nobody-knows-it")


def test_a_wrong_file_sends_nothing(
    world: World, type_in: Callable[..., Said], tmp_path: Path
) -> None:
    crowd = world.crowd(1_000)
    before = len(world.events())
    file = campaign_file(tmp_path, crowd, deadline="yesterday")
    with pytest.raises(
        InvalidCampaign, match=r"(?s)spring\.yaml.*deadline.*expected a time"
    ) as raised:
        type_in("launch", str(file))
    assert "line" in str(raised.value)
    assert len(world.events()) == before
