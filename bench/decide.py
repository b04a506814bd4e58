"""What a decision costs in Python, the engine's own work left out: ``python -m bench.decide``.

Prints recipients a second of processor time over pages of 500, and microseconds a recipient, for
people without a state, with three reservations each (shared by their page, of 360 kinds, or
different in everybody), with consent words, with and without caps; and the folding of outcomes.
Each is the best of three runs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from schemas import codec
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant
from schemas.pages import PAGE_SIZE, bitmap_bytes, full_bitmap
from schemas.reasons import Channel, Lane, Outcome, Reason
from schemas.records import (
    CampaignSpec,
    CapRule,
    ConsentStatus,
    LegSpec,
    OutcomeGroup,
    Outcomes,
    PageOrder,
    QuietHours,
    Route,
    WhenCapped,
    WhenZoneUnknown,
    WindowKind,
)
from schemas.snapshot import HAS_EMAIL
from schemas.state import ConsentEntry, RecipientState, Reservation
from transforms.decide import decide_page, fold_page_outcomes

NOW = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
PAGES = 100
SIZES = (50, 125, 250)
"""Recipients of a page, beside full ones: what a page costs, however many it has."""
CAPS = (
    CapRule(
        "daily",
        4,
        WindowKind.CALENDAR_DAY,
        timedelta(),
        Channel.EMAIL,
        None,
        WhenCapped.DEFER,
    ),
    CapRule(
        "fortnight", 10, WindowKind.ROLLING, timedelta(days=14), None, "promo", WhenCapped.DROP
    ),
)
SPEC = CampaignSpec(
    tenant=Tenant("acme"),
    run=RunId("spring-2026-03-10"),
    campaign="spring",
    snapshot=SnapshotId("0" * 32),
    category="promo",
    topic="offers",
    lane=Lane.PROMOTIONAL,
    legs=(
        LegSpec(
            LegId("email"),
            Channel.EMAIL,
            (Route("smtp", "main"),),
            "news@acme.example",
            "Acme",
            None,
            "Hello",
            "<p>Hello</p>",
            "Hello",
        ),
    ),
    start_at=None,
    deadline=NOW + timedelta(days=2),
    quiet_hours=QuietHours(21 * 60, 8 * 60),
    when_zone_unknown=WhenZoneUnknown.ASSUME,
    fallback_zone="Europe/Berlin",
    caps=CAPS,
    holdout_percent=0.0,
    rate_per_second=None,
    valid_for=timedelta(minutes=10),
    defaults={},
)


@dataclass(frozen=True, slots=True)
class Page:
    """A page of people in one zone with three sets of consents."""

    recipient_ids: list[str]
    zones: list[str]
    consent_sets: tuple[frozenset[str], ...]
    consent_index: list[int]
    flags: bytes


def _page(number: int, size: int = PAGE_SIZE) -> Page:
    ids = [f"person-{number:05d}-{i:03d}" for i in range(size)]
    sets = (
        frozenset({"email:offers"}),
        frozenset({"email:*", "sms:offers"}),
        frozenset({"sms:*"}),
    )
    index = [2 if i % 20 == 0 else i % 2 for i in range(size)]
    return Page(ids, ["Europe/Berlin"] * size, sets, index, bytes([HAS_EMAIL]) * size)


def _reservations(apart: timedelta) -> tuple[Reservation, ...]:
    return tuple(
        Reservation(
            RunId(f"winter-2026-03-0{day}"),
            LegId("email"),
            0,
            NOW - timedelta(days=day) + apart,
            "email",
            "promo",
            True,
        )
        for day in (9, 6, 3)
    )


def _states(page: Page, kind: str, number: int) -> dict[str, bytes]:
    if kind == "none":
        return {}
    states = {}
    for i, recipient in enumerate(page.recipient_ids):
        apart = timedelta()
        words: tuple[ConsentEntry, ...] = ()
        if kind != "shared":
            apart = timedelta(milliseconds=number * PAGE_SIZE + i)
        if kind == "ticks":
            apart = timedelta(seconds=10 * (i * 7919 % 360))
        if kind == "words":
            words = (ConsentEntry("email", "offers", ConsentStatus.GRANTED, NOW - apart),)
        reservations = () if kind == "words" else _reservations(apart)
        states[recipient] = codec.encode(RecipientState(SPEC.tenant, words, reservations))
    return states


def _order(page: int, size: int = PAGE_SIZE) -> PageOrder:
    return PageOrder(
        SPEC.tenant,
        SPEC.run,
        LegId("email"),
        ObjectId("0" * 64),
        SPEC.snapshot,
        0,
        page,
        0,
        bitmap_bytes(full_bitmap(size)),
        NOW,
    )


def _timed(
    name: str, work: Callable[[int], object], people: int = PAGES * PAGE_SIZE
) -> dict[str, float]:
    seconds = math.inf
    for _ in range(3):
        before = time.process_time()
        for page in range(PAGES):
            work(page)
        seconds = min(seconds, time.process_time() - before)
    print(
        f"{name:52} {people / seconds:>10,.0f}/s {seconds / people * 1e6:>7.2f} µs",
        file=sys.stderr,
    )
    return {name: people / seconds}


def run() -> dict[str, float]:
    """Measure; {name: recipients a second of processor time}."""
    figures: dict[str, float] = {}
    pages = [_page(number) for number in range(PAGES)]
    orders = [_order(number) for number in range(PAGES)]
    bare = replace(SPEC, caps=())
    held = replace(SPEC, holdout_percent=5.0)
    for kind, label in (
        ("none", "no state"),
        ("shared", "3 reservations, equal within a page"),
        ("ticks", "3 reservations, 360 kinds a page"),
        ("distinct", "3 reservations, all different"),
        ("words", "a consent word, all different"),
    ):
        states = [_states(page, kind, number) for number, page in enumerate(pages)]
        for spec, rules in ((SPEC, "2 caps"), (bare, "no caps"), (held, "2 caps, holdout")):
            figures |= _timed(
                f"decide: {label}, {rules}",
                lambda n, s=spec, st=states: decide_page(  # type: ignore[misc]
                    orders[n], s, pages[n], st[n].get, NOW
                ),
            )
        decided = [decide_page(orders[n], SPEC, pages[n], states[n].get, NOW) for n in range(PAGES)]
        told = [
            Outcomes(
                SPEC.tenant,
                SPEC.run,
                LegId("email"),
                SPEC.snapshot,
                0,
                n,
                NOW + timedelta(seconds=20),
                (
                    OutcomeGroup(
                        Outcome.ACCEPTED,
                        Reason.PROVIDER_ACCEPTED,
                        "smtp",
                        0,
                        tuple(range(PAGE_SIZE)),
                    ),
                ),
            )
            for n in range(PAGES)
        ]
        figures |= _timed(
            f"fold: accepted, {label}",
            lambda n, d=decided, t=told: fold_page_outcomes(  # type: ignore[misc]
                t[n], pages[n], d[n].states.get
            ),
        )
        assert all(len(one.states) > PAGE_SIZE * 0.9 for one in decided)
    for size in SIZES:
        small = [_page(number, size) for number in range(PAGES)]
        asked = [_order(number, size) for number in range(PAGES)]
        figures |= _timed(
            f"decide: no state, 2 caps, pages of {size}",
            lambda n, o=asked, p=small: decide_page(  # type: ignore[misc]
                o[n], SPEC, p[n], lambda recipient: None, NOW
            ),
            PAGES * size,
        )
    return figures


if __name__ == "__main__":
    run()
