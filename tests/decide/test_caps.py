"""Caps: never exceeded by what arrives, whatever comes in whatever order."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import permutations
from random import Random
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.ids import LegId, RunId
from schemas.reasons import Channel, Outcome, Reason
from schemas.records import CapRule, QuietHours, WhenCapped, WindowKind
from schemas.state import RecipientState
from tests.decide.people import EMAIL, NOON, SMS, campaign, cap, person
from transforms.decide import Admit, Decision, Defer, Skip, decide_one, fold_outcome
from transforms.quiet_hours import calendar_window

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
REFUNDS = [Outcome.FAILED, Outcome.EXPIRED, Outcome.CANCELLED, Outcome.STALE]
COUNTS = [Outcome.ACCEPTED, Outcome.UNKNOWN]


def run(number: int) -> RunId:
    return RunId(f"run-{number}")


def decide(
    state: RecipientState | None,
    number: int,
    rules: tuple[CapRule, ...],
    now: datetime,
    generation: int = 0,
    category: str = "promo",
    at: LegId = EMAIL,
) -> tuple[Decision, RecipientState | None]:
    spec = campaign(
        run=run(number), caps=rules, deadline=now + timedelta(days=90), category=category
    )
    return decide_one(state, person(), spec, at, generation, now)


def admitted(decided: tuple[Decision, RecipientState | None]) -> RecipientState:
    decision, state = decided
    assert isinstance(decision, Admit), decision
    assert state is not None
    return state


# The model: one person, four runs, two categories, two channels, and a delivery that keeps the
# ledger's promises (one message a run and leg; a refusal closes its generation and the older ones).


@dataclass
class Message:
    channel: str
    category: str
    live: dict[int, datetime] = field(default_factory=dict)
    """Generations that may still leave, and until when."""
    left: datetime | None = None
    outcome: Outcome | None = None
    heard: bool = False
    generation: int = 0


@dataclass
class World:
    rules: tuple[CapRule, ...]
    zone: str
    now: datetime
    quiet: QuietHours | None
    state: RecipientState | None = None
    messages: dict[tuple[int, LegId], Message] = field(default_factory=dict)
    told: list[tuple[int, LegId, int, Outcome, datetime]] = field(default_factory=list)

    def order(self, number: int, at: LegId) -> None:
        message = self.messages.setdefault(
            (number, at), Message(at, "promo" if number % 2 else "news")
        )
        message.generation += 1
        spec = campaign(
            run=run(number),
            caps=self.rules,
            category=message.category,
            deadline=NOON + timedelta(days=400),
            quiet_hours=self.quiet,
            valid_for=(5 + number) * MINUTE,
        )
        decision, self.state = decide_one(
            self.state, person(zone=self.zone), spec, at, message.generation, self.now
        )
        if isinstance(decision, Admit):
            assert self.now < decision.valid_until <= self.now + 10 * MINUTE
            message.live[message.generation] = decision.valid_until
        elif isinstance(decision, Defer):
            assert decision.until > self.now

    def deliver(self, number: int, at: LegId, outcome: Outcome, newest: bool) -> None:
        message = self.messages.get((number, at))
        if message is None or not message.live:
            return
        generation = max(message.live) if newest else min(message.live)
        valid_until = message.live.pop(generation)
        if message.outcome is not None:
            # the ledger remembers: nothing leaves again; what decide knows of may be cancelled
            if outcome in COUNTS or not message.heard:
                outcome = message.outcome
        elif outcome in COUNTS:
            if self.now >= valid_until:
                outcome = Outcome.STALE
            else:
                message.left, message.outcome = self.now, outcome
        if outcome in REFUNDS:
            for older in [one for one in message.live if one < generation]:
                del message.live[older]
                self.told.append((number, at, older, outcome, self.now))
        self.told.append((number, at, generation, outcome, self.now))

    def resend(self, number: int, at: LegId) -> None:
        """By hand: an unknown message did not arrive, and is ordered again."""
        message = self.messages.get((number, at))
        if message is not None and message.outcome is Outcome.UNKNOWN and not message.live:
            message.left = message.outcome = None
            self.order(number, at)

    def hear(self, position: int, again: bool) -> None:
        if not self.told:
            return
        position %= len(self.told)
        number, at, generation, outcome, when = self.told[position]
        if not again:
            del self.told[position]
        self.state = fold_outcome(self.state, run(number), at, generation, outcome, when)
        if outcome in COUNTS:
            self.messages[number, at].heard = True

    def check(self) -> None:
        zone = ZoneInfo(self.zone)
        for rule in self.rules:
            times = sorted(
                message.left
                for message in self.messages.values()
                if message.left is not None
                and (rule.channel is None or rule.channel.value == message.channel)
                and (rule.category is None or rule.category == message.category)
            )
            for last in times:
                if rule.window is WindowKind.ROLLING:
                    since = last - rule.length
                    within = [one for one in times if since < one <= last]
                else:
                    begin, end = calendar_window(rule.window, zone, last)
                    within = [one for one in times if begin <= one < end]
                assert len(within) <= rule.limit, (rule, within)


LENGTHS = [30 * MINUTE, 90 * MINUTE, DAY, 7 * DAY]
STARTS = [
    datetime(2026, 3, 28, 22, 54, tzinfo=UTC),  # Berlin: before midnight of a day of 23 hours
    datetime(2026, 10, 25, 22, 50, tzinfo=UTC),
    datetime(2026, 2, 28, 18, 10, tzinfo=UTC),
    datetime(2026, 10, 4, 10, 20, tzinfo=UTC),
]


def history(seed: int) -> None:
    """One random history: few runs and tight rules, so that most steps meet a limit."""
    draw = Random(seed)
    rules = tuple(
        cap(
            draw.choice([1, 1, 2]),
            draw.choice([*LENGTHS, *list(WindowKind)[1:]]),
            draw.choice([None, None, Channel.EMAIL]),
            draw.choice([None, None, "promo"]),
            draw.choice(list(WhenCapped)),
        )
        for _ in range(draw.choice([1, 1, 2, 3]))
    )
    world = World(
        rules,
        draw.choice(["Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe", "UTC"]),
        draw.choice(STARTS),
        draw.choice([None, None, QuietHours(22 * 60, 7 * 60)]),
    )
    runs = draw.choice([2, 2, 3, 4])
    legs = draw.choice([[EMAIL], [EMAIL], [EMAIL, SMS]])
    passing = [1, 60, 60, 240, 300, 1260, 1740] + [
        int(length.total_seconds()) - draw.choice([1, 240, 590, 900]) for length in LENGTHS
    ]
    outcomes = draw.choice([COUNTS, REFUNDS, [*COUNTS, *COUNTS, *REFUNDS]])
    for _ in range(draw.choice([15, 30, 60])):
        number, at = draw.randrange(runs), draw.choice(legs)
        match draw.choices(["order", "deliver", "hear", "wait", "resend"], [8, 6, 6, 4, 1])[0]:
            case "order":
                world.order(number, at)
            case "deliver":
                outcome = draw.choice(draw.choice([outcomes, list(Outcome)]))
                world.deliver(number, at, outcome, draw.random() < 0.5)
            case "hear":
                world.hear(draw.randrange(16), again=draw.random() < 0.5)
            case "wait":
                world.now += timedelta(seconds=draw.choice(passing))
            case "resend":
                world.resend(number, at)
        world.check()
    for position in range(len(world.told)):
        world.hear(position, again=True)
    state = world.state
    for position in range(len(world.told)):
        world.hear(-1 - position, again=True)
    assert world.state == state


@given(st.integers(0, 2**40))
@settings(max_examples=3_000, deadline=None)
def test_what_arrives_never_passes_a_cap(seed: int) -> None:
    history(seed)


outcomes_drawn = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(list(Outcome)), st.integers(0, 30)), max_size=5
)


@given(outcomes_drawn, st.randoms(), st.integers(0, 2))
def test_outcomes_may_come_in_any_order_and_often(
    outcomes: list[tuple[int, Outcome, int]], random: object, generation: int
) -> None:
    def folded(told: list[tuple[int, Outcome, int]]) -> RecipientState | None:
        state = admitted(decide(None, 1, (), NOON, generation))
        for heard, outcome, minutes in told:
            state = fold_outcome(state, run(1), EMAIL, heard, outcome, NOON + minutes * MINUTE)  # type: ignore[assignment]
        return state

    shuffled = [*outcomes, *outcomes[:2]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    state = folded(shuffled)
    assert state == folded(outcomes)
    assert state is not None
    (one,) = state.reservations
    assert one.settled is any(outcome in COUNTS for _, outcome, _ in outcomes)
    assert one.refunded is (
        not one.settled
        and any(outcome in REFUNDS and heard == generation for heard, outcome, _ in outcomes)
    )


@pytest.mark.parametrize("outcome", REFUNDS)
def test_a_refund_gives_the_room_back(outcome: Outcome) -> None:
    rules = (cap(1, DAY),)
    state = admitted(decide(None, 1, rules, NOON))
    assert isinstance(decide(state, 2, rules, NOON)[0], Defer)
    refunded = fold_outcome(state, run(1), EMAIL, 0, outcome, NOON + MINUTE)
    admitted(decide(refunded, 2, rules, NOON + MINUTE))


@pytest.mark.parametrize("outcome", COUNTS)
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_late_word_that_it_was_accepted_counts_after_all(
    outcome: Outcome, order: tuple[int, ...]
) -> None:
    rules = (cap(1, DAY),)
    told = [Outcome.FAILED, outcome, Outcome.STALE]
    state: RecipientState | None = admitted(decide(None, 1, rules, NOON))
    for position in order:
        state = fold_outcome(state, run(1), EMAIL, 0, told[position], NOON + MINUTE)
    assert isinstance(decide(state, 2, rules, NOON + 2 * MINUTE)[0], Defer)


def test_another_generation_refunds_nothing() -> None:
    rules = (cap(1, DAY),)
    state: RecipientState | None = admitted(decide(None, 1, rules, NOON, 3))
    for generation in (0, 2, 4):
        assert fold_outcome(state, run(1), EMAIL, generation, Outcome.FAILED, NOON) is state
    assert isinstance(decide(state, 2, rules, NOON)[0], Defer)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_an_outcome_of_what_was_never_reserved_changes_nothing(outcome: Outcome) -> None:
    state = admitted(decide(None, 1, (), NOON))
    assert fold_outcome(state, run(2), EMAIL, 0, outcome, NOON) is state
    assert fold_outcome(state, run(1), SMS, 0, outcome, NOON) is state
    assert fold_outcome(None, run(1), EMAIL, 0, outcome, NOON) is None


def test_what_is_open_counts_in_every_window_whatever_its_age() -> None:
    rules = (cap(1, 30 * MINUTE), cap(1, WindowKind.CALENDAR_DAY))
    state = admitted(decide(None, 1, rules, NOON))
    later = NOON + 60 * DAY
    decision, _ = decide(state, 2, rules, later)
    assert isinstance(decision, Defer)
    assert decision.until > later


def test_a_run_is_never_refused_by_its_own_older_reservation() -> None:
    rules = (cap(1, 7 * DAY, when_capped=WhenCapped.DROP),)
    state = admitted(decide(None, 1, rules, NOON, 0))
    state = admitted(decide(state, 1, rules, NOON + DAY, 1))
    (one,) = state.reservations
    assert (one.generation, one.at) == (1, NOON + DAY + 10 * MINUTE)
    # the superseded generation's refusal is no longer this reservation's
    assert fold_outcome(state, run(1), EMAIL, 0, Outcome.FAILED, NOON) is state


def test_a_clock_that_goes_back_shortens_no_reservation() -> None:
    state = admitted(decide(None, 1, (), NOON + 5 * MINUTE, 0))
    state = admitted(decide(state, 1, (), NOON, 1))
    assert [one.at for one in state.reservations] == [NOON + 15 * MINUTE]


def test_the_other_leg_of_a_run_is_another_message() -> None:
    rules = (cap(1, DAY),)
    state = admitted(decide(None, 1, rules, NOON, at=EMAIL))
    assert isinstance(decide(state, 1, rules, NOON, at=SMS)[0], Defer)


def test_a_skip_or_deferral_leaves_an_older_reservation() -> None:
    state = admitted(decide(None, 1, (), NOON, 0))
    spec = campaign(run=run(1), quiet_hours=QuietHours(11 * 60, 15 * 60))
    decision, after = decide_one(state, person(), spec, EMAIL, 1, NOON)
    assert isinstance(decision, Defer)
    assert after is state
    decision, after = decide_one(state, person(consents=frozenset()), spec, EMAIL, 1, NOON)
    assert isinstance(decision, Skip)
    assert after is state
    refunded = fold_outcome(state, run(1), EMAIL, 0, Outcome.STALE, NOON)
    assert refunded is not None
    assert refunded.reservations[0].refunded


def test_what_was_accepted_stays_so_when_it_is_ordered_again() -> None:
    rules = (cap(1, DAY),)
    state: RecipientState | None = admitted(decide(None, 1, rules, NOON, 0))
    state = fold_outcome(state, run(1), EMAIL, 0, Outcome.ACCEPTED, NOON + MINUTE)
    state = admitted(decide(state, 1, rules, NOON + 2 * MINUTE, 1))
    state = fold_outcome(state, run(1), EMAIL, 1, Outcome.CANCELLED, NOON + 3 * MINUTE)
    assert isinstance(decide(state, 2, rules, NOON + 4 * MINUTE)[0], Defer)


def test_an_old_word_does_not_move_a_message_that_was_sent_again_by_hand() -> None:
    rules = (cap(1, DAY),)
    state: RecipientState | None = admitted(decide(None, 1, rules, NOON, 0))
    state = fold_outcome(state, run(1), EMAIL, 0, Outcome.UNKNOWN, NOON)
    state = admitted(decide(state, 1, rules, NOON + 20 * 60 * MINUTE, 1))
    assert fold_outcome(state, run(1), EMAIL, 0, Outcome.UNKNOWN, NOON) is state
    assert isinstance(decide(state, 2, rules, NOON + DAY + MINUTE)[0], Defer)


@pytest.mark.parametrize(
    ("channel", "category", "first", "refused"),
    [
        (None, None, (SMS, "news"), True),
        (Channel.EMAIL, None, (EMAIL, "news"), True),
        (Channel.EMAIL, None, (SMS, "promo"), False),
        (None, "promo", (SMS, "promo"), True),
        (None, "promo", (EMAIL, "news"), False),
        (Channel.EMAIL, "promo", (EMAIL, "promo"), True),
        (Channel.EMAIL, "promo", (EMAIL, "news"), False),
        (Channel.EMAIL, "promo", (SMS, "promo"), False),
        # a rule on others does not concern an e-mail of the category promo
        (Channel.SMS, None, (SMS, "promo"), False),
        (None, "news", (EMAIL, "news"), False),
    ],
)
def test_scopes(
    channel: Channel | None, category: str | None, first: tuple[LegId, str], refused: bool
) -> None:
    rules = (cap(1, DAY, channel, category),)
    state = admitted(decide(None, 1, (), NOON, category=first[1], at=first[0]))
    decision, _ = decide(state, 2, rules, NOON)
    assert isinstance(decision, Defer) is refused


def test_the_category_is_the_one_at_decision() -> None:
    state = admitted(decide(None, 1, (), NOON, category="news"))
    rules = (cap(1, DAY, category="news"),)
    assert isinstance(decide(state, 2, rules, NOON, category="news")[0], Defer)


def test_a_rolling_window_defers_to_when_enough_has_left_it() -> None:
    rules = (cap(2, 60 * MINUTE),)
    state: RecipientState | None = None
    for number, minutes in ((1, 0), (2, 20)):
        now = NOON + minutes * MINUTE
        state = admitted(decide(state, number, rules, now))
        state = fold_outcome(state, run(number), EMAIL, 0, Outcome.ACCEPTED, now)
    decision, _ = decide(state, 3, rules, NOON + 30 * MINUTE)
    # accepted at noon, rounded up to ten seconds, an hour, rounded up to a minute
    assert decision == Defer(NOON + 61 * MINUTE, Reason.FREQUENCY_CAP)
    state = admitted(decide(state, 3, rules, NOON + 61 * MINUTE))
    assert isinstance(decide(state, 4, rules, NOON + 62 * MINUTE)[0], Defer)


@pytest.mark.parametrize(
    ("kind", "until"),
    [
        (WindowKind.CALENDAR_DAY, "2026-03-11T00:00+01:00"),
        (WindowKind.CALENDAR_WEEK, "2026-03-16T00:00+01:00"),
        (WindowKind.CALENDAR_MONTH, "2026-04-01T00:00+02:00"),
    ],
)
def test_a_calendar_window_defers_to_the_next_one_in_the_zone(kind: WindowKind, until: str) -> None:
    rules = (cap(1, kind),)
    state: RecipientState | None = admitted(decide(None, 1, rules, NOON))
    state = fold_outcome(state, run(1), EMAIL, 0, Outcome.ACCEPTED, NOON)
    decision, _ = decide(state, 2, rules, NOON)
    assert decision == Defer(datetime.fromisoformat(until), Reason.FREQUENCY_CAP)
    admitted(decide(state, 2, rules, datetime.fromisoformat(until)))


def test_a_decision_is_valid_no_longer_than_its_calendar_window() -> None:
    rules = (cap(1, WindowKind.CALENDAR_DAY),)
    midnight = datetime(2026, 3, 10, 23, 0, tzinfo=UTC)
    decision, state = decide(None, 1, rules, midnight - 3 * MINUTE)
    assert decision == Admit(midnight)
    state = fold_outcome(state, run(1), EMAIL, 0, Outcome.ACCEPTED, midnight + MINUTE)
    admitted(decide(state, 2, rules, midnight + MINUTE))  # it left before midnight


def test_what_may_leave_after_midnight_counts_on_both_days() -> None:
    midnight = datetime(2026, 3, 10, 23, 0, tzinfo=UTC)
    rules = (cap(1, WindowKind.CALENDAR_DAY),)
    state: RecipientState | None = admitted(decide(None, 1, (), midnight - 3 * MINUTE))
    state = fold_outcome(state, run(1), EMAIL, 0, Outcome.UNKNOWN, midnight + 5 * MINUTE)
    assert isinstance(decide(state, 2, rules, midnight + 6 * MINUTE)[0], Defer)


def test_one_rule_that_drops_outweighs_others_that_defer() -> None:
    rules = (cap(1, DAY), cap(1, DAY, when_capped=WhenCapped.DROP))
    state = admitted(decide(None, 1, rules, NOON))
    assert decide(state, 2, rules, NOON)[0] == Skip(Reason.FREQUENCY_CAP)


def test_of_rules_that_defer_the_latest_time_is_taken() -> None:
    rules = (cap(1, WindowKind.CALENDAR_WEEK), cap(1, 60 * MINUTE))
    state: RecipientState | None = admitted(decide(None, 1, rules, NOON))
    state = fold_outcome(state, run(1), EMAIL, 0, Outcome.ACCEPTED, NOON)
    for ordered in (rules, rules[::-1]):
        decision, _ = decide(state, 2, ordered, NOON)
        assert isinstance(decision, Defer)
        assert decision.until == datetime.fromisoformat("2026-03-16T00:00+01:00")


def test_a_cap_that_admits_only_after_the_deadline_drops() -> None:
    rules = (cap(1, WindowKind.CALENDAR_DAY),)
    state = admitted(decide(None, 1, rules, NOON))
    midnight = datetime(2026, 3, 10, 23, 0, tzinfo=UTC)
    for deadline, expected in (
        (midnight, Skip(Reason.FREQUENCY_CAP)),
        (midnight + MINUTE, Defer(midnight, Reason.FREQUENCY_CAP)),
    ):
        spec = campaign(run=run(2), caps=rules, deadline=deadline)
        assert decide_one(state, person(), spec, EMAIL, 0, NOON)[0] == expected


def test_calendar_caps_of_a_person_without_a_zone_follow_utc_or_the_fallback() -> None:
    rules = (cap(1, WindowKind.CALENDAR_DAY),)
    state = admitted(decide(None, 1, rules, NOON))
    nowhere = person(zone="")
    spec = campaign(run=run(2), caps=rules)
    decision, _ = decide_one(state, nowhere, spec, EMAIL, 0, NOON)
    assert decision == Defer(datetime(2026, 3, 11, tzinfo=UTC), Reason.FREQUENCY_CAP)


def test_what_no_window_can_hold_is_forgotten_and_what_is_open_is_not() -> None:
    state: RecipientState | None = admitted(decide(None, 1, (), NOON))
    state = fold_outcome(state, run(1), EMAIL, 0, Outcome.ACCEPTED, NOON)
    state = admitted(decide(state, 2, (), NOON))
    state = fold_outcome(state, run(2), EMAIL, 0, Outcome.FAILED, NOON)
    state = admitted(decide(state, 3, (), NOON))
    held = {one.run for one in admitted(decide(state, 4, (), NOON + 31 * DAY)).reservations}
    assert held == {run(1), run(2), run(3), run(4)}
    held = {one.run for one in admitted(decide(state, 4, (), NOON + 34 * DAY)).reservations}
    assert held == {run(3), run(4)}
