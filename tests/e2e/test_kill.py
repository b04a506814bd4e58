"""A TaskManager is killed in mid-campaign: nobody is lost, nobody gets it twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

from stack.flink_jobs import last_failure
from stack.layout import processes
from tests.e2e.producer import now_ms
from tests.e2e.world import LONG, Crowd, One, World
from tests.stack_fixture import eventually, wait_restarted

PEOPLE = 4_000
RATE = 400.0
"""Messages a second: the campaign spans several checkpoints, which are two seconds apart."""
LATENCY_MS = 400.0
STOPPED_S = 8.0
"""Longer than delivery waits for one answer of Redis."""
IN_FLIGHT = 768
"""What delivery lets be in flight at the account at most (``sendgrid_in_flight``)."""


def killed_in_the_middle(
    world: World, job: str, run: str, crowd: Crowd, look: Callable[[], int]
) -> int:
    """Run a campaign, kill the job's process in the middle; what ``look`` saw at the kill."""
    latency = {"kind": "uniform", "min_ms": LATENCY_MS / 2, "max_ms": LATENCY_MS * 2}
    with world.provider(sendgrid={"latency": latency}):
        event = world.launch(run, crowd.name, rate_per_second=RATE)
        assert event.accepted, event.note
        world.wait_accepted(run, len(wanted(crowd)) // 3)
        name, pid = world.taskmanager(job)
        # Stopped first, so that what is counted is what was under way when it died.
        os.kill(pid, signal.SIGSTOP)
        seen = look()
        os.kill(pid, signal.SIGKILL)
        wait_restarted(world.home, name, pid)
        world.wait_status(run, timeout=LONG)
    return seen


def wanted(crowd: Crowd) -> list[One]:
    return crowd.consenting()


def test_delivery_is_killed_in_mid_campaign(world: World) -> None:
    crowd = world.crowd(PEOPLE)
    run = world.run_name("kill-delivery")

    def claims() -> int:
        # What the process had written to Redis before it was stopped is still being carried out.
        counts: list[int] = []

        def still() -> bool:
            counts.append(world.ledger(run).claims)
            return len(counts) > 2 and counts[-1] == counts[-2] == counts[-3]

        eventually(still, timedelta(seconds=3), "the claims stand still")
        return counts[-1]

    in_flight = killed_in_the_middle(world, "delivery", run, crowd, claims)
    assert 0 < in_flight <= IN_FLIGHT
    found = world.check_balanced(run, crowd).as_json()
    assert found["failed"] == found["expired"] == found["cancelled"] == 0
    # Nobody is lost: each is accepted, or in doubt and said to be; and only who was in flight is.
    assert found["accepted"] + found["unknown"] == len(wanted(crowd))
    assert found["unknown"] <= in_flight
    doubt = {place for place, (kind, _) in world.classes(run).items() if kind == "unknown"}
    got = world.accepted(run)
    missing = {(one.shard, one.ordinal) for one in wanted(crowd) if one.message(run) not in got}
    assert missing <= doubt


def test_jobs_that_have_ended_go_on_from_their_last_checkpoint(world: World) -> None:
    crowd = world.crowd(PEOPLE)
    run = world.run_name("ended")
    assert world.launch(run, crowd.name, rate_per_second=RATE).accepted
    world.wait_accepted(run, len(wanted(crowd)) // 4)
    before = dict(world.jobs.ids)
    world.jobs.cancel()
    ended_ms = now_ms()
    while now_ms() < ended_ms + 1_500:
        time.sleep(0.1)
    assert world.starts_after(run, ended_ms) == 0, (
        "its loop ended with the task, and no process did"
    )
    assert world.stats(run)["unique"] < len(wanted(crowd)), "it was ended in the middle"
    world.jobs.ensure()
    assert set(before.values()).isdisjoint(world.jobs.ids.values())
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    # An end is no kill: what was in flight was answered and settled.
    assert found["accepted"] == len(wanted(crowd))


def test_the_campaigns_job_is_killed_in_mid_campaign(world: World) -> None:
    crowd = world.crowd(PEOPLE)
    run = world.run_name("kill-campaigns")
    killed_in_the_middle(world, "campaigns", run, crowd, lambda: 0)
    found = world.check_balanced(run, crowd).as_json()
    # Delivery lived: nothing is in doubt, and everybody who was to get it has got it once.
    assert found["unknown"] == found["failed"] == found["expired"] == found["cancelled"] == 0
    assert set(world.accepted(run)) == {one.message(run) for one in wanted(crowd)}
    eventually(lambda: world.jobs.all_run(), LONG, "all jobs run again")


def test_redis_is_stopped_and_goes_on_in_mid_campaign(world: World) -> None:
    """Answers are lost on both sides of it: claims and settlements are repeated, no request is."""
    crowd = world.crowd(PEOPLE)
    run = world.run_name("redis-stopped")
    pid = processes(world.home)["redis"].pid
    assert pid is not None
    failures = {name: last_failure(world.home, job) for name, job in world.jobs.ids.items()}
    with world.provider(sendgrid={"latency": {"kind": "fixed", "ms": LATENCY_MS}}):
        assert world.launch(run, crowd.name, rate_per_second=RATE).accepted
        world.wait_accepted(run, len(wanted(crowd)) // 3)
        os.kill(pid, signal.SIGSTOP)
        try:
            stopped_ms = now_ms()
            time.sleep(STOPPED_S)
            # What was granted before it stopped has left by then; nothing leaves without a grant.
            assert world.starts_after(run, stopped_ms + 1_000) == 0
            assert world.stats(run)["unique"] < len(wanted(crowd)), "it is stopped in the middle"
        finally:
            os.kill(pid, signal.SIGCONT)
        world.wait_status(run, timeout=LONG)
    found = world.check_balanced(run, crowd).as_json()
    assert found["unknown"] == found["failed"] == found["expired"] == found["cancelled"] == 0
    assert set(world.accepted(run)) == {one.message(run) for one in wanted(crowd)}
    assert world.stats(run)["duplicates"] == 0
    assert {name: last_failure(world.home, job) for name, job in world.jobs.ids.items()} == failures
