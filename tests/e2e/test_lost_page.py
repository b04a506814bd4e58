"""A page that is lost with its Kafka transaction is noticed and ordered again, once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from kafka import KafkaAdminClient
from kafka.admin import AbortTransactionSpec
from kafka.errors import KafkaError

from schemas import topics
from schemas.codec import decode
from schemas.errors import MalformedRecord
from schemas.records import PageResult
from stack import flink_jobs
from tests.e2e.producer import campaign
from tests.e2e.world import TENANT, World
from tests.stack_fixture import eventually

LOST = (topics.PAGE_RESULTS, "fanfare.sends.")
_ATTEMPTS = 5


@pytest.fixture
def hasty(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The campaigns job under transactions, and a patience, of seconds."""
    with monkeypatch.context() as patched:
        patched.setenv("FANFARE_TRANSACTION_TIMEOUT", "PT15S")
        patched.setenv("FANFARE_SILENCE_MARGIN", "PT2S")
        _start_again(world)
    yield world
    _start_again(world)


def _start_again(world: World) -> None:
    """End the campaigns job and let it go on from its last checkpoint with the settings of now."""
    flink_jobs.cancel(world.home, world.jobs.ids["campaigns"])
    world.jobs.ensure()


def _written(admin: KafkaAdminClient) -> list[AbortTransactionSpec]:
    """Where an open transaction has decisions, each to be aborted."""
    listed = admin.list_transactions(state_filters=["Ongoing"])
    names = [one.transactional_id for of_broker in listed.values() for one in of_broker]
    found = admin.describe_transactions(names) if names else {}
    for one in found.values():
        places = [place for place in one.topic_partitions if place.topic.startswith(LOST)]
        if any(place.topic == topics.PAGE_RESULTS for place in places):
            return [
                AbortTransactionSpec(place, one.producer_id, one.producer_epoch) for place in places
            ]
    return []


def _abort_decisions(admin: KafkaAdminClient) -> bool:
    """Abort, once a page is decided, what its transaction has written; whether it was in time."""
    until = time.monotonic() + 10
    while not _written(admin):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    time.sleep(0.5)  # a thousand people are decided in some milliseconds
    specs = _written(admin)
    try:
        for spec in specs:
            admin.abort_transaction(spec)
    except KafkaError:
        return False
    return bool(specs)


def _results(world: World, run: str) -> list[PageResult]:
    found = []
    for value in world.read(topics.PAGE_RESULTS):
        try:
            result = decode(value, PageResult)
        except MalformedRecord:  # of another test
            continue
        if result.run == run:
            found.append(result)
    return found


def test_a_page_lost_with_its_transaction_is_ordered_again(hasty: World) -> None:
    world = hasty
    admin = KafkaAdminClient(bootstrap_servers=world.at.kafka)
    try:
        for attempt in range(_ATTEMPTS):
            crowd = world.crowd(1_000)
            run = world.run_name(f"lost-{attempt}")
            launch = campaign(TENANT, run, crowd.name, caps=[])
            launched = world.producer.command("launch", TENANT, run, launch=launch)
            in_time = _abort_decisions(admin)
            assert world.answer(launched).accepted
            time.sleep(3)  # the transaction ends, and what is left of it is read
            if in_time and not _results(world, run) and not world.accepted(run):
                break
            world.wait_status(run)
        else:
            pytest.fail(f"none of {_ATTEMPTS} transactions was caught before it was committed")
    finally:
        admin.close()
    world.wait_status(run)
    found = world.check_balanced(run, crowd).as_json()
    assert found["accepted"] == len(crowd.consenting())
    assert set(world.accepted(run)) == {one.message(run) for one in crowd.consenting()}
    assert world.stats(run)["duplicates"] == 0
    assert {one.generation for one in _results(world, run)} == {1}
    eventually(world.jobs.all_run, what="all jobs run")
