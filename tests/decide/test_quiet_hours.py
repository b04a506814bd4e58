"""Local time against the wall clock that zoneinfo shows, minute by minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.records import QuietHours, WindowKind
from transforms.quiet_hours import (
    calendar_window,
    is_quiet,
    quiet_begins,
    quiet_ends,
    zone_named,
)

MINUTE = timedelta(minutes=1)
NIGHT = QuietHours(21 * 60, 8 * 60)
ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/St_Johns",  # half an hour off, until 2011 changing at one minute past midnight
    "Australia/Lord_Howe",  # changes by half an hour
    "Asia/Kathmandu",  # 45 minutes off
    "Pacific/Chatham",  # 45 minutes off and changing
    "Africa/Cairo",  # changes at midnight
    "Asia/Beirut",  # changes at midnight
    "America/Havana",  # goes back from one to midnight
    "Pacific/Apia",  # left out 30 December 2011
    "Pacific/Kiritimati",
    "Etc/GMT+12",
]
CHANGES = [
    datetime(2026, 3, 29, 1, tzinfo=UTC),  # Berlin, Beirut the day before
    datetime(2026, 10, 25, 1, tzinfo=UTC),
    datetime(2026, 3, 8, 7, tzinfo=UTC),  # New York
    datetime(2026, 11, 1, 6, tzinfo=UTC),
    datetime(2026, 4, 4, 15, tzinfo=UTC),  # Lord Howe, Chatham
    datetime(2026, 10, 3, 15, tzinfo=UTC),
    datetime(2026, 4, 23, 22, tzinfo=UTC),  # Cairo
    datetime(2026, 10, 29, 21, tzinfo=UTC),
    datetime(2026, 3, 8, 5, tzinfo=UTC),  # Havana
    datetime(2010, 11, 7, 2, 31, tzinfo=UTC),  # St John's: 00:01 goes back to 23:01
    datetime(2011, 12, 30, 10, tzinfo=UTC),  # Apia
]
zones = st.sampled_from([ZoneInfo(name) for name in ZONES])
moments = st.builds(
    lambda change, off: change + off * MINUTE,
    st.sampled_from(CHANGES),
    st.integers(-2 * 24 * 60, 2 * 24 * 60),
)
hours = st.builds(QuietHours, st.integers(0, 1439), st.integers(0, 1439))


def wall_minute(zone: ZoneInfo, at: datetime) -> int:
    local = at.astimezone(zone)
    return local.hour * 60 + local.minute


def shows_quiet(quiet: QuietHours, minute: int) -> bool:
    minutes = set()
    one = quiet.start_minute
    while one != quiet.end_minute:
        minutes.add(one)
        one = (one + 1) % 1440
    return minute in minutes


@given(zones, moments, hours)
@settings(max_examples=400, deadline=None)
def test_quiet_is_what_the_wall_clock_shows(
    zone: ZoneInfo, at: datetime, quiet: QuietHours
) -> None:
    assert is_quiet(quiet, zone, at) == shows_quiet(quiet, wall_minute(zone, at))


@given(zones, moments, hours)
@settings(max_examples=300, deadline=None)
def test_edges_are_the_first_minutes_of_another_kind(
    zone: ZoneInfo, at: datetime, quiet: QuietHours
) -> None:
    ends, begins = quiet_ends(quiet, zone, at), quiet_begins(quiet, zone, at)
    assert not is_quiet(quiet, zone, ends)
    if quiet.start_minute == quiet.end_minute:
        assert ends == at
        assert begins is None
        return
    assert begins is not None
    assert is_quiet(quiet, zone, begins)
    assert min(ends, begins) == at
    for edge, quiet_before in ((ends, True), (begins, False)):
        assert edge - at <= timedelta(hours=49)
        if edge > at:
            assert is_quiet(quiet, zone, edge - timedelta(milliseconds=1)) is quiet_before
        moment = at
        while moment < edge:
            assert is_quiet(quiet, zone, moment) is quiet_before
            moment += 7 * MINUTE


@pytest.mark.parametrize(
    ("zone", "now", "end"),
    [
        # 02:00 to 03:00 does not exist: hours that end at 02:30 end with the jump
        ("Europe/Berlin", "2026-03-29T00:30+00:00", "2026-03-29T01:00+00:00"),
        # an ordinary night
        ("Europe/Berlin", "2026-03-30T00:10+00:00", "2026-03-30T00:30+00:00"),
        # 02:00 to 03:00 comes twice: the first 02:30 ends it
        ("Europe/Berlin", "2026-10-25T00:10+00:00", "2026-10-25T00:30+00:00"),
        # the second 02:10 is quiet again, until the second 02:30
        ("Europe/Berlin", "2026-10-25T01:10+00:00", "2026-10-25T01:30+00:00"),
        ("Asia/Kathmandu", "2026-03-29T20:00+00:00", "2026-03-29T20:45+00:00"),
        ("Australia/Lord_Howe", "2026-10-03T15:10+00:00", "2026-10-03T15:30+00:00"),
    ],
)
def test_the_end_of_quiet_hours_on_days_that_change(zone: str, now: str, end: str) -> None:
    quiet = QuietHours(23 * 60, 2 * 60 + 30)
    assert quiet_ends(quiet, ZoneInfo(zone), datetime.fromisoformat(now)) == datetime.fromisoformat(
        end
    )


def test_a_night_of_a_changing_clock_is_an_hour_shorter_or_longer() -> None:
    zone = ZoneInfo("Europe/Berlin")
    for day, length in ((28, 10), (27, 11)):
        evening = datetime(2026, 3, day, 20, 0, tzinfo=UTC)
        assert quiet_ends(NIGHT, zone, evening) - evening == timedelta(hours=length)
    evening = datetime(2026, 10, 24, 19, 0, tzinfo=UTC)
    assert quiet_ends(NIGHT, zone, evening) - evening == timedelta(hours=12)


@given(zones, moments, st.sampled_from(list(WindowKind)[1:]))
@settings(max_examples=400, deadline=None)
def test_calendar_windows_follow_each_other_and_hold_their_moment(
    zone: ZoneInfo, at: datetime, kind: WindowKind
) -> None:
    begin, end = calendar_window(kind, zone, at)
    assert begin <= at < end
    assert calendar_window(kind, zone, begin) == (begin, end)
    assert calendar_window(kind, zone, end - timedelta(milliseconds=1)) == (begin, end)
    assert calendar_window(kind, zone, end)[0] == end
    assert end - begin <= timedelta(days=31, hours=1)
    first = begin.astimezone(zone)
    if kind is WindowKind.CALENDAR_WEEK and zone.key != "Pacific/Apia":
        assert first.weekday() == 0
    if kind is WindowKind.CALENDAR_MONTH:
        assert first.day == 1
    before = (begin - timedelta(milliseconds=1)).astimezone(zone)
    assert before.date() < first.date()


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", "2026-03-29T12:00+02:00", 23),
        ("Europe/Berlin", "2026-10-25T12:00+01:00", 25),
        ("Europe/Berlin", "2026-06-01T12:00+02:00", 24),
        ("Australia/Lord_Howe", "2026-10-04T12:00+11:00", 23.5),
        ("Africa/Cairo", "2026-04-24T12:00+03:00", 23),  # begins at 01:00: midnight is left out
        ("America/Havana", "2026-11-01T12:00-05:00", 25),  # midnight comes twice: the first begins
    ],
)
def test_the_length_of_days(zone: str, day: str, hours: float) -> None:
    begin, end = calendar_window(
        WindowKind.CALENDAR_DAY, ZoneInfo(zone), datetime.fromisoformat(day)
    )
    assert end - begin == timedelta(hours=hours)


def test_a_day_that_comes_back_over_midnight_is_counted_once() -> None:
    zone = ZoneInfo("America/St_Johns")
    midnight = datetime(2010, 11, 7, 2, 30, tzinfo=UTC)
    for minutes in (0, 30, 61, 600):
        begin, _ = calendar_window(
            WindowKind.CALENDAR_DAY, zone, midnight + timedelta(minutes=minutes)
        )
        assert begin == midnight


def test_a_rolling_window_has_no_calendar() -> None:
    with pytest.raises(ValueError, match="count back"):
        calendar_window(WindowKind.ROLLING, ZoneInfo("UTC"), datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("name", ["", "Mars/Olympus", "../../etc/passwd", "Europe", "a\0b"])
def test_what_is_no_zone_is_unknown(name: str) -> None:
    assert zone_named(name) is None
