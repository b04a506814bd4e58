"""Coordinate: the state machine of a run.

``Coordinator`` takes commands, decide's results, delivery's outcomes and ticks of the clock,
changes the memory of one run and answers with ``Effects``: page orders, closings, audit events, a
status to publish, a ledger to create. It has no clock, no client and no engine; the shell loads,
steps, saves and emits.

Three counts part a leg's recipients that have no final outcome: *unordered* (in pages behind the
cursor), *open* (in orders or closings, unresolved) and *deferred*. Their sum is *pending*; when it
is zero in a running run, the run is completed. An outcome counts if its generation is that of the
order which holds the ordinal; ``accepted`` and ``unknown`` always count. Folding twice changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from heapq import heapify, heappop, heappush

from schemas.codec import to_millis
from schemas.ids import LegId, ObjectId, derive, run_key
from schemas.pages import PAGE_SIZE, bitmap_bytes, bitmap_from, bitmap_of, full_bitmap, indexes_of
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import (
    CampaignSpec,
    Command,
    CommandKind,
    OutcomeGroup,
    Outcomes,
    PageOrder,
    PageResult,
    RunEvent,
)
from schemas.state import Deferral, LegState, OpenOrder, PageState, RunState

LOWEST_RATE = 0.001
HIGHEST_RATE = 1_000_000.0
"""Messages a second that a run may be limited to; above it is no limit."""
_RATE_WANTED = f"a rate must be {LOWEST_RATE:g} to {HIGHEST_RATE:,.0f} a second"

PageKey = tuple[LegId, int, int]
"""Leg, shard, page."""


@dataclass(frozen=True, slots=True)
class CoordinatePolicy:
    """What a deployment decides of coordinating.

    ``window``: recipients of a leg that may be open at once where no rate is set.
    ``commit``: how long a Kafka transaction lies open. Where a rate is set, the window is what the
    rate needs in three of them (an order, a decision and the next order wait for one each) and in
    ``way``: delivery, and its outcomes' way back.
    ``silence``: an order whose result was not heard for so long is given again; it must exceed the
    longest that a Kafka transaction may live.
    ``unanswered``: orders of a leg that decide may have before it, whatever the window: checkpoints
    and commands wait behind them. Twice what 150,000 recipients a second need from order to result.
    ``closings_per_step``: pages of a cancelled or expired run that are closed in one step.
    """

    window: int = 100_000
    commit: timedelta = timedelta(seconds=2)
    way: timedelta = timedelta(seconds=6)
    silence: timedelta = timedelta(minutes=20)
    unanswered: int = 2_000
    closings_per_step: int = 200
    progress_interval: timedelta = timedelta(seconds=2)
    remembered_commands: int = 1000
    publish_interval: timedelta = timedelta(seconds=5)
    """How often the status of a run is published though it is the same: an older copy of Redis may
    have taken the place of the one that knew it."""

    def room(self, rate_per_second: float | None) -> int:
        """How many recipients of a leg may be open at once, at least one page."""
        if rate_per_second is None:
            return self.window
        wanted = int(rate_per_second * (3 * self.commit + self.way).total_seconds())
        return max(4 * PAGE_SIZE, min(self.window, wanted))


@dataclass(frozen=True, slots=True)
class LaunchFacts:
    """What the shell found when it looked at what a launch names."""

    spec: ObjectId
    shard_counts: tuple[int, ...]
    problems: tuple[str, ...] = ()
    """Not empty: the launch is refused with these."""


@dataclass(slots=True)
class Effects:
    """What a step asks of the world."""

    orders: list[PageOrder] = field(default_factory=list)
    closings: list[Outcomes] = field(default_factory=list)
    """Recipients closed without delivery: cancelled or expired before they were sent."""
    events: list[RunEvent] = field(default_factory=list)
    publish: bool = False
    """Whether Redis must learn the run's status; see ``Coordinator.unpublished``."""
    create_ledger: bool = False
    silent: int = 0
    """How many orders are given again because nothing was heard of them."""


@dataclass(slots=True)
class RunMemory:
    """All memory of one run. ``dirty`` names the pages that a step changed."""

    run: RunState | None = None
    pages: dict[PageKey, PageState] = field(default_factory=dict)
    dirty: set[PageKey] = field(default_factory=set)
    saved: RunState | None = None
    """``run`` as it was last saved: most steps leave it as it is."""
    last_progress: tuple[datetime, tuple[int, ...]] | None = None
    """Not kept across a restart: when progress was last told, and what."""
    published_at: datetime | None = None
    """Not kept across a restart: when the run's status was last published."""
    open_by_leg: dict[LegId, int] = field(default_factory=dict)
    deferred_by_leg: dict[LegId, int] = field(default_factory=dict)
    unanswered_by_leg: dict[LegId, int] = field(default_factory=dict)
    """Orders and closings, not recipients."""
    given: list[tuple[datetime, PageKey, int]] = field(default_factory=list)
    """A heap of what was ordered or closed: when, the page, the generation. What was heard of is
    dropped when it is the oldest, or when it is most of all."""
    wakes: dict[LegId, list[tuple[datetime, int, int]]] = field(default_factory=dict)
    """A heap a leg, of deferrals: when, page, shard. A deferral may be gone already."""

    def recount(self) -> None:
        """Derive counts, ``given`` and ``wakes`` from the pages, after the memory was loaded."""
        self.open_by_leg.clear()
        self.deferred_by_leg.clear()
        self.unanswered_by_leg.clear()
        self.wakes.clear()
        for key, page in self.pages.items():
            self._count(key[0], page, +1)
            leg, shard, number = key
            self.wakes.setdefault(leg, []).extend(
                (one.wake, number, shard) for one in page.deferrals
            )
        for heap in self.wakes.values():
            heapify(heap)
        self.given = [
            (one.ordered_at, key, one.generation)
            for key, page in self.pages.items()
            for one in page.orders
            if not one.heard
        ]
        heapify(self.given)

    def _count(self, leg: LegId, page: PageState, sign: int) -> None:
        opened = sum(bitmap_from(one.unresolved).bit_count() for one in page.orders)
        put_off = sum(bitmap_from(one.ordinals).bit_count() for one in page.deferrals)
        unanswered = sum(not one.heard for one in page.orders)
        for counts, number in (
            (self.open_by_leg, opened),
            (self.deferred_by_leg, put_off),
            (self.unanswered_by_leg, unanswered),
        ):
            counts[leg] = counts.get(leg, 0) + sign * number

    def give(self, key: PageKey, page: PageState, order: OpenOrder) -> None:
        """Put a page with a new order, and remember to look whether it is heard of."""
        self.put(key, replace(page, generation=order.generation, orders=(*page.orders, order)))
        heappush(self.given, (order.ordered_at, key, order.generation))
        if len(self.given) > 1_000 + 2 * sum(self.unanswered_by_leg.values()):
            self.given = [one for one in self.given if self.unheard(one[1], one[2])]
            heapify(self.given)

    def unheard(self, key: PageKey, generation: int) -> OpenOrder | None:
        """The page's order of this generation, if it is open and nothing was heard of it."""
        order = _order_of(self.pages.get(key), generation)
        return order if order is not None and not order.heard else None

    def wake_at(self, key: PageKey, moment: datetime) -> None:
        """Remember that a page has a deferral until then."""
        leg, shard, page = key
        heappush(self.wakes.setdefault(leg, []), (moment, page, shard))

    def put(self, key: PageKey, page: PageState) -> None:
        """Replace a page, keep the counts, and forget it where nothing is left to remember."""
        before = self.pages.get(key)
        if before is not None:
            self._count(key[0], before, -1)
        self._count(key[0], page, +1)
        if page.generation == 0 and not page.orders and not page.deferrals:
            self.pages.pop(key, None)
        else:
            self.pages[key] = page
        self.dirty.add(key)

    @property
    def unordered(self) -> int:
        """Recipients in pages never ordered."""
        if self.run is None:
            return 0
        return sum(leg.unordered for leg in self.run.legs)

    @property
    def open(self) -> int:
        """Recipients in orders, unresolved."""
        return sum(self.open_by_leg.values())

    @property
    def deferred(self) -> int:
        """Recipients waiting to be decided again."""
        return sum(self.deferred_by_leg.values())

    @property
    def pending(self) -> int:
        """Recipients without a final outcome."""
        return self.unordered + self.open + self.deferred


def page_count(shard_count: int) -> int:
    """How many pages a shard of so many recipients has."""
    return -(-shard_count // PAGE_SIZE)


def recipients_of_page(shard_count: int, page: int) -> int:
    """How many recipients a page of a shard holds."""
    return max(0, min(PAGE_SIZE, shard_count - page * PAGE_SIZE))


class Coordinator:
    """Steps of one run. Every method takes ``now`` and changes ``memory``."""

    def __init__(self, memory: RunMemory, policy: CoordinatePolicy) -> None:
        self.memory = memory
        self.policy = policy

    # commands

    def on_command(self, command: Command, now: datetime, facts: LaunchFacts | None) -> Effects:
        """Carry out a command, or refuse it with a reason; a repeated ``command_id`` is nothing."""
        effects = Effects()
        run = self.memory.run
        if run is not None and command.command_id in run.commands:
            return effects
        if command.kind is CommandKind.LAUNCH:
            self._launch(command, now, facts, effects)
        elif run is None:
            effects.events.append(_refusal_without_run(command, now))
        else:
            problem = self._stale(run, command) or self._act(run, command, now)
            self._remember(command, now)
            self._tell(effects, now, command, problem)
        self._advance(now, effects)
        return effects

    def _stale(self, run: RunState, command: Command) -> str:
        """Why a command is too old, where its id may have been forgotten."""
        newest = run.issued_until
        forgetful = len(run.commands) >= self.policy.remembered_commands
        if not forgetful or newest is None or command.issued_at >= newest:
            return ""
        return (
            f"the command is stale: it was issued at {command.issued_at.isoformat()} and another "
            f"at {newest.isoformat()}; whether it was carried out long ago is not known any more. "
            "Issue it again"
        )

    def _remember(self, command: Command, now: datetime) -> None:
        run = self._run
        commands = (*run.commands, command.command_id)[-self.policy.remembered_commands :]
        newest = min(command.issued_at, now)
        if run.issued_until is not None:
            newest = max(run.issued_until, newest)
        self.memory.run = replace(run, commands=commands, issued_until=newest)

    def _launch(
        self, command: Command, now: datetime, facts: LaunchFacts | None, effects: Effects
    ) -> None:
        spec = command.launch
        earlier = self.memory.run
        if earlier is not None and earlier.status is not RunStatus.REFUSED:
            self._tell(effects, now, command, "this run exists already: launch under another name")
            return
        if spec is None or facts is None:
            effects.events.append(_refusal_without_run(command, now, "a launch needs its campaign"))
            return
        problems = facts.problems
        if spec.deadline <= now:
            problems = (*problems, f"deadline {spec.deadline.isoformat()} is in the past")
        if spec.rate_per_second is not None and not sound_rate(spec.rate_per_second):
            problems = (*problems, f"rate_per_second: {_RATE_WANTED}")
        # A refusal names the run of the command: that of the definition may be somebody else's.
        status = RunStatus.RUNNING
        if spec.start_at is not None and spec.start_at > now:
            status = RunStatus.SCHEDULED
        audience = sum(facts.shard_counts)
        first = next((s for s, count in enumerate(facts.shard_counts) if count), 0)
        self.memory.run = RunState(
            tenant=command.tenant,
            run=command.run,
            campaign=spec.campaign,
            spec=facts.spec,
            snapshot=spec.snapshot,
            status=RunStatus.REFUSED if problems else status,
            version=to_millis(now) if earlier is None else _later(earlier, now),
            published_version=0,
            ledger_ready=False,
            legs=()
            if problems
            else tuple(LegState(leg.leg, 0, first, audience) for leg in spec.legs),
            shard_counts=() if problems else facts.shard_counts,
            rate_per_second=spec.rate_per_second,
            commands=(*(earlier.commands if earlier is not None else ()), command.command_id),
            start_at=spec.start_at,
            deadline=spec.deadline,
            launched_at=now,
        )
        self._tell(effects, now, command, "; ".join(problems), launched=True)

    def _act(self, run: RunState, command: Command, now: datetime) -> str:
        """Change the run as the command says; what is returned refuses it."""
        kind = command.kind
        status = run.status
        if kind is CommandKind.REORDER:
            return self._reorder(run, command, now)
        if status.terminal:
            return f"the run is {status.value}: nothing of it can be changed"
        if kind is CommandKind.PAUSE:
            if status is RunStatus.PAUSED:
                return "the run is paused already"
            self._set_status(RunStatus.PAUSED, now)
        elif kind is CommandKind.RESUME:
            if status is not RunStatus.PAUSED:
                return f"the run is {status.value}, not paused"
            waiting = run.start_at is not None and run.start_at > now
            self._set_status(RunStatus.SCHEDULED if waiting else RunStatus.RUNNING, now)
        elif kind is CommandKind.CANCEL:
            self._set_status(RunStatus.CANCELLED, now)
        elif kind is CommandKind.SET_RATE:
            rate = command.rate_per_second
            if rate is not None and not sound_rate(rate):
                return f"{_RATE_WANTED}, got {rate:g}; use pause to stop"
            self.memory.run = replace(run, rate_per_second=rate, version=_later(run, now))
        elif kind is CommandKind.SCHEDULE:
            return self._schedule(run, command.start_at or now, now)
        return ""

    def _schedule(self, run: RunState, start_at: datetime, now: datetime) -> str:
        """Begin at another time; a moment that has passed is now."""
        if run.start_at is None or run.start_at <= now:
            return f"the run has begun: it is {run.status.value}; pause and resume it instead"
        if start_at >= run.deadline:
            return (
                f"the start {start_at.isoformat()} is not before the run's deadline "
                f"{run.deadline.isoformat()}"
            )
        self.memory.run = replace(run, start_at=max(start_at, now), version=_later(run, now))
        return ""

    def _reorder(self, run: RunState, command: Command, now: datetime) -> str:
        if run.status in (RunStatus.CANCELLED, RunStatus.EXPIRED, RunStatus.REFUSED):
            return f"the run is {run.status.value}: nothing is ordered again"
        if now >= run.deadline:
            return f"the run's deadline {run.deadline.isoformat()} has passed"
        legs = {leg.leg: leg for leg in run.legs}
        for one in command.reorders:
            leg = legs.get(one.leg)
            if leg is None:
                return f"the run has no leg {one.leg!r}; it has {', '.join(legs)}"
            known = 0 <= one.shard < len(run.shard_counts) and one.page >= 0
            size = recipients_of_page(run.shard_counts[one.shard], one.page) if known else 0
            bits = bitmap_from(one.ordinals)
            if not bits or bits > full_bitmap(size):
                return f"page {one.page} of shard {one.shard} has {size} recipients, not these"
            if (one.page, one.shard) >= (leg.next_page, leg.next_shard):
                return f"page {one.page} of shard {one.shard} was not ordered yet"
        for one in command.reorders:
            key = (one.leg, one.shard, one.page)
            page = self._page(key)
            bits = bitmap_from(one.ordinals) & ~_held(page)
            if bits:
                self._defer(key, page, bits, now)
        # The version grows in a running run, too: this one's predecessor, ended after its last
        # checkpoint, may have published the run as completed under a version above this one's, and
        # no send of the run would ever be let through again.
        self._set_status(
            RunStatus.RUNNING if run.status is RunStatus.COMPLETED else run.status, now
        )
        return ""

    # what comes back

    def on_result(self, result: PageResult, now: datetime) -> Effects:
        """Fold what decide said of an order; a result that was heard before is nothing."""
        effects = Effects()
        if self.memory.run is None:
            return effects
        key = (result.leg, result.shard, result.page)
        page = self.memory.pages.get(key)
        order = _order_of(page, result.generation)
        if page is not None and order is not None and not order.heard:
            unresolved = bitmap_from(order.unresolved)
            for skip in result.skips:
                unresolved &= ~bitmap_from(skip.ordinals)
            put_off: list[Deferral] = []
            for group in result.deferrals:
                bits = bitmap_from(group.ordinals) & unresolved
                unresolved &= ~bits
                if bits:
                    put_off.append(Deferral(group.until, bitmap_bytes(bits)))
            heard = replace(order, unresolved=bitmap_bytes(unresolved), heard=True)
            page = _with_order(page, heard)
            self.memory.put(key, replace(page, deferrals=(*page.deferrals, *put_off)))
            for one in put_off:
                self.memory.wake_at(key, one.wake)
        self._advance(now, effects)
        return effects

    def on_outcomes(self, outcomes: Outcomes, now: datetime) -> Effects:
        """Fold delivery's outcomes of one page. At least once, in any order."""
        effects = Effects()
        if self.memory.run is None:
            return effects
        key = (outcomes.leg, outcomes.shard, outcomes.page)
        for group in outcomes.groups:
            page = self.memory.pages.get(key)
            if page is None:
                break
            bits = bitmap_of(group.indexes)
            if group.outcome in (Outcome.ACCEPTED, Outcome.UNKNOWN):
                self.memory.put(key, _without(page, bits))
                continue
            order = _order_of(page, group.generation)
            if order is None:
                continue
            hit = bitmap_from(order.unresolved) & bits
            if not hit:
                continue
            left = bitmap_from(order.unresolved) & ~hit
            # Not 'heard': the result may come later than the outcome, and tells of others.
            page = _with_order(page, replace(order, unresolved=bitmap_bytes(left)))
            self.memory.put(key, page)
            if group.outcome is Outcome.STALE:
                self._defer(key, page, hit, now)
        self._advance(now, effects)
        return effects

    def on_tick(self, now: datetime) -> Effects:
        """What time brings: start, deadline, due deferrals, silent orders, progress."""
        effects = Effects()
        if self.memory.run is None:
            return effects
        self._advance(now, effects)
        return effects

    # what the shell did

    def on_published(self, version: int, now: datetime) -> None:
        """Redis has the run's status as of ``version``."""
        run = self._run
        if version == run.version:
            self.memory.published_at = now
        if version > run.published_version:
            self.memory.run = replace(run, published_version=version)

    def on_ledger_created(self, now: datetime) -> Effects:
        """The ledger of the run exists: pages may be ordered."""
        effects = Effects()
        self.memory.run = replace(self._run, ledger_ready=True)
        self._advance(now, effects)
        return effects

    # inside

    @property
    def _run(self) -> RunState:
        run = self.memory.run
        if run is None:
            raise AssertionError("a step of a run that was not launched")
        return run

    def _page(self, key: PageKey) -> PageState:
        return self.memory.pages.get(key) or PageState(0, (), ())

    def _set_status(self, status: RunStatus, now: datetime) -> None:
        run = self._run
        self.memory.run = replace(run, status=status, version=_later(run, now))

    def _defer(self, key: PageKey, page: PageState, bits: int, wake: datetime) -> None:
        deferral = Deferral(wake, bitmap_bytes(bits))
        self.memory.put(key, replace(page, deferrals=(*page.deferrals, deferral)))
        self.memory.wake_at(key, wake)

    def _advance(self, now: datetime, effects: Effects) -> None:
        """Bring the run as far as it can go now."""
        run = self.memory.run
        if run is None:
            return
        if not run.status.terminal and now >= run.deadline:
            self._set_status(RunStatus.EXPIRED, now)
            self._tell(effects, now, None, "")
        elif run.status is RunStatus.SCHEDULED and (run.start_at is None or now >= run.start_at):
            self._set_status(RunStatus.RUNNING, now)
            self._tell(effects, now, None, "")
        run = self._run
        if run.status in (RunStatus.CANCELLED, RunStatus.EXPIRED):
            self._close(now, effects)
        elif run.status is RunStatus.RUNNING and run.ledger_ready:
            self._attend(now, effects)
            self._fill(now, effects)
            if self.memory.pending == 0:
                self._set_status(RunStatus.COMPLETED, now)
                self._tell(effects, now, None, "")
        run = self._run
        effects.create_ledger = not run.ledger_ready and not run.status.terminal
        effects.publish = self.unpublished(now)
        self._progress(now, effects)

    def _attend(self, now: datetime, effects: Effects) -> None:
        """Order again what is silent, and what is due as far as there is room.

        What is due first goes first: one that finds no room keeps those behind it waiting.
        """
        for key, page, bits in self._silent(now, effects):
            self._order(key, page, bits, now, effects)
        for leg in self._run.legs:
            wakes = self.memory.wakes.get(leg.leg, [])
            while wakes and wakes[0][0] <= now:
                _, number, shard = wakes[0]
                key = (leg.leg, shard, number)
                page = self._page(key)
                due = tuple(one for one in page.deferrals if one.wake <= now)
                bits = _put_off(due)
                if bits and not self._fits(leg.leg, bits.bit_count()):
                    break
                heappop(wakes)
                if bits:
                    kept = tuple(one for one in page.deferrals if one not in due)
                    self._order(key, replace(page, deferrals=kept), bits, now, effects)

    def _silent(self, now: datetime, effects: Effects) -> Iterator[tuple[PageKey, PageState, int]]:
        """Orders and closings that were not heard of for too long: their pages without them, and
        whom they hold."""
        while given := self.memory.given:
            at, key, generation = given[0]
            order = self.memory.unheard(key, generation)
            if order is not None and now < at + self.silence:
                return
            heappop(given)
            if order is not None:
                effects.silent += 1
                page = self._page(key)
                others = tuple(one for one in page.orders if one is not order)
                yield key, replace(page, orders=others), bitmap_from(order.unresolved)

    @property
    def silence(self) -> timedelta:
        """How long an order may stay unheard."""
        return self.policy.silence

    def _fits(self, leg: LegId, recipients: int) -> bool:
        """Whether an order of so many may be given: one, however large, always may."""
        opened = self.memory.open_by_leg.get(leg, 0)
        if opened == 0:
            return True
        unanswered = self.memory.unanswered_by_leg.get(leg, 0)
        window = self.policy.room(self._run.rate_per_second)
        return unanswered < self.policy.unanswered and opened + recipients <= window

    def _order(
        self, key: PageKey, page: PageState, bits: int, now: datetime, effects: Effects
    ) -> None:
        """Give an order of the page's next generation."""
        run = self._run
        generation = self._open(key, page, bits, now)
        leg, shard, number = key
        effects.orders.append(
            PageOrder(
                run.tenant,
                run.run,
                leg,
                run.spec,
                run.snapshot,
                shard,
                number,
                generation,
                bitmap_bytes(bits),
                now,
                run.start_at,
            )
        )

    def _open(self, key: PageKey, page: PageState, bits: int, now: datetime) -> int:
        """Hold these recipients in an order of the page's next generation, which is returned."""
        generation = self._generation_after(key, page)
        order = OpenOrder(generation, bitmap_bytes(bits), now, heard=False)
        self.memory.give(key, page, order)
        return generation

    def _generation_after(self, key: PageKey, page: PageState) -> int:
        ordered_before = page.generation > 0 or key in self.memory.pages or self._passed(key)
        return page.generation + 1 if ordered_before else 0

    def _passed(self, key: PageKey) -> bool:
        """Whether the cursor is behind this page: it was ordered at least once."""
        leg = next(one for one in self._run.legs if one.leg == key[0])
        return (key[2], key[1]) < (leg.next_page, leg.next_shard)

    def _fill(self, now: datetime, effects: Effects) -> None:
        """Order pages never ordered while the window has room that nobody waits for."""
        for position, leg in enumerate(self._run.legs):
            wakes = self.memory.wakes.get(leg.leg)
            if leg.unordered == 0 or (wakes and wakes[0][0] <= now):
                continue
            for key, size in self._walk(leg):
                if not self._fits(leg.leg, size):
                    break
                self._order(key, self._page(key), full_bitmap(size), now, effects)
                leg = self._step_past(position, key, size)

    def _walk(self, leg: LegState) -> Iterator[tuple[PageKey, int]]:
        """The pages from the cursor on, and their sizes."""
        counts = self._run.shard_counts
        last = page_count(max(counts, default=0))
        page, shard = leg.next_page, leg.next_shard
        while page < last:
            while shard < len(counts):
                size = recipients_of_page(counts[shard], page)
                if size:
                    yield (leg.leg, shard, page), size
                shard += 1
            page, shard = page + 1, 0

    def _step_past(self, position: int, key: PageKey, size: int) -> LegState:
        run = self._run
        leg = run.legs[position]
        leg = replace(leg, next_page=key[2], next_shard=key[1] + 1, unordered=leg.unordered - size)
        legs = (*run.legs[:position], leg, *run.legs[position + 1 :])
        self.memory.run = replace(run, legs=legs)
        return leg

    def _close(self, now: datetime, effects: Effects) -> None:
        """Close what is deferred or unordered; what is open closes by delivery's outcome.

        A closing is an order that coordinate answers itself: it is open until it comes back as an
        outcome. One that was lost with its transaction is silent, and is given again.
        """
        for key, page, bits in self._silent(now, effects):
            self._closing(key, page, bits, now, effects)
        # What is put off in a closed run is closed now, not when it would have been due.
        budget = self.policy.closings_per_step
        for leg_id, wakes in self.memory.wakes.items():
            while wakes and budget > 0:
                _, number, shard = heappop(wakes)
                key = (leg_id, shard, number)
                page = self._page(key)
                bits = _put_off(page.deferrals)
                if bits:
                    budget -= 1
                    self._closing(key, replace(page, deferrals=()), bits, now, effects)
        for position, leg in enumerate(self._run.legs):
            for key, size in self._walk(leg):
                if budget <= 0:
                    return
                budget -= 1
                self._closing(key, self._page(key), full_bitmap(size), now, effects)
                self._step_past(position, key, size)

    def _closing(
        self, key: PageKey, page: PageState, bits: int, now: datetime, effects: Effects
    ) -> None:
        run = self._run
        generation = self._open(key, page, bits, now)
        cancelled = run.status is RunStatus.CANCELLED
        group = OutcomeGroup(
            outcome=Outcome.CANCELLED if cancelled else Outcome.EXPIRED,
            reason=Reason.RUN_CANCELLED if cancelled else Reason.RUN_EXPIRED,
            provider="",
            generation=generation,
            indexes=tuple(indexes_of(bits)),
        )
        leg, shard, number = key
        effects.closings.append(
            Outcomes(run.tenant, run.run, leg, run.snapshot, shard, number, now, (group,))
        )

    @property
    def closing(self) -> bool:
        """Whether a closed run still has pages to close: the shell ticks again soon."""
        run = self.memory.run
        return (
            run is not None
            and run.status in (RunStatus.CANCELLED, RunStatus.EXPIRED)
            and (any(leg.unordered for leg in run.legs) or any(self.memory.wakes.values()))
        )

    def unpublished(self, now: datetime) -> bool:
        """Whether the run's status is to be published: it is new, or may have been undone.

        As long as something of the run can be sent, it is published again and again, and at once
        after a restart: should an older copy take Redis' place, its older status holds only until
        then. Who has a later version ignores it.
        """
        run = self.memory.run
        if run is None or run.status is RunStatus.REFUSED:
            return False
        if run.published_version < run.version:
            return True
        if run.status.terminal and not self.memory.pending:
            return False
        last = self.memory.published_at
        return last is None or not timedelta() <= now - last < self.policy.publish_interval

    def _counts(self) -> tuple[int, ...]:
        memory = self.memory
        return (memory.pending, memory.unordered, memory.open, memory.deferred)

    def _progress(self, now: datetime, effects: Effects) -> None:
        counts = (*self._counts(), self._run.version)
        last = self.memory.last_progress
        if last is not None:
            # The last word on a closed run must be that nothing is pending.
            over = counts[0] == 0 and last[1][0] > 0
            if last[1] == counts or (now - last[0] < self.policy.progress_interval and not over):
                return
        self._tell(effects, now, None, "")

    def _tell(
        self,
        effects: Effects,
        now: datetime,
        command: Command | None,
        problem: str,
        *,
        launched: bool = False,
    ) -> None:
        run = self._run
        pending, unordered, opened, deferred = self._counts()
        self.memory.last_progress = (now, (pending, unordered, opened, deferred, run.version))
        audience = sum(run.shard_counts) * len(run.legs)
        name = run_key(run.tenant, run.run)
        effects.events.append(
            RunEvent(
                event_id=derive(
                    "run-event",
                    (name, command.command_id if command else "", run.version, to_millis(now)),
                ),
                tenant=run.tenant,
                run=run.run,
                campaign=run.campaign,
                version=run.version,
                status=run.status,
                at=now,
                command_id=command.command_id if command else "",
                command=command.kind if command else None,
                by=command.issued_by if command else "fanfare",
                accepted=not problem,
                note=_short(problem or (command.note if command else "")),
                spec=run.spec,
                snapshot=run.snapshot,
                audience=audience,
                legs=tuple(leg.leg for leg in run.legs),
                pending=pending,
                ordered=audience - unordered,
                open=opened,
                deferred=deferred,
                shard_counts=run.shard_counts if launched else (),
            )
        )


LONGEST_NOTE = 4_000
"""Characters: an event must fit into a Kafka record, whatever was wrong."""


def _short(note: str) -> str:
    return note if len(note) <= LONGEST_NOTE else f"{note[:LONGEST_NOTE]} …"


def sound_rate(per_second: float) -> bool:
    """Whether a run's rate can be kept: token buckets need a finite time for one message."""
    return LOWEST_RATE <= per_second <= HIGHEST_RATE


def _later(run: RunState, now: datetime) -> int:
    """A version above every earlier one, across restarts too: the clock moves on."""
    return max(run.version + 1, to_millis(now))


def _held(page: PageState) -> int:
    bits = _put_off(page.deferrals)
    for order in page.orders:
        bits |= bitmap_from(order.unresolved)
    return bits


def _put_off(deferrals: Iterable[Deferral]) -> int:
    bits = 0
    for deferral in deferrals:
        bits |= bitmap_from(deferral.ordinals)
    return bits


def _order_of(page: PageState | None, generation: int) -> OpenOrder | None:
    if page is None:
        return None
    return next((one for one in page.orders if one.generation == generation), None)


def _with_order(page: PageState, order: OpenOrder) -> PageState:
    """The page with this order in place of its generation's, or without it when it is resolved."""
    orders = tuple(
        order if one.generation == order.generation else one
        for one in page.orders
        if one.generation != order.generation or order.unresolved
    )
    return replace(page, orders=orders)


def _without(page: PageState, bits: int) -> PageState:
    """The page without these recipients, wherever they are held."""
    orders = []
    for order in page.orders:
        left = bitmap_from(order.unresolved) & ~bits
        if left:
            orders.append(replace(order, unresolved=bitmap_bytes(left)))
    deferrals = []
    for deferral in page.deferrals:
        left = bitmap_from(deferral.ordinals) & ~bits
        if left:
            deferrals.append(replace(deferral, ordinals=bitmap_bytes(left)))
    return replace(page, orders=tuple(orders), deferrals=tuple(deferrals))


def _refusal_without_run(command: Command, now: datetime, why: str = "") -> RunEvent:
    return RunEvent(
        event_id=derive("run-event", (command.tenant, command.run, command.command_id)),
        tenant=command.tenant,
        run=command.run,
        campaign="",
        version=0,
        status=RunStatus.REFUSED,
        at=now,
        command_id=command.command_id,
        command=command.kind,
        by=command.issued_by,
        accepted=False,
        note=_short(why) or f"there is no run {command.run!r} of tenant {command.tenant!r}",
        spec=None,
        snapshot=None,
        audience=0,
        legs=(),
        pending=0,
        ordered=0,
        open=0,
        deferred=0,
    )


def problems_of(spec: CampaignSpec) -> tuple[str, ...]:
    """What makes a definition impossible to coordinate."""
    names = [leg.leg for leg in spec.legs]
    problems = []
    if not names:
        problems.append("legs: at least one channel is needed")
    if len(set(names)) != len(names):
        problems.append(f"legs: each channel once, got {', '.join(names)}")
    return tuple(problems)
