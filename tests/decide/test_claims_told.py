"""What claims are told of consent changes, and that Redis may be away meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipelines import decide as shell
from pipelines.decide import DecideOperator, DecideParts
from schemas.codec import encode, to_millis
from schemas.errors import IncompatibleState, Unavailable
from schemas.ids import RecipientId, Tenant
from schemas.records import ConsentChange, ConsentStatus
from tests.decide.people import Page, campaign, order, page_of, person
from tests.flink_metrics import Metrics
from transforms.consent import change_bytes, for_claims
from transforms.decide import state_key

GRANTED, WITHDRAWN = ConsentStatus.GRANTED, ConsentStatus.WITHDRAWN
SUPPRESSED, ERASED = ConsentStatus.SUPPRESSED, ConsentStatus.ERASED
NOW = datetime.now(UTC).replace(microsecond=0)


def word(scope: str, status: ConsentStatus, second: float = 0, who: str = "ada") -> ConsentChange:
    channel, topic = scope.split("/")
    at = NOW + timedelta(seconds=second)
    return ConsentChange(
        f"{scope} {second}", Tenant("acme"), RecipientId(who), channel, topic, status, at, "form"
    )


def told(words: list[ConsentChange], now: datetime = NOW) -> list[tuple[str, str]]:
    """Scope and status of what claims are told of the last of these words."""
    data = None
    changes: tuple[ConsentChange, ...] = ()
    for one in words:
        after = change_bytes(data, one)
        changes = () if after is None else for_claims(after, one, now)
        data = data if after is None else after
    return [(f"{one.channel}/{one.topic}", one.status.value) for one in changes]


@pytest.mark.parametrize(
    ("words", "scopes"),
    [
        ([word("email/offers", WITHDRAWN)], ["email/offers"]),
        ([word("email/*", SUPPRESSED)], ["email/*"]),
        ([word("email/offers", ERASED)], ["*/*"]),
        ([word("email/offers", GRANTED)], ["email/offers"]),
        # A grant takes back what it covers, and nothing else.
        (
            [word("email/offers", WITHDRAWN), word("email/*", GRANTED, 1)],
            ["email/*", "email/offers"],
        ),
        ([word("email/offers", WITHDRAWN), word("*/offers", GRANTED, 1)],
         ["*/offers", "email/offers"]),
        (
            [word("email/*", SUPPRESSED), word("sms/news", WITHDRAWN), word("*/*", GRANTED, 1)],
            ["*/*", "email/*", "sms/news"],
        ),
        ([word("sms/offers", WITHDRAWN), word("email/*", GRANTED, 1)], ["email/*"]),
        ([word("email/*", WITHDRAWN), word("email/offers", GRANTED, 1)], ["email/offers"]),
        # Whatever comes late says what it would have said in time.
        ([word("email/offers", WITHDRAWN, 2), word("email/*", GRANTED, 1)], ["email/*"]),
        ([word("email/*", GRANTED, 2), word("email/offers", WITHDRAWN, 1)], []),
        ([word("email/*", GRANTED, 2), word("*/*", WITHDRAWN, 1)], ["*/*"]),
        # What does not win is not told.
        ([word("email/offers", GRANTED, 2), word("email/offers", WITHDRAWN, 1)], []),
        ([word("email/offers", WITHDRAWN, 2), word("email/offers", GRANTED, 1)], []),
        ([word("email/offers", WITHDRAWN), word("email/offers", WITHDRAWN)], []),
        ([word("*/*", ERASED), word("email/*", GRANTED, 1)], []),
    ],
)  # fmt: skip
def test_claims_are_told_of_what_won(words: list[ConsentChange], scopes: list[str]) -> None:
    found = told(words)
    assert [scope for scope, _ in found] == scopes
    assert {status for _, status in found} <= {words[-1].status.value}


def test_claims_are_not_told_of_withdrawals_that_they_would_have_forgotten() -> None:
    for status, told_late in ((WITHDRAWN, False), (ERASED, False), (GRANTED, True)):
        change = [word("email/*", status)]
        assert told(change, NOW + timedelta(minutes=19, seconds=59))
        assert bool(told(change, NOW + timedelta(minutes=20))) is told_late


# The shell.


class OptOuts:
    """The memory of claims, of scopes by person; while it is ``away`` it takes nothing."""

    def __init__(self) -> None:
        self.away = False
        self.asked = 0
        self.kept: set[tuple[str, str]] = set()
        self.calls: list[tuple[str, str, str]] = []

    def opt_out(self, tenant: str, recipient_id: str, channel: str, topic: str) -> None:
        self._ask("out", recipient_id, f"{channel}/{topic}")
        self.kept.add((recipient_id, f"{channel}/{topic}"))

    def opt_in(self, tenant: str, recipient_id: str, channel: str, topic: str) -> None:
        self._ask("in", recipient_id, f"{channel}/{topic}")
        self.kept.discard((recipient_id, f"{channel}/{topic}"))

    def _ask(self, how: str, recipient_id: str, scope: str) -> None:
        self.asked += 1
        if self.away:
            raise Unavailable("Redis is away")
        self.calls.append((how, recipient_id, scope))


class MapState:
    """Flink's, of one key."""

    def __init__(self) -> None:
        self.map: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        return self.map.get(name)

    def put(self, name: str, data: bytes) -> None:
        assert type(data) is bytes
        self.map[name] = data

    def remove(self, name: str) -> None:
        del self.map[name]

    def items(self) -> Iterator[tuple[str, bytes]]:
        return iter(self.map.items())


class Flink:
    """State and timers of one key, which outlive the operator; its clock stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: dict[str, MapState] = {}
        self.timers: set[int] = set()
        self.now = NOW
        clock = type("Clock", (), {"now": lambda _: self.now})
        monkeypatch.setattr(shell, "datetime", clock)
        self.opt_outs = OptOuts()
        self.restart()

    def restart(self) -> None:
        self.operator = DecideOperator(
            DecideParts(lambda: object(), lambda: self.opt_outs, 0.05, 1000)  # type: ignore[arg-type, return-value]
        )
        self.operator.open(self)  # type: ignore[arg-type]

    def hear(self, *changes: ConsentChange) -> None:
        for change in changes:
            assert list(self.operator.process_element(encode(change), self)) == []  # type: ignore[arg-type]

    def pass_time(self, seconds: float) -> None:
        """Half-second steps, in which timers fire."""
        end = self.now + timedelta(seconds=seconds)
        while self.now < end:
            self.now += timedelta(seconds=0.5)
            due = {at for at in self.timers if at <= to_millis(self.now)}
            self.timers -= due
            for at in sorted(due):
                assert list(self.operator.on_timer(at, self)) == []  # type: ignore[arg-type]

    @property
    def owed(self) -> int:
        return len(self.states["owed"].map)

    # RuntimeContext
    def get_map_state(self, descriptor: Any) -> MapState:
        return self.states.setdefault(descriptor.name, MapState())

    def get_metrics_group(self) -> Metrics:
        return Metrics()

    # Context
    def get_current_key(self) -> int:
        return 7

    def timer_service(self) -> Flink:
        return self

    def register_processing_time_timer(self, at: int) -> None:
        self.timers.add(at)


@pytest.fixture
def flink(monkeypatch: pytest.MonkeyPatch) -> Flink:
    return Flink(monkeypatch)


def test_claims_are_told_at_once_and_nothing_is_kept(flink: Flink) -> None:
    flink.hear(word("email/*", WITHDRAWN), word("email/*", WITHDRAWN), word("email/*", GRANTED, -1))
    assert flink.opt_outs.calls == [("out", "ada", "email/*")]
    assert not flink.owed and not flink.timers


def test_a_redis_that_is_away_gets_what_it_is_owed_when_it_is_back(flink: Flink) -> None:
    flink.opt_outs.away = True
    flink.hear(word("email/offers", WITHDRAWN), word("sms/*", WITHDRAWN, who="bob"))
    flink.pass_time(5)
    assert flink.owed == 2 and flink.opt_outs.kept == set()
    assert flink.opt_outs.asked <= 11, "one that is away is asked once in a while"
    flink.opt_outs.away = False
    flink.pass_time(1)
    assert flink.opt_outs.kept == {("ada", "email/offers"), ("bob", "sms/*")}
    assert not flink.owed and not flink.timers


def test_the_latest_word_of_a_scope_is_told_last(flink: Flink) -> None:
    flink.hear(word("email/offers", WITHDRAWN))
    flink.opt_outs.away = True
    flink.hear(word("email/*", GRANTED, 1), word("sms/*", WITHDRAWN, 1))
    flink.opt_outs.away = False
    # Redis answers again, but is told in order.
    flink.hear(word("sms/*", GRANTED, 2), word("email/offers", WITHDRAWN, 3))
    flink.pass_time(1)
    assert flink.opt_outs.kept == {("ada", "email/offers")}
    flink.hear(word("email/*", GRANTED, 4))
    assert flink.opt_outs.kept == set() and not flink.owed


def test_what_is_owed_is_state(flink: Flink) -> None:
    flink.opt_outs.away = True
    flink.hear(word("email/*", WITHDRAWN))
    for _ in range(3):
        flink.restart()
        # A record may come before the old timer fires, and must not start a second chain.
        flink.now += timedelta(milliseconds=100)
        flink.hear(replace(word("sms/*", WITHDRAWN), at=flink.now))
        flink.pass_time(2)
        assert len(flink.timers) == 1
    flink.restart()
    flink.opt_outs.away = False
    flink.pass_time(1)
    assert flink.opt_outs.kept == {("ada", "email/*"), ("ada", "sms/*")}
    assert not flink.owed and not flink.timers


def test_what_claims_would_have_forgotten_is_owed_no_more(flink: Flink) -> None:
    flink.opt_outs.away = True
    flink.hear(word("email/*", WITHDRAWN), word("sms/*", GRANTED))
    flink.pass_time(20 * 60)
    flink.opt_outs.away = False
    flink.pass_time(1)
    assert flink.opt_outs.calls == [("in", "ada", "sms/*")] and not flink.owed


def test_a_person_kept_in_a_newer_layout_ends_the_job_and_stays_as_it_is(flink: Flink) -> None:
    newer = b"\xc3\x01" + b"\1" * 8 + b"whatever is in it"
    people = flink.states["people"]
    name = state_key(Tenant("acme"), "ada")
    people.put(name, newer)
    with pytest.raises(IncompatibleState, match="Install the version that wrote it"):
        flink.hear(word("email/*", WITHDRAWN))
    assert people.get(name) == newer and not flink.opt_outs.calls


class Store:
    """A store of one campaign and one page."""

    def get_object(self, kind: str, name: str) -> bytes:
        return encode(campaign())

    def open_snapshot(self, name: str) -> Store:
        return self

    def read_index(self, shard: int, page: int) -> Page:
        return page_of([person()])


def test_an_order_for_such_a_person_is_not_answered_as_one_of_a_corrupt_page(flink: Flink) -> None:
    flink.operator._store = Store()
    asked = encode(order(campaign(), [0]))
    answers = list(flink.operator.process_element(asked, flink))  # type: ignore[arg-type]
    assert answers, "the page can be decided"
    name = state_key(campaign().tenant, person().recipient_id)
    flink.states["people"].put(name, b"\xc3\x01" + b"\1" * 8)
    with pytest.raises(IncompatibleState):
        list(flink.operator.process_element(asked, flink))  # type: ignore[arg-type]
