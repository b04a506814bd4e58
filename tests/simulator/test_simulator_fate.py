"""Fates are pure, and follow the proportions."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InvalidInput
from stack.simulator import EventKind, SimulatorConfig, fate, updated


def _config(**webhooks: object) -> SimulatorConfig:
    return updated(SimulatorConfig(), {"webhooks": webhooks})


@given(st.integers(), st.text(min_size=1, max_size=40))
def test_a_fate_is_the_same_for_ever_and_makes_sense(seed: int, send_id: str) -> None:
    config = _config(proportions={"delivered": 0.5, "bounce": 0.3, "dropped": 0.1})
    one = fate(seed, send_id, config)
    assert fate(seed, send_id, config) == one
    kinds = [event.kind for event in one.events]
    assert len(set(kinds)) == len(kinds)
    assert sum(kind in kinds for kind in (EventKind.DELIVERED, EventKind.BOUNCE)) <= 1
    engaged = {EventKind.OPEN, EventKind.CLICK, EventKind.SPAM_REPORT, EventKind.UNSUBSCRIBE}
    assert one.delivered or not engaged & set(kinds)
    assert EventKind.CLICK not in kinds or EventKind.OPEN in kinds
    times = [event.after for event in one.events]
    assert times == sorted(times)
    low, high = timedelta(milliseconds=200), timedelta(milliseconds=2000)
    steps = [later - sooner for sooner, later in pairwise(times)]
    assert all(low <= step <= high for step in steps)


def test_known_fates_never_change() -> None:
    config = SimulatorConfig()
    bounced = [n for n in range(200) if fate(1, f"send-{n}", config).bounced]
    assert bounced == [10, 17, 140, 165]


def test_proportions_hold() -> None:
    config = SimulatorConfig()
    counts: Counter[EventKind] = Counter()
    blocked = 0
    total = 20_000
    for n in range(total):
        one = fate(3, f"id-{n}", config)
        counts.update(event.kind for event in one.events)
        blocked += one.bounced and one.blocked
    assert counts[EventKind.DELIVERED] / total == pytest.approx(0.97, abs=0.005)
    assert counts[EventKind.BOUNCE] / total == pytest.approx(0.02, abs=0.004)
    assert counts[EventKind.DROPPED] / total == pytest.approx(0.01, abs=0.003)
    delivered = counts[EventKind.DELIVERED]
    assert counts[EventKind.OPEN] / delivered == pytest.approx(0.3, abs=0.015)
    assert counts[EventKind.CLICK] / delivered == pytest.approx(0.05, abs=0.006)
    assert counts[EventKind.UNSUBSCRIBE] / delivered == pytest.approx(0.002, abs=0.001)
    assert blocked / counts[EventKind.BOUNCE] == pytest.approx(0.2, abs=0.06)


def test_rules_decide_the_fate_of_their_addresses() -> None:
    rules = [{"pattern": "^gone", "action": "unsubscribe"}, {"pattern": "@", "action": "bounce"}]
    config = updated(_config(proportions={"delivered": 0.0}), {"sendgrid": {"rules": rules}})
    assert fate(0, "a", config, "gone@example.com").has(EventKind.UNSUBSCRIBE)
    assert fate(0, "a", config, "here@example.com").bounced


def test_disorder_and_duplicates_touch_when_events_are_sent_not_when_they_happen() -> None:
    plain = fate(0, "a", SimulatorConfig())
    mixed = fate(0, "a", _config(disorder_rate=1.0, duplicate_rate=1.0))
    assert [e.after for e in mixed.events] == [e.after for e in plain.events]
    assert [e.sent_after for e in mixed.events] == [e.after for e in reversed(plain.events)]
    assert all(e.repeated_after is not None for e in mixed.events)
    assert all(e.repeated_after is None for e in plain.events)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sed": 1}, "sed"),
        ({"seed": "1"}, "seed"),
        ({"seed": True}, "seed"),
        ({"sendgrid": {"faults": {"ambiguous": 0.1}}}, "sendgrid.faults.ambiguous"),
        ({"sendgrid": {"faults": {"ambiguous_rate": 1.1}}}, "sendgrid.faults.ambiguous_rate"),
        ({"sendgrid": {"faults": {"ambiguous_rate": 0.6, "slow_rate": 0.6}}}, "sendgrid.faults"),
        ({"sendgrid": {"faults": {"error_rates": {"200": 1}}}}, "sendgrid.faults.error_rates"),
        ({"smtp": {"rules": [{"pattern": "("}]}}, "smtp.rules.0.pattern"),
        ({"smtp": {"latency": {"kind": "poisson"}}}, "smtp.latency.kind"),
        ({"smtp": 3}, "smtp"),
        ({"webhooks": {"url": "nowhere"}}, "webhooks.url"),
        ({"webhooks": {"proportions": {"bounce": 0.5}}}, "webhooks.proportions"),
        ([], ""),
    ],
)
def test_a_wrong_setting_is_named(changes: object, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        updated(SimulatorConfig(), changes)
    assert str(refused.value).startswith(f"{field}: ")


def test_a_change_keeps_what_it_does_not_name() -> None:
    config = updated(SimulatorConfig(), {"sendgrid": {"faults": {"error_rates": {"500": 0.5}}}})
    config = updated(config, {"sendgrid": {"faults": {"slow_rate": 0.1}}})
    assert config.sendgrid.faults.error_rates == {"500": 0.5}
    config = updated(config, {"sendgrid": {"faults": {"error_rates": {}}}})
    assert config.sendgrid.faults.error_rates == {}
    assert config.sendgrid.faults.slow_rate == 0.1
