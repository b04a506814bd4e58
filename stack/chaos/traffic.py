"""What is sent while things break: promotional campaigns, one after the other, and critical
messages at a steady pace."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from kafka import KafkaProducer
from kafka.errors import KafkaError

from schemas.codec import encode
from schemas.errors import StackFailed, Unavailable
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant
from schemas.pages import PAGE_SIZE, bitmap_bytes, bitmap_of
from schemas.reasons import Channel, Lane, RunStatus
from schemas.records import (
    CampaignSpec,
    CommandKind,
    LegSpec,
    Route,
    RunEvent,
    Send,
    WhenZoneUnknown,
)
from schemas.topics import sends_topic
from sinks import runs
from sinks.redis_client import connect
from sinks.redis_ports import connect_registry
from sinks.store import FileStore
from stack.chaos.records import Trial
from stack.cli_campaign import await_answer, new_command, send_command
from stack.crowd import LEG, TENANT, Crowd, One
from stack.layout import Home, endpoints
from stack.simulator.client import Control

SENDGRID = Route("sendgrid", "main")
SMTP = Route("smtp", "main")
DEADLINE = timedelta(hours=6)
_ANSWER = timedelta(seconds=120)
_PATIENCE = timedelta(seconds=120)
_ACKNOWLEDGE_S = 12.0
_AGAIN_S = 0.5
_GLANCE = timedelta(milliseconds=200)


def spec(
    run: str, snapshot: str, lane: Lane, routes: tuple[Route, ...], rate: float | None
) -> CampaignSpec:
    """A campaign of one e-mail leg without caps, quiet hours or holdout."""
    return CampaignSpec(
        tenant=Tenant(TENANT),
        run=RunId(run),
        campaign="chaos",
        snapshot=SnapshotId(snapshot),
        category="promo" if lane is Lane.PROMOTIONAL else "account",
        topic="offers",
        lane=lane,
        legs=(
            LegSpec(
                LEG,
                Channel.EMAIL,
                routes,
                "chaos@news.example.com",
                "Lindgren & Söhne",
                None,
                "Spring, {{ first_name }}",
                None,
                "Hello {{ first_name }} of {{ city }}.",
            ),
        ),
        start_at=None,
        deadline=datetime.now(UTC) + DEADLINE,
        quiet_hours=None,
        when_zone_unknown=WhenZoneUnknown.ASSUME,
        fallback_zone="Europe/Berlin",
        caps=(),
        holdout_percent=0.0,
        rate_per_second=rate,
        valid_for=timedelta(minutes=10),
        defaults={"first_name": "friend", "city": "your town"},
    )


@dataclass(slots=True)
class Launched:
    """A promotional run."""

    run: str
    stream: int
    wanted: int
    sent: int = 0
    over: bool = False
    """Completed: what has not reached the provider by then is in doubt, and never will."""

    @property
    def remaining(self) -> int:
        """Messages that may yet reach the provider, when it was last asked."""
        return 0 if self.over else max(0, self.wanted - self.sent)


@dataclass(slots=True)
class Campaigns:
    """Promotional runs, throttled, one stream for each provider; a run that nears its end is
    followed by the next. Belongs to one thread."""

    home: Home
    crowd: Crowd
    tag: str
    rate: float
    runs: list[Launched] = field(default_factory=list)

    def trials(self) -> list[Trial]:
        """What was launched, for the records."""
        people = list(self.crowd)
        return [Trial(one.run, Lane.PROMOTIONAL, people) for one in self.runs]

    def keep_going(self, ahead_s: float) -> None:
        """Launch what follows in each stream that has less left than its rate needs so long."""
        self.look()
        for stream, routes in enumerate(((SENDGRID, SMTP), (SMTP, SENDGRID))):
            left = sum(one.remaining for one in self.runs if one.stream == stream)
            if left >= self.rate * ahead_s:
                continue
            run = f"chaos-{self.tag}-{len(self.runs) + 1}"
            launch = spec(run, self.crowd.name, Lane.PROMOTIONAL, routes, self.rate)
            self._command(CommandKind.LAUNCH, run, launch=launch)
            self.runs.append(Launched(run, stream, len(self.crowd.consenting())))

    def look(self) -> int:
        """Ask the provider how far the runs are; how many messages it has in all."""
        at = endpoints(self.home)
        control = Control(at.simulator)
        going = [one for one in self.runs if one.remaining]
        for one in going:
            one.sent = int(control.stats(one.run)["unique"])
        redis = connect(at.redis, _GLANCE)
        with suppress(Unavailable):  # Redis may be what was struck
            for one in going:
                found = runs.read(redis, Tenant(TENANT), RunId(one.run))
                one.over = found is not None and found.status.terminal
        redis.close()
        return sum(one.sent for one in self.runs)

    @property
    def remaining(self) -> int:
        """Messages of all runs that have not reached the provider, when it was last asked."""
        return sum(one.remaining for one in self.runs)

    def longest(self) -> str:
        """The run that has most left."""
        return max(self.runs, key=lambda one: one.remaining).run

    def pause(self, run: str) -> RunEvent:
        """Pause a run."""
        return self._command(CommandKind.PAUSE, run)

    def resume(self, run: str) -> RunEvent:
        """Resume a run."""
        return self._command(CommandKind.RESUME, run)

    def set_rate(self, run: str, rate: float) -> RunEvent:
        """Change a run's rate."""
        return self._command(CommandKind.SET_RATE, run, rate=rate)

    def hurry(self, rate: float) -> None:
        """Let what is left run at another rate: nothing is to break any more."""
        self.look()
        for one in self.runs:
            # With so little left it may be over before it is heard.
            if one.remaining > self.rate:
                self.set_rate(one.run, rate)

    def _command(
        self,
        kind: CommandKind,
        run: str,
        launch: CampaignSpec | None = None,
        rate: float | None = None,
    ) -> RunEvent:
        servers = endpoints(self.home).kafka
        command = new_command(kind, TENANT, run, note="chaos", launch=launch, rate_per_second=rate)
        send_command(servers, command)
        event = await_answer(servers, command.command_id, _ANSWER)
        if event is None:
            raise StackFailed(
                f"{kind.value} {run} was not answered in {_ANSWER.total_seconds():.0f} s; "
                "see `fanfare jobs list`"
            )
        if not event.accepted:
            raise StackFailed(f"{kind.value} {run} was refused: {event.note}")
        return event


class CriticalMessages(threading.Thread):
    """Plays the producer of critical messages: a send each ``interval``, whatever breaks.

    What the broker does not acknowledge is written again: a message that was begun is owed.
    """

    def __init__(self, home: Home, crowd: Crowd, tag: str, interval: timedelta, seed: int) -> None:
        super().__init__(name="critical-messages", daemon=True)
        self.run_name = f"chaos-{tag}-critical"
        self.ordered: list[One] = []
        self.failure: BaseException | None = None
        self._home = home
        self._crowd = crowd
        self._interval_s = interval.total_seconds()
        self._ended = threading.Event()
        self._people = crowd.consenting()
        random.Random(seed).shuffle(self._people)  # noqa: S311 - an order, not a secret
        self.ids = frozenset(one.message(self.run_name) for one in self._people)
        self._generations: Counter[tuple[int, int]] = Counter()
        self._producer: KafkaProducer | None = None
        self._spec = ObjectId("")
        self._deadline = datetime.now(UTC) + DEADLINE

    def prepare(self) -> None:
        """Make spec and ledgers and publish the run, as coordinate does for its runs."""
        definition = spec(self.run_name, self._crowd.name, Lane.CRITICAL, (SENDGRID, SMTP), None)
        at = endpoints(self._home)
        self._deadline = definition.deadline
        self._spec = FileStore(at.store).put_object("spec", encode(definition))
        manifest = self._crowd.snapshot.manifest
        counts = tuple(manifest.shard_size(shard) for shard in range(manifest.shards))
        registry = connect_registry(at.redis)

        def known() -> bool:
            try:
                registry.create_ledger(TENANT, self.run_name, [LEG], counts, self._spec[:16])
                registry.publish(
                    TENANT, self.run_name, 1, RunStatus.RUNNING, None, definition.deadline
                )
            except Unavailable:
                return False
            return True

        wait_until(known, _PATIENCE, f"the ledgers of {self.run_name} are made")

    def trial(self) -> Trial:
        """Who was written to, for the records."""
        return Trial(self.run_name, Lane.CRITICAL, tuple(self.ordered))

    def run(self) -> None:
        """The thread."""
        try:
            for one in self._people:
                if self._ended.wait(self._interval_s):
                    return
                self.ordered.append(one)
                self._write(encode(self._send(one)))
        except BaseException as error:
            self.failure = error
            raise

    def finish(self) -> None:
        """Order nothing more; return when the broker has all. Raises what ended the thread."""
        self._ended.set()
        self.join(_PATIENCE.total_seconds())
        if self.is_alive():
            raise StackFailed("the last critical message is not taken by Kafka; see its log")
        if self.failure is not None:
            raise StackFailed(f"critical messages ended: {self.failure!r}") from self.failure
        self._let_go()

    def _send(self, one: One) -> Send:
        page, index = divmod(one.ordinal, PAGE_SIZE)
        generation = self._generations[one.shard, page]
        self._generations[one.shard, page] += 1
        return Send(
            Tenant(TENANT),
            RunId(self.run_name),
            LegId(LEG),
            Lane.CRITICAL,
            Channel.EMAIL,
            self._spec,
            self._crowd.snapshot.id,
            one.shard,
            page,
            generation,
            bitmap_bytes(bitmap_of([index])),
            datetime.now(UTC),
            self._deadline,
            self._deadline,
        )

    def _let_go(self) -> None:
        if self._producer is not None:
            with suppress(KafkaError):
                self._producer.close(timeout=5)
        self._producer = None

    def _write(self, value: bytes) -> None:
        until = time.monotonic() + 2 * _PATIENCE.total_seconds() + _ACKNOWLEDGE_S
        while True:
            try:
                if self._producer is None:
                    self._producer = _producer(endpoints(self._home).kafka)
                topic = sends_topic(Lane.CRITICAL, Channel.EMAIL)
                self._producer.send(topic, value).get(timeout=_ACKNOWLEDGE_S)
            except KafkaError:
                if time.monotonic() > until:
                    raise
                self._let_go()
                time.sleep(_AGAIN_S)
            else:
                return


def _producer(servers: str) -> KafkaProducer:
    """One that gives up soon, so that the caller repeats: a repeated send is the same message."""
    return KafkaProducer(
        bootstrap_servers=servers.split(","),
        acks="all",
        enable_idempotence=False,
        request_timeout_ms=4_000,
        delivery_timeout_ms=8_000,
        max_block_ms=8_000,
        reconnect_backoff_max_ms=1_000,
    )


def wait_until(condition: Callable[[], bool], patience: timedelta, what: str) -> None:
    """Poll until it holds. Raises StackFailed that says what did not come about."""
    until = time.monotonic() + patience.total_seconds()
    while not condition():
        if time.monotonic() > until:
            raise StackFailed(f"not within {patience.total_seconds():.0f} s: {what}")
        time.sleep(0.1)


__all__: Sequence[str] = [
    "Campaigns",
    "CriticalMessages",
    "Launched",
    "spec",
    "wait_until",
]
