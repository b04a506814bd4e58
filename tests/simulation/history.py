"""A history: a set-up and a list of events, drawn from a seed, replayed at will.

An event is a kind and a number. The number picks among what the kind can be done to at that moment;
where there is nothing, nothing happens. So any part of a history is a history too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from schemas.ids import LegId, RecipientId, RunId
from schemas.message import Answer, Verdict
from schemas.pages import bitmap_bytes
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import (
    Command,
    CommandKind,
    ConsentChange,
    ConsentStatus,
    OutcomeGroup,
    Outcomes,
    Reorder,
)
from tests.simulation import invariants
from tests.simulation.actors import Campaigns, Delivery, Process
from tests.simulation.world import (
    PAGE,
    SNAPSHOT,
    TENANT,
    Redis,
    Setup,
    Violation,
    World,
    person,
    setup_of,
)
from transforms.ledger import BIT, Held, LedgerRef, Seen

Event = tuple[str, int]
_DRAIN_ROUNDS = 6000
_ALL = 112
"""Of the campaigns job: all that there is to do."""


class Simulation:
    """The world, the jobs in it, and what may happen to them."""

    def __init__(self, setup: Setup, trace: bool = False) -> None:
        self.world = World(setup, trace)
        self.campaigns = Campaigns(self.world)
        self.delivery = Delivery(self.world)
        self.unknown = 0
        """Recipients whose message nobody knows the end of, when all is quiet."""
        for number, spec in enumerate(setup.specs):
            self._command(spec.run, CommandKind.LAUNCH, number, launch=True)

    def do(self, event: Event) -> bool:
        """Let one event happen; says whether it could."""
        kind, number = event
        happened = _DO[kind](self, number)
        self.world.steps += happened
        return happened

    # delivery

    def process(self, number: int) -> Process:
        """The job's process, or at times a predecessor."""
        zombies = self.delivery.zombies
        if zombies and number % 3 == 0:
            return zombies[number % len(zombies)]
        return self.delivery.process

    def offer(self, number: int) -> bool:
        process = self.process(number)
        works = process.open_works()
        if not works:
            return False
        process.offer(works[(number >> 4) % len(works)], 1 + (number >> 2) % 2)
        return True

    def ledger_call(self, number: int, how: str = "") -> bool:
        desks = self.process(number).desks()
        return bool(desks) and desks[(number >> 4) % len(desks)].turn(how)

    def provider(self, number: int, how: str) -> bool:
        """The provider, or the network before it, deals with a request."""
        world = self.world
        open_ones = world.network
        if not open_ones:
            return False
        request = open_ones[number % len(open_ones)]
        if request.answered and how not in ("accept", "vanish"):
            return False
        world.progress += 1
        world.say(f"provider: {how} {request}")
        if how != "late":
            open_ones.remove(request)
        if how in ("accept", "accept, answer lost"):
            world.arrive(request)
        else:
            request.refused = how != "late"
        if request.answered:
            return True
        request.answered = True
        process = request.process
        assert isinstance(process, Process)
        if how != "accept":
            world.faults[f"provider: {how}"] += 1
        answer = _ANSWERS[how]
        if process.alive:
            if answer.verdict is Verdict.IN_DOUBT:
                world.truth.unknown_bound += 1
            process.answered(request, answer)
        return True

    # commands and consent

    def _command(self, run: str, kind: CommandKind, number: int, **more: object) -> None:
        world = self.world
        world.commands += 1
        rate = (None, 1.0, 5.0)[number % 3] if kind is CommandKind.SET_RATE else None
        reorders = more.get("reorders", ())
        assert isinstance(reorders, tuple)
        world.topics["commands"].append(
            Command(
                command_id=f"command {world.commands}",
                tenant=TENANT,
                run=RunId(run),
                kind=kind,
                issued_at=world.now,
                issued_by="operator",
                launch=world.spec_of(run) if more.get("launch") else None,
                rate_per_second=rate,
                reorders=reorders,
            ),
            number,
        )
        world.progress += 1

    def command(self, number: int, kind: CommandKind) -> bool:
        specs = self.world.setup.specs
        self._command(specs[number % len(specs)].run, kind, number >> 4)
        return True

    def reorder(self, number: int) -> bool:
        """Replay a dead letter."""
        letters = self.world.dead_letters
        if not letters:
            return False
        run, leg, shard, page, index = letters[number % len(letters)]
        one = Reorder(LegId(leg), shard, page, bitmap_bytes(1 << index))
        self._command(run, CommandKind.REORDER, number >> 4, reorders=(one,))
        self.world.faults["dead letter replayed"] += 1
        return True

    def consent(self, number: int) -> bool:
        world = self.world
        counts = world.setup.counts
        people = [f"p{shard}{i}" for shard, count in enumerate(counts) for i in range(count)]
        world.pass_time(timedelta(milliseconds=1))
        status = ConsentStatus.GRANTED if number >> 4 & 3 == 0 else ConsentStatus.WITHDRAWN
        world.commands += 1
        change = ConsentChange(
            f"change {world.commands}",
            TENANT,
            RecipientId(people[number % len(people)]),
            ("email", "sms", "*")[(number >> 6) % 3],
            "*",
            status,
            world.now,
            "form",
        )
        # The consent topic is keyed by person: the order of one's own words is kept.
        world.topics["consent"].append(change, 0)
        world.progress += 1
        return True

    def repeat(self, number: int, topic: str) -> bool:
        """An old record comes again."""
        world = self.world
        parts = world.topics[topic].parts
        part = parts[number % len(parts)]
        if not part:
            return False
        world.topics[topic].append(part[(number >> 4) % len(part)], number >> 1)
        world.faults[f"{topic}: record repeated"] += 1
        world.progress += 1
        return True

    # Redis

    def copy_redis(self, number: int) -> bool:
        return self.world.keep_copy()

    def lose_redis(self, number: int, *, empty: bool) -> bool:
        """Redis comes back empty, or as it was some time ago.

        Only where all that was done since is known to the checkpoint: a ledger of which delivery
        never kept a trace can't be told from an untouched one, nor an old status from a new one.
        """
        world, delivery = self.world, self.delivery
        other = Redis() if empty else world.copy
        if other is None or world.real is not None or delivery.zombies:
            return False
        if not empty and (
            other.ledger.runs != world.redis.ledger.runs
            or other.ledger.opt_outs != world.redis.ledger.opt_outs
        ):
            return False
        saved: dict[LedgerRef, Seen] = {}
        for marks in delivery.saved.marks.values():
            saved |= marks
        for ref, shard in world.redis.ledger.shards.items():
            there = other.ledger.shards.get(ref)
            behind = -1 if there is None else there.seq
            if shard.seq > max(behind, 0) and (ref not in saved or saved[ref].seq <= behind):
                return False
        world.faults["redis restarted empty" if empty else "redis rolled back"] += 1
        world.say("redis is " + ("empty" if empty else "as it was some time ago"))
        world.put_in_place(other if empty else other.copied())
        return True

    def repair_redis(self, number: int) -> bool:
        """Redis's data are restored, and delivery is started again."""
        if not self.world.repair():
            return False
        self.world.say("redis has its data again")
        self.delivery.crash(late=False)
        return True

    def flake(self, number: int) -> bool:
        self.world.flakes.append(("unreachable", "half done", "answer lost")[number % 3])
        return True

    def webhook(self, number: int) -> bool:
        """A webhook tells that a message was taken: what is in doubt is settled by it."""
        world = self.world
        taken = [one for each in world.truth.accepted.values() for one in each]
        if not taken or world.real is not None:
            return False
        request = taken[number % len(taken)]
        entry = world.redis.ledger.reconcile(request.ref, [request.ordinal])[0]
        world.operations += 1
        if entry != BIT:
            return False
        world.say(f"a webhook tells of {request}")
        reason = Reason.SETTLED_BY_WEBHOOK
        self._settled(request.ref, request.ordinal, request.generation, reason, number >> 4)
        return True

    def _settled(
        self, ref: LedgerRef, ordinal: int, generation: int, reason: Reason, part: int
    ) -> None:
        world = self.world
        page, index = divmod(ordinal, PAGE)
        group = OutcomeGroup(Outcome.ACCEPTED, reason, "", generation, (index,))
        outcomes = Outcomes(
            ref.tenant, ref.run, ref.leg, SNAPSHOT, ref.shard, page, world.now, (group,)
        )
        world.topics["outcomes"].append(outcomes, part)
        world.progress += 1

    def settle_by_hand(self, number: int) -> bool:
        """Somebody asks the provider about an unknown, and settles it: ledger first."""
        world = self.world
        if world.real is not None:
            return False
        unknown = [
            (ref, ordinal, matter)
            for ref, shard in world.redis.ledger.shards.items()
            for ordinal, entry in shard.entries.items()
            if isinstance(matter := entry.matter, Held)
        ]
        if not unknown:
            return False
        ref, ordinal, held = unknown[number % len(unknown)]
        # The provider can only tell of what has reached it.
        if any((one.ref, one.ordinal) == (ref, ordinal) for one in world.network):
            return False
        recipient = person(ref.shard, ordinal)
        accepted = (ref.run, ref.leg, recipient) in world.truth.accepted
        world.operations += 1
        world.redis.ledger.settle_by_hand(ref, ordinal, held, accepted)
        world.faults["unknown settled by hand"] += 1
        world.say(f"{ref.run}/{ref.leg} to {recipient} is settled by hand: {accepted=}")
        if accepted:
            reason = Reason.SETTLED_BY_HAND
            self._settled(ref, ordinal, held.generation, reason, number >> 4)
        else:
            page, index = divmod(ordinal, PAGE)
            one = Reorder(ref.leg, ref.shard, page, bitmap_bytes(1 << index))
            self._command(ref.run, CommandKind.REORDER, number >> 4, reorders=(one,))
        return True

    # time, and many small steps at once

    def pass_time(self, number: int, steps: Sequence[timedelta]) -> bool:
        by = steps[number % len(steps)]
        self.world.pass_time(by)
        self.world.say(f"{by} pass")
        return True

    def run_campaigns(self, number: int) -> bool:
        """The campaigns job works off what is there, or most of it."""
        campaigns = self.campaigns
        campaigns.tick(number)
        learns, commits = number & 16, number & 96
        while campaigns.read(number) or campaigns.decide(number):
            pass
        while learns and campaigns.learn(number):
            pass
        campaigns.checkpoint()
        while commits and campaigns.commit(number):
            pass
        return True

    def run_delivery(self, number: int) -> bool:
        """Delivery takes what is there and claims it; requests stay on their way."""
        delivery = self.delivery
        while delivery.read(number):
            pass
        process = delivery.process
        for work in process.open_works():
            process.offer(work, 2)
        for _ in range(3):
            for desk in process.desks():
                desk.turn("")
        return True

    def finish_delivery(self, number: int) -> bool:
        """Delivery settles, emits and completes a checkpoint."""
        delivery = self.delivery
        process = delivery.process
        for _ in range(3):
            for desk in process.desks():
                desk.turn("")
        delivery.collect(process)
        return delivery.checkpoint(number)

    def collect(self, number: int) -> bool:
        return self.delivery.collect(self.process(number))

    def flush(self, number: int) -> bool:
        return self.delivery.flush(self.process(number), number >> 4)

    def end_zombie(self, number: int) -> bool:
        zombies = self.delivery.zombies
        if not zombies:
            return False
        self.delivery.end(zombies[number % len(zombies)])
        return True

    # the end

    def drain(self) -> None:
        """No more faults: everything comes to its end, or a promise is broken."""
        world, campaigns, delivery = self.world, self.campaigns, self.delivery
        world.say("-- no more faults --")
        world.flakes.clear()
        for process in tuple(delivery.zombies):
            delivery.end(process)
        self.repair_redis(0)
        while delivery.late_call(0):
            pass
        for spec in world.setup.specs:
            # A pause may be on its way yet: the resume comes after it.
            self._command(spec.run, CommandKind.RESUME, 0)
            self._command(spec.run, CommandKind.RESUME, 1)
        jump = timedelta(seconds=1)
        resumed = world.now
        for _ in range(_DRAIN_ROUNDS):
            before = world.progress
            for number in range(len(world.setup.specs)):
                campaigns.tick(number)
            self.run_campaigns(_ALL)
            self.run_delivery(0)
            while self.provider(0, "accept"):
                pass
            self.finish_delivery(0)
            if world.progress != before:
                jump = timedelta(seconds=1)
                continue
            runs = [memory.run for memory in campaigns.memories.values()]
            if campaigns.idle and delivery.idle and not world.network:
                paused = [run.run for run in runs if run and run.status is RunStatus.PAUSED]
                if paused and world.now > resumed:
                    for run in paused:
                        self._command(run, CommandKind.RESUME, 0)
                    continue
                done = [run is not None and run.status.terminal for run in runs]
                settled = not any(memory.pending for memory in campaigns.memories.values())
                if len(done) == len(world.setup.specs) and all(done) and settled:
                    break
            world.pass_time(jump)
            jump = min(jump * 4, timedelta(hours=6))
        self.unknown = invariants.at_the_end(world, campaigns, delivery)


def _answer(verdict: Verdict, retry_after: timedelta | None = None) -> Answer:
    return Answer(verdict, verdict.value, retry_after=retry_after)


_ANSWERS = {
    "accept": _answer(Verdict.ACCEPTED),
    "accept, answer lost": _answer(Verdict.IN_DOUBT),
    "vanish": _answer(Verdict.IN_DOUBT),
    "late": _answer(Verdict.IN_DOUBT),
    "refuse": _answer(Verdict.REFUSED),
    "address dead": _answer(Verdict.ADDRESS_DEAD),
    "throttle": _answer(Verdict.THROTTLED, retry_after=timedelta(seconds=1)),
    "error": _answer(Verdict.RETRYABLE),
    "account refused": _answer(Verdict.ACCOUNT),
}
_SMALL = tuple(timedelta(milliseconds=ms) for ms in (1, 50, 200, 1000, 1000, 2000, 5000))
_LARGE = (
    timedelta(seconds=30),
    timedelta(minutes=3, seconds=5),
    timedelta(minutes=3, seconds=5),
    timedelta(minutes=11),
    timedelta(minutes=21),
    timedelta(minutes=31),
    timedelta(hours=2),
    timedelta(hours=13),
)
_Do = Callable[[Simulation, int], bool]


def _provider(how: str) -> _Do:
    return lambda simulation, number: simulation.provider(number, how)


def _ledger(how: str) -> _Do:
    return lambda simulation, number: simulation.ledger_call(number, how)


def _commanded(kind: CommandKind) -> _Do:
    return lambda simulation, number: simulation.command(number, kind)


_WORK: dict[str, tuple[int, _Do]] = {
    "coordinate reads": (8, lambda s, n: s.campaigns.read(n)),
    "decide learns": (4, lambda s, n: s.campaigns.learn(n)),
    "decide": (6, lambda s, n: s.campaigns.decide(n)),
    "tick": (4, lambda s, n: s.campaigns.tick(n)),
    "campaigns checkpoint": (3, lambda s, n: s.campaigns.checkpoint()),
    "commit": (4, lambda s, n: s.campaigns.commit(n)),
    "campaigns run": (5, Simulation.run_campaigns),
    "delivery reads": (6, lambda s, n: s.delivery.read(n)),
    "offer": (10, Simulation.offer),
    "ledger": (16, _ledger("")),
    "provider accepts": (5, _provider("accept")),
    "collect": (5, Simulation.collect),
    "flush": (4, Simulation.flush),
    "delivery checkpoint": (2, lambda s, n: s.delivery.checkpoint(n)),
    "delivery run": (4, Simulation.run_delivery),
    "delivery finishes": (3, Simulation.finish_delivery),
    "late call arrives": (2, lambda s, n: s.delivery.late_call(n)),
    "short time": (6, lambda s, n: s.pass_time(n, _SMALL)),
    "long time": (2, lambda s, n: s.pass_time(n, _LARGE)),
}
"""What goes on all the time."""
_TROUBLE: dict[str, tuple[int, _Do]] = {
    "ledger answer lost": (5, _ledger("lost")),
    "ledger call delayed": (5, _ledger("late")),
    "answer lost": (4, _provider("accept, answer lost")),
    "request vanishes": (3, _provider("vanish")),
    "request late": (4, _provider("late")),
    "refusal": (4, _provider("refuse")),
    "address dead": (2, _provider("address dead")),
    "throttle": (3, _provider("throttle")),
    "error": (4, _provider("error")),
    "account refused": (2, _provider("account refused")),
}
"""What goes wrong with single calls: some kinds of it in each history."""
_EVENTS: dict[str, tuple[int, _Do]] = {
    "campaigns killed": (4, lambda s, n: s.campaigns.crash()),
    "transaction lost": (4, lambda s, n: s.campaigns.lose()),
    "delivery killed": (6, lambda s, n: s.delivery.crash(late=False)),
    "predecessor acts on": (5, lambda s, n: s.delivery.crash(late=True)),
    "predecessor ends": (1, Simulation.end_zombie),
    "redis fails": (3, Simulation.flake),
    "redis copied": (2, Simulation.copy_redis),
    "redis rolled back": (2, lambda s, n: s.lose_redis(n, empty=False)),
    "redis empty": (2, lambda s, n: s.lose_redis(n, empty=True)),
    "redis repaired": (3, Simulation.repair_redis),
    "consent": (3, Simulation.consent),
    "pause": (2, _commanded(CommandKind.PAUSE)),
    "resume": (4, _commanded(CommandKind.RESUME)),
    "cancel": (1, _commanded(CommandKind.CANCEL)),
    "rate": (1, _commanded(CommandKind.SET_RATE)),
    "replay": (4, Simulation.reorder),
    "outcomes repeated": (3, lambda s, n: s.repeat(n, "outcomes")),
    "command repeated": (2, lambda s, n: s.repeat(n, "commands")),
    "webhook": (2, Simulation.webhook),
    "settled by hand": (4, Simulation.settle_by_hand),
}
"""What happens now and then."""
_BEGINNING = ("campaigns run", "campaigns run", "delivery run")
_DO: dict[str, _Do] = {
    kind: do for kind, (_, do) in (*_WORK.items(), *_TROUBLE.items(), *_EVENTS.items())
}


@dataclass(frozen=True)
class History:
    """What is needed to let the same things happen again."""

    setup: Setup
    events: tuple[Event, ...]


def history_of(seed: int) -> History:
    """The history of a seed: some kinds of trouble, some actors slower than others."""
    rng = random.Random(f"history {seed}")
    weights = {kind: weight * rng.choice((0.2, 1, 1, 1, 2)) for kind, (weight, _) in _WORK.items()}
    for kind in rng.sample(sorted(_TROUBLE), rng.randint(1, 4)):
        weights[kind] = _TROUBLE[kind][0]
    names = _drawn(rng, weights, rng.choice((30, 60, 90, 120)))
    some = rng.sample(sorted(_EVENTS), rng.randint(2, 8))
    for kind in _drawn(rng, {kind: _EVENTS[kind][0] for kind in some}, rng.randint(1, 10)):
        names.insert(rng.randint(0, len(names)), kind)
    if rng.random() < 0.8:
        names[:0] = _BEGINNING
    bits = rng.getrandbits(16 * len(names))
    events = ((name, bits >> 16 * at & 0xFFFF) for at, name in enumerate(names))
    return History(setup_of(seed), tuple(events))


def _drawn(rng: random.Random, weights: Mapping[str, float], count: int) -> list[str]:
    return rng.choices(list(weights), list(weights.values()), k=count)


def play(history: History, trace: bool = False) -> tuple[Simulation, Violation | None]:
    """Let a history happen, and everything come to its end. Small pages must be in place."""
    simulation = Simulation(history.setup, trace)
    try:
        for event in history.events:
            simulation.do(event)
        simulation.drain()
    except Violation as broken:
        return simulation, broken
    return simulation, None
