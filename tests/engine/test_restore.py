"""What the operators keep in state survives a savepoint in mid-campaign."""

from __future__ import annotations

import time

from schemas.reasons import RunStatus
from stack.flink_jobs import running_jobs
from stack.upgrade import upgrade
from tests.e2e.world import World

ALL_ARRIVE = {
    "delivered": 1.0,
    "bounce": 0.0,
    "dropped": 0.0,
    "spamreport": 0.0,
    "unsubscribe": 0.0,
}


def test_a_campaign_goes_on_exactly_after_all_jobs_were_stopped_and_restored(world: World) -> None:
    """Coordinate's pages and windows, decide's caps, delivery's owed sends, ingest's buffer."""
    # Nobody's address is suppressed meanwhile: only the cap is to refuse them.
    with world.provider(webhooks={"proportions": ALL_ARRIVE}):
        check_restored(world)


def check_restored(world: World) -> None:
    crowd = world.crowd(4_000)
    run, second = world.run_name("restore"), world.run_name("restored-caps")
    category = world.run_name("category")
    event = world.launch(run, crowd.name, category=category, rate_per_second=60.0)
    assert event.accepted, event.note
    world.wait_accepted(run, 100)
    paused = world.run_name("paused-meanwhile")
    other = world.crowd(1_000)
    assert world.launch(paused, other.name, rate_per_second=50.0).accepted
    assert world.control("pause", paused).accepted

    before = {job.id for job in running_jobs(world.home)}
    upgrade(world.home)
    world.jobs.ensure()
    assert before.isdisjoint({job.id for job in running_jobs(world.home)})
    assert world.stats(run)["unique"] < len(crowd.consenting()), "it was stopped in the middle"

    assert world.control("set_rate", run, rate_per_second=1_000.0).accepted
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    assert set(world.accepted(run)) == {one.message(run) for one in crowd.consenting()}
    # A stop is no kill: requests in flight were answered and settled before it.
    assert found["unknown"] == found["failed"] == found["expired"] == 0

    # Reservations made before the savepoint and after it count alike.
    cap = {
        "name": "once", "limit": 1, "window": "rolling", "length": 86_400_000, "channel": "email",
        "category": category, "when_capped": "drop",
    }  # fmt: skip
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
    assert world.control("resume", paused).accepted
    world.wait_status(paused)
    world.check_balanced(paused, other)
