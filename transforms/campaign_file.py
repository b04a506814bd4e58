"""Campaign files: YAML in, ``CampaignSpec`` out, every mistake named with line, field and remedy.

All mistakes of a file are reported at once. ``validate_spec`` holds the rules that do not depend on
a file; a launch command that a producer wrote is judged by the same.

A file, with all fields (``stack/example_campaign.yaml`` is one that works)::

    campaign: spring-offers         tenant: acme         run: spring-offers-1   (optional)
    snapshot: <32 hex digits>       category: promo      topic: offers
    lane: promotional               start_at: 2026-03-10T09:00:00+01:00         (optional)
    deadline: +36h                  # a time, or after start_at (after launch without one)
    quiet_hours: 21:00-08:00        # in each person's own zone
    when_zone_unknown: skip         # or assume, with fallback_zone: Europe/Berlin
    valid_for: 10m                  rate_per_second: 500 holdout_percent: 5
    caps:
      - {name: daily, limit: 2, per: day, channel: email, category: promo, when_capped: defer}
    defaults: {first_name: friend}
    legs:
      - channel: email
        routes: [{provider: smtp, account: main}]
        from: Acme <news@acme.example>
        reply_to: service@acme.example
        subject: Hello {{ first_name }}
        html_file: offer.html       # or html: …
        text: …                     # or text_file
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import PurePath
from typing import TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from schemas.errors import InvalidCampaign, InvalidInput, InvalidTemplate
from schemas.ids import LegId, RunId, SnapshotId, Tenant
from schemas.profile import MAX_EMAIL_BYTES, MAX_EMAIL_LOCAL_BYTES
from schemas.reasons import Channel, Lane
from schemas.records import (
    CampaignSpec,
    CapRule,
    LegSpec,
    QuietHours,
    Route,
    WhenCapped,
    WhenZoneUnknown,
    WindowKind,
)
from transforms.caps import LONGEST_WINDOW
from transforms.coordinate import HIGHEST_RATE, LOWEST_RATE, sound_rate
from transforms.decide import MAX_VALID_FOR
from transforms.quiet_hours import zone_named

T = TypeVar("T")
E = TypeVar("E", bound=Enum)

SHORTEST_VALID_FOR = timedelta(seconds=1)
DEFAULT_CATEGORY = "promo"
MAX_FILE_CHARS = 1_048_576
MAX_LIMIT = 10_000
_PER = {
    "day": WindowKind.CALENDAR_DAY,
    "week": WindowKind.CALENDAR_WEEK,
    "month": WindowKind.CALENDAR_MONTH,
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAME_WANTED = (
    "expected up to 100 letters, digits, dots, hyphens and underscores, beginning with a letter "
    "or digit"
)
_SNAPSHOT = re.compile(r"[0-9a-f]{32}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_DURATION = re.compile(r"(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_QUIET = re.compile(r"(\d{1,2}):(\d\d)\s*-\s*(\d{1,2}):(\d\d)")
_ATOM = r'[^\s\x00-\x20\x7f@"(),:;<>\[\]\\]'
_LABEL = r'[^\s\x00-\x20\x7f@"(),:;<>\[\]\\.]'
_ADDRESS = re.compile(rf"{_ATOM}+@{_LABEL}+(\.{_LABEL}+)+")
_MAILBOX = re.compile(r"([^<>]*)<([^<>]*)>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FAR = datetime(9999, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake of a campaign: where it is, and what was expected."""

    field: str
    """Path, such as ``caps[0].limit``; empty for the file as a whole."""
    message: str
    line: int | None = None
    """Counted from 1; None where there is no file."""

    def __str__(self) -> str:
        place = [f"line {self.line}"] if self.line is not None else []
        if self.field:
            place.append(self.field)
        return f"{', '.join(place)}: {self.message}" if place else self.message


class WrongCampaign(InvalidCampaign):
    """A campaign file with mistakes: ``problems`` has them all, by line."""

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        super().__init__("\n  ".join([f"{name} has {count}:", *map(str, self.problems)]))


def read_moment(text: str, after: datetime | None) -> datetime:
    """A time with its offset or, with ``after``, a duration from then, as ``+3h``.

    Raises:
        InvalidInput: it is neither.
    """
    try:
        if after is not None and text.startswith("+"):
            length = parse_duration(text[1:])
            if length is not None:
                return (after + length).astimezone(UTC)
        else:
            found = datetime.fromisoformat(text)
            if found.tzinfo is not None:
                return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    other = ", or a duration such as +3h" if after is not None else ""
    raise InvalidInput(
        f"expected a time with its offset, such as 2026-03-10T09:00:00+01:00{other}, got "
        f"{text[:80]!r}"
    )


def parse_duration(text: str) -> timedelta | None:
    """``90s``, ``10m``, ``36h``, ``2d``, ``1w`` or several (``1h30m``); None for what is none."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        return None
    weeks, days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    try:
        return timedelta(weeks=weeks, days=days, hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError:
        return None


def is_address(text: str) -> bool:
    """Whether a text is a bare e-mail address, by the rule that profiles are judged by."""
    return (
        _ADDRESS.fullmatch(text) is not None
        and len(text.encode()) <= MAX_EMAIL_BYTES
        and len(text.rpartition("@")[0].encode()) <= MAX_EMAIL_LOCAL_BYTES
    )


def _plain(duration: timedelta) -> str:
    seconds = duration.total_seconds()
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


# What must hold of every campaign, whoever wrote it.


def validate_spec(spec: CampaignSpec, now: datetime | None = None) -> list[Problem]:
    """The mistakes of a definition; empty if it can be launched.

    Fields are named as in ``schemas.records``. With ``now``, a deadline that has passed is one.
    Templates are not compiled here, and routes not compared with the deployment's accounts.
    """
    return [Problem(field, message) for field, message in _mistakes(spec, now)]


def _mistakes(spec: CampaignSpec, now: datetime | None) -> Iterable[tuple[str, str]]:
    for field in ("tenant", "run", "campaign", "category", "topic"):
        value = str(getattr(spec, field))
        if not _NAME.fullmatch(value):
            yield field, f"{_NAME_WANTED}, got {value[:120]!r}"
    if not _SNAPSHOT.fullmatch(spec.snapshot):
        yield (
            "snapshot",
            (
                f"expected the 32 hex digits that `fanfare audience build` printed, got "
                f"{spec.snapshot[:80]!r}"
            ),
        )
    if now is not None and spec.deadline <= now:
        yield (
            "deadline",
            (f"{spec.deadline.isoformat()} is in the past: expected a time to come, or +3h"),
        )
    elif spec.start_at is not None and spec.deadline <= spec.start_at:
        yield (
            "deadline",
            (f"{spec.deadline.isoformat()} is not after start_at, {spec.start_at.isoformat()}"),
        )
    if spec.quiet_hours is not None:
        yield from _quiet_mistakes(spec.quiet_hours)
    if spec.fallback_zone is not None and zone_named(spec.fallback_zone) is None:
        yield (
            "fallback_zone",
            (f"{spec.fallback_zone[:80]!r} is no IANA time zone, such as Europe/Berlin"),
        )
    if spec.when_zone_unknown is WhenZoneUnknown.ASSUME and spec.fallback_zone is None:
        yield "fallback_zone", "missing: when_zone_unknown is assume, so a zone to assume is needed"
    if not SHORTEST_VALID_FOR <= spec.valid_for <= MAX_VALID_FOR:
        yield (
            "valid_for",
            (
                f"expected {_plain(SHORTEST_VALID_FOR)} to {_plain(MAX_VALID_FOR)}, got "
                f"{_plain(spec.valid_for)}: older decisions would miss changed consents and hours"
            ),
        )
    if not 0 <= spec.holdout_percent <= 100:
        yield "holdout_percent", f"expected 0 to 100, got {spec.holdout_percent:g}"
    rate = spec.rate_per_second
    if rate is not None and not sound_rate(rate):
        yield (
            "rate_per_second",
            f"expected {LOWEST_RATE:g} to {HIGHEST_RATE:,.0f} messages a second, got {rate:g}",
        )
    yield from _cap_mistakes(spec.caps)
    yield from _leg_mistakes(spec.legs)
    for name in spec.defaults:
        if not _VARIABLE.fullmatch(name):
            yield f"defaults.{name[:80]}", "expected the name of a template variable"


def _quiet_mistakes(hours: QuietHours) -> Iterable[tuple[str, str]]:
    if not (0 <= hours.start_minute < 1440 and 0 <= hours.end_minute < 1440):
        yield (
            "quiet_hours",
            (
                f"expected minutes of a day, 0 to 1439, got {hours.start_minute} to "
                f"{hours.end_minute}"
            ),
        )
    elif hours.start_minute == hours.end_minute:
        yield "quiet_hours", "begins when it ends: expected two times, such as 21:00-08:00"


def _cap_mistakes(caps: tuple[CapRule, ...]) -> Iterable[tuple[str, str]]:
    names: set[str] = set()
    for position, rule in enumerate(caps):
        at = f"caps[{position}]"
        if not _NAME.fullmatch(rule.name):
            yield f"{at}.name", f"{_NAME_WANTED}, got {rule.name[:120]!r}"
        elif rule.name in names:
            yield f"{at}.name", f"{rule.name!r} is another rule's name"
        names.add(rule.name)
        if not 1 <= rule.limit <= MAX_LIMIT:
            yield f"{at}.limit", f"expected 1 to {MAX_LIMIT} messages, got {rule.limit}"
        if rule.window is WindowKind.ROLLING and not timedelta() < rule.length <= LONGEST_WINDOW:
            yield (
                f"{at}.length",
                (
                    f"expected a rolling window of up to {_plain(LONGEST_WINDOW)}, got "
                    f"{_plain(rule.length)}"
                ),
            )
        if rule.category is not None and not _NAME.fullmatch(rule.category):
            yield f"{at}.category", f"{_NAME_WANTED}, got {rule.category[:120]!r}"


def _leg_mistakes(legs: tuple[LegSpec, ...]) -> Iterable[tuple[str, str]]:
    if not legs:
        yield "legs", "expected at least one leg, such as `- channel: email`"
    seen: set[str] = set()
    for position, leg in enumerate(legs):
        at = f"legs[{position}]"
        if leg.leg in seen:
            yield f"{at}.channel", f"each channel once: {leg.leg!r} is another leg's"
        elif leg.leg != leg.channel.value:
            yield f"{at}.leg", f"a leg is named by its channel: expected {leg.channel.value!r}"
        seen.add(leg.leg)
        if not leg.routes:
            yield f"{at}.routes", "expected at least one provider and account"
        for number, route in enumerate(leg.routes):
            for part in ("provider", "account"):
                value = getattr(route, part)
                if not _NAME.fullmatch(value):
                    yield (
                        f"{at}.routes[{number}].{part}",
                        f"{_NAME_WANTED}, got {value[:120]!r}",
                    )
            if route in leg.routes[:number]:
                yield f"{at}.routes[{number}]", "named before: a route is tried once"
        yield from _content_mistakes(at, leg)


def _content_mistakes(at: str, leg: LegSpec) -> Iterable[tuple[str, str]]:
    if _CONTROL.search(leg.sender_name):
        yield f"{at}.sender_name", "has a control character or line break"
    if leg.channel is Channel.EMAIL:
        for field, address in (("sender_address", leg.sender_address), ("reply_to", leg.reply_to)):
            if address is not None and not is_address(address):
                yield f"{at}.{field}", f"{address[:120]!r} is no e-mail address"
        if not leg.subject.strip():
            yield f"{at}.subject", "an e-mail needs a subject"
        if leg.html is None and leg.text is None:
            yield f"{at}.text", "expected html, text or both"
    else:
        if leg.text is None:
            yield f"{at}.text", f"expected a text: {leg.channel.value} has no other part"
        if leg.html is not None:
            yield f"{at}.html", f"{leg.channel.value} has no HTML part"


# Files.


class _Fields:
    """The fields of one mapping. Taking a wrong one notes a problem and gives a harmless value."""

    def __init__(self, reader: _Reader, node: Node, path: str, known: tuple[str, ...]) -> None:
        self._reader = reader
        self._path = path
        self._line: int = node.start_mark.line + 1
        self._values: dict[str, Node] = {}
        self._lines: dict[str, int] = {}
        if not isinstance(node, MappingNode):
            reader.note(path, "expected fields with values, `name: value`", self._line)
            self.broken = True
            return
        self.broken = False
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, ScalarNode) else ""
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1, 0.6)
                hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
                reader.note(self.path(name or "?"), f"unknown field: {hint}", line)
            elif name in self._values:
                first = self._lines[name]
                reader.note(self.path(name), f"given before, in line {first}", line)
            elif value.tag == _NULL:
                reader.note(self.path(name), "has no value: give one or leave the field out", line)
                self._lines[name] = line
            else:
                self._values[name] = value
                self._lines[name] = line

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def line(self, name: str) -> int:
        return self._lines.get(name, self._line)

    def has(self, name: str) -> bool:
        return name in self._values

    def node(self, name: str) -> Node | None:
        return self._values.get(name)

    def wrong(self, name: str, message: str) -> None:
        self._reader.note(self.path(name), message, self.line(name))

    def missing(self, name: str, message: str = "missing") -> None:
        if name not in self._lines and not self.broken:
            self._reader.note(self.path(name), message, self._line)

    def bind(self, name: str, spec_field: str) -> None:
        """Name the place in the file that a field of the spec comes from."""
        self._reader.places[spec_field] = (self.path(name), self.line(name))

    def text(self, name: str, default: str | None = None) -> str:
        node = self._values.get(name)
        if node is None:
            if default is None:
                self.missing(name)
                self._reader.failed.add(self.path(name))
            return default or ""
        if not isinstance(node, ScalarNode) or node.tag in (_NULL, _BOOL):
            self.wrong(name, f"expected text, got {_shown(node)}")
            return default or ""
        return str(node.value)

    def number(self, name: str, default: float | None, whole: bool = False) -> float | None:
        node = self._values.get(name)
        if node is None:
            return default
        wanted = "a whole number" if whole else "a number"
        if isinstance(node, ScalarNode) and node.tag in (_INT, _FLOAT):
            try:
                value = float(node.value.replace("_", ""))
            except ValueError:
                value = math.nan
            if math.isfinite(value) and (not whole or value == int(value)):
                return value
        self.wrong(name, f"expected {wanted}, got {_shown(node)}")
        return default

    def choice(self, name: str, kind: type[E], default: E | None) -> E | None:
        if name not in self._values:
            return default
        value = self.text(name, "")
        for one in kind:
            if one.value == value:
                return one
        wanted = " or ".join(str(one.value) for one in kind)
        near = difflib.get_close_matches(value, [str(one.value) for one in kind], 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        if not self._reader.noted(self.path(name)):
            self.wrong(name, f"expected {wanted}, got {value[:80]!r}{hint}")
        return default

    def duration(self, name: str, default: timedelta) -> timedelta:
        if name not in self._values:
            return default
        value = self.text(name, "")
        found = parse_duration(value)
        if found is None:
            if not self._reader.noted(self.path(name)):
                self.wrong(name, f"expected a duration such as 10m or 36h, got {value[:80]!r}")
            return default
        return found

    def items(self, name: str) -> list[Node]:
        node = self._values.get(name)
        if node is None:
            return []
        if not isinstance(node, SequenceNode):
            self.wrong(name, f"expected a list, got {_shown(node)}")
            return []
        return list(node.value)


_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"


def _shown(node: Node) -> str:
    if isinstance(node, MappingNode):
        return "fields"
    if isinstance(node, SequenceNode):
        return "a list"
    return repr(str(node.value)[:80])


@dataclass(frozen=True, slots=True)
class _Given:
    """What the caller of ``parse_campaign`` gives beside the file."""

    now: datetime
    read_text: Callable[[str], str]
    check_template: Callable[[LegSpec], object]
    run: str | None
    tenant: str | None
    snapshot: str | None


class _Reader:
    def __init__(self, given: _Given) -> None:
        self.given = given
        self.problems: list[Problem] = []
        self.failed: set[str] = set()
        self.places: dict[str, tuple[str, int]] = {}

    def note(self, path: str, message: str, line: int) -> None:
        self.problems.append(Problem(path, message, line))
        self.failed.add(path)

    def noted(self, path: str) -> bool:
        return path in self.failed

    def campaign(self, root: Node) -> CampaignSpec:
        given = self.given
        top = _Fields(self, root, "", _TOP)
        for name in (*_TOP, "legs"):
            top.bind(name, name)
        start_at = self._moment(top, "start_at", None)
        legs = tuple(self._leg(node, position) for position, node in enumerate(top.items("legs")))
        if not top.has("legs"):
            top.missing("legs", "missing: expected at least one leg, such as `- channel: email`")
            self.failed.add("legs")
        zone_unknown = top.choice("when_zone_unknown", WhenZoneUnknown, None)
        has_fallback = top.has("fallback_zone")
        if zone_unknown is None:
            zone_unknown = WhenZoneUnknown.ASSUME if has_fallback else WhenZoneUnknown.SKIP
        return CampaignSpec(
            tenant=Tenant(top.text("tenant", given.tenant)),
            run=RunId(top.text("run", given.run)),
            campaign=top.text("campaign"),
            snapshot=SnapshotId(top.text("snapshot", given.snapshot)),
            category=top.text("category", DEFAULT_CATEGORY),
            topic=top.text("topic"),
            lane=top.choice("lane", Lane, Lane.PROMOTIONAL) or Lane.PROMOTIONAL,
            legs=legs,
            start_at=start_at,
            deadline=self._moment(top, "deadline", start_at or given.now) or _FAR,
            quiet_hours=self._quiet_hours(top),
            when_zone_unknown=zone_unknown,
            fallback_zone=top.text("fallback_zone", "") if has_fallback else None,
            caps=tuple(
                self._cap(node, position) for position, node in enumerate(top.items("caps"))
            ),
            holdout_percent=top.number("holdout_percent", 0.0) or 0.0,
            rate_per_second=top.number("rate_per_second", None),
            valid_for=top.duration("valid_for", MAX_VALID_FOR),
            defaults=self._defaults(top),
        )

    def _moment(self, top: _Fields, name: str, after: datetime | None) -> datetime | None:
        if not top.has(name):
            if name == "deadline":
                top.missing(name, "missing: expected a time, or +3h")
                self.failed.add(name)
            return None
        text = top.text(name, "").strip()
        if self.noted(name):
            return None
        try:
            return read_moment(text, after)
        except InvalidInput as error:
            top.wrong(name, str(error))
            return None

    def _quiet_hours(self, top: _Fields) -> QuietHours | None:
        if not top.has("quiet_hours"):
            return None
        text = top.text("quiet_hours", "").strip()
        if self.noted("quiet_hours"):
            return None
        found = _QUIET.fullmatch(text)
        if found is not None:
            hours = [int(part) for part in found.groups()]
            start, end = hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
            if hours[1] < 60 and hours[3] < 60 and start < 1440 and end <= 1440:
                return QuietHours(start, end % 1440)
        top.wrong("quiet_hours", f"expected two times, such as 21:00-08:00, got {text[:80]!r}")
        return None

    def _defaults(self, top: _Fields) -> Mapping[str, str]:
        node = top.node("defaults")
        if node is None:
            return {}
        if not isinstance(node, MappingNode):
            top.wrong("defaults", f"expected variables with values, got {_shown(node)}")
            return {}
        found: dict[str, str] = {}
        for key, value in node.value:
            path, line = f"defaults.{key.value}", key.start_mark.line + 1
            if not isinstance(key, ScalarNode) or not isinstance(value, ScalarNode):
                self.note(path, "expected a variable's name and a text", line)
            elif key.value in found:
                self.note(path, "given before", line)
            else:
                found[key.value] = "" if value.tag == _NULL else str(value.value)
                self.places[path] = (path, line)
        return found

    def _cap(self, node: Node, position: int) -> CapRule:
        at = f"caps[{position}]"
        one = _Fields(self, node, at, _CAP)
        for name, field in (("name", "name"), ("limit", "limit"), ("category", "category")):
            one.bind(name, f"{at}.{field}")
        one.bind("per", f"{at}.length")
        if not one.has("limit"):
            one.missing("limit", "missing: how many messages a person may get")
        limit = one.number("limit", 1, whole=True)
        window, length = WindowKind.CALENDAR_DAY, timedelta()
        if not one.has("per"):
            one.missing("per", "missing: expected day, week, month, or a duration such as 36h")
        else:
            per = one.text("per", "").strip()
            rolling = parse_duration(per)
            if per in _PER:
                window = _PER[per]
            elif rolling is not None:
                window, length = WindowKind.ROLLING, rolling
            elif not self.noted(f"{at}.per"):
                one.wrong(
                    "per",
                    "expected day, week, month, or a duration such as 36h, got " + repr(per[:80]),
                )
        return CapRule(
            name=one.text("name", f"cap-{position + 1}"),
            limit=int(limit or 0),
            window=window,
            length=length,
            channel=one.choice("channel", Channel, None),
            category=one.text("category") if one.has("category") else None,
            when_capped=one.choice("when_capped", WhenCapped, WhenCapped.DROP) or WhenCapped.DROP,
        )

    def _leg(self, node: Node, position: int) -> LegSpec:
        at = f"legs[{position}]"
        one = _Fields(self, node, at, _LEG)
        for field in ("channel", "routes", "reply_to", "subject", "html", "text"):
            one.bind(field, f"{at}.{field}")
        for field in ("html", "text"):
            if one.has(f"{field}_file"):
                one.bind(f"{field}_file", f"{at}.{field}")
        if not one.has("channel"):
            one.missing("channel", "missing: expected email, sms or push")
        channel = one.choice("channel", Channel, Channel.EMAIL) or Channel.EMAIL
        routes = tuple(
            self._route(item, f"{at}.routes[{number}]", one)
            for number, item in enumerate(one.items("routes"))
        )
        if not one.has("routes"):
            one.missing("routes", "missing: expected providers and accounts, in order of trial")
            self.failed.add(f"{at}.routes")
        address, name = self._sender(one, at, channel)
        leg = LegSpec(
            leg=LegId(channel.value),
            channel=channel,
            routes=routes,
            sender_address=address,
            sender_name=name,
            reply_to=one.text("reply_to") if one.has("reply_to") else None,
            subject=one.text("subject", None if channel is Channel.EMAIL else ""),
            html=self._part(one, at, "html"),
            text=self._part(one, at, "text"),
        )
        self._check_template(one, at, leg)
        return leg

    def _check_template(self, one: _Fields, at: str, leg: LegSpec) -> None:
        broken = [f"{at}.{name}" for name in ("subject", "html", "text", "html_file", "text_file")]
        if self.failed.intersection(broken) or (leg.html is None and leg.text is None):
            return
        try:
            self.given.check_template(leg)
        except InvalidTemplate as error:
            message = str(error)
            parts = {"subject": leg.subject, "html": leg.html, "text": leg.text}
            given = [name for name, source in parts.items() if source]
            part = next((name for name in given if name in message), given[-1])
            place, line = self.places.get(f"{at}.{part}", (f"{at}.{part}", one.line("channel")))
            self.note(place, message, line)

    def _route(self, node: Node, path: str, leg: _Fields) -> Route:
        one = _Fields(self, node, path, _ROUTE)
        self.places[path] = (path, node.start_mark.line + 1)
        for name in _ROUTE:
            one.bind(name, f"{path}.{name}")
        if one.broken:
            self.failed.update(f"{path}.{name}" for name in _ROUTE)
            return Route("", "")
        return Route(one.text("provider"), one.text("account"))

    def _sender(self, leg: _Fields, at: str, channel: Channel) -> tuple[str, str]:
        node = leg.node("from")
        leg.bind("from", f"{at}.sender_address")
        leg.bind("from", f"{at}.sender_name")
        if node is None:
            leg.missing("from", "missing: expected a sender, such as Acme <news@acme.example>")
            self.failed.add(f"{at}.from")
            return "", ""
        if isinstance(node, MappingNode):
            one = _Fields(self, node, f"{at}.from", _FROM)
            one.bind("address", f"{at}.sender_address")
            one.bind("name", f"{at}.sender_name")
            return one.text("address"), one.text("name", "")
        text = leg.text("from", "")
        if channel is not Channel.EMAIL:
            return text, ""
        found = _MAILBOX.fullmatch(text.strip())
        return (found[2], found[1].strip().strip('"')) if found is not None else (text, "")

    def _part(self, leg: _Fields, at: str, part: str) -> str | None:
        by_file = f"{part}_file"
        if leg.has(part):
            if leg.has(by_file):
                leg.wrong(by_file, f"given beside {part}: expected one of the two")
            return leg.text(part)
        if not leg.has(by_file):
            return None
        name = leg.text(by_file, "")
        if self.noted(f"{at}.{by_file}"):
            return None
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            leg.wrong(by_file, f"{name!r}: expected a path below the campaign file's folder")
            return None
        try:
            return self.given.read_text(name)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            leg.wrong(by_file, f"{name!r} can't be read: {why}")
            return None


_TOP = (
    "campaign",
    "tenant",
    "run",
    "snapshot",
    "category",
    "topic",
    "lane",
    "start_at",
    "deadline",
    "quiet_hours",
    "when_zone_unknown",
    "fallback_zone",
    "valid_for",
    "rate_per_second",
    "holdout_percent",
    "caps",
    "defaults",
    "legs",
)
_CAP = ("name", "limit", "per", "channel", "category", "when_capped")
_LEG = (
    "channel",
    "routes",
    "from",
    "reply_to",
    "subject",
    "html",
    "html_file",
    "text",
    "text_file",
)
_ROUTE = ("provider", "account")
_FROM = ("address", "name")


def _compose(text: str, name: str) -> Node:
    if len(text) > MAX_FILE_CHARS:
        raise WrongCampaign(
            name, [Problem("", f"{len(text)} characters; expected at most {MAX_FILE_CHARS}")]
        )
    try:
        root: Node | None = YAML().compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        raise WrongCampaign(
            name, [Problem("", f"no YAML: {error.problem or error.context}", line)]
        ) from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise WrongCampaign(name, [Problem("", f"no YAML: {error}")]) from error
    if root is None:
        raise WrongCampaign(name, [Problem("", "is empty: expected a campaign's fields", 1)])
    return root


def parse_campaign(
    text: str,
    *,
    now: datetime,
    read_text: Callable[[str], str],
    check_template: Callable[[LegSpec], object],
    run: str | None = None,
    tenant: str | None = None,
    snapshot: str | None = None,
    name: str = "the campaign file",
) -> CampaignSpec:
    """The campaign of a YAML file.

    Args:
        text: the file.
        now: the moment of launch; relative deadlines without a start count from it.
        read_text: reads a template file, its path relative to the campaign file; raises
            ``OSError`` or ``UnicodeDecodeError``.
        check_template: raises ``InvalidTemplate`` for a leg whose template can't be used.
        run, tenant, snapshot: taken where the file names none.
        name: how messages call the file.

    Raises:
        WrongCampaign: with all mistakes, by line.
    """
    root = _compose(text, name)
    reader = _Reader(_Given(now, read_text, check_template, run, tenant, snapshot))
    spec = reader.campaign(root)
    problems = list(reader.problems)
    for problem in validate_spec(spec, now):
        place, line = reader.places.get(problem.field, (problem.field, root.start_mark.line + 1))
        if place not in reader.failed:
            problems.append(Problem(place, problem.message, line))
    if problems:
        raise WrongCampaign(name, sorted(problems, key=lambda one: one.line or 0))
    return spec
