"""What the shells do with time and with rubbish, step by step; the engine runs them elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipelines.coordinate import CoordinateOperator, CoordinateParts
from pipelines.dead_letters import DeadLetterGate, DeadLetterRatioPassed
from schemas.codec import decode, encode, header_of
from schemas.errors import IncompatibleState, MalformedRecord, UnknownSchema
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant
from schemas.reasons import Channel, Lane, Reason, RunStatus
from schemas.records import (
    CampaignSpec,
    Command,
    CommandKind,
    DeadLetter,
    LegSpec,
    Outcomes,
    Route,
    RunEvent,
    WhenZoneUnknown,
)
from schemas.snapshot import PageBody, PageIndex
from tests.flink_metrics import Metrics
from transforms.coordinate import CoordinatePolicy

NOW = datetime.now(UTC)


# The gate.


def letters(gate: DeadLetterGate, count: int, tag: str = "") -> list[DeadLetter]:
    error = MalformedRecord("cut short")
    return [
        decode(
            gate.letter(f"{tag}{number}".encode(), error, NOW, step="read", source="a topic"),
            DeadLetter,
        )
        for number in range(count)
    ]


def test_a_dead_letter_holds_all_that_a_replay_needs() -> None:
    gate = DeadLetterGate("decide", 0.05, 1000)
    data = encode(
        Outcomes(Tenant("acme"), RunId("r"), LegId("email"), SnapshotId(""), 1, 2, NOW, ())
    )
    letter = decode(
        gate.letter(data[:-1], UnknownSchema("new"), NOW, step="read", source="t"), DeadLetter
    )
    assert (letter.original, letter.step, letter.source) == (data[:-1], "decide/read", "t")
    assert (letter.reason, letter.detail) == (Reason.UNKNOWN_SCHEMA, "new")
    assert (letter.tenant, letter.run) == ("acme", "r")
    again = decode(
        gate.letter(data[:-1], UnknownSchema("new"), NOW, step="read", source="t"), DeadLetter
    )
    assert again.letter_id == letter.letter_id, "a replay makes the same letter"


def test_few_bad_records_never_stop_a_job() -> None:
    gate = DeadLetterGate("decide", 0.05, 100)
    assert len(letters(gate, 99)) == 99, "too few were seen to judge"
    gate = DeadLetterGate("decide", 0.05, 100)
    for number in range(200):
        gate.good(97)
        letters(gate, 2, f"{number}-")


def test_a_bad_deployment_stops_it_with_the_reason() -> None:
    gate = DeadLetterGate("decide", 0.05, 100)
    gate.good(1_000_000)
    with pytest.raises(DeadLetterRatioPassed, match=r"more than 5%.*cut short") as caught:
        letters(gate, 100)
    assert "decide: " in str(caught.value)


# Time.


class Value:
    """A keyed ValueState, MapState and timer service of one key, as Flink keeps them."""

    def __init__(self) -> None:
        self.kept: Any = None
        self.map: dict[Any, Any] = {}
        self.timers: set[int] = set()

    # ValueState
    def value(self) -> Any:
        return self.kept

    def update(self, value: Any) -> None:
        self.kept = value

    # MapState
    def items(self) -> Any:
        return list(self.map.items())

    def put(self, key: Any, value: Any) -> None:
        self.map[key] = value

    def remove(self, key: Any) -> None:
        self.map.pop(key, None)

    # RuntimeContext
    def get_state(self, _: Any) -> Value:
        return self

    def get_map_state(self, _: Any) -> Value:
        return self

    def get_metrics_group(self) -> Metrics:
        return Metrics()

    # Context
    def get_current_key(self) -> str:
        return "acme/r"

    def timer_service(self) -> Value:
        return self

    def register_processing_time_timer(self, at: int) -> None:
        self.timers.add(at)


class Nothing:
    """A snapshot of one person without an address, a store and a registry that take everything."""

    class manifest:
        tenant = "acme"
        attributes = ()
        pages = ()
        shards = 256

        @staticmethod
        def shard_size(shard: int) -> int:
            return 1 if shard == 7 else 0

    def read_index(self, shard: int, page: int) -> PageIndex:
        raise AssertionError

    def read_body(self, shard: int, page: int) -> PageBody:
        raise AssertionError

    def put_object(self, kind: str, content: bytes) -> ObjectId:
        return ObjectId("a" * 64)

    def open_snapshot(self, name: str) -> Nothing:
        return self

    def publish(self, *_: Any) -> None:
        return

    def create_ledger(self, *_: Any) -> None:
        return


def nothing(spec: CampaignSpec, manifest: Any) -> Iterator[str]:
    return iter(())


def coordinate(state: Value) -> CoordinateOperator:
    make: Callable[[], Any] = Nothing
    operator = CoordinateOperator(
        CoordinateParts(make, make, nothing, CoordinatePolicy(), 0.05, 1000)
    )
    operator.open(state)
    return operator


def launch() -> bytes:
    leg = LegSpec(
        LegId("email"), Channel.EMAIL, (Route("smtp", "main"),), "a@example.com", "", None,
        "Hello", None, "Hello",
    )  # fmt: skip
    spec = CampaignSpec(
        Tenant("acme"), RunId("r"), "c", SnapshotId("0" * 32), "promo", "offers",
        Lane.PROMOTIONAL, (leg,), None, NOW + timedelta(hours=1), None, WhenZoneUnknown.SKIP,
        None, (), 0.0, None, timedelta(minutes=10), {},
    )  # fmt: skip
    return encode(
        Command("c1", Tenant("acme"), RunId("r"), CommandKind.LAUNCH, NOW, "me", launch=spec)
    )


def pause(number: int) -> bytes:
    kind = CommandKind.PAUSE if number % 2 else CommandKind.RESUME
    return encode(Command(f"p{number}", Tenant("acme"), RunId("r"), kind, NOW, "me"))


def test_ticks_do_not_multiply_when_state_is_restored() -> None:
    """However often a job is restored, and whatever comes before its old timer fires."""
    state = Value()
    first = coordinate(state)
    events = [decode(one, RunEvent) for one in list(first.process_element(launch(), state))
              if one[:10] == header_of(RunEvent)]  # fmt: skip
    assert events[0].status is RunStatus.RUNNING
    assert len(state.timers) == 1
    for restart in range(1, 6):
        # Timers are state: the old one is there, and a record comes before it fires.
        operator = coordinate(state)
        list(operator.process_element(pause(restart), state))
        due, state.timers = sorted(state.timers), set()
        for at in due:
            list(operator.on_timer(at, state))
        assert len(state.timers) <= 1, f"after restart {restart}"
        # With nothing in between the old timer goes on with the chain.
        operator = coordinate(state)
        due, state.timers = sorted(state.timers), set()
        for at in due:
            list(operator.on_timer(at, state))
        assert len(state.timers) == 1


def test_a_run_kept_in_a_newer_layout_ends_the_job() -> None:
    state = Value()
    list(coordinate(state).process_element(launch(), state))
    state.kept = newer = state.kept[:2] + b"\1" * 8 + state.kept[10:]
    with pytest.raises(IncompatibleState, match=r"RunState.*newer layout"):
        list(coordinate(state).process_element(pause(1), state))
    assert state.kept == newer
