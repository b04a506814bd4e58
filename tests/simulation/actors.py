"""The jobs, as their shells run them: what is state, when it is saved, what is emitted.

The decisions are those of ``transforms``: the same code that runs in the jobs. What is here is
what Flink, the topics and the event loop do around them, one small step at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain

from schemas.codec import to_millis
from schemas.errors import Corrupt, Fenced, MissingLedger, Unavailable
from schemas.ids import run_key
from schemas.message import Answer, Verdict
from schemas.pages import bitmap_from, delivery_key, indexes_of
from schemas.reasons import Reason
from schemas.records import (
    Command,
    CommandKind,
    ConsentChange,
    DeadLetter,
    Outcomes,
    PageOrder,
    PageResult,
    Send,
)
from schemas.state import RunState
from sinks.delivery_records import records_of
from sinks.delivery_work import Completion
from tests.simulation import invariants
from tests.simulation.world import PAGE, PARTS, Record, Redis, Request, World, person
from transforms import consent, decide, delivery
from transforms.coordinate import Coordinator, Effects, LaunchFacts, PageKey, RunMemory
from transforms.delivery import Again, Next, Told, Tries, Turn
from transforms.ledger import (
    Ask,
    Claims,
    LedgerRef,
    Moved,
    Owner,
    Seen,
    Settled,
    SettledKind,
    Settlement,
    Settlements,
    recipient_key,
    scopes_of,
)
from transforms.ledger import Verdict as LedgerVerdict
from transforms.shaping import Grant, Limit, plan

Offsets = dict[tuple[str, str], list[int]]
Memories = dict[str, tuple[RunState | None, dict[PageKey, object]]]


class _Reader:
    """Reads topics' partitions, each in order."""

    def __init__(self, world: World, names: Sequence[tuple[str, str]]) -> None:
        self.world = world
        self.offsets: Offsets = {name: [0] * PARTS for name in names}

    def unread(self, reader: str) -> list[tuple[str, int]]:
        """Topic and partition of what this reader may read next."""
        return [
            (topic, part)
            for (who, topic), offsets in self.offsets.items()
            if who == reader
            for part in range(PARTS)
            if offsets[part] < len(self.world.topics[topic].parts[part])
        ]

    def next(self, reader: str, topic: str, part: int) -> Record:
        offsets = self.offsets[reader, topic]
        record = self.world.topics[topic].parts[part][offsets[part]]
        offsets[part] += 1
        self.world.progress += 1
        return record

    def copied(self) -> Offsets:
        return {name: list(offsets) for name, offsets in self.offsets.items()}

    def restore(self, offsets: Offsets) -> None:
        self.offsets = {name: list(each) for name, each in offsets.items()}


@dataclass
class _CampaignsState:
    offsets: Offsets
    memories: Memories
    channel: list[list[PageOrder]]
    people: list[dict[str, bytes]]
    owed: dict[tuple[str, str, str], ConsentChange]


class Campaigns:
    """Coordinate and decide: one job, one transaction a checkpoint."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.source = _Reader(
            world,
            (
                ("coordinate", "commands"),
                ("coordinate", "results"),
                ("coordinate", "outcomes"),
                ("decide", "outcomes"),
                ("decide", "consent"),
            ),
        )
        shards = len(world.setup.counts)
        self.memories: dict[str, RunMemory] = {}
        self.channel: list[deque[PageOrder]] = [deque() for _ in range(shards)]
        self.people: list[dict[str, bytes]] = [{} for _ in range(shards)]
        self.owed: dict[tuple[str, str, str], ConsentChange] = {}
        self.buffer: list[Record] = []
        self.begun: datetime | None = None
        self.prepared: list[tuple[list[Record], datetime]] = []
        self.saved = self._snapshot()

    # coordinate

    def read(self, pick: int) -> bool:
        """Coordinate takes one record."""
        unread = self.source.unread("coordinate")
        if not unread:
            return False
        world = self.world
        topic, part = unread[pick % len(unread)]
        record = self.source.next("coordinate", topic, part)
        assert isinstance(record, Command | PageResult | Outcomes)
        world.say(f"coordinate reads {describe(record)}")
        coordinator = self._coordinator(record.run)
        if isinstance(record, Command):
            effects = coordinator.on_command(record, world.now, self._facts(record))
        elif isinstance(record, PageResult):
            effects = coordinator.on_result(record, world.now)
        else:
            effects = coordinator.on_outcomes(record, world.now)
        self._carry_out(record.run, coordinator, effects)
        return True

    def tick(self, pick: int) -> bool:
        """A run's clock ticks, as long as it is wound up."""
        if not self.memories:
            return False
        run = list(self.memories)[pick % len(self.memories)]
        coordinator = self._coordinator(run)
        if not _armed(coordinator, self.world.now):
            return False
        self._carry_out(run, coordinator, coordinator.on_tick(self.world.now))
        return True

    def _coordinator(self, run: str) -> Coordinator:
        memory = self.memories.setdefault(run, RunMemory())
        return Coordinator(memory, self.world.setup.policy)

    def _facts(self, command: Command) -> LaunchFacts | None:
        spec = command.launch
        if spec is None:
            return None
        named = next(name for name, one in self.world.specs.items() if one is spec)
        return LaunchFacts(named, self.world.setup.counts)

    def _carry_out(self, run: str, coordinator: Coordinator, effects: Effects) -> None:
        self._emit(effects)
        if effects.publish:
            self._publish(run, coordinator)
        if effects.create_ledger and self._create_ledger(run):
            after = coordinator.on_ledger_created(self.world.now)
            self._emit(after)
            if after.publish:
                self._publish(run, coordinator)
        invariants.coordinated(self.world, run, coordinator, effects)
        coordinator.memory.dirty.clear()

    def _emit(self, effects: Effects) -> None:
        world = self.world
        for order in effects.orders:
            self.channel[order.shard].append(order)
            world.progress += 1
            world.say(f"coordinate orders {describe(order)}")
        for closing in effects.closings:
            self._write(closing)
        for event in effects.events:
            world.say(f"{event.run} is {event.status.value}, {event.pending} pending {event.note}")

    def _publish(self, run: str, coordinator: Coordinator) -> None:
        state = coordinator.memory.run
        if state is None:
            return
        try:
            spec = self.world.spec_of(run)
            self.world.publish(spec, state.version, state.status, state.rate_per_second)
        except Unavailable:
            return
        coordinator.on_published(state.version, self.world.now)

    def _create_ledger(self, run: str) -> bool:
        try:
            self.world.create_ledger(self.world.spec_of(run))
        except (Unavailable, Corrupt):
            return False
        return True

    # decide

    def decide(self, pick: int) -> bool:
        """Decide takes the next order of a shard."""
        waiting = [shard for shard, orders in enumerate(self.channel) if orders]
        if not waiting:
            return False
        world = self.world
        order = self.channel[waiting[pick % len(waiting)]].popleft()
        spec = world.specs[order.spec]
        people = self.people[order.shard]
        facts = world.pages[order.shard, order.page]
        decided = decide.decide_page(order, spec, facts, people.get, world.now)
        invariants.decided(world, order, spec, decided)
        people.update(decided.states)
        self._write(decided.result)
        for send in decided.sends:
            self._write(send)
        world.say(f"decide: {describe(decided.result)}")
        world.progress += 1
        return True

    def learn(self, pick: int) -> bool:
        """Decide takes an outcome or a consent change, or tells Redis what it is owed."""
        unread = self.source.unread("decide")
        if self.owed and (pick & 1 or not unread):
            return self._tell_claims()
        if not unread:
            return False
        world = self.world
        topic, part = unread[pick % len(unread)]
        record = self.source.next("decide", topic, part)
        world.say(f"decide reads {describe(record)}")
        if isinstance(record, Outcomes):
            people = self.people[record.shard]
            facts = world.pages[record.shard, record.page]
            people.update(decide.fold_page_outcomes(record, facts, people.get))
            return True
        assert isinstance(record, ConsentChange)
        people = self.people[int(record.recipient_id[1])]
        after = consent.change_bytes(people.get(record.recipient_id), record)
        if after is None:
            return True
        people[record.recipient_id] = after
        waits = bool(self.owed)
        for one in consent.for_claims(after, record, world.now):
            self.owed[one.recipient_id, one.channel, one.topic] = one
        return waits or not self.owed or self._tell_claims()

    def _tell_claims(self) -> bool:
        """Tell Redis of consent changes until it does not answer."""
        for name, one in list(self.owed.items()):
            if not consent.forgotten_by_claims(one, self.world.now):
                try:
                    self.world.opt_out(one)
                except Unavailable:
                    break
            del self.owed[name]
            self.world.progress += 1
        return True

    # the engine around them

    def _write(self, record: Record) -> None:
        if self.begun is None:
            self.begun = self.world.now
        self.buffer.append(record)

    def _snapshot(self) -> _CampaignsState:
        return _CampaignsState(
            self.source.copied(),
            {run: (one.run, dict(one.pages)) for run, one in self.memories.items()},
            [list(orders) for orders in self.channel],
            [dict(each) for each in self.people],
            dict(self.owed),
        )

    def checkpoint(self) -> bool:
        """Complete a checkpoint; what was written since the last is to be committed."""
        world = self.world
        if self.begun is not None and world.now - self.begun > world.setup.transaction:
            world.faults["transaction timed out before its checkpoint"] += 1
            self.crash()
            return True
        if self.begun is not None:
            self.prepared.append((self.buffer, self.begun))
            self.buffer, self.begun = [], None
            world.progress += 1
        self.saved = self._snapshot()
        return True

    def commit(self, pick: int) -> bool:
        """The checkpoint's transaction is committed, if Kafka still knows it."""
        if not self.prepared:
            return False
        world = self.world
        records, begun = self.prepared.pop(0)
        world.progress += 1
        if world.now - begun > world.setup.transaction:
            world.faults["transaction timed out after its checkpoint"] += 1
            world.truth.lost_transactions += 1
            world.say("Kafka has given up the transaction of the last checkpoint")
            return True
        for number, record in enumerate(records):
            world.topics[_TOPIC_OF[type(record)]].append(record, pick >> number % 8)
            invariants.written(world, record)
        world.say(f"committed: {len(records)} records")
        return True

    def lose(self) -> bool:
        """Kafka loses a transaction that is to be committed."""
        if not self.prepared:
            return False
        self.prepared.pop(0)
        self.world.truth.lost_transactions += 1
        self.world.faults["transaction lost"] += 1
        self.world.progress += 1
        self.world.say("the transaction of the last checkpoint is lost")
        return True

    def crash(self) -> bool:
        """The job is ended and begins again from its last checkpoint."""
        self.world.faults["campaigns job killed"] += 1
        self.world.progress += 1
        self.world.say("the campaigns job is killed and restored")
        self.buffer, self.begun = [], None
        saved = self.saved
        self.source.restore(saved.offsets)
        self.channel = [deque(orders) for orders in saved.channel]
        self.people = [dict(each) for each in saved.people]
        self.owed = dict(saved.owed)
        self.memories = {}
        for name, (run, pages) in saved.memories.items():
            memory = RunMemory(run, dict(pages))  # type: ignore[arg-type]
            memory.recount()
            self.memories[name] = memory
        self.world.pass_time(timedelta(seconds=2))
        # What was prepared with a checkpoint is committed at restore.
        while self.prepared:
            self.commit(self.world.steps)
        return True

    @property
    def idle(self) -> bool:
        return not (
            any(self.channel)
            or self.prepared
            or self.buffer
            or self.source.unread("coordinate")
            or self.source.unread("decide")
            or self.owed
        )


def _armed(coordinator: Coordinator, now: datetime) -> bool:
    """Whether the shell keeps a timer for the run."""
    run = coordinator.memory.run
    if run is None:
        return False
    over = run.status.terminal and not coordinator.closing and not coordinator.unpublished(now)
    return not over or coordinator.memory.open > 0


_TOPIC_OF: dict[type, str] = {PageResult: "results", Outcomes: "outcomes", Send: "sends"}


def key_of(send: Send) -> int:
    """The delivery key of a send."""
    return delivery_key(send.shard)


def name_of(send: Send) -> str:
    """As ``pipelines.delivery.work_name``, which would need the engine here."""
    return (
        f"{send.tenant}/{send.run}/{send.leg}/{send.shard}/{send.page}/{send.generation}/"
        f"{to_millis(send.valid_until)}"
    )


class Work:
    """A send that is not finished."""

    def __init__(self, key: int, name: str, send: Send, desk: Desk) -> None:
        self.key = key
        self.name = name
        self.send = send
        self.desk = desk
        self.ready = indexes_of(bitmap_from(send.ordinals))
        self.left = len(self.ready)
        self.waiting: list[tuple[datetime, int]] = []
        self.tries: dict[int, Tries] = {}
        self.under_way: set[int] = set()
        """Between asking for a claim and its settlement."""

    def due(self, now: datetime) -> None:
        for one in [one for one in self.waiting if one[0] <= now]:
            self.waiting.remove(one)
            self.ready.append(one[1])


@dataclass(frozen=True)
class Attempt:
    """What a process calls a request."""

    work: Work
    index: int
    account: str


@dataclass
class Call:
    """A call to the ledger, repeated until it is answered."""

    payload: Sequence[Ask] | Sequence[Settlement]
    scopes: Sequence[str]
    answered: Callable[[Sequence[LedgerVerdict], int], None] | None
    settled: Sequence[Callable[[Settled], None]] = ()


@dataclass
class Desk:
    """One ledger's desk: one call at a time."""

    ref: LedgerRef
    key: Key
    seen: Seen | None
    questions: deque[Call] = field(default_factory=deque)
    settlements: deque[tuple[Settlement, Callable[[Settled], None]]] = field(default_factory=deque)
    call: Call | None = None
    after_settle: bool = False

    @property
    def idle(self) -> bool:
        return self.call is None and not self.questions and not self.settlements

    def turn(self, how: str) -> bool:
        """Make the next call. ``how``: answered, its answer lost, or late (it may arrive yet)."""
        if self.idle or self.key.fenced or not self.key.process.alive:
            return False
        if self.call is None:
            self.call = self._next()
        process = self.key.process
        world = process.world
        try:
            owner = process.owner(self.key)
            if self.seen is None:
                self.seen = world.redis.ledger.look(self.ref)
            if how == "late":
                process.job.late.append((self, owner, self.seen, self.call))
                world.faults["call to the ledger delayed"] += 1
                return True
            answer = self.carry_out(world.redis, owner, self.seen, self.call)
        except Fenced:
            world.faults["predecessor fenced"] += 1
            world.progress += 1
            process.fence(self.key)
            if process is process.job.process:
                # A predecessor came to the key later than this process: the job fails, and takes
                # the key again when it is restored.
                process.job.crash(late=False)
            return True
        except (MissingLedger, Corrupt):
            world.faults["ledger refused"] += 1
            return True
        world.progress += 1
        if how == "lost":
            world.faults["answer of the ledger lost"] += 1
            world.say(f"{process.name}: the ledger's answer is lost")
            return True
        self.seen = Seen(self.seen.dataset, answer.seq)
        call = self.call
        if isinstance(answer, Moved):
            return True
        self.call = None
        if isinstance(answer, Claims):
            assert call.answered is not None
            call.answered(answer.verdicts, world.operations)
        else:
            for settled, told in zip(call.settled, answer.answers, strict=True):
                settled(told)
        return True

    def carry_out(
        self, redis: Redis, owner: Owner, seen: Seen, call: Call
    ) -> Claims | Settlements | Moved:
        """What the script does when the call reaches the server."""
        world = self.key.process.world
        world.operations += 1
        if call.answered is not None:
            asks = [one for one in call.payload if isinstance(one, Ask)]
            return redis.ledger.claim(self.ref, owner, seen, call.scopes, asks, world.now_ms)
        settlements = [one for one in call.payload if isinstance(one, Settlement)]
        return redis.ledger.settle(self.ref, owner, seen, settlements, world.now_ms)

    def _next(self) -> Call:
        if self.settlements and not (self.after_settle and self.questions):
            self.after_settle = True
            taken = list(self.settlements)
            self.settlements.clear()
            return Call([one for one, _ in taken], (), None, [told for _, told in taken])
        self.after_settle = False
        return self.questions.popleft()


@dataclass
class Key:
    """What a process knows of a delivery key."""

    number: int
    process: Process
    marks: dict[LedgerRef, Seen]
    owner: Owner | None = None
    fenced: bool = False
    desks: dict[LedgerRef, Desk] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)
    owed: dict[str, int] = field(default_factory=dict)
    done: list[Completion] = field(default_factory=list)
    told_marks: dict[LedgerRef, Seen] = field(default_factory=dict)


class Process:
    """Delivery's loop in one process, from its start to its end."""

    def __init__(self, job: Delivery, name: str) -> None:
        self.job = job
        self.world = job.world
        self.name = name
        self.alive = True
        self.keys: dict[int, Key] = {}
        self.unflushed: list[Record] = []

    # handed over by the operator

    def take_over(self, key: int, marks: dict[LedgerRef, Seen]) -> None:
        self.keys[key] = Key(key, self, dict(marks))

    def submit(self, number: int, name: str, send: Send) -> None:
        key = self.keys[number]
        if name in key.owed:
            return
        ref = LedgerRef(send.tenant, send.run, send.leg, send.shard)
        desk = key.desks.get(ref)
        if desk is None:
            desk = key.desks[ref] = Desk(ref, key, key.marks.get(ref))
        work = Work(number, name, send, desk)
        key.owed[name] = work.left
        key.works[name] = work

    def collect(self, number: int) -> tuple[list[Record | DeadLetter], list[str]]:
        """What is done since the last look: records, and names of sends that are finished."""
        key = self.keys[number]
        done, key.done = key.done, []
        finished = []
        for one in done:
            name = one.work.name
            key.owed[name] -= 1
            if key.owed[name] == 0:
                del key.owed[name]
                del key.works[name]
                finished.append(name)
        for ref, desk in key.desks.items():
            if desk.seen is not None:
                key.told_marks[ref] = desk.seen
        return list(records_of(done)), finished

    # the loop

    def owner(self, key: Key) -> Owner:
        """This process's ownership of a key, taken at first touch."""
        if key.owner is None:
            epoch = self.world.redis.ledger.acquire_epoch(self.world.setup.lane, key.number)
            self.took_over(key, epoch)
        assert key.owner is not None
        return key.owner

    def took_over(self, key: Key, epoch: int) -> None:
        """From now on its predecessors are fenced: what they have under way is in doubt."""
        key.owner = Owner(self.world.setup.lane, key.number, epoch)
        for other in self.job.others(self):
            self.world.truth.unknown_bound += other.under_way(key.number)
        self.world.say(f"{self.name} owns delivery key {key.number} at epoch {epoch}")

    def under_way(self, number: int) -> int:
        key = self.keys.get(number)
        if key is None or key.fenced:
            return 0
        return sum(len(work.under_way) for work in key.works.values())

    def fence(self, key: Key) -> None:
        """A successor owns the key."""
        self.world.say(f"{self.name} is fenced from delivery key {key.number}")
        key.fenced = True
        for work in key.works.values():
            work.ready.clear()
            work.waiting.clear()
        for desk in key.desks.values():
            desk.call = None
            desk.questions.clear()
            desk.settlements.clear()

    def open_works(self) -> list[Work]:
        """Works with something ready."""
        if not self.alive:
            return []
        now = self.world.now
        found = []
        for key in self.keys.values():
            for work in key.works.values():
                if work.waiting:
                    work.due(now)
                if work.ready:
                    found.append(work)
        return found

    def desks(self) -> list[Desk]:
        return [
            desk
            for key in self.keys.values()
            if not key.fenced
            for desk in key.desks.values()
            if not desk.idle
        ]

    def offer(self, work: Work, most: int) -> None:
        """Get tokens for a batch, and send what they allow."""
        world = self.world
        send = work.send
        spec = world.specs[send.spec]
        leg = decide.leg_of(spec, send.leg)
        route = work.tries.get(work.ready[0], Tries()).route
        indexes = [index for index in work.ready if work.tries.get(index, Tries()).route == route][
            :most
        ]
        account = f"{leg.routes[route].provider}:{leg.routes[route].account}"
        rate = world.setup.account_rate
        limits = [(f"account/{account}", plan(Limit(rate)), True)] if rate is not None else []
        run = run_key(send.tenant, send.run)
        grant = world.redis.shaping.take(
            len(indexes), send.lane, account, limits, run, world.now_ms * 1000
        )
        turn = delivery.after_grant(
            grant, world.now, send.valid_until, send.deadline, route, len(leg.routes)
        )
        match turn:
            case Turn.SEND:
                indexes = indexes[: grant.granted]
                invariants.granted(world, send.run, account, grant.granted)
                self._ask(work, indexes, account, grant)
            case Turn.ASK:
                self._ask(work, indexes, None, None)
            case Turn.NEXT_ROUTE:
                for index in indexes:
                    tries = work.tries.get(index, Tries())
                    work.tries[index] = Tries(route + 1, 0, tries.total)

    def _ask(
        self, work: Work, indexes: Sequence[int], account: str | None, grant: Grant | None
    ) -> None:
        """Claim; the request leaves only after that."""
        send = work.send
        spec = self.world.specs[send.spec]
        asks = []
        for index in indexes:
            work.ready.remove(index)
            work.under_way.add(index)
            ordinal = send.page * PAGE + index
            asks.append(
                Ask(
                    ordinal=ordinal,
                    generation=send.generation,
                    attempt=work.tries.get(index, Tries()).total,
                    provider=account or "",
                    recipient=recipient_key(send.tenant, person(send.shard, ordinal)),
                    valid_until_ms=to_millis(send.valid_until),
                    deadline_ms=to_millis(send.deadline),
                )
            )
        self.world.progress += 1
        self.world.say(
            f"{self.name} asks to claim {describe(send)} {list(indexes)} of key {work.key}"
        )

        def answered(verdicts: Sequence[LedgerVerdict], operation: int) -> None:
            self._judged(work, indexes, account, grant, verdicts, operation)

        scopes = scopes_of(send.channel.value, spec.topic)
        work.desk.questions.append(Call(asks, scopes, answered))

    def _judged(
        self,
        work: Work,
        indexes: Sequence[int],
        account: str | None,
        grant: Grant | None,
        verdicts: Sequence[LedgerVerdict],
        operation: int,
    ) -> None:
        world = self.world
        used = 0
        for index, verdict in zip(indexes, verdicts, strict=True):
            tries = work.tries.get(index, Tries())
            then = delivery.after_verdict(verdict, tries, world.now, work.send.valid_until)
            world.say(f"{self.name}: the ledger says {verdict.kind.value} to [{index}]")
            if then is not None:
                self._follow(work, index, then, None)
            elif account is None:
                self.settle(work, index, delivery.unsent(tries), Verdict.RETRYABLE, "")
            else:
                used += 1
                self.request(work, index, account, operation)
        if grant is not None and grant.granted > used:
            world.redis.shaping.put_back(grant.granted - used, grant.serials)
            invariants.put_back(world, work.send.run, account or "", grant.granted - used)

    def request(self, work: Work, index: int, account: str, operation: int) -> None:
        """One attempt leaves."""
        send = work.send
        ordinal = send.page * PAGE + index
        request = Request(
            self,
            Attempt(work, index, account),
            send.run,
            send.leg,
            person(send.shard, ordinal),
            work.desk.ref,
            ordinal,
            send.generation,
            self.world.now,
        )
        self.world.network.append(request)
        self.world.truth.requests.append(request)
        self.world.say(f"{self.name} sends {request}")
        invariants.started(self.world, request, operation)

    def answered(self, request: Request, answer: Answer) -> None:
        """The provider's answer, or that there is none."""
        token = request.token
        assert isinstance(token, Attempt)
        work, index, account = token.work, token.index, token.account
        world = self.world
        tries = work.tries.get(index, Tries())
        routes = len(decide.leg_of(world.specs[work.send.spec], work.send.leg).routes)
        following = delivery.after_answer(
            answer, tries, routes, work.send.lane, world.retry, world.jitter
        )
        throttled = answer.retry_after if answer.verdict is Verdict.THROTTLED else None
        failed = answer.verdict in (Verdict.RETRYABLE, Verdict.IN_DOUBT, Verdict.ACCOUNT)
        world.redis.shaping.report(
            account,
            int(not failed and throttled is None),
            int(failed),
            None if throttled is None else throttled // timedelta(microseconds=1),
            world.now_ms * 1000,
        )
        self.settle(work, index, following, answer.verdict, account)

    def settle(
        self, work: Work, index: int, following: Next, answer: Verdict, account: str
    ) -> None:
        """Tell the ledger, then the books."""
        tries = work.tries.get(index, Tries())
        ordinal = work.send.page * PAGE + index
        settlement = delivery.settlement_of(ordinal, work.send.generation, tries, following, answer)

        def settled(result: Settled) -> None:
            then = delivery.after_settled(result, following, tries, account)
            self.world.say(
                f"{self.name}: the ledger has [{index}] as {settlement.action.value}: "
                f"{result.kind.value}"
            )
            done = result.kind is SettledKind.DONE
            self._follow(work, index, then, answer if done else None)

        work.desk.settlements.append((settlement, settled))

    def _follow(self, work: Work, index: int, then: Told | Again, answer: Verdict | None) -> None:
        key = self.keys[work.key]
        work.under_way.discard(index)
        if key.fenced:
            return
        now = self.world.now
        if isinstance(then, Again):
            if then.tries != Tries():
                work.tries[index] = then.tries
            until = max(now, min(work.send.valid_until, work.send.deadline))
            work.waiting.append((min(now + then.wait, until), index))
            return
        tries = work.tries.pop(index, Tries())
        work.left -= 1
        dead = then.reason is Reason.ADDRESS_REFUSED
        key.done.append(
            Completion(
                work,  # type: ignore[arg-type]
                index,
                then.outcome,
                then.reason,
                work.send.generation if then.generation is None else then.generation,
                then.provider,
                "",
                tries.total + 1 if then.provider else tries.total,
                "",
                now,
                person(work.send.shard, work.send.page * PAGE + index) if dead else "",
            )
        )


@dataclass
class _DeliveryState:
    offsets: Offsets
    sends: dict[int, dict[str, Send]]
    marks: dict[int, dict[LedgerRef, Seen]]


class Delivery:
    """The delivery job: what is owed is keyed state, its process works beside it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.source = _Reader(world, (("delivery", "sends"),))
        self.sends: dict[int, dict[str, Send]] = {}
        self.marks: dict[int, dict[LedgerRef, Seen]] = {}
        self.late: list[tuple[Desk, Owner, Seen, Call]] = []
        self.started = 1
        self.process = Process(self, "delivery 1")
        self.zombies: list[Process] = []
        self.ended: list[Process] = []
        self.saved = self._snapshot()

    def others(self, process: Process) -> list[Process]:
        return [one for one in (*self.zombies, self.process) if one is not process and one.alive]

    def processes(self) -> list[Process]:
        """Those that act: the one of the job, and predecessors that nobody has told."""
        return [self.process, *self.zombies]

    def read(self, pick: int) -> bool:
        """Record a send and hand it over."""
        unread = self.source.unread("delivery")
        if not unread:
            return False
        send = self.source.next("delivery", *unread[pick % len(unread)])
        assert isinstance(send, Send)
        key, name = key_of(send), name_of(send)
        self._take_over(key)
        self.sends.setdefault(key, {})[name] = send
        self.process.submit(key, name, send)
        self.world.say(f"{self.process.name} reads {describe(send)}")
        return True

    def _take_over(self, key: int) -> None:
        if key in self.process.keys:
            return
        self.process.take_over(key, self.marks.get(key, {}))
        for name, send in self.sends.get(key, {}).items():
            self.process.submit(key, name, send)

    def collect(self, process: Process) -> bool:
        """Take what is done out of state, and emit it."""
        found = False
        for number, key in process.keys.items():
            if not key.done:
                continue
            found = True
            records, finished = process.collect(number)
            for record in records:
                if isinstance(record, DeadLetter):
                    for index in indexes_of(bitmap_from(record.ordinals)):
                        letter = (record.run, record.leg, record.shard, record.page, index)
                        self.world.dead_letters.append(letter)
                else:
                    process.unflushed.append(record)
            if process is self.process:
                for name in finished:
                    self.sends[number].pop(name, None)
        if process is self.process:
            for number, key in process.keys.items():
                for ref, desk in key.desks.items():
                    if desk.seen is not None:
                        self.marks.setdefault(number, {})[ref] = desk.seen
        self.world.progress += found
        return found

    def flush(self, process: Process, pick: int) -> bool:
        """What was emitted reaches the topic."""
        if not process.unflushed:
            return False
        for number, record in enumerate(process.unflushed):
            topic = "outcomes" if isinstance(record, Outcomes) else "consent"
            part = pick >> number % 8 if topic == "outcomes" else 0
            self.world.topics[topic].append(record, part)
            invariants.written(self.world, record)
            self.world.say(f"{process.name} tells {describe(record)}")
        process.unflushed = []
        self.world.progress += 1
        return True

    def checkpoint(self, pick: int) -> bool:
        self.flush(self.process, pick)
        self.saved = self._snapshot()
        return True

    def _snapshot(self) -> _DeliveryState:
        return _DeliveryState(
            self.source.copied(),
            {key: dict(sends) for key, sends in self.sends.items()},
            {key: dict(marks) for key, marks in self.marks.items()},
        )

    def crash(self, *, late: bool) -> bool:
        """The process is ended, or thought to be; a successor begins from the last checkpoint."""
        world = self.world
        before = self.process
        world.progress += 1
        world.faults["predecessor acts on" if late else "delivery job killed"] += 1
        if late:
            self.zombies.append(before)
            world.say(f"{before.name} is thought to be dead, and acts on")
        else:
            self.end(before)
        self.started += 1
        self.process = Process(self, f"delivery {self.started}")
        self.source.restore(self.saved.offsets)
        self.sends = {key: dict(sends) for key, sends in self.saved.sends.items()}
        self.marks = {key: dict(marks) for key, marks in self.saved.marks.items()}
        for key in self.sends:
            self._take_over(key)
        world.pass_time(timedelta(seconds=1))
        return True

    def end(self, process: Process) -> None:
        """Kill a process: what it had under way is in doubt, what left is still on its way."""
        world = self.world
        world.say(f"{process.name} is killed")
        process.alive = False
        for key in process.keys:
            world.truth.unknown_bound += process.under_way(key)
        if process in self.zombies:
            self.zombies.remove(process)

    def late_call(self, pick: int) -> bool:
        """A call that nobody waits for any more reaches the ledger."""
        if not self.late:
            return False
        desk, owner, seen, call = self.late.pop(pick % len(self.late))
        try:
            done = desk.carry_out(self.world.redis, owner, seen, call)
        except (Fenced, MissingLedger, Corrupt):
            self.world.say("a delayed call reaches the ledger and is refused")
            return True
        void = isinstance(done, Moved)
        self.world.say(f"a delayed call reaches the ledger and is {'void' if void else 'done'}")
        return True

    @property
    def idle(self) -> bool:
        return not (
            self.source.unread("delivery")
            or any(chain.from_iterable(self.sends.values()))
            or self.process.unflushed
            or any(key.done for key in self.process.keys.values())
        )


def describe(record: object) -> str:
    """A record in a few words."""
    match record:
        case Command():
            rate = f" to {record.rate_per_second}" if record.kind is CommandKind.SET_RATE else ""
            return f"command {record.command_id}: {record.kind.value} {record.run}{rate}"
        case PageOrder():
            return f"{_place(record)} {_bits(record.ordinals)}"
        case Send():
            return f"send {_place(record)} {_bits(record.ordinals)}"
        case PageResult():
            parts = [f"sends {_bits(record.sends)}"] if record.sends else []
            parts += [f"skips {_bits(one.ordinals)} ({one.reason.value})" for one in record.skips]
            parts += [
                f"defers {_bits(one.ordinals)} ({one.reason.value}) to {one.until:%d %H:%M}"
                for one in record.deferrals
            ]
            return f"result {_place(record)} {', '.join(parts)}"
        case Outcomes():
            groups = [
                f"{list(one.indexes)} {one.outcome.value} ({one.reason.value}) in {one.generation}"
                for one in record.groups
            ]
            return f"outcomes of {record.run}/{record.leg} {record.shard}.{record.page}: " + (
                ", ".join(groups)
            )
        case ConsentChange():
            return f"{record.recipient_id} {record.status.value} {record.channel}:{record.topic}"
    return repr(record)


def _place(record: PageOrder | PageResult | Send) -> str:
    return f"{record.run}/{record.leg} {record.shard}.{record.page} gen {record.generation}"


def _bits(data: bytes) -> list[int]:
    return indexes_of(bitmap_from(data))
