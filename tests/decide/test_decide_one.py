"""One person's decision: the order of refusals, each reason, and how long an admission holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.errors import InvalidCampaign
from schemas.ids import LegId, RecipientId
from schemas.reasons import DEFER_REASONS, SKIP_REASONS, Channel, Reason
from schemas.records import ConsentStatus, QuietHours, WhenCapped, WhenZoneUnknown, WindowKind
from schemas.snapshot import HAS_EMAIL, HAS_PHONE, HAS_PUSH_TOKEN
from schemas.state import ConsentEntry, RecipientState, Reservation
from tests.decide.people import EMAIL, NOON, SMS, TENANT, campaign, cap, leg, person
from transforms.decide import Admit, Decision, Defer, Skip, decide_one

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
NIGHT = QuietHours(21 * 60, 8 * 60)
ERASED = ConsentEntry("*", "*", ConsentStatus.ERASED, NOON)
WITHDRAWN = ConsentEntry("email", "*", ConsentStatus.WITHDRAWN, NOON)
SUPPRESSED = ConsentEntry("email", "*", ConsentStatus.SUPPRESSED, NOON)
FULL = Reservation(campaign(run="other").run, EMAIL, 0, NOON, "email", "promo", False)


def state(*consents: ConsentEntry, full: bool = False) -> RecipientState:
    return RecipientState(TENANT, consents, (FULL,) if full else ())


def decision(
    known: RecipientState | None = None,
    now: datetime = NOON,
    spec: dict[str, Any] | None = None,
    **facts: Any,
) -> Decision:
    return decide_one(known, person(**facts), campaign(**(spec or {})), EMAIL, 0, now)[0]


ALL_WRONG: dict[str, Any] = {
    "deadline": NOON,
    "holdout_percent": 100.0,
    "start_at": NOON + HOUR,
    "quiet_hours": QuietHours(0, 23 * 60),
    "caps": (cap(1, HOUR, when_capped=WhenCapped.DROP),),
}


@pytest.mark.parametrize(
    ("consents", "mended", "expected"),
    [
        ((ERASED, SUPPRESSED), {}, Skip(Reason.ERASED)),
        ((SUPPRESSED,), {}, Skip(Reason.SUPPRESSED)),
        ((WITHDRAWN,), {}, Skip(Reason.CONSENT_WITHDRAWN)),
        ((), {}, Skip(Reason.DEADLINE, expired=True)),
        ((), {"deadline": NOON + 30 * HOUR}, Skip(Reason.HOLDOUT)),
        ((), {"holdout_percent": 0.0}, Defer(NOON + HOUR, Reason.SCHEDULE)),
        (
            (),
            {"start_at": None},
            Defer(datetime(2026, 3, 10, 22, 0, tzinfo=UTC), Reason.QUIET_HOURS),
        ),
        ((), {"quiet_hours": None}, Skip(Reason.FREQUENCY_CAP)),
        ((), {"caps": ()}, Skip(Reason.NO_ADDRESS)),
    ],
)
def test_the_first_refusal_decides(
    consents: tuple[ConsentEntry, ...], mended: dict[str, Any], expected: Decision
) -> None:
    """Everything is wrong; what comes before the expected refusal is mended, in order."""
    order = ["deadline", "holdout_percent", "start_at", "quiet_hours", "caps"]
    spec = dict(ALL_WRONG)
    for name in order[: order.index(next(iter(mended))) + 1] if mended else []:
        spec[name] = {"deadline": NOON + 30 * HOUR, "holdout_percent": 0.0, "caps": ()}.get(name)
    assert decision(state(*consents, full=True), NOON, spec, flags=0) == expected


def test_nobody_without_consent_is_told_of_by_another_reason() -> None:
    assert decision(None, NOON, ALL_WRONG, consents=frozenset()) == Skip(Reason.NO_CONSENT)


def test_an_admission_reserves() -> None:
    decided, after = decide_one(None, person(), campaign(), EMAIL, 4, NOON)
    assert decided == Admit(NOON + 10 * MINUTE)
    assert after == RecipientState(
        TENANT,
        (),
        (
            Reservation(
                campaign().run, EMAIL, 4, NOON + 10 * MINUTE, "email", "promo", False, False
            ),
        ),
    )


def test_whoever_is_not_admitted_is_not_reserved_for() -> None:
    for spec, facts in (
        ({"deadline": NOON}, {}),
        ({"holdout_percent": 100.0}, {}),
        ({"start_at": NOON + HOUR}, {}),
        ({"quiet_hours": QuietHours(0, 23 * 60)}, {}),
        ({}, {"flags": 0}),
        ({}, {"consents": frozenset()}),
    ):
        decided, after = decide_one(None, person(**facts), campaign(**spec), EMAIL, 0, NOON)
        assert not isinstance(decided, Admit)
        assert after is None


@pytest.mark.parametrize(
    ("at", "flags", "consents", "sent"),
    [
        (EMAIL, HAS_EMAIL, {"email:*"}, True),
        (EMAIL, HAS_PHONE | HAS_PUSH_TOKEN, {"email:*"}, False),
        (SMS, HAS_PHONE, {"sms:*"}, True),
        (SMS, HAS_EMAIL | HAS_PUSH_TOKEN, {"sms:*"}, False),
        (LegId("push"), HAS_PUSH_TOKEN, {"push:*"}, True),
        (LegId("push"), HAS_EMAIL | HAS_PHONE, {"push:*"}, False),
    ],
)
def test_each_channel_needs_its_own_address(
    at: LegId, flags: int, consents: set[str], sent: bool
) -> None:
    spec = campaign(legs=tuple(leg(one) for one in Channel))
    one = person(flags=flags, consents=frozenset(consents))
    decided, _ = decide_one(None, one, spec, at, 0, NOON)
    assert isinstance(decided, Admit) if sent else decided == Skip(Reason.NO_ADDRESS)


@pytest.mark.parametrize(
    ("spec", "until"),
    [
        ({}, NOON + 10 * MINUTE),
        ({"valid_for": 2 * MINUTE}, NOON + 2 * MINUTE),
        ({"valid_for": HOUR}, NOON + 10 * MINUTE),
        ({"deadline": NOON + MINUTE}, NOON + MINUTE),
        ({"quiet_hours": QuietHours(13 * 60 + 4, 14 * 60)}, NOON + 4 * MINUTE),
        ({"quiet_hours": QuietHours(13 * 60 + 40, 14 * 60)}, NOON + 10 * MINUTE),
    ],
)
def test_an_admission_holds_until_its_premises_may_change(
    spec: dict[str, Any], until: datetime
) -> None:
    assert decision(spec=spec) == Admit(until)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-03-10T19:59+00:00", Admit(datetime(2026, 3, 10, 20, 0, tzinfo=UTC))),
        (
            "2026-03-10T20:00+00:00",
            Defer(datetime(2026, 3, 11, 7, 0, tzinfo=UTC), Reason.QUIET_HOURS),
        ),
        (
            "2026-03-11T06:59:59.999+00:00",
            Defer(datetime(2026, 3, 11, 7, 0, tzinfo=UTC), Reason.QUIET_HOURS),
        ),
        ("2026-03-11T07:00+00:00", Admit(datetime(2026, 3, 11, 7, 10, tzinfo=UTC))),
        # the clock goes forward in this night: eight in the morning comes an hour earlier
        (
            "2026-03-28T20:00+00:00",
            Defer(datetime(2026, 3, 29, 6, 0, tzinfo=UTC), Reason.QUIET_HOURS),
        ),
    ],
)
def test_quiet_hours_in_the_persons_own_zone(now: str, expected: Decision) -> None:
    spec = {"quiet_hours": NIGHT, "deadline": NOON + 90 * 24 * HOUR}
    assert decision(None, datetime.fromisoformat(now), spec) == expected


def test_two_zones_two_decisions() -> None:
    spec = {"quiet_hours": NIGHT}
    assert isinstance(decision(spec=spec, zone="Europe/Berlin"), Admit)
    assert isinstance(decision(spec=spec, zone="Asia/Tokyo"), Defer)


@pytest.mark.parametrize(
    ("deadline", "expected"),
    [
        (NOON + 5 * HOUR, Skip(Reason.DEADLINE, expired=True)),
        (datetime(2026, 3, 10, 21, 0, tzinfo=UTC), Skip(Reason.DEADLINE, expired=True)),
        (
            datetime(2026, 3, 10, 21, 0, 1, tzinfo=UTC),
            Defer(datetime(2026, 3, 10, 21, 0, tzinfo=UTC), Reason.QUIET_HOURS),
        ),
    ],
)
def test_quiet_hours_that_outlast_the_deadline_expire_at_once(
    deadline: datetime, expected: Decision
) -> None:
    spec = {"quiet_hours": QuietHours(12 * 60, 22 * 60), "deadline": deadline}
    assert decision(spec=spec) == expected


def test_a_start_at_or_after_the_deadline_expires_at_once() -> None:
    spec = {"start_at": NOON + 2 * HOUR, "deadline": NOON + HOUR}
    assert decision(spec=spec) == Skip(Reason.DEADLINE, expired=True)


def test_a_start_is_the_first_moment_that_sends() -> None:
    start = NOON + HOUR
    spec = {"start_at": start}
    early = start - timedelta(milliseconds=1)
    assert decision(now=early, spec=spec) == Defer(start, Reason.SCHEDULE)
    assert isinstance(decision(now=start, spec=spec), Admit)


@pytest.mark.parametrize("zone", ["", "Mars/Olympus"])
def test_a_person_without_a_zone(zone: str) -> None:
    quiet = {"quiet_hours": NIGHT}
    assert decision(spec=quiet, zone=zone) == Skip(Reason.UNKNOWN_ZONE)
    assert isinstance(decision(spec={}, zone=zone), Admit)
    never = {"quiet_hours": QuietHours(60, 60)}
    assert isinstance(decision(spec=never, zone=zone), Admit)
    for fallback, kind in (("Europe/Berlin", Admit), ("Asia/Tokyo", Defer)):
        spec = quiet | {"when_zone_unknown": WhenZoneUnknown.ASSUME, "fallback_zone": fallback}
        assert isinstance(decision(spec=spec, zone=zone), kind)


def test_calendar_caps_of_a_person_without_a_zone_follow_the_fallback() -> None:
    spec = {
        "caps": (cap(1, WindowKind.CALENDAR_DAY),),
        "when_zone_unknown": WhenZoneUnknown.ASSUME,
        "fallback_zone": "Asia/Tokyo",
    }
    assert decision(state(full=True), spec=spec, zone="") == Defer(
        datetime(2026, 3, 10, 15, 0, tzinfo=UTC), Reason.FREQUENCY_CAP
    )


def held_out(percent: float, **changes: Any) -> set[str]:
    spec = campaign(holdout_percent=percent, **changes)
    names = [f"person-{number}" for number in range(2_000)]
    return {
        name
        for name in names
        if decide_one(None, person(recipient_id=RecipientId(name)), spec, EMAIL, 0, NOON)[0]
        == Skip(Reason.HOLDOUT)
    }


def test_the_holdout_is_the_same_people_of_a_campaign_and_others_of_another() -> None:
    ten = held_out(10.0)
    assert 140 <= len(ten) <= 260  # 200 expected; five standard deviations are 67
    assert held_out(10.0, run="spring-2") == ten
    assert ten < held_out(20.0)
    other = held_out(10.0, campaign="summer")
    assert len(other & ten) < 60  # 20 expected of two independent draws
    assert held_out(0.0) == set()
    assert len(held_out(100.0)) == 2_000


def test_a_leg_that_the_campaign_lacks_is_named() -> None:
    with pytest.raises(InvalidCampaign, match=r"spring-1 of acme has no leg 'fax'.*email, sms"):
        decide_one(None, person(), campaign(), LegId("fax"), 0, NOON)


def test_reasons_are_those_that_a_page_result_may_give() -> None:
    for known, spec, facts in (
        (state(ERASED), {}, {}),
        (state(), ALL_WRONG | {"deadline": NOON + HOUR}, {}),
        (None, {}, {"flags": 0}),
        (None, {"quiet_hours": QuietHours(0, 23 * 60)}, {}),
        (state(full=True), {"caps": ALL_WRONG["caps"]}, {}),
    ):
        decided = decision(known, NOON, spec, **facts)
        if isinstance(decided, Skip):
            assert decided.reason in SKIP_REASONS
        else:
            assert isinstance(decided, Defer)
            assert decided.reason in DEFER_REASONS
