"""What is tried of a campaign's templates before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from schemas.ids import LegId, RunId, SnapshotId, Tenant
from schemas.reasons import Channel, Lane
from schemas.records import CampaignSpec, LegSpec, Route, WhenZoneUnknown
from schemas.snapshot import PageBody
from transforms.examine import undeliverable, unrenderable

LEG = LegSpec(
    LegId("email"), Channel.EMAIL, (Route("smtp", "main"),), "a@example.com", "", None,
    "Hello", None, "Hello {{ first_name }}",
)  # fmt: skip
SPEC = CampaignSpec(
    Tenant("acme"), RunId("r"), "c", SnapshotId("0" * 32), "promo", "offers", Lane.PROMOTIONAL,
    (LEG,), None, datetime(2030, 1, 1, tzinfo=UTC), None, WhenZoneUnknown.SKIP, None, (), 0.0,
    None, timedelta(minutes=10), {},
)  # fmt: skip
ENDLESS = "{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}x"


def page(count: int, orders: list[int], addresses: bool = True) -> tuple[list[str], PageBody]:
    nothing = [None] * count
    emails = [f"p{i}@example.com" if addresses else None for i in range(count)]
    columns = (("first_name", ["Zoë"] * count), ("orders", orders))
    return [f"u{i}" for i in range(count)], PageBody(
        0,
        emails,
        nothing,
        nothing,
        nothing,
        columns,  # type: ignore[arg-type]
    )


def said(text: str, count: int, orders: list[int], addresses: bool = True) -> list[str]:
    half = count // 2
    first, second = (
        page(half, orders[:half], addresses),
        page(count - half, orders[half:], addresses),
    )
    return list(unrenderable(replace(SPEC, legs=(replace(LEG, text=text),)), [first, second]))


@pytest.mark.parametrize("count", [1, 4, 500])
def test_what_nobody_can_be_sent_is_refused(count: int) -> None:
    (problem,) = said(ENDLESS, count, [1] * count)
    assert "legs[0]" in problem
    assert "does more than 50000 steps" in problem
    (problem,) = said("{{ 1 // orders }}", count, [0] * count)
    assert "text line 1" in problem


def test_what_fails_for_some_is_not() -> None:
    assert said("{{ 1 // orders }}", 10, [0, 1] * 5) == []
    assert said("Hello {{ first_name }}", 10, [0] * 10) == []


def test_nobody_to_try_it_on_is_no_problem() -> None:
    assert said(ENDLESS, 10, [1] * 10, addresses=False) == []
    assert said(ENDLESS, 0, []) == []


def test_what_nothing_can_send_is_refused() -> None:
    assert list(undeliverable(SPEC)) == []
    typo = replace(LEG, routes=(Route("smtp", "main"), Route("smpt", "main")))
    (problem,) = undeliverable(replace(SPEC, legs=(typo,)))
    assert problem.startswith("legs[0].routes[1]: there is no account 'smpt'")
    (problem,) = undeliverable(replace(SPEC, legs=(LEG, replace(LEG, channel=Channel.SMS))))
    assert problem.startswith("legs[1].channel: sms has no provider yet; expected email")


def test_a_launch_looks_for_somebody_with_an_address_in_some_pages_alone() -> None:
    read = 0

    def pages() -> Iterator[tuple[list[str], PageBody]]:
        nonlocal read
        while True:
            read += 1
            yield page(2, [1, 1], addresses=False)

    assert list(unrenderable(replace(SPEC, legs=(replace(LEG, text=ENDLESS),)), pages())) == []
    assert read == 200
