"""Campaign files: what a right one says, and how every mistake in a wrong one is named."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stack
from schemas import codec
from schemas.errors import InvalidCampaign, InvalidTemplate
from schemas.ids import LegId
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
from tests.decide.people import NOON, campaign, cap, leg
from transforms.campaign_file import (
    Problem,
    WrongCampaign,
    parse_campaign,
    parse_duration,
    validate_spec,
)
from transforms.rendering import TemplateSource, compile_template, render

EXAMPLE = Path(stack.__file__).parent / "example_campaign.yaml"
HOUR = timedelta(hours=1)
SHORTEST = """\
campaign: spring
tenant: acme
snapshot: 0123456789abcdef0123456789abcdef
topic: offers
deadline: +36h
legs:
  - channel: email
    routes: [{provider: smtp, account: main}]
    from: Acme <news@acme.example>
    subject: Hello
    text: Hello {{ first_name }}
"""
FULL = """\
campaign: spring
tenant: acme
run: spring-7
snapshot: 0123456789abcdef0123456789abcdef
category: news
topic: offers
lane: critical
start_at: 2026-03-11T09:00:00+01:00
deadline: 2026-03-12 20:00Z
quiet_hours: "21:30 - 08:00"
when_zone_unknown: assume
fallback_zone: Asia/Kathmandu
valid_for: 5m
rate_per_second: 12.5
holdout_percent: 3
caps:
  - {name: daily, limit: 2, per: day, channel: email, category: promo, when_capped: defer}
  - {limit: 5, per: 36h}
  - {name: weekly, limit: 5, per: week}
  - {name: monthly, limit: 20, per: month, when_capped: drop}
defaults: {first_name: friend, offer: 20, empty: }
legs:
  - channel: email
    routes:
      - {provider: sendgrid, account: main}
      - {provider: smtp, account: second}
    from: {address: news@acme.example, name: "Åcme: \\u4f60"}
    reply_to: service@acme.example
    subject: Hello {{ first_name }}
    html_file: mail/offer.html
    text_file: offer.txt
  - channel: sms
    routes: [{provider: sms, account: main}]
    from: "+4915112345678"
    text: Hello
"""
FILES = {"mail/offer.html": "<p>Hello {{ first_name }}</p>", "offer.txt": "Hello"}


def read_text(name: str) -> str:
    if name == "latin.txt":
        return b"\xe4".decode()
    try:
        return FILES[name]
    except KeyError:
        raise FileNotFoundError(2, "No such file or directory", name) from None


def check_template(leg: LegSpec) -> None:
    compile_template(TemplateSource(leg.subject, leg.html, leg.text))


def parse(text: str, **given: Any) -> CampaignSpec:
    return parse_campaign(
        text,
        now=NOON,
        read_text=read_text,
        check_template=check_template,
        **({"run": "derived-1"} | given),
    )


def problems(text: str, **given: Any) -> list[tuple[int | None, str, str]]:
    with pytest.raises(WrongCampaign) as raised:
        parse(text, **given)
    error = raised.value
    assert isinstance(error, InvalidCampaign)
    for one in error.problems:
        assert str(one) in str(error)
    return [(one.line, one.field, one.message) for one in error.problems]


def test_the_shortest_file() -> None:
    assert parse(SHORTEST) == campaign(
        run="derived-1",
        snapshot="0123456789abcdef0123456789abcdef",
        deadline=NOON + 36 * HOUR,
        legs=(replace(leg(Channel.EMAIL), html=None, text="Hello {{ first_name }}"),),
    )


def test_a_file_with_all_fields() -> None:
    spec = parse(FULL)
    assert spec == CampaignSpec(
        tenant="acme",
        run="spring-7",
        campaign="spring",
        snapshot="0123456789abcdef0123456789abcdef",
        category="news",
        topic="offers",
        lane=Lane.CRITICAL,
        legs=(
            LegSpec(
                leg=LegId("email"),
                channel=Channel.EMAIL,
                routes=(Route("sendgrid", "main"), Route("smtp", "second")),
                sender_address="news@acme.example",
                sender_name="Åcme: 你",
                reply_to="service@acme.example",
                subject="Hello {{ first_name }}",
                html="<p>Hello {{ first_name }}</p>",
                text="Hello",
            ),
            LegSpec(
                leg=LegId("sms"),
                channel=Channel.SMS,
                routes=(Route("sms", "main"),),
                sender_address="+4915112345678",
                sender_name="",
                reply_to=None,
                subject="",
                html=None,
                text="Hello",
            ),
        ),
        start_at=datetime(2026, 3, 11, 8, 0, tzinfo=UTC),
        deadline=datetime(2026, 3, 12, 20, 0, tzinfo=UTC),
        quiet_hours=QuietHours(21 * 60 + 30, 8 * 60),
        when_zone_unknown=WhenZoneUnknown.ASSUME,
        fallback_zone="Asia/Kathmandu",
        caps=(
            CapRule(
                "daily",
                2,
                WindowKind.CALENDAR_DAY,
                timedelta(),
                Channel.EMAIL,
                "promo",
                WhenCapped.DEFER,
            ),
            CapRule("cap-2", 5, WindowKind.ROLLING, 36 * HOUR, None, None, WhenCapped.DROP),
            CapRule(
                "weekly", 5, WindowKind.CALENDAR_WEEK, timedelta(), None, None, WhenCapped.DROP
            ),
            CapRule(
                "monthly", 20, WindowKind.CALENDAR_MONTH, timedelta(), None, None, WhenCapped.DROP
            ),
        ),
        holdout_percent=3.0,
        rate_per_second=12.5,
        valid_for=timedelta(minutes=5),
        defaults={"first_name": "friend", "offer": "20", "empty": ""},
    )
    assert validate_spec(spec, NOON) == []
    assert codec.decode(codec.encode(spec), CampaignSpec) == spec


def test_the_example_is_right_and_renders() -> None:
    spec = parse(EXAMPLE.read_text(), snapshot="0" * 32)
    (only,) = spec.legs
    assert only.html is not None
    assert only.text is not None
    assert 2_500 <= len(only.html) <= 4_000
    template = compile_template(TemplateSource(only.subject, only.html, only.text))
    assert len(template.variables) == 10
    values = {**spec.defaults, "locale": "sv-SE", "recipient_id": "u-1"}
    message = render(
        template, values | {"first_name": "Åsa <b>", "unsubscribe_url": "https://x.example/u/1"}
    )
    assert message.html is not None
    assert message.text is not None
    assert message.html.count("<a href=") == 3
    assert "Åsa &lt;b&gt;" in message.html
    assert "Unsubscribe: https://x.example/u/1" in message.text
    without = render(template, values | {"unsubscribe_url": None})
    assert "nsubscribe" not in f"{without.html}{without.text}"


def test_a_deadline_counts_from_the_start() -> None:
    started = SHORTEST.replace("deadline:", "start_at: 2026-03-11T00:00:00Z\ndeadline:")
    assert parse(started).deadline == datetime(2026, 3, 12, 12, 0, tzinfo=UTC)


def test_what_the_file_says_outranks_what_the_command_gives() -> None:
    spec = parse(FULL, run="other", tenant="other", snapshot="f" * 32)
    assert (spec.run, spec.tenant, spec.snapshot[:4]) == ("spring-7", "acme", "0123")
    bare = SHORTEST.replace("tenant: acme\n", "")
    assert parse(bare, tenant="globex").tenant == "globex"


WRONG: list[tuple[str, str, int, str, str]] = [
    # replaced, by, line, field, part of the message
    ("topic:", "topick:", 4, "topick", "unknown field: did you mean topic?"),
    ("topic:", "qqq:", 4, "qqq", "unknown field: expected campaign, tenant"),
    ("topic: offers", "topic:", 4, "topic", "has no value"),
    ("topic: offers", "topic: [a]", 4, "topic", "expected text, got a list"),
    ("topic: offers", "topic: true", 4, "topic", "expected text, got 'true'"),
    ("topic: offers", "topic: a b", 4, "topic", "letters, digits"),
    ("topic: offers\n", "", 1, "topic", "missing"),
    ("topic: offers", "topic: offers\ntenant: b", 5, "tenant", "given before, in line 2"),
    ("tenant: acme", "tenant: ../acme", 2, "tenant", "letters, digits"),
    ("snapshot: 0", "snapshot: g", 3, "snapshot", "32 hex digits"),
    ("snapshot: 0123456789abcdef0123456789abcdef\n", "", 1, "snapshot", "missing"),
    ("deadline: +36h\n", "", 1, "deadline", "missing: expected a time, or +3h"),
    ("+36h", "2026-03-10T11:59:59Z", 5, "deadline", "is in the past"),
    ("+36h", "2026-03-12T20:00:00", 5, "deadline", "expected a time with its offset"),
    ("+36h", "tomorrow", 5, "deadline", "got 'tomorrow'"),
    ("+36h", "+36x", 5, "deadline", "a duration such as +3h"),
    ("+36h", "+99999999999w", 5, "deadline", "a duration such as +3h"),
    (
        "deadline: +36h",
        "deadline: 2026-03-11T00:00Z\nstart_at: 2026-03-11T00:00Z",
        5,
        "deadline",
        "is not after start_at",
    ),
    ("deadline:", "start_at: +3h\ndeadline:", 5, "start_at", "expected a time with its offset"),
    ("deadline:", "quiet_hours: 21-8\ndeadline:", 5, "quiet_hours", "such as 21:00-08:00"),
    ("deadline:", "quiet_hours: 21:00-25:00\ndeadline:", 5, "quiet_hours", "21:00-08:00, got"),
    ("deadline:", "quiet_hours: 21:60-22:00\ndeadline:", 5, "quiet_hours", "21:00-08:00, got"),
    ("deadline:", "quiet_hours: 00:00-24:00\ndeadline:", 5, "quiet_hours", "begins when it ends"),
    ("deadline:", "quiet_hours: {a: b}\ndeadline:", 5, "quiet_hours", "expected text, got fields"),
    ("deadline:", "lane: promotionel\ndeadline:", 5, "lane", "did you mean promotional?"),
    ("deadline:", "fallback_zone: Mars/X\ndeadline:", 5, "fallback_zone", "no IANA time zone"),
    ("deadline:", "when_zone_unknown: assume\ndeadline:", 1, "fallback_zone", "missing"),
    ("deadline:", "when_zone_unknown: guess\ndeadline:", 5, "when_zone_unknown", "skip or assume"),
    ("deadline:", "valid_for: 11m\ndeadline:", 5, "valid_for", "expected 1s to 10m, got 11m"),
    ("deadline:", "valid_for: 0s\ndeadline:", 5, "valid_for", "expected 1s to 10m, got 0s"),
    ("deadline:", "valid_for: 10\ndeadline:", 5, "valid_for", "expected a duration"),
    (
        "deadline:",
        "rate_per_second: 0\ndeadline:",
        5,
        "rate_per_second",
        "0.001 to 1,000,000",
    ),
    ("deadline:", "rate_per_second: fast\ndeadline:", 5, "rate_per_second", "expected a number"),
    ("deadline:", "rate_per_second: .inf\ndeadline:", 5, "rate_per_second", "expected a number"),
    ("deadline:", "holdout_percent: 101\ndeadline:", 5, "holdout_percent", "expected 0 to 100"),
    ("deadline:", "holdout_percent: -1\ndeadline:", 5, "holdout_percent", "expected 0 to 100"),
    ("deadline:", "defaults: [a]\ndeadline:", 5, "defaults", "expected variables with values"),
    ("deadline:", "defaults: {a b: c}\ndeadline:", 5, "defaults.a b", "name of a template"),
    ("deadline:", "defaults: {a: [c]}\ndeadline:", 5, "defaults.a", "a variable's name and a text"),
    ("deadline:", "defaults: {a: 1, a: 2}\ndeadline:", 5, "defaults.a", "given before"),
    ("deadline:", "caps: {a: b}\ndeadline:", 5, "caps", "expected a list, got fields"),
    ("deadline:", "caps: [day]\ndeadline:", 5, "caps[0]", "expected fields with values"),
    ("deadline:", "caps: [{per: day}]\ndeadline:", 5, "caps[0].limit", "missing"),
    ("deadline:", "caps: [{limit: 2}]\ndeadline:", 5, "caps[0].per", "missing: expected day"),
    ("deadline:", "caps:\n- {limit: 2, per: year}\ndeadline:", 6, "caps[0].per", "got 'year'"),
    ("deadline:", "caps:\n- {limit: 2, per: 32d}\ndeadline:", 6, "caps[0].per", "up to 31d"),
    ("deadline:", "caps:\n- {limit: 2, per: 0s}\ndeadline:", 6, "caps[0].per", "up to 31d"),
    ("deadline:", "caps:\n- {limit: 0, per: day}\ndeadline:", 6, "caps[0].limit", "1 to 10000"),
    ("deadline:", "caps:\n- {limit: 1.5, per: day}\ndeadline:", 6, "caps[0].limit", "whole number"),
    (
        "deadline:",
        "caps:\n- {limit: 1, per: day, chanel: sms}\ndeadline:",
        6,
        "caps[0].chanel",
        "did you mean channel?",
    ),
    (
        "deadline:",
        "caps:\n- {limit: 1, per: day, channel: fax}\ndeadline:",
        6,
        "caps[0].channel",
        "expected email or sms or push",
    ),
    (
        "deadline:",
        "caps:\n- {limit: 1, per: day, when_capped: delay}\ndeadline:",
        6,
        "caps[0].when_capped",
        "expected drop or defer",
    ),
    (
        "deadline:",
        "caps:\n- {name: a, limit: 1, per: day}\n- {name: a, limit: 1, per: day}\ndeadline:",
        7,
        "caps[1].name",
        "another rule's name",
    ),
    ("channel: email", "channel: fax", 7, "legs[0].channel", "expected email or sms or push"),
    ("channel: email\n    routes", "routes", 7, "legs[0].channel", "missing"),
    ("channel: email", "channel: sms\n    html: x", 8, "legs[0].html", "sms has no HTML part"),
    ("    routes: [{provider: smtp, account: main}]\n", "", 7, "legs[0].routes", "missing"),
    ("[{provider: smtp, account: main}]", "[]", 8, "legs[0].routes", "at least one provider"),
    ("[{provider: smtp, account: main}]", "[smtp]", 8, "legs[0].routes[0]", "expected fields"),
    (", account: main", "", 8, "legs[0].routes[0].account", "missing"),
    ("account: main}", "account: a/b}", 8, "legs[0].routes[0].account", "letters, digits"),
    (
        "main}]",
        "main}, {provider: smtp, account: main}]",
        8,
        "legs[0].routes[1]",
        "a route is tried once",
    ),
    ("    from: Acme <news@acme.example>\n", "", 7, "legs[0].from", "missing: expected a sender"),
    ("news@acme.example>", "news@acme>", 9, "legs[0].from", "'news@acme' is no e-mail address"),
    ("Acme <news@acme.example>", "Acme", 9, "legs[0].from", "is no e-mail address"),
    (
        "Acme <news@acme.example>",
        "{address: a b@c.de, name: x}",
        9,
        "legs[0].from.address",
        "is no e-mail address",
    ),
    (
        "Acme <news@acme.example>",
        '{address: a@b.example, name: "x\\r\\nBcc: y"}',
        9,
        "legs[0].from.name",
        "control character",
    ),
    ("subject:", "reply_to: nobody\n    subject:", 10, "legs[0].reply_to", "no e-mail address"),
    ("    subject: Hello\n", "", 7, "legs[0].subject", "missing"),
    ("subject: Hello", 'subject: " "', 10, "legs[0].subject", "needs a subject"),
    ("    text: Hello {{ first_name }}\n", "", 7, "legs[0].text", "expected html, text or both"),
    ("text: Hello {{", "text: Hello {{ {{", 11, "legs[0].text", "text"),
    ("text: Hello {{", "html: '{% for x in %}'\n    text: Hello {{", 11, "legs[0].html", "html"),
    ("text: Hello", "text_file: none.txt #", 11, "legs[0].text_file", "No such file"),
    ("text: Hello", "text_file: latin.txt #", 11, "legs[0].text_file", "it is not UTF-8"),
    ("text: Hello", "text_file: ../offer.txt #", 11, "legs[0].text_file", "below the campaign"),
    ("text: Hello", "text_file: /offer.txt #", 11, "legs[0].text_file", "below the campaign"),
    (
        "text: Hello",
        "text_file: offer.txt\n    text: Hello",
        11,
        "legs[0].text_file",
        "expected one of the two",
    ),
    ("legs:\n", "legs: x\n#", 6, "legs", "expected a list"),
    ("campaign: spring", "campaign: {{", 1, "", "no YAML"),
]


@pytest.mark.parametrize(("old", "new", "line", "field", "message"), WRONG)
def test_a_mistake_is_named(old: str, new: str, line: int, field: str, message: str) -> None:
    assert old in SHORTEST
    text = SHORTEST.replace(old, new, 1)
    if field == "legs" and "#" in new:
        text = text[: text.index("#")]
    if field == "":
        (only,) = problems(text)
        assert message in only[2]
        assert only[0] is not None
        return
    found = problems(text)
    matching = [one for one in found if one[:2] == (line, field) and message in one[2]]
    assert matching, found
    if old.endswith(":") and new.split(":")[0] != old[:-1] and "\n" not in new:
        found = [one for one in found if one[2] != "missing"]
    assert len(found) == 1, found


def test_all_mistakes_are_named_at_once_by_line() -> None:
    text = (
        SHORTEST.replace("topic: offers", "topik: offers")
        .replace("+36h", "soon")
        .replace("news@acme.example", "nobody")
        .replace("{{ first_name }}", "{{ first_name")
        .replace("deadline", "valid_for: 2h\ncaps: [{limit: none, per: hour}]\ndeadline")
    )
    found = problems(text)
    assert [(line, field) for line, field, _ in found] == [
        (1, "topic"),
        (4, "topik"),
        (5, "valid_for"),
        (6, "caps[0].limit"),
        (6, "caps[0].per"),
        (7, "deadline"),
        (11, "legs[0].from"),
        (13, "legs[0].text"),
    ]
    with pytest.raises(WrongCampaign, match=r"offers\.yaml has 8 mistakes:"):
        parse(text, name="offers.yaml")


@pytest.mark.parametrize(
    "text",
    ["", "# nothing", "just words", "- a", "a: b: c", "\t- x", "a: &a [*a]", "%", "a: *b", "\0"],
)
def test_what_is_no_campaign_at_all(text: str) -> None:
    assert problems(text)


def test_two_documents_are_refused() -> None:
    assert "no YAML" in problems(SHORTEST + "---\n" + SHORTEST)[0][2]


def test_a_huge_file_is_refused_unread() -> None:
    assert "at most" in problems("#" * 2_000_000)[0][2]


@given(st.text(max_size=200) | st.text(alphabet="ab:-[]{}\n &*!|>'\"#%,", max_size=80))
def test_no_text_breaks_the_reader(text: str) -> None:
    with pytest.raises(WrongCampaign):
        parse(text)


@given(st.data())
def test_no_value_in_any_field_breaks_the_reader(data: st.DataObject) -> None:
    lines = FULL.splitlines()
    position = data.draw(st.integers(0, len(lines) - 1))
    name, colon, _ = lines[position].partition(":")
    value = data.draw(st.sampled_from(["", " []", " {}", " null", " 1e400", " 0x", " -1", " '☃'"]))
    lines[position] = f"{name}{colon}{value}"
    try:
        spec = parse("\n".join(lines))
    except WrongCampaign as error:
        assert error.problems
    else:
        assert validate_spec(spec, NOON) == []


def test_a_template_is_judged_by_the_caller() -> None:
    def refuse(leg: LegSpec) -> None:
        raise InvalidTemplate(f"line 3 of html: {leg.leg} is refused")

    with pytest.raises(WrongCampaign) as raised:
        parse_campaign(
            FULL, now=NOON, read_text=read_text, check_template=refuse, run="r", name="f"
        )
    assert [(one.field, one.message) for one in raised.value.problems] == [
        ("legs[0].html_file", "line 3 of html: email is refused"),
        ("legs[1].text", "line 3 of html: sms is refused"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("10m", timedelta(minutes=10)),
        ("36h", timedelta(hours=36)),
        ("2d", timedelta(days=2)),
        ("1w", timedelta(weeks=1)),
        ("1h30m", timedelta(minutes=90)),
        ("", None),
        ("10", None),
        ("m", None),
        ("-1h", None),
        ("1.5h", None),
        ("30m1h", None),
        ("9" * 30 + "w", None),
    ],
)
def test_durations(text: str, expected: timedelta | None) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tenant": "a/b"}, "tenant"),
        ({"run": ""}, "run"),
        ({"campaign": "x" * 101}, "campaign"),
        ({"category": "a\nb"}, "category"),
        ({"snapshot": "../../etc"}, "snapshot"),
        ({"deadline": NOON}, "deadline"),
        ({"start_at": NOON + 400 * HOUR}, "deadline"),
        ({"quiet_hours": QuietHours(-1, 60)}, "quiet_hours"),
        ({"quiet_hours": QuietHours(0, 1440)}, "quiet_hours"),
        ({"quiet_hours": QuietHours(60, 60)}, "quiet_hours"),
        ({"fallback_zone": "Nowhere"}, "fallback_zone"),
        ({"when_zone_unknown": WhenZoneUnknown.ASSUME}, "fallback_zone"),
        ({"valid_for": timedelta()}, "valid_for"),
        ({"valid_for": HOUR}, "valid_for"),
        ({"holdout_percent": float("nan")}, "holdout_percent"),
        ({"rate_per_second": float("inf")}, "rate_per_second"),
        ({"rate_per_second": -1.0}, "rate_per_second"),
        ({"caps": (cap(0, HOUR),)}, "caps[0].limit"),
        ({"caps": (cap(1, timedelta()),)}, "caps[0].length"),
        ({"caps": (cap(1, timedelta(days=32)),)}, "caps[0].length"),
        ({"caps": (cap(1, HOUR, category="a b"),)}, "caps[0].category"),
        ({"legs": ()}, "legs"),
        ({"legs": (leg(Channel.EMAIL),) * 2}, "legs[1].channel"),
        ({"legs": (replace(leg(Channel.EMAIL), leg=LegId("mail")),)}, "legs[0].leg"),
        ({"legs": (replace(leg(Channel.EMAIL), routes=()),)}, "legs[0].routes"),
        ({"legs": (replace(leg(Channel.EMAIL), sender_address="x"),)}, "legs[0].sender_address"),
        ({"legs": (replace(leg(Channel.SMS), html=None, text=None),)}, "legs[0].text"),
        ({"legs": (leg(Channel.SMS),)}, "legs[0].html"),
        ({"defaults": {"a-b": "c"}}, "defaults.a-b"),
    ],
)
def test_a_producers_definition_is_judged_by_the_same_rules(
    changes: dict[str, Any], field: str
) -> None:
    right = campaign(legs=(leg(Channel.EMAIL),))
    assert validate_spec(right, NOON) == []
    found = validate_spec(replace(right, **changes), NOON)
    assert [one.field for one in found] == [field]
    assert found == [Problem(field, found[0].message)]
    assert str(found[0]) == f"{field}: {found[0].message}"
