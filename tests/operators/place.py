"""A campaign on real Kafka, Redis and ClickHouse, with the jobs' rules in place of the jobs.

Coordinate is the real ``Coordinator``, on a thread that reads the topics as its job does; what
delivery does to a message is told by the test, and goes through the real ledger's scripts; what
ingest writes is written by its own ``Batch``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from typer.testing import CliRunner, Result

from schemas import topics
from schemas.codec import decode, encode, name_of, to_millis
from schemas.errors import Unavailable
from schemas.ids import RunId, SnapshotId, Tenant
from schemas.pages import bitmap_from, delivery_key
from schemas.reasons import Channel, Lane, Outcome, Reason
from schemas.records import (
    Command,
    CommandKind,
    DeadLetter,
    EngagementEvent,
    OutcomeGroup,
    Outcomes,
    PageOrder,
    PageResult,
    RunEvent,
    Send,
)
from sinks import ledger, ledger_upkeep, runs
from sinks.clickhouse import Batch, connect
from sinks.kafka_client import producer, read_all, read_from_end
from sinks.redis_client import connect as connect_redis
from sinks.redis_client import connect_async
from sinks.store import FileStore, Snapshot
from stack.layout import Home, endpoints
from tests.decide.people import EMAIL, campaign, leg
from transforms.coordinate import CoordinatePolicy, Coordinator, Effects, LaunchFacts, RunMemory
from transforms.ledger import (
    Action,
    Ask,
    Claims,
    LedgerRef,
    Moved,
    Owner,
    Seen,
    Settlement,
    Settlements,
    recipient_key,
)
from transforms.routing import topic_of

PROVIDER = "sendgrid:main"
_ACTIONS = {
    Outcome.ACCEPTED: (Action.ACCEPT, Reason.PROVIDER_ACCEPTED),
    Outcome.UNKNOWN: (Action.HOLD, Reason.NO_ANSWER),
    Outcome.FAILED: (Action.CLOSE, Reason.PROVIDER_REFUSED),
}


@dataclass(frozen=True, slots=True)
class Mail:
    """One message: where it stands, and the send it is of."""

    shard: int
    ordinal: int
    generation: int = 0


class Place:
    """One run of one tenant of its own, on topics of its own."""

    def __init__(self, home: Home, name: str, audience: Snapshot) -> None:
        self.away = False
        """Whether coordinate's clock stands: it publishes a run's status again only by commands."""
        self.home, self.prefix = home, f"{name}."
        self.tenant, self.run = Tenant(audience.manifest.tenant), RunId(name)
        self.at = endpoints(home)
        self.clickhouse = connect(self.at.clickhouse)
        self.redis = connect_redis(self.at.redis)
        self.store = FileStore(self.at.store)
        self.audience = audience
        self.sender = producer(self.at.kafka)
        self.memory = RunMemory()
        self.orders: list[PageOrder] = []
        self.commands: list[Command] = []
        self.owner: Owner | None = None
        self.quiet = False
        """Whether the ingest job itself writes ClickHouse."""
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._answering = threading.Thread(target=self._answer, daemon=True)

    # what the jobs do

    def launch(self, deadline: timedelta = timedelta(hours=1)) -> None:
        self.spec = campaign(
            tenant=self.tenant,
            run=self.run,
            snapshot=SnapshotId(self.audience.id),
            legs=(leg(Channel.EMAIL),),
            deadline=datetime.now(UTC) + deadline,
        )
        self.spec_id = self.store.put_object("spec", encode(self.spec))
        counts = tuple(self.audience.manifest.shard_size(shard) for shard in range(256))
        ledger_upkeep.create(self.redis, self.tenant, self.run, EMAIL, counts, self.spec_id[:16])
        now = datetime.now(UTC)
        command = Command("launch", self.tenant, self.run, CommandKind.LAUNCH, now, "me", "",
                          self.spec)  # fmt: skip
        self._do(lambda one: one.on_command(command, now, LaunchFacts(self.spec_id, counts)))
        self._do(lambda one: one.on_ledger_created(now))
        self._answering.start()

    def decide(self, orders: Iterable[PageOrder] | None = None) -> list[Mail]:
        """Decide orders (all that are not decided yet): everybody is sent to."""
        with self._lock:
            todo = list(self.orders if orders is None else orders)
            self.orders.clear()
        now = datetime.now(UTC)
        mails = []
        for one in todo:
            place = (one.tenant, one.run, one.leg)
            where = (one.snapshot, one.shard, one.page, one.generation)
            result = PageResult(*place, *where, now, now, one.ordinals, (), ())
            send = Send(
                *place, Lane.PROMOTIONAL, Channel.EMAIL, self.spec_id, *where, one.ordinals, now,
                now + timedelta(minutes=10), self.spec.deadline,
            )  # fmt: skip
            self.put(encode(result), encode(send))
            self.ingest(result)
            self._do(lambda step, result=result: step.on_result(result, now))
            mails += [
                Mail(one.shard, one.page * 500 + index, one.generation)
                for index in range(500)
                if bitmap_from(one.ordinals) >> index & 1
            ]
        return mails

    def deliver(self, fates: Mapping[Mail, Outcome | None], *, told: bool = True) -> list[Outcomes]:
        """Claim and settle; None: killed between request and answer. Tell, unless killed then."""
        asyncio.run(self._deliver(fates))
        records = [self.outcome(mail, fate) for mail, fate in fates.items() if fate is not None]
        if told:
            self.tell(*records)
        return records

    async def _deliver(self, fates: Mapping[Mail, Outcome | None]) -> None:
        client = connect_async(self.at.redis)
        for mail, fate in fates.items():
            key = delivery_key(mail.shard)
            epoch = await ledger.acquire_epoch(client, Lane.PROMOTIONAL, key)
            self.owner = Owner(Lane.PROMOTIONAL, key, epoch)
            ref = self.ref(mail.shard)
            seen = await ledger.look(client, ref)
            answer = await ledger.claim(client, ref, self.owner, seen, (), [self.ask(mail)])
            assert isinstance(answer, Claims), answer
            assert answer.verdicts[0].kind.value == "claimed", answer
            if fate is not None:
                action, reason = _ACTIONS[fate]
                settlement = Settlement(mail.ordinal, mail.generation, 0, action, fate, reason)
                after = Seen(seen.dataset, answer.seq)
                done = await ledger.settle(client, ref, self.owner, after, [settlement])
                assert isinstance(done, Settlements), done
        await client.disconnect()

    def claim_as(self, owner: Owner, seen: Seen, mail: Mail) -> Any:
        """Claim as a process that has seen the ledger before."""

        async def ask() -> Any:
            client = connect_async(self.at.redis)
            try:
                while True:
                    answer = await ledger.claim(
                        client, self.ref(mail.shard), owner, seen_now[0], (), [self.ask(mail)]
                    )
                    if not isinstance(answer, Moved):
                        return answer.verdicts[0]
                    seen_now[0] = Seen(seen.dataset, answer.seq)
            finally:
                await client.disconnect()

        seen_now = [seen]
        return asyncio.run(ask())

    def ask(self, mail: Mail) -> Ask:
        far = to_millis(datetime.now(UTC) + timedelta(minutes=10))
        who = recipient_key(self.tenant, self.recipient(mail))
        return Ask(mail.ordinal, mail.generation, 0, PROVIDER, who, far, far)

    def outcome(self, mail: Mail, fate: Outcome) -> Outcomes:
        ids = (f"id-{mail.ordinal}",) if fate is Outcome.ACCEPTED else ()
        index = mail.ordinal % 500
        group = OutcomeGroup(fate, _ACTIONS[fate][1], PROVIDER, mail.generation, (index,), ids, 1)
        return Outcomes(
            self.tenant, self.run, EMAIL, SnapshotId(self.audience.id), mail.shard,
            mail.ordinal // 500, datetime.now(UTC), (group,),
        )  # fmt: skip

    def tell(self, *records: Outcomes) -> None:
        """Outcomes into Kafka (where coordinate hears of them) and ClickHouse."""
        self.put(*map(encode, records))
        self.ingest(*records)

    def ref(self, shard: int) -> LedgerRef:
        return LedgerRef(self.tenant, self.run, EMAIL, shard)

    def recipient(self, mail: Mail) -> str:
        index = self.audience.read_index(mail.shard, mail.ordinal // 500)
        return index.recipient_ids[mail.ordinal % 500]

    # the world

    def put(self, *values: bytes) -> None:
        for value in values:
            self.sender.send(self.prefix + topic_of(value), value)
        self.sender.flush()

    def has(self, topic: str) -> bool:
        try:
            return next(iter(self.read(topic)), None) is None
        except Unavailable:
            return False

    def read(self, topic: str) -> list[bytes]:
        return list(read_all(self.at.kafka, self.prefix + topic))

    def letters(self) -> list[DeadLetter]:
        return [decode(one, DeadLetter) for one in self.read(topics.DEAD_LETTERS)]

    def ingest(self, *found: PageResult | Outcomes | RunEvent | EngagementEvent) -> None:
        if self.quiet:
            return
        batch = Batch()
        for one in found:
            match one:
                case PageResult():
                    batch.add_page_result(one)
                case Outcomes():
                    batch.add_outcomes(one)
                case RunEvent():
                    batch.add_run_event(one)
                case EngagementEvent():
                    batch.add_engagement(one)
        batch.write(self.clickhouse)

    def fanfare(self, app: Any, *words: str) -> Result:
        """A command of the command line, as a person calls it."""
        return CliRunner().invoke(app, [*words, "--home", str(self.home.root)])

    def eventually(self, what: str, condition: Any) -> None:
        until = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < until, what
            time.sleep(0.05)

    def pending(self) -> int:
        with self._lock:
            return self.memory.pending

    def close(self) -> None:
        self._stop.set()
        if self._answering.is_alive():
            self._answering.join()
        self.sender.close()
        self.redis.close()
        self.clickhouse.close()

    # coordinate

    def _answer(self) -> None:
        with (
            read_from_end(self.at.kafka, self.prefix + topics.COMMANDS, back=1000) as commands,
            read_from_end(self.at.kafka, self.prefix + topics.OUTCOMES, back=1000) as outcomes,
        ):
            while not self._stop.is_set():
                for value in (*commands(), *outcomes()):
                    now = datetime.now(UTC)
                    if name_of(value) == "Outcomes":
                        one = decode(value, Outcomes)
                        self._do(lambda step, one=one, now=now: step.on_outcomes(one, now))
                    else:
                        command = decode(value, Command)
                        self.commands.append(command)
                        self._do(
                            lambda step, command=command, now=now: step.on_command(
                                command, now, None
                            )
                        )
                if not self.away:
                    self._do(lambda step: step.on_tick(datetime.now(UTC)))

    def _do(self, step: Any) -> None:
        with self._lock:
            effects: Effects = step(Coordinator(self.memory, CoordinatePolicy()))
            self.orders += effects.orders
            run = self.memory.run
            if run is not None and effects.publish:
                runs.publish(
                    self.redis, self.tenant, self.run, run.version, run.status, None, run.deadline
                )
                now = datetime.now(UTC)
                Coordinator(self.memory, CoordinatePolicy()).on_published(run.version, now)
            for event in effects.events:
                self.put(encode(event))
                self.ingest(event)

    def command(self, kind: CommandKind) -> None:
        """A command that is carried out at once."""
        now = datetime.now(UTC)
        name = f"{kind.value}-{time.monotonic_ns()}"
        command = Command(name, self.tenant, self.run, kind, now, "me")
        self._do(lambda step: step.on_command(command, now, None))


def webhook_event(place: Place, mail: Mail, send: str, **changes: Any) -> EngagementEvent:
    from schemas.records import EngagementKind

    event = EngagementEvent(
        f"e-{mail.shard}-{mail.ordinal}", place.tenant, place.run, EMAIL, send,
        f"{mail.shard}.{mail.ordinal}.{mail.generation}", EngagementKind.DELIVERED,
        datetime.now(UTC), "sendgrid", "provider-id", "", "",
    )  # fmt: skip
    return replace(event, **changes)


def in_one_shard(mails: Sequence[Mail], least: int) -> list[Mail]:
    """The messages of a shard that has at least so many."""
    for mail in mails:
        same = [one for one in mails if one.shard == mail.shard]
        if len(same) >= least:
            return same
    raise AssertionError(f"no shard has {least} recipients")
