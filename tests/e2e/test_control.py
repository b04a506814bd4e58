"""Pause, resume, cancel, the rate, and commands that are refused."""

from __future__ import annotations

import time
from datetime import timedelta

from schemas.codec import to_millis
from schemas.reasons import RunStatus
from schemas.records import RunEvent
from tests.e2e.producer import campaign, now_ms
from tests.e2e.world import TENANT, Crowd, World
from tests.stack_fixture import eventually

GRACE_MS = 1_000
"""After a command a request may still leave for so long."""


def started(world: World, what: str, rate: float) -> tuple[str, Crowd]:
    """A slow campaign that is under way."""
    crowd = world.crowd(2_000)
    run = world.run_name(what)
    event = world.launch(run, crowd.name, rate_per_second=rate)
    assert event.accepted, event.note
    world.wait_accepted(run, 50)
    return run, crowd


def quiet_since(world: World, run: str, event: RunEvent, length: timedelta) -> None:
    """For so long after the grace no request of the run starts."""
    from_ms = to_millis(event.at) + GRACE_MS
    while now_ms() < from_ms + length.total_seconds() * 1000:
        time.sleep(0.1)
    assert world.starts_after(run, from_ms) == 0


def test_pause_resume_and_rate(world: World) -> None:
    run, crowd = started(world, "pause", rate=60.0)
    event = world.control("pause", run)
    assert (event.accepted, event.status) == (True, RunStatus.PAUSED)
    quiet_since(world, run, event, timedelta(seconds=3))
    before = world.stats(run)["unique"]
    assert 0 < before < len(crowd.consenting())

    again = world.control("pause", run)
    assert (again.accepted, again.note) == (False, "the run is paused already")
    refused = world.control("set_rate", run, rate_per_second=float("nan"))
    assert not refused.accepted
    assert "a rate must be" in refused.note
    event = world.control("set_rate", run, rate_per_second=2_000.0)
    assert event.accepted
    assert world.stats(run)["unique"] == before, "a new rate does not resume"

    event = world.control("resume", run)
    assert (event.accepted, event.status) == (True, RunStatus.RUNNING)
    resumed = time.monotonic()
    world.wait_status(run)
    # At the old rate the rest would have taken longer than this by far.
    assert time.monotonic() - resumed < (len(crowd.consenting()) - before) / 60
    found = world.check_balanced(run, crowd).as_json()
    assert set(world.accepted(run)) == {one.message(run) for one in crowd.consenting()}
    assert found["unknown"] == found["cancelled"] == found["failed"] == 0
    late = world.control("cancel", run)
    assert not late.accepted
    assert "the run is completed" in late.note


def test_the_rate_of_a_run_is_kept(world: World) -> None:
    run, crowd = started(world, "rate", rate=200.0)
    world.wait_status(run)
    seconds = world.ask(f"/starts?run={run}")["per_second"]
    assert max(seconds.values()) <= 200
    world.check_balanced(run, crowd)


def test_cancel_closes_the_rest(world: World) -> None:
    run, crowd = started(world, "cancel", rate=60.0)
    event = world.control("cancel", run, note="a wrong price")
    assert (event.accepted, event.status) == (True, RunStatus.CANCELLED)
    assert event.note == "a wrong price"
    quiet_since(world, run, event, timedelta(seconds=1))
    world.wait_status(run, RunStatus.CANCELLED)
    found = world.check_balanced(run, crowd).as_json()
    sent = world.accepted(run)
    assert found["accepted"] == len(sent)
    assert found["unknown"] == found["failed"] == found["expired"] == 0
    # Whoever has the message is not among the cancelled, and nobody else is among the accepted.
    rows = world.classes(run)
    for one in crowd.consenting():
        kind, _ = rows[one.shard, one.ordinal]
        assert kind == ("accepted" if one.message(run) in sent else "cancelled")
    assert found["cancelled"] >= len(crowd.consenting()) - len(sent) > 0
    resumed = world.control("resume", run)
    assert not resumed.accepted


def test_a_run_is_launched_once(world: World) -> None:
    crowd = world.crowd(2_000)
    run = world.run_name("once")
    first = world.producer.command(
        "launch", TENANT, run, launch=campaign(TENANT, run, crowd.name, rate_per_second=200.0)
    )
    assert world.answer(first).accepted
    second = world.launch(run, crowd.name)
    assert not second.accepted
    assert "exists already" in second.note
    # The same command again, as a producer repeats it that heard no answer: nothing at all.
    world.producer.command("launch", TENANT, run, first, launch=campaign(TENANT, run, crowd.name))
    pause = world.producer.command("pause", TENANT, run)
    assert world.answer(pause).accepted
    for _ in range(2):
        world.producer.command("pause", TENANT, run, pause)
    assert world.control("resume", run).accepted
    world.wait_status(run)
    answers = [one.command_id for one in world.events(run) if one.command_id]
    assert answers.count(first) == 1
    assert answers.count(pause) == 1
    world.check_balanced(run, crowd)


def test_commands_to_nobody_are_refused(world: World) -> None:
    run = world.run_name("nobody")
    for kind in ("pause", "resume", "cancel"):
        event = world.control(kind, run)
        assert not event.accepted
        assert event.note == f"there is no run {run!r} of tenant {TENANT!r}"
    # Another tenant's run is nobody's either, and its name is not taken by the attempt.
    crowd = world.crowd(1_000)
    stranger = world.producer.command(
        "launch", "somebody-else", run, launch=campaign(TENANT, run, crowd.name)
    )
    refused = world.answer(stranger)
    assert (refused.accepted, refused.tenant) == (False, "somebody-else")
    assert world.launch(run, crowd.name).accepted
    world.wait_status(run)
    world.check_balanced(run, crowd)
    eventually(lambda: world.events(run)[-1].status is RunStatus.COMPLETED, what="it completed")
