"""A limit is a limit: the arithmetic of buckets, yielding rates and circuit breakers."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from schemas.reasons import Lane, RunStatus
from transforms.shaping import (
    COOL_MOST_US,
    COOL_US,
    FACTOR_FLOOR,
    FAILURES,
    JITTER_US,
    PROBES,
    PROBES_GOOD,
    SECOND_US,
    WINDOW_US,
    Account,
    Bucket,
    Circuit,
    Limit,
    Plan,
    RunShape,
    ShapingModel,
    plan,
    report,
)

MINUTE = timedelta(minutes=1)
limits = st.builds(
    Limit,
    st.integers(1, 3000) | st.integers(1, 5),
    st.sampled_from([timedelta(seconds=1), MINUTE]),
)
reserves = st.sampled_from([0.0, 0.1, 0.25, 0.9])
LONG_AGO = 10**15


def most_in_a_window(grants: list[tuple[int, int]], window_us: int) -> int:
    most = inside = first = 0
    for at, n in grants:
        inside += n
        while grants[first][0] <= at - window_us:
            inside -= grants[first][1]
            first += 1
        most = max(most, inside)
    return most


steps = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 999, 1000, 20_000, 50_000, 333_333, 999_999, SECOND_US, 3_000_000]),
        st.integers(1, 500),
        st.sampled_from(list(Lane)),
        st.sampled_from(["keep", "keep", "keep", "put back", "throttled", "ok"]),
    ),
    max_size=120,
)


@given(limit=limits, reserve=reserves, steps=steps, full=st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_window_has_more_than_its_limit(
    limit: Limit, reserve: float, steps: list[tuple[int, int, Lane, str]], full: bool
) -> None:
    """Whatever is asked when, in both lanes, with tokens put back and rates that yield."""
    model, bucket = ShapingModel(), plan(limit, reserve)
    model.publish("r", RunShape(1, RunStatus.RUNNING, None))
    now = LONG_AGO
    if full:
        model.buckets["b"] = Bucket(bucket.burst, now, 0)
    kept: list[tuple[int, int]] = []
    last = None
    for passed, n, lane, then in steps:
        now += passed
        grant = model.take(n, lane, "a", [("b", bucket, True)], "r", now)
        granted = grant.granted
        if then == "put back" and granted:
            assert model.put_back(granted, grant.serials) == 1
            assert model.put_back(granted, grant.serials) == 0
            granted = 0
        elif then == "throttled":
            model.report("a", 0, 0, 0, now)
        elif then == "ok":
            model.report("a", 1, 0, None, now)
        if last and last.granted and granted:
            assert model.put_back(1, last.serials) == 0, "put back after others took"
        last = grant
        kept.append((now, granted))
    window = limit.period // timedelta(microseconds=1) + JITTER_US
    assert most_in_a_window(kept, window) <= limit.amount


@given(
    limit=limits,
    gaps=st.lists(st.integers(0, 60_000), max_size=100),
    delays=st.lists(st.integers(0, JITTER_US), min_size=100, max_size=100),
)
@settings(deadline=None)
def test_provider_counts_no_more_though_requests_are_delayed(
    limit: Limit, gaps: list[int], delays: list[int]
) -> None:
    model, bucket = ShapingModel(), plan(limit)
    now, arrivals = LONG_AGO, []
    for gap, delay in zip(gaps, delays, strict=False):
        now += gap
        grant = model.take(10_000, Lane.CRITICAL, "a", [("b", bucket, True)], None, now)
        arrivals.append((now + delay, grant.granted))
    period = limit.period // timedelta(microseconds=1)
    assert most_in_a_window(sorted(arrivals), period) <= limit.amount


@pytest.mark.parametrize(
    ("limit", "share"),
    [
        (Limit(1), 0.95),
        (Limit(2), 0.95),
        (Limit(10), 0.93),
        (Limit(100), 0.9),
        (Limit(1000), 0.9),
        (Limit(20_000), 0.9),
        (Limit(1, MINUTE), 0.99),
        (Limit(600, MINUTE), 0.98),
        (Limit(100_000, MINUTE), 0.98),
        (Limit(0.1), 0.99),
    ],
)
def test_most_of_a_limit_can_be_used(limit: Limit, share: float) -> None:
    model, bucket, took = ShapingModel(), plan(limit), 0
    period_us = limit.period // timedelta(microseconds=1)
    span = int(20 * period_us * max(1, 1 / limit.amount))
    for now in range(LONG_AGO, LONG_AGO + span, span // 20_000):
        took += model.take(1_000_000, Lane.CRITICAL, "a", [("b", bucket, True)], None, now).granted
    assert share * limit.amount * span / period_us - 1 <= took <= limit.amount * span / period_us


def test_missing_bucket_starts_empty() -> None:
    model = ShapingModel()
    grant = model.take(5, Lane.CRITICAL, "a", [("b", plan(Limit(100)), True)], None, LONG_AGO)
    assert (grant.granted, grant.wait_ms) == (0, 11)
    later = LONG_AGO + 11_000
    assert model.take(5, Lane.CRITICAL, "a", [("b", plan(Limit(100)), True)], None, later).granted


@given(limit=limits, reserve=reserves, n=st.integers(1, 100))
def test_waiting_as_told_is_enough(limit: Limit, reserve: float, n: int) -> None:
    model, bucket = ShapingModel(), [("b", plan(limit, reserve), True)]
    model.publish("r", RunShape(1, RunStatus.RUNNING, None))
    first = model.take(n, Lane.PROMOTIONAL, "a", bucket, "r", LONG_AGO)
    assert first.granted == 0
    later = LONG_AGO + 1000 * first.wait_ms
    assert model.take(n, Lane.PROMOTIONAL, "a", bucket, "r", later).granted >= 1


def test_scarcest_bucket_decides_and_nothing_is_taken_from_the_others() -> None:
    model, many, few = ShapingModel(), plan(Limit(1000)), plan(Limit(20))
    model.buckets = {"many": Bucket(50, LONG_AGO, 0), "few": Bucket(1, LONG_AGO, 0)}
    both = [("many", many, False), ("few", few, False)]
    assert model.take(9, Lane.CRITICAL, "a", both, None, LONG_AGO).granted == 1
    assert model.take(9, Lane.CRITICAL, "a", both, None, LONG_AGO).granted == 0
    assert model.buckets["many"].tokens == 49


def test_reserve_is_for_the_critical_lane() -> None:
    model, bucket = ShapingModel(), plan(Limit(1000), reserve=0.2)
    model.publish("r", RunShape(1, RunStatus.RUNNING, None))
    model.buckets["b"] = Bucket(50, LONG_AGO, 0)
    limits_ = [("b", bucket, True)]
    assert model.take(99, Lane.PROMOTIONAL, "a", limits_, "r", LONG_AGO).granted == 40
    assert model.take(99, Lane.PROMOTIONAL, "a", limits_, "r", LONG_AGO).granted == 0
    assert model.take(99, Lane.CRITICAL, "a", limits_, None, LONG_AGO).granted == 10


@pytest.mark.parametrize("amount", [2, 3, 10, 1000])
def test_reserve_holds_a_token_of_small_limits_too(amount: int) -> None:
    model, bucket = ShapingModel(), [("b", plan(Limit(amount), reserve=0.1), True)]
    model.publish("r", RunShape(1, RunStatus.RUNNING, None))
    now, taken = LONG_AGO, 0
    for _ in range(5000):
        now += 1000
        taken += model.take(64, Lane.PROMOTIONAL, "a", bucket, "r", now).granted
    assert taken >= amount * 5 * 0.3
    assert model.take(1, Lane.CRITICAL, "a", bucket, None, now).granted == 1


@pytest.mark.parametrize("status", [each for each in RunStatus if each is not RunStatus.RUNNING])
def test_only_a_running_run_is_granted(status: RunStatus) -> None:
    model = ShapingModel()
    assert model.take(5, Lane.PROMOTIONAL, "a", [], "r", 1).granted == 0
    model.publish("r", RunShape(2, status, None))
    grant = model.take(5, Lane.PROMOTIONAL, "a", [], "r", 1)
    assert (grant.granted, grant.status) == (0, status)
    assert not model.publish("r", RunShape(1, RunStatus.RUNNING, None))
    assert model.take(5, Lane.PROMOTIONAL, "a", [], "r", 1).granted == 0
    model.publish("r", RunShape(3, RunStatus.RUNNING, None))
    assert model.take(5, Lane.PROMOTIONAL, "a", [], "r", 1).granted == 5


def test_clock_that_goes_back_refills_nothing() -> None:
    model, bucket = ShapingModel(), [("b", plan(Limit(10)), True)]
    model.buckets["b"] = Bucket(0, LONG_AGO, 0)
    assert model.take(1, Lane.CRITICAL, "a", bucket, None, LONG_AGO - SECOND_US).granted == 0
    assert model.take(1, Lane.CRITICAL, "a", bucket, None, LONG_AGO).granted == 0


@pytest.mark.parametrize(
    ("limit", "reserve"), [(Limit(0), 0), (Limit(-1), 0), (Limit(float("nan")), 0), (Limit(5), 1)]
)
def test_limits_that_grant_nothing_are_refused(limit: Limit, reserve: float) -> None:
    with pytest.raises(ValueError, match=r"must be a positive|share from 0"):
        plan(limit, reserve)


# a rate that yields


def test_throttled_blocks_and_lowers_the_rate_for_everybody() -> None:
    model, bucket = ShapingModel(), [("b", plan(Limit(1000)), True)]
    model.buckets["b"] = Bucket(50, LONG_AGO, 0)
    model.report("a", 0, 0, 2 * SECOND_US, LONG_AGO)
    grant = model.take(9, Lane.CRITICAL, "a", bucket, None, LONG_AGO)
    assert (grant.granted, grant.wait_ms) == (0, 2000)
    took = 0
    for at in range(LONG_AGO + 2 * SECOND_US, LONG_AGO + 12 * SECOND_US, 10_000):
        took += model.take(1000, Lane.CRITICAL, "a", bucket, None, at).granted
    assert 0.6 * 9000 < took < 0.71 * 9060


def test_one_burst_of_throttled_answers_is_one_cut() -> None:
    account = Account()
    for _ in range(30):
        account = report(account, 0, 0, 0, LONG_AGO)
    assert account.factor == pytest.approx(0.7)
    for second in range(1, 100):
        account = report(account, 0, 0, 0, LONG_AGO + second * SECOND_US)
    assert account.factor == FACTOR_FLOOR


def test_success_raises_the_rate_until_it_is_whole() -> None:
    account = report(Account(), 0, 0, 0, LONG_AGO)
    for tenth in range(1, 61):
        account = report(account, 5, 0, None, LONG_AGO + tenth * SECOND_US // 10)
    assert account.factor == pytest.approx(1.0)
    assert report(account, 5, 0, None, LONG_AGO + 10 * SECOND_US).factor == 1.0


def test_successes_between_do_not_put_a_cut_off() -> None:
    account, factors = Account(), []
    for tenth in range(200):
        now = LONG_AGO + tenth * SECOND_US // 10
        account = report(account, 5, 0, 0 if tenth % 10 == 2 else None, now)
        factors.append(account.factor)
    assert factors[-1] < 0.1, "a provider that throttles each second is asked less each second"


# circuit breaker


def failing(account: Account, now: int) -> Account:
    return report(account, 0, FAILURES, None, now)


def probe(model: ShapingModel, n: int, now: int) -> tuple[int, Circuit]:
    grant = model.take(n, Lane.CRITICAL, "a", [], None, now)
    return grant.granted, grant.circuit


def test_circuit_opens_probes_and_closes() -> None:
    model = ShapingModel()
    model.accounts["a"] = failing(Account(), LONG_AGO)
    grant = model.take(9, Lane.CRITICAL, "a", [], None, LONG_AGO + 1)
    assert (grant.granted, grant.circuit) == (0, Circuit.OPEN)
    assert grant.open_until_ms == (LONG_AGO + COOL_US) // 1000
    then = LONG_AGO + COOL_US
    assert probe(model, 3, then) == (3, Circuit.HALF_OPEN)
    assert probe(model, 9, then) == (PROBES - 3, Circuit.HALF_OPEN)
    assert probe(model, 9, then) == (0, Circuit.HALF_OPEN)
    model.report("a", PROBES_GOOD - 1, 0, None, then)
    assert probe(model, 9, then) == (0, Circuit.HALF_OPEN)
    model.report("a", 1, 0, None, then)
    assert probe(model, 9, then) == (9, Circuit.CLOSED)


def test_failed_probe_opens_for_twice_as_long() -> None:
    model, now, cool = ShapingModel(), LONG_AGO, COOL_US
    model.accounts["a"] = failing(Account(), now)
    for _ in range(6):
        assert probe(model, 1, now + cool - 1)[1] is Circuit.OPEN
        now += cool
        assert probe(model, 1, now) == (1, Circuit.HALF_OPEN)
        model.report("a", 0, 1, None, now)
        cool = min(COOL_MOST_US, 2 * cool)
    assert cool == COOL_MOST_US


def test_lost_probes_are_given_again() -> None:
    model = ShapingModel()
    model.accounts["a"] = failing(Account(), LONG_AGO)
    then = LONG_AGO + COOL_US
    assert probe(model, 99, then)[0] == PROBES
    assert probe(model, 99, then + COOL_US - 1)[0] == 0
    assert probe(model, 99, then + COOL_US)[0] == PROBES


def test_circuit_stays_closed_for_few_or_old_failures() -> None:
    few = report(Account(), 0, FAILURES - 1, None, LONG_AGO)
    assert few.until_us == 0
    assert report(few, 0, FAILURES - 1, None, LONG_AGO + WINDOW_US).until_us == 0
    assert report(few, 0, 1, None, LONG_AGO + WINDOW_US - 1).until_us > 0
    mostly_good = report(Account(), FAILURES + 1, FAILURES, None, LONG_AGO)
    assert mostly_good.until_us == 0


def test_answers_of_requests_from_before_do_not_close_an_open_circuit() -> None:
    opened = failing(Account(), LONG_AGO)
    assert report(opened, 50, 0, None, LONG_AGO + 1) == opened


def test_scaling_never_raises_a_bucket() -> None:
    from transforms.shaping import scaled

    whole = plan(Limit(100), 0.2)
    for factor in (1.0, 0.7, FACTOR_FLOOR):
        less = scaled(whole, factor)
        assert less.burst <= whole.burst
        assert less.refill_per_us <= whole.refill_per_us
        assert 0 <= less.floor <= less.burst - 1
    assert scaled(whole, 1.0) == replace(whole)
    assert isinstance(less, Plan)
