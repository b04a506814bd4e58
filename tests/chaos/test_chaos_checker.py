"""The checker finds what was planted, and lays it to the right fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from schemas.reasons import Lane, Outcome
from stack.chaos.checker import Findings, check, standstills
from stack.chaos.evidence import Acceptance, Entry, Evidence, InFlight, Owed, Place, Struck, Told
from stack.chaos.schedule import Deed, Fault, Part

CALM, URGENT = Lane.PROMOTIONAL, Lane.CRITICAL
KILL = Fault(Deed.KILL, Part.DELIVERY)
PEOPLE = 20
FIRST, SECOND = 5_000, 12_000
"""When the two faults strike. Message ``i`` of each lane is accepted at ``1000 * i``."""


def owed(number: int, lane: Lane = CALM, wanted: bool = True) -> Owed:
    place = (f"{lane.value}-run", number, 0)
    return Owed(place, f"{lane.value}-{number}", f"{number}@example.com", lane, wanted)


def accepted(one: Owed, at_ms: int) -> Acceptance:
    return Acceptance(one.send_id, one.address, at_ms)


def told(outcome: Outcome, at_ms: int, flagged: bool = False) -> Told:
    return Told(outcome, 0, at_ms, flagged)


def sound() -> Evidence:
    """Two lanes in which all is well: everybody who wants it has it, one promotional doesn't."""
    wanted = [owed(i, lane) for lane in Lane for i in range(PEOPLE)]
    stranger = owed(99, wanted=False)
    return Evidence(
        audience=(*wanted, stranger),
        provider=tuple(accepted(one, 1_000 * one.place[1]) for one in wanted),
        outcomes={
            one.place: (told(Outcome.ACCEPTED, 1_000 * one.place[1] + 300),) for one in wanted
        },
        ledger={one.place: Entry.ACCEPTED for one in wanted},
        books={**{one.place: "accepted" for one in wanted}, stranger.place: "skipped"},
    )


def struck(at_ms: int, ended_ms: int, slots: int = 0, doubtful: int = 0) -> Struck:
    left = InFlight(slots=slots, claims=slots, doubtful=doubtful)
    return Struck(KILL, at_ms, ended_ms, 3, 10, dict.fromkeys(Lane, left))


FAULTS = (struck(FIRST, 11_000, slots=2), struck(SECOND, 19_000, doubtful=1))


def without_provider(evidence: Evidence, one: Owed) -> Evidence:
    kept = tuple(row for row in evidence.provider if row.send_id != one.send_id)
    return replace(evidence, provider=kept)


def said(evidence: Evidence, one: Owed, outcome: Outcome, entry: Entry, at_ms: int) -> Evidence:
    """All three records say this of somebody."""
    return replace(
        evidence,
        outcomes={**evidence.outcomes, one.place: (told(outcome, at_ms),)},
        ledger={**evidence.ledger, one.place: entry},
        books={**evidence.books, one.place: outcome.value},
    )


def dropped(records: dict[Place, object], places: Iterable[Place]) -> dict[Place, object]:
    return {place: one for place, one in records.items() if place not in set(places)}


def judged(evidence: Evidence) -> Findings:
    return check(evidence, FAULTS)


def test_nothing_is_found_where_all_is_well() -> None:
    found = judged(sound())
    assert found.sound
    assert found.balanced
    assert (found.promotional.messages, found.critical.messages) == (PEOPLE, PEOPLE)
    assert found.promotional.lost == found.promotional.duplicates == found.promotional.unknown == 0
    assert found.promotional.bound == 3


def test_a_message_that_is_told_to_be_accepted_and_did_not_arrive_is_lost() -> None:
    found = judged(without_provider(sound(), owed(7)))
    assert found.promotional.lost == 1
    assert [cost.lost for cost in found.promotional.by_fault] == [1, 0]
    assert not found.sound


def test_a_message_of_which_nobody_says_anything_is_lost() -> None:
    one = owed(7)
    evidence = without_provider(sound(), one)
    for name in ("outcomes", "ledger", "books"):
        records = dropped(dict(getattr(evidence, name)), [one.place])
        evidence = replace(evidence, **{name: records})
    found = judged(evidence)
    assert found.promotional.lost == 1
    assert found.promotional.before.lost == 1, "nothing tells when"
    assert not found.sound
    assert not found.balanced


def test_who_was_skipped_and_wanted_it_is_lost() -> None:
    one = owed(7)
    evidence = without_provider(sound(), one)
    evidence = replace(
        evidence,
        outcomes=dropped(dict(evidence.outcomes), [one.place]),
        ledger=dropped(dict(evidence.ledger), [one.place]),
        books={**evidence.books, one.place: "skipped"},
    )
    assert judged(evidence).promotional.lost == 1


def test_a_critical_message_is_lost_likewise() -> None:
    found = judged(without_provider(sound(), owed(13, URGENT)))
    assert [cost.lost for cost in found.critical.by_fault] == [0, 1]
    assert found.promotional.lost == 0
    assert not found.sound


def test_a_message_that_failed_is_not_lost_but_counted() -> None:
    evidence = without_provider(sound(), owed(7))
    found = judged(said(evidence, owed(7), Outcome.FAILED, Entry.CLOSED, 7_300))
    assert (found.promotional.lost, found.promotional.failed) == (0, 1)
    assert found.sound


@pytest.mark.parametrize(
    ("number", "again_ms", "by_fault"),
    [(3, 4_500, [0, 0]), (3, 6_500, [1, 0]), (3, 12_500, [1, 0]), (11, 12_500, [1, 0]),
     (12, 12_500, [0, 1])],
)  # fmt: skip
def test_a_duplicate_is_laid_to_the_first_fault_that_can_be_its_reason(
    number: int, again_ms: int, by_fault: list[int]
) -> None:
    evidence = sound()
    evidence = replace(
        evidence,
        provider=tuple(
            replace(one, at_ms=1_000 * number) if one.send_id == owed(3).send_id else one
            for one in evidence.provider
        ),
    )
    again = replace(evidence, provider=(*evidence.provider, accepted(owed(3), again_ms)))
    found = judged(again)
    assert found.promotional.duplicates == 1
    assert [cost.duplicates for cost in found.promotional.by_fault] == by_fault
    assert not found.sound


def test_a_critical_duplicate_must_be_flagged_and_within_the_bound() -> None:
    evidence = sound()
    one = owed(6, URGENT)
    again = replace(evidence, provider=(*evidence.provider, accepted(one, 6_500)))
    silent = judged(again)
    assert (silent.critical.duplicates, silent.critical.unflagged) == (1, 1)
    assert not silent.sound
    flagged = replace(
        again,
        outcomes={**again.outcomes, one.place: (told(Outcome.ACCEPTED, 6_800, flagged=True),)},
    )
    assert judged(flagged).sound
    more = tuple(accepted(one, 6_500 + n) for n in range(4))
    assert not judged(replace(flagged, provider=(*evidence.provider, *more))).sound


def test_more_unknown_than_were_in_flight_are_found() -> None:
    evidence = sound()
    for number in range(6, 9):
        evidence = said(evidence, owed(number), Outcome.UNKNOWN, Entry.HELD, 10_000)
    found = judged(evidence)
    assert found.promotional.unknown == found.promotional.unknown_left == 3
    assert found.promotional.lost == 0
    assert found.sound, "as many as the bound allows"
    evidence = said(evidence, owed(13), Outcome.UNKNOWN, Entry.HELD, 18_000)
    found = judged(evidence)
    assert [cost.unknown for cost in found.promotional.by_fault] == [3, 1]
    assert found.balanced
    assert not found.sound


def test_an_unknown_that_was_settled_was_unknown_all_the_same() -> None:
    evidence = sound()
    one = owed(6)
    words = (told(Outcome.UNKNOWN, 9_000), told(Outcome.ACCEPTED, 9_500))
    found = judged(replace(evidence, outcomes={**evidence.outcomes, one.place: words}))
    assert (found.promotional.unknown, found.promotional.unknown_left) == (1, 0)
    assert found.sound


@pytest.mark.parametrize(
    ("name", "value"),
    [("books", "unknown"), ("ledger", Entry.CLAIM), ("ledger", Entry.CLOSED)],
)
def test_records_that_contradict_each_other_do_not_balance(name: str, value: object) -> None:
    evidence = sound()
    records = {**getattr(evidence, name), owed(4).place: value}
    found = judged(replace(evidence, **{name: records}))
    assert not found.balanced
    assert not found.sound
    assert str(owed(4).place) in found.disagreements[0]


def test_outcomes_that_miss_somebody_do_not_balance() -> None:
    evidence = sound()
    outcomes = dropped(dict(evidence.outcomes), [owed(4).place])
    assert not judged(replace(evidence, outcomes=outcomes)).balanced


def test_who_did_not_want_it_and_got_it_does_not_balance() -> None:
    evidence = sound()
    stranger = owed(99, wanted=False)
    sent = replace(evidence, provider=(*evidence.provider, accepted(stranger, 100)))
    assert not judged(sent).balanced


def test_a_message_to_nobody_or_to_another_address_does_not_balance() -> None:
    evidence = sound()
    nobody = Acceptance("nobody", "nobody@example.com", 1)
    assert not judged(replace(evidence, provider=(*evidence.provider, nobody))).balanced
    wrong = replace(evidence.provider[0], address="other@example.com")
    assert not judged(replace(evidence, provider=(wrong, *evidence.provider[1:]))).balanced


def test_books_that_do_not_add_up_by_themselves_do_not_balance() -> None:
    found = judged(replace(sound(), book_errors=("a-run: 3 are missing",)))
    assert found.disagreements == ("a-run: 3 are missing",)
    assert not found.sound


def test_more_claims_than_slots_are_found() -> None:
    left = {CALM: InFlight(slots=1, claims=2)}
    found = check(sound(), (replace(FAULTS[0], left_behind=left), FAULTS[1]))
    assert not found.sound
    assert "2 claims in 1 request slots" in found.disagreements[0]


def test_the_longest_standstill_after_each_fault() -> None:
    times = [4_000, 4_900, 9_000, 9_500, 12_100, 18_000]
    assert standstills(times, FAULTS) == [4_000, 5_900]
    assert standstills([], FAULTS) == [6_000, 7_000]
    found = check(sound(), FAULTS)
    assert [cost.standstill_ms for cost in found.promotional.by_fault] == [1_000, 1_000]
