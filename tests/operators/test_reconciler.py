"""Unknowns that webhooks prove, with the real ledger and the real table of events."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipelines.reconcile import Reconciler
from schemas.codec import encode
from schemas.errors import Unavailable
from schemas.ids import send_id
from schemas.reasons import Outcome, Reason
from schemas.records import EngagementKind, Outcomes
from sinks import ledger_upkeep
from sinks.unknowns import Settler, connect_settler
from tests.operators.place import EMAIL, Mail, Place, in_one_shard, webhook_event
from transforms.ledger import Held
from transforms.reconcile import ReconcilePolicy, unknowns_of

POLICY = ReconcilePolicy()


class State(dict[str, bytes]):
    """A keyed MapState of one key."""

    put = dict.__setitem__

    def remove(self, name: str) -> None:
        del self[name]


@pytest.fixture
def settler(place: Place) -> Iterator[Settler]:
    made = connect_settler(place.at.redis, place.at.clickhouse)
    yield made
    made.close()


def send_of(place: Place, mail: Mail) -> str:
    return str(send_id(place.tenant, place.run, EMAIL, place.recipient(mail)))


def unknown(place: Place, count: int) -> tuple[list[Mail], list[Outcomes]]:
    place.launch()
    mails = in_one_shard(place.decide(), count)[:count]
    return mails, place.deliver(dict.fromkeys(mails, Outcome.UNKNOWN))


class Time:
    """A reconciler and the moment at which its next look is due."""

    def __init__(self, place: Place, settler: Any, state: State) -> None:
        self.now = datetime.now(UTC)
        self.state = state
        self.one = Reconciler(state, settler, place.store, POLICY, self.now)

    def take(self, *records: Outcomes) -> None:
        for one in records:
            watched = unknowns_of(one)
            assert watched is not None
            self.one.take(watched, self.now)

    def look(self) -> list[Outcomes]:
        assert self.one.soonest is not None
        self.now = max(self.now, self.one.soonest)
        return self.one.look(self.now)


def test_events_before_and_after_the_outcome_settle_it(place: Place, settler: Settler) -> None:
    mails, records = unknown(place, 3)
    early, late, never = mails
    # Told before anybody knew that the outcome is unknown; the bounce proves it as well.
    place.ingest(webhook_event(place, early, send_of(place, early), kind=EngagementKind.BOUNCED))
    time = Time(place, settler, State())
    time.take(*records, records[0])
    (told,) = time.look()
    (group,) = told.groups
    assert (group.outcome, group.reason, group.indexes) == (
        Outcome.ACCEPTED, Reason.SETTLED_BY_WEBHOOK, (early.ordinal,),
    )  # fmt: skip
    assert (group.provider, group.provider_ids) == ("sendgrid:main", ("provider-id",))
    assert (told.tenant, told.shard, told.snapshot) == (
        place.tenant, early.shard, place.audience.id,
    )  # fmt: skip
    ref = place.ref(early.shard)
    assert ledger_upkeep.entries(place.redis, ref, [early.ordinal])[0].accepted
    assert time.look() == []

    # Somebody else's event at this place, and an event of this message without a place.
    place.ingest(webhook_event(place, never, "another message"))
    event = webhook_event(place, late, send_of(place, late), ref="")
    place.ingest(event)
    (told,) = time.look()
    assert [group.indexes for group in told.groups] == [(late.ordinal,)]
    assert len(time.one) == 1
    matter = ledger_upkeep.list_open(place.redis, ref)[never.ordinal]
    assert isinstance(matter, Held), "held until it is proven, or a person settles it"

    # A restart loses nothing, and an event that passes by makes the look due.
    again = Time(place, settler, time.state)
    proof = webhook_event(place, never, send_of(place, never))
    place.ingest(proof)
    again.one.heard(proof, again.now)
    assert again.one.soonest == again.now
    assert [one.groups[0].indexes for one in again.look()] == [(never.ordinal,)]
    assert time.state == {}
    assert again.one.soonest is None
    place.put(*map(encode, [told]))


def test_a_crash_between_ledger_and_outcome_is_mended(place: Place, settler: Settler) -> None:
    (mail,), records = unknown(place, 1)
    ledger_upkeep.reconcile(place.redis, place.ref(mail.shard), [mail.ordinal])
    time = Time(place, settler, State())
    time.take(*records)
    (told,) = time.look()
    assert (told.groups[0].outcome, told.groups[0].reason) == (
        Outcome.ACCEPTED, Reason.LEDGER_ACCEPTED,
    )  # fmt: skip
    assert told.groups[0].provider_ids == ()


def test_what_a_person_settled_is_watched_no_more(place: Place, settler: Settler) -> None:
    (mail,), records = unknown(place, 1)
    ref = place.ref(mail.shard)
    held = ledger_upkeep.list_open(place.redis, ref)[mail.ordinal]
    assert isinstance(held, Held)
    assert ledger_upkeep.settle_by_hand(place.redis, ref, mail.ordinal, held, False)
    place.ingest(webhook_event(place, mail, send_of(place, mail)))
    time = Time(place, settler, State())
    time.take(*records)
    assert time.look() == []
    assert time.state == {}
    assert not ledger_upkeep.entries(place.redis, ref, [mail.ordinal])[0].accepted


def test_patience_ends_and_a_lost_ledger_is_waited_for(place: Place, settler: Settler) -> None:
    mails, records = unknown(place, 1)
    time = Time(place, settler, State())
    time.take(*records)
    ledger_upkeep.drop(place.redis, place.tenant, place.run, EMAIL)
    assert time.look() == []
    assert len(time.one) == 1
    counts = tuple(place.audience.manifest.shard_size(shard) for shard in range(256))
    ledger_upkeep.create(place.redis, place.tenant, place.run, EMAIL, counts, place.spec_id[:16])
    place.deliver(dict.fromkeys(mails, Outcome.UNKNOWN), told=False)
    end = records[0].at + POLICY.patience
    while time.now < end - timedelta(hours=8):
        assert time.look() == []
        assert time.state
        time.now += timedelta(hours=7)
    time.now = end
    assert time.look() == []
    assert time.state == {}
    matter = ledger_upkeep.list_open(place.redis, place.ref(mails[0].shard))[mails[0].ordinal]
    assert isinstance(matter, Held), "still held, and listed for a person"


def test_an_absent_server_delays_and_loses_nothing(place: Place, settler: Settler) -> None:
    (mail,), records = unknown(place, 1)
    place.ingest(webhook_event(place, mail, send_of(place, mail)))

    class Away:
        entries = settler.entries
        reconcile = settler.reconcile
        away = True

        def proofs(self, *place: Any) -> Any:
            if self.away:
                raise Unavailable("ClickHouse did not answer")
            return settler.proofs(*place)

    server = Away()
    time = Time(place, server, State())
    time.take(*records)
    assert time.look() == []
    server.away = False
    assert [one.groups[0].outcome for one in time.look()] == [Outcome.ACCEPTED]
