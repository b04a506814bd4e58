"""What a dead letter's history says, and what a replay of it is."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import decode, encode
from schemas.errors import Missing
from schemas.ids import LegId, RunId, SnapshotId, Tenant
from schemas.pages import bitmap_bytes, bitmap_from, bitmap_of
from schemas.reasons import Outcome, Reason
from schemas.records import DeadLetter, OutcomeGroup, Outcomes, RawWebhook
from sinks.dead_letters import (
    NotReplayable,
    State,
    find,
    marked,
    orders,
    read_letters,
    record_again,
    select,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def letter(name: str, at: datetime = NOW, **changes: object) -> DeadLetter:
    one = DeadLetter(
        letter_id=name, tenant="acme", run="spring", step="delivery/request",
        reason=Reason.PROVIDER_REFUSED, detail="550", source="page 1 of shard 3", original=b"",
        first_at=at, last_at=at, leg="email", shard=3, page=1, ordinals=bitmap_bytes(0b101),
        generation=0,
    )  # fmt: skip
    return replace(one, **changes)  # type: ignore[arg-type]


def record(name: str, original: bytes, step: str = "coordinate/read") -> DeadLetter:
    return letter(
        name, step=step, reason=Reason.MALFORMED, original=original, leg="", shard=-1, page=-1,
        ordinals=b"", generation=-1,
    )  # fmt: skip


def test_a_letter_is_counted_dated_and_told_apart() -> None:
    later = NOW + timedelta(hours=2)
    found = read_letters(
        [encode(letter("a")), encode(letter("b")), b"noise", encode(letter("a", later))]
    )
    assert [one.letter.letter_id for one in found.values()] == ["a", "b"]
    one = found["a"]
    assert (one.count, one.letter.first_at, one.letter.last_at) == (2, NOW, later)
    assert (one.recipients, one.ordinals()) == (2, [500, 502])
    assert one.state is State.OPEN


def test_what_was_done_is_remembered_and_what_comes_again_is_open() -> None:
    found = read_letters([encode(letter("a"))])["a"]
    mark = encode(marked(found, State.REPLAYED, "ada", "mended", NOW + timedelta(hours=1), "c1"))
    handled = read_letters([encode(letter("a")), mark])["a"]
    assert (handled.state, handled.count) == (State.REPLAYED, 1)
    assert handled.handled[0]["by"] == "ada"
    assert handled.handled[0]["command_id"] == "c1"
    assert handled.letter == letter("a"), "the index keeps its row"
    # A restart of the job repeats the letter as it was; a new failure is a new time.
    repeated = read_letters([encode(letter("a")), mark, encode(letter("a"))])["a"]
    assert (repeated.state, repeated.count) == (State.REPLAYED, 2)
    again = letter("a", NOW + timedelta(hours=2))
    assert read_letters([encode(letter("a")), mark, encode(again)])["a"].state is State.OPEN
    # Retention may take the letter before its mark.
    assert read_letters([mark])["a"].state is State.REPLAYED


def test_selecting_and_finding() -> None:
    letters = read_letters(
        [
            encode(letter("aaaa-1")),
            encode(letter("aaaa-2", run="autumn")),
            encode(letter("bbbb-1", reason=Reason.RETRIES_EXHAUSTED)),
        ]
    )

    def names(**wanted: object) -> list[str]:
        found = select(letters.values(), **wanted)  # type: ignore[arg-type]
        return [one.letter.letter_id for one in found]

    assert names(run="spring", reason=Reason.PROVIDER_REFUSED) == ["aaaa-1"]
    assert names(tenant="other") == []
    assert find(letters, ["bbbb"])[0].letter.letter_id == "bbbb-1"
    with pytest.raises(Missing, match="2 dead letters begin with it"):
        find(letters, ["aaaa-"])
    with pytest.raises(Missing, match="there is none"):
        find(letters, ["cccc"])


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 255)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_orders_name_each_recipient_once_and_nobody_else(
    places: list[tuple[int, int, int]],
) -> None:
    written = [
        letter(f"l{n}", shard=shard, page=page, ordinals=bitmap_bytes(bits))
        for n, (shard, page, bits) in enumerate(places)
    ]
    letters = list(read_letters(map(encode, written)).values())
    (replay,) = orders(letters, "ada", "mended", NOW)
    assert orders(letters[::-1], "ada", "again", NOW)[0].command.command_id == (
        replay.command.command_id
    )
    wanted: dict[tuple[int, int], int] = {}
    for shard, page, bits in places:
        wanted[shard, page] = wanted.get((shard, page), 0) | bits
    named = {(one.shard, one.page): bitmap_from(one.ordinals) for one in replay.command.reorders}
    assert named == wanted
    assert len(replay.command.reorders) == len(wanted)
    assert len(replay.letters) == len(letters)


def test_replaying_what_failed_again_is_another_order() -> None:
    first = read_letters([encode(letter("a"))])["a"]
    mark = encode(marked(first, State.REPLAYED, "ada", "x", NOW + timedelta(hours=1)))
    again = encode(letter("a", NOW + timedelta(hours=2)))
    second = read_letters([encode(letter("a")), mark, again])["a"]
    one, other = (orders([each], "ada", "x", NOW)[0].command for each in (first, second))
    assert one.command_id != other.command_id


def test_a_record_is_written_again_only_if_it_can_be_read() -> None:
    good = encode(
        Outcomes(
            Tenant("acme"), RunId("spring"), LegId("email"), SnapshotId("5" * 32), 3, 1, NOW,
            (OutcomeGroup(Outcome.STALE, Reason.DECISION_TOO_OLD, "", 0, (1,)),),
        )
    )  # fmt: skip
    item = {
        "event": "delivered", "timestamp": int(NOW.timestamp()), "sg_event_id": "e1",
        "ff_send_id": "s", "ff_tenant": "acme", "ff_run": "spring", "ff_leg": "email",
    }  # fmt: skip
    letters = read_letters(
        map(
            encode,
            [
                record("good", good),
                record("cut", good[:-2]),
                record("noise", b"noise"),
                record("event", orjson.dumps(item), "ingest/event"),
                record("no event", b"7", "ingest/event"),
                record("empty", b""),
                record(
                    "letter", encode(RawWebhook("w", "sendgrid", Tenant("acme"), NOW, {}, b"{"))
                ),
            ],
        )
    )
    assert record_again(letters["good"], NOW) == good
    raw = decode(record_again(letters["event"], NOW), RawWebhook)
    assert (raw.tenant, raw.provider, orjson.loads(raw.body)) == ("acme", "sendgrid", [item])
    for name, why in (
        ("cut", "would fail again"),
        ("noise", "no record of a schema"),
        ("no event", "would fail again"),
        ("empty", "no record and no recipients"),
        ("letter", "would fail again"),
    ):
        with pytest.raises(NotReplayable, match=why):
            record_again(letters[name], NOW)


def test_bitmaps_are_of_the_page() -> None:
    assert bitmap_bytes(bitmap_of((0, 2))) == letter("a").ordinals
