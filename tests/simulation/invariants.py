"""The promises, as checks on the world: some at every step, the rest when all is quiet."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from schemas import recipient_bytes
from schemas.ids import LegId
from schemas.pages import bitmap_from, indexes_of
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from schemas.records import (
    CampaignSpec,
    DeferGroup,
    Outcomes,
    PageOrder,
    PageResult,
    SkipGroup,
    WindowKind,
)
from schemas.tables import EXCLUSIVE_KINDS, StepKind
from tests.simulation.world import PAGE, Record, Request, Violation, World, person
from transforms import books
from transforms.coordinate import Coordinator, Effects
from transforms.decide import PageDecision
from transforms.ledger import OPT_OUT_MEMORY_MS, Claim, Held, scopes_of
from transforms.quiet_hours import UTC_ZONE, calendar_window
from transforms.shaping import JITTER_US, SECOND_US

if TYPE_CHECKING:
    from tests.simulation.actors import Campaigns, Delivery

_KINDS = {
    Outcome.ACCEPTED: StepKind.ACCEPTED,
    Outcome.UNKNOWN: StepKind.UNKNOWN,
    Outcome.FAILED: StepKind.FAILED,
    Outcome.EXPIRED: StepKind.EXPIRED,
    Outcome.CANCELLED: StepKind.CANCELLED,
    Outcome.STALE: StepKind.STALE,
}


def coordinated(world: World, run: str, coordinator: Coordinator, effects: Effects) -> None:
    """After a step of coordinate: its counts are its rows', and the window is kept."""
    memory = coordinator.memory
    state = memory.run
    if state is None:
        return
    if state.status is RunStatus.COMPLETED and memory.pending:
        raise Violation(f"{run} is completed with {memory.pending} pending")
    if not memory.dirty:
        return
    opened: Counter[LegId] = Counter()
    deferred: Counter[LegId] = Counter()
    for key, page in memory.pages.items():
        held = 0
        for bits, counts in (
            *((bitmap_from(one.unresolved), opened) for one in page.orders),
            *((bitmap_from(one.ordinals), deferred) for one in page.deferrals),
        ):
            if held & bits:
                raise Violation(f"{run}: page {key} holds a recipient twice")
            held |= bits
            counts[key[0]] += bits.bit_count()
    for leg, count in opened.items():
        if count != memory.open_by_leg.get(leg, 0):
            raise Violation(f"{run}: {count} are open, {memory.open_by_leg.get(leg, 0)} counted")
    if sum(deferred.values()) != sum(memory.deferred_by_leg.values()):
        raise Violation(f"{run}: deferrals are counted wrongly")
    if effects.orders:
        if state.status is not RunStatus.RUNNING and state.status is not RunStatus.COMPLETED:
            raise Violation(f"{run} is {state.status.value} and orders pages")
        # Silent orders are given again as they were, also if the window is smaller by now.
        before = world.truth.opened.get(run, 0)
        room = max(PAGE, coordinator.policy.room(state.rate_per_second), before)
        widest = max(opened.values(), default=0)
        if widest > room:
            raise Violation(f"{run}: {widest} are open, the window is {room}")
    world.truth.opened[run] = max(opened.values(), default=0)


def decided(world: World, order: PageOrder, spec: CampaignSpec, what: PageDecision) -> None:
    """After a decision: who a cap refuses has had messages of others, and every ordinal is told."""
    result = what.result
    told = bitmap_from(result.sends)
    groups: tuple[SkipGroup | DeferGroup, ...] = (*result.skips, *result.deferrals)
    for group in groups:
        bits = bitmap_from(group.ordinals)
        if told & bits:
            raise Violation(f"decide says two things of {order.run} {order.shard}.{order.page}")
        told |= bits
        if group.reason is Reason.FREQUENCY_CAP:
            limit = spec.caps[0].limit
            for recipient in world.recipients_in(order.shard, order.page, group.ordinals):
                others = sum(
                    1
                    for run, leg, who in world.truth.decided
                    if who == recipient and (run, leg) != (order.run, order.leg)
                )
                if others < limit:
                    raise Violation(
                        f"a cap of {limit} refuses {order.run}/{order.leg} to {recipient}, who was "
                        f"to get {others} other messages"
                    )
    if told != bitmap_from(order.ordinals):
        raise Violation(f"decide leaves out somebody of {order.run} {order.shard}.{order.page}")
    for recipient in world.recipients_in(order.shard, order.page, result.sends):
        world.truth.decided[order.run, order.leg, recipient] = order.generation


def started(world: World, request: Request, operation: int) -> None:
    """A request leaves; ``operation`` of Redis gave leave to it."""
    spec = world.spec_of(request.run)
    stop = world.truth.stops.get(request.run)
    if stop is not None and stop < operation:
        status = world.truth.versions[request.run][1]
        raise Violation(f"{request} starts after all knew that the run is {status.value}")
    for scope in scopes_of(request.leg, spec.topic):
        known = world.truth.opted_out.get((request.recipient, scope))
        if known is None or known[0] >= operation:
            continue
        if (world.now - known[1]).total_seconds() * 1000 < OPT_OUT_MEMORY_MS:
            raise Violation(f"{request} starts although {request.recipient} withdrew {scope}")
    if world.now >= spec.deadline and operation < 0:
        raise Violation(f"{request} starts after its deadline")
    _capped(world, request, spec)


def _capped(world: World, request: Request, spec: CampaignSpec) -> None:
    """At most so many messages a window that were accepted, or may yet be."""
    if world.setup.lane is Lane.CRITICAL:
        return
    rule = spec.caps[0]
    if rule.channel is not None and rule.channel.value != request.leg:
        return
    if rule.window is WindowKind.ROLLING:
        since = request.at - rule.length
    else:
        since = calendar_window(rule.window, UTC_ZONE, request.at)[0]
    counted = {
        one.message
        for one in world.truth.requests
        if one.recipient == request.recipient
        and (one.at > since or one is request)
        and not one.refused
        and (rule.channel is None or rule.channel.value == one.leg)
    }
    if len(counted) > rule.limit:
        names = ", ".join(sorted(f"{run}/{leg}" for run, leg, _ in counted))
        raise Violation(f"{request.recipient} may get {rule.limit} a window and gets {names}")


def granted(world: World, run: str, account: str, count: int) -> None:
    """Tokens were granted: no limit is passed in any window."""
    state = world.redis.shaping.runs[f"{world.setup.specs[0].tenant}/{run}"]
    limits = [(f"account {account}", world.setup.account_rate)]
    if state.plan is not None:
        rate = state.plan.refill_per_us * (SECOND_US + JITTER_US) + state.plan.burst
        limits.append((f"run {run} at {state.version}", int(rate)))
    for name, limit in limits:
        if limit is None:
            continue
        log = world.truth.grants.setdefault(name, [])
        log.append((world.now, count))
        recent = sum(n for at, n in log if (world.now - at).total_seconds() < 1)
        if recent > limit:
            raise Violation(f"{recent} tokens within a second of {name}, limited to {limit:g}")


def put_back(world: World, run: str, account: str, count: int) -> None:
    """Tokens came back unused: they do not count against the provider."""
    for name, log in world.truth.grants.items():
        if name == f"account {account}" or name.startswith(f"run {run} "):
            log.append((world.now, -count))


def written(world: World, record: Record) -> None:
    """A record is in its topic for everybody to read."""


def _steps(world: World, run: str) -> list[books.Step]:
    """The rows of a run, as the ingest job writes them."""
    steps = []
    for topic in ("results", "outcomes"):
        for part in world.topics[topic].parts:
            for record in part:
                if isinstance(record, PageResult | Outcomes) and record.run == run:
                    steps += _rows(record)
    return steps


def _without_echoes(steps: list[books.Step]) -> list[books.Step]:
    """The rows without what a replay says of a message that another generation had accepted.

    A replay that finds the accepted bit says accepted in its own generation, also where that one
    had failed and a later one was sent: no contradiction.
    """
    accepted: dict[tuple[str, int, int], set[int]] = {}
    refused: set[tuple[str, int, int, int]] = set()
    for step in steps:
        place = step.leg, step.shard, step.ordinal
        if step.kind is StepKind.ACCEPTED:
            accepted.setdefault(place, set()).add(step.generation)
        elif step.kind in EXCLUSIVE_KINDS:
            refused.add((*place, step.generation))
    return [
        step
        for step in steps
        if step.reason != Reason.LEDGER_ACCEPTED.value
        or (step.leg, step.shard, step.ordinal, step.generation) not in refused
        or accepted[step.leg, step.shard, step.ordinal] == {step.generation}
    ]


def _rows(record: PageResult | Outcomes) -> list[books.Step]:
    base = record.page * PAGE
    rows: list[tuple[StepKind, Reason | None, int, list[int]]] = []
    if isinstance(record, PageResult):
        g = record.generation
        rows.append((StepKind.SEND, None, g, indexes_of(bitmap_from(record.sends))))
        for skip in record.skips:
            kind = StepKind.EXPIRED if skip.expired else StepKind.SKIPPED
            rows.append((kind, skip.reason, g, indexes_of(bitmap_from(skip.ordinals))))
        for put_off in record.deferrals:
            indexes = indexes_of(bitmap_from(put_off.ordinals))
            rows.append((StepKind.DEFER, put_off.reason, g, indexes))
    else:
        for one in record.groups:
            rows.append((_KINDS[one.outcome], one.reason, one.generation, list(one.indexes)))
    return [
        books.Step(
            record.leg, record.shard, base + index, generation, kind, reason.value if reason else ""
        )
        for kind, reason, generation, indexes in rows
        for index in indexes
    ]


def at_the_end(world: World, campaigns: Campaigns, delivery: Delivery) -> int:
    """All is quiet: nobody is forgotten, and three records agree. Answers how many are unknown."""
    unknown = 0
    for spec in world.setup.specs:
        run = spec.run
        memory = campaigns.memories[run]
        state = memory.run
        if state is None or not state.status.terminal:
            raise Violation(f"{run} is {state.status.value if state else 'not known'} for ever")
        if memory.pending:
            raise Violation(f"{run} is {state.status.value}, {memory.pending} pending for ever")
        if state.status is RunStatus.REFUSED:
            continue
        steps = _steps(world, run)
        legs = [leg.leg for leg in spec.legs]
        counts = books.count(_without_echoes(steps), world.setup.counts, legs)
        verdict = books.check(
            counts,
            books.Coordinator(
                state.status.value, world.now, memory.pending, counts.audience, memory.open
            ),
            True,
        )
        if not verdict.balanced:
            raise Violation(f"the books of {run} do not balance: {'; '.join(verdict.errors)}")
        unknown += counts.of(StepKind.UNKNOWN)
        people: dict[tuple[str, int, int], list[books.Step]] = {}
        for step in steps:
            people.setdefault((step.leg, step.shard, step.ordinal), []).append(step)
        for (leg, shard, ordinal), theirs in people.items():
            name = books.class_of(theirs)[0]
            taken = world.truth.accepted.get((run, leg, person(shard, ordinal)), [])
            if taken and name not in ("accepted", "unknown"):
                raise Violation(f"the provider took {taken[0]}, the books say {name}")
            if name == "accepted" and not taken:
                raise Violation(
                    f"the books say accepted of {run}/{leg} to {person(shard, ordinal)}, "
                    "the provider never had it"
                )
    if unknown > world.truth.unknown_bound:
        raise Violation(f"{unknown} unknown, {world.truth.unknown_bound} could be in doubt")
    for ref, ledger in world.redis.ledger.shards.items():
        for ordinal, entry in ledger.entries.items():
            if isinstance(entry.matter, Claim):
                raise Violation(f"a claim is left in the ledger {ref.run}/{ref.leg} at {ordinal}")
            took = world.truth.accepted.get((ref.run, ref.leg, person(ref.shard, ordinal)))
            if took and not entry.accepted and not isinstance(entry.matter, Held):
                raise Violation(f"the provider took {took[0]}, the ledger holds {entry.matter}")
    if not world.truth.lost_transactions:
        _no_room_lost(campaigns)
    return unknown


def _no_room_lost(campaigns: Campaigns) -> None:
    """Every reservation came to an end: none takes a person's room for ever."""
    for people in campaigns.people:
        for recipient, data in people.items():
            for one in recipient_bytes.read(data).held:
                if not (one.settled or one.refunded):
                    raise Violation(f"{one.run}/{one.leg} takes {recipient}'s room for ever")
