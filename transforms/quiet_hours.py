"""Local time: quiet hours and calendar windows in a person's zone, right on every day of the year.

A zone's wall clock is a chain of segments of constant offset. Everything here is answered segment
by segment, so that days of 23 or 25 hours, wall times that don't exist and wall times that come
twice need no special case:

- It is quiet when the wall clock shows a quiet minute. A wall time that comes twice is judged both
  times.
- Quiet hours end at the first moment whose wall time is not quiet. An end that the clock jumps over
  is the moment of the jump.
- A local day begins when the wall clock first reaches its midnight, or jumps over it.

Functions named ``_ms`` take and give milliseconds since 1970, UTC; they serve the decision's hot
loop. The others take aware datetimes.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from schemas.codec import from_millis, to_millis
from schemas.records import QuietHours, WindowKind

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
MINUTE_MS = 60_000
_EPOCH = date(1970, 1, 1)
_FURTHEST_OFFSET_MS = 26 * HOUR_MS
"""More than any zone is from UTC, also on the day that it crosses the date line."""

Segment = tuple[int, int, int]
"""From, to (exclusive), offset: all in milliseconds."""


@lru_cache(maxsize=4_096)
def zone_named(name: str) -> ZoneInfo | None:
    """The zone of an IANA name; None for the empty name and for what is no zone."""
    if not name:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def _offset_ms(zone: ZoneInfo, at_ms: int) -> int:
    offset = from_millis(at_ms).astimezone(zone).utcoffset()
    return 0 if offset is None else offset // timedelta(milliseconds=1)


@lru_cache(maxsize=16_384)
def _day_segments(zone: ZoneInfo, day: int) -> tuple[Segment, ...]:
    """The segments of one UTC day. Found by the hour: no zone changes twice within one."""
    segments: list[Segment] = []
    begin = day * DAY_MS
    since = begin
    offset = _offset_ms(zone, begin)
    for hour_end in range(begin + HOUR_MS, begin + DAY_MS + 1, HOUR_MS):
        after = _offset_ms(zone, hour_end)
        if after == offset:
            continue
        low, high = hour_end - HOUR_MS, hour_end
        while high - low > 1:
            middle = (low + high) // 2
            if _offset_ms(zone, middle) == offset:
                low = middle
            else:
                high = middle
        segments.append((since, high, offset))
        since, offset = high, after
    if since < begin + DAY_MS:
        segments.append((since, begin + DAY_MS, offset))
    return tuple(segments)


def local_ms(zone: ZoneInfo, at_ms: int) -> int:
    """The wall clock at a moment, as milliseconds from 1970-01-01 00:00 of the wall clock."""
    for begin, end, offset in _day_segments(zone, at_ms // DAY_MS):
        if begin <= at_ms < end:
            return at_ms + offset
    raise AssertionError("segments cover their day")


def is_quiet_ms(hours: QuietHours, zone: ZoneInfo, at_ms: int) -> bool:
    """Whether a moment is in the quiet hours of a zone."""
    return _in_quiet(hours, local_ms(zone, at_ms) % DAY_MS)


def _in_quiet(hours: QuietHours, of_day_ms: int) -> bool:
    start, end = hours.start_minute * MINUTE_MS, hours.end_minute * MINUTE_MS
    if start <= end:
        return start <= of_day_ms < end
    return of_day_ms >= start or of_day_ms < end


def _next_change_ms(hours: QuietHours, zone: ZoneInfo, after_ms: int, becomes_quiet: bool) -> int:
    """The first moment at or after ``after_ms`` that is (or is not) quiet."""
    edge = (hours.start_minute if becomes_quiet else hours.end_minute) * MINUTE_MS
    day = after_ms // DAY_MS
    while True:
        for begin, end, offset in _day_segments(zone, day):
            if end <= after_ms:
                continue
            moment = max(begin, after_ms)
            of_day = (moment + offset) % DAY_MS
            if _in_quiet(hours, of_day) is becomes_quiet:
                return moment
            moment += (edge - of_day) % DAY_MS
            if moment < end:
                return moment
        day += 1


def quiet_ends_ms(hours: QuietHours, zone: ZoneInfo, at_ms: int) -> int:
    """When it is no longer quiet: ``at_ms`` itself if it is not quiet then."""
    if hours.start_minute == hours.end_minute:
        return at_ms
    return _next_change_ms(hours, zone, at_ms, becomes_quiet=False)


def quiet_begins_ms(hours: QuietHours, zone: ZoneInfo, at_ms: int) -> int | None:
    """When it is quiet next: ``at_ms`` itself if it is quiet then, None if it never is."""
    if hours.start_minute == hours.end_minute:
        return None
    return _next_change_ms(hours, zone, at_ms, becomes_quiet=True)


def _day_begins_ms(zone: ZoneInfo, day: int) -> int:
    """When a local day (counted from 1970-01-01) begins."""
    midnight = day * DAY_MS
    first = midnight - _FURTHEST_OFFSET_MS
    utc_day = first // DAY_MS
    while True:
        for begin, end, offset in _day_segments(zone, utc_day):
            if end <= first:
                continue
            moment = max(begin, first, midnight - offset)
            if moment < end:
                return moment
        utc_day += 1


def window_ms(kind: WindowKind, zone: ZoneInfo, at_ms: int) -> tuple[int, int]:
    """The calendar window that holds a moment: its begin and its end (exclusive).

    Days, weeks from Monday and months of the wall clock. Windows follow each other without gap or
    overlap, also where a wall clock goes back over midnight.

    Raises:
        ValueError: a rolling window has no calendar.
    """
    day = local_ms(zone, at_ms) // DAY_MS
    if _day_begins_ms(zone, day + 1) <= at_ms:
        day += 1
    today = _EPOCH + timedelta(days=day)
    match kind:
        case WindowKind.CALENDAR_DAY:
            first, last = day, day + 1
        case WindowKind.CALENDAR_WEEK:
            first = day - today.weekday()
            last = first + 7
        case WindowKind.CALENDAR_MONTH:
            first = day - today.day + 1
            following = (today.replace(day=28) + timedelta(days=4)).replace(day=1)
            last = (following - _EPOCH).days
        case WindowKind.ROLLING:
            raise ValueError("a rolling window follows no calendar: count back its length")
    return _day_begins_ms(zone, first), _day_begins_ms(zone, last)


def is_quiet(hours: QuietHours, zone: ZoneInfo, now: datetime) -> bool:
    """Whether a moment is in the quiet hours of a zone."""
    return is_quiet_ms(hours, zone, to_millis(now))


def quiet_ends(hours: QuietHours, zone: ZoneInfo, now: datetime) -> datetime:
    """When it is no longer quiet: ``now`` itself, to the millisecond, if it is not quiet."""
    return from_millis(quiet_ends_ms(hours, zone, to_millis(now)))


def quiet_begins(hours: QuietHours, zone: ZoneInfo, now: datetime) -> datetime | None:
    """When it is quiet next; None if it never is."""
    begins_ms = quiet_begins_ms(hours, zone, to_millis(now))
    return None if begins_ms is None else from_millis(begins_ms)


def calendar_window(kind: WindowKind, zone: ZoneInfo, now: datetime) -> tuple[datetime, datetime]:
    """The calendar window that holds ``now``: its begin and its end (exclusive), UTC."""
    begin_ms, end_ms = window_ms(kind, zone, to_millis(now))
    return from_millis(begin_ms), from_millis(end_ms)


UTC_ZONE = ZoneInfo("UTC")
