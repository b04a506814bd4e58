"""What the end-to-end tests look at: crowds, runs, the provider, books, tables and ledger."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from clickhouse_connect.driver.client import Client
from kafka import KafkaConsumer, TopicPartition

from schemas import topics
from schemas.codec import decode
from schemas.errors import MalformedRecord, Missing
from schemas.ids import RunId, Tenant
from schemas.pages import PAGE_SIZE
from schemas.reasons import RunStatus
from schemas.records import ConsentChange, DeadLetter, RunEvent
from sinks import ledger_upkeep
from sinks.books import Books
from sinks.clickhouse import connect
from sinks.redis_client import Client as Redis
from sinks.redis_client import connect as connect_redis
from sinks.store import FileStore
from stack import flink_jobs
from stack.cli_books import look, settled
from stack.crowd import LEG, TENANT, Crowd, One, build_crowds
from stack.layout import Home, endpoints, processes
from stack.simulator.client import Control
from tests.e2e.producer import Producer, campaign
from tests.stack_fixture import RunningJobs, eventually
from transforms.ledger import LedgerRef, LedgerView

LONG = timedelta(seconds=120)


class Tail:
    """A topic, read on from where the last look ended."""

    def __init__(self, servers: str, topic: str) -> None:
        self._consumer = KafkaConsumer(
            bootstrap_servers=servers, isolation_level="read_committed", fetch_max_wait_ms=50
        )
        numbers = self._consumer.partitions_for_topic(topic) or ()
        self._partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
        self._consumer.assign(self._partitions)
        self._consumer.seek_to_beginning(*self._partitions)
        self._values: list[bytes] = []

    def values(self) -> list[bytes]:
        """All that is committed now."""
        ends = self._consumer.end_offsets(self._partitions)
        while any(self._consumer.position(one) < ends[one] for one in self._partitions):
            for records in self._consumer.poll(200).values():
                self._values += [record.value for record in records]
        return self._values

    def close(self) -> None:
        self._consumer.close()


class World:
    """The running stack with its jobs, and everything that can be asked of it."""

    def __init__(self, jobs: RunningJobs, folder: Path) -> None:
        self.jobs = jobs
        self.home: Home = jobs.home
        self.at = endpoints(jobs.home)
        self.control_server = Control(self.at.simulator)
        self.folder = folder
        self.store = FileStore(self.at.store)
        self.producer = Producer(self.at.kafka)
        self.tables: Client = connect(self.at.clickhouse)
        self.redis: Redis = connect_redis(self.at.redis, timedelta(seconds=5))
        self._tails: dict[str, Tail] = {}
        # Each crowd, of each session on a stack that is kept, has numbers of its own.
        self._next_person = time.time_ns() // 1_000_000_000 * 1_000

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()
        self.producer.kafka.close()
        self.tables.close()
        self.redis.close()

    # audiences and runs

    def now(self) -> datetime:
        return datetime.now(UTC)

    def crowd(self, people: int, segment: str | None = None) -> Crowd:
        """A new crowd of so many people."""
        return self.crowds(people, segment)[0]

    def crowds(self, people: int, *segments: str | None) -> list[Crowd]:
        """Audiences of the same new people, one for each segment."""
        first = self._next_person
        self._next_person += people
        return build_crowds(self.store, self.folder, people, first, *segments)

    def run_name(self, what: str) -> str:
        return f"{what}-{time.time_ns() // 1_000_000}"

    def launch(self, run: str, snapshot: str, **changes: Any) -> RunEvent:
        """Launch by the plain producer, and wait for the answer."""
        spec = campaign(TENANT, run, snapshot, **changes)
        return self.answer(self.producer.command("launch", TENANT, run, launch=spec))

    def control(self, kind: str, run: str, **fields: Any) -> RunEvent:
        """A command to a run, and its answer."""
        return self.answer(self.producer.command(kind, TENANT, run, **fields))

    def events(self, run: str | None = None) -> list[RunEvent]:
        """The audit trail, or that of one run."""
        found = [decode(value, RunEvent) for value in self.read(topics.RUNS)]
        return [one for one in found if run in (None, one.run)]

    def answer(self, command_id: str, timeout: timedelta = LONG) -> RunEvent:
        """The event that answers a command."""
        found: list[RunEvent] = []

        def answered() -> bool:
            found[:] = [one for one in self.events() if one.command_id == command_id]
            return bool(found)

        eventually(answered, timeout, f"command {command_id} is answered")
        return found[0]

    def wait_status(
        self, run: str, status: RunStatus = RunStatus.COMPLETED, timeout: timedelta = LONG
    ) -> RunEvent:
        """Wait until a run's coordinator says this, and nothing is pending if it is over."""

        def reached() -> bool:
            last = self.events(run)[-1]
            return last.status is status and (not status.terminal or last.pending == 0)

        eventually(reached, timeout, f"{run} is {status.value}")
        return self.events(run)[-1]

    def books(self, run: str, timeout: timedelta = LONG) -> Books:
        """The books of a run that is over, when ClickHouse has all that Kafka had."""
        until = time.monotonic() + timeout.total_seconds()
        while True:
            try:
                found = look(run, TENANT, self.home.root)
                if settled(found):
                    return found
            except Missing:
                if time.monotonic() > until:
                    raise
            assert time.monotonic() < until, f"the books of {run} are not settled: {found}"
            time.sleep(0.2)

    def classes(self, run: str) -> dict[tuple[int, int], tuple[str, str]]:
        """(shard, ordinal) to class and reason, from the rows: highest generation, heaviest kind.

        Only for runs in which nothing outranks a later generation (no doubt, no reorder).
        """
        rows = self.tables.query(
            "SELECT shard, ordinal, toString(kind), reason FROM fanfare_steps FINAL "
            "WHERE tenant = {t:String} AND run = {r:String} "
            "ORDER BY shard, ordinal, generation, toInt8(kind)",
            parameters={"t": TENANT, "r": run},
        ).result_rows
        return {(shard, ordinal): (kind, reason) for shard, ordinal, kind, reason in rows}

    def engagement(self, run: str) -> dict[str, set[str]]:
        """Messages by kind of event."""
        rows = self.tables.query(
            "SELECT kind, groupUniqArray(send_id) FROM fanfare_engagement "
            "WHERE tenant = {t:String} AND run = {r:String} GROUP BY kind",
            parameters={"t": TENANT, "r": run},
        ).result_rows
        return {kind: set(found) for kind, found in rows}

    # Kafka

    def read(self, topic: str) -> list[bytes]:
        """All committed values of a topic, oldest first within a partition."""
        if topic not in self._tails:
            self._tails[topic] = Tail(self.at.kafka, topic)
        return self._tails[topic].values()

    def dead_letters(self) -> list[DeadLetter]:
        """All that were written, each once."""
        found = [decode(value, DeadLetter) for value in self.read(topics.DEAD_LETTERS)]
        return list({one.letter_id: one for one in found}.values())

    def consents(self) -> list[ConsentChange]:
        """The consent topic, without the rubbish that other tests have put into it."""
        found = []
        for value in self.read(topics.CONSENT):
            try:
                found.append(decode(value, ConsentChange))
            except MalformedRecord:
                continue
        return found

    # the provider

    def ask(self, path: str, method: str = "GET", body: Any = None, timeout_s: float = 30) -> Any:
        """A question to the simulator's control server."""
        return self.control_server.ask(path, method, body, timeout_s)

    def provider(self, **changes: Any) -> AbstractContextManager[None]:
        """The simulator with other settings for the length of the block."""
        return self.control_server.configured(changes)

    def accepted(self, run: str) -> dict[str, dict[str, Any]]:
        """What the provider accepted of a run, by message; fails when one came twice."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.control_server.messages(run):
            assert row["send_id"] not in found, f"accepted twice: {row}"
            found[row["send_id"]] = row
        return found

    def stats(self, run: str) -> dict[str, Any]:
        return self.control_server.stats(run)

    def wait_accepted(self, run: str, count: int) -> None:
        eventually(lambda: self.stats(run)["unique"] >= count, LONG, f"{run}: {count} accepted")

    def starts_after(self, run: str, moment_ms: int) -> int:
        """Requests of a run that started after a moment."""
        return self.control_server.starts_after(run, moment_ms)

    def drain_webhooks(self) -> None:
        """Wait until all that is to be sent back was."""
        assert self.control_server.drain_webhooks(60), f"webhooks remain: {self.ask('/webhooks')}"

    # the ledger

    def ledger_accepted(self, run: str, crowd: Crowd) -> set[str]:
        """Who has the accepted bit."""
        places = {(one.shard, one.ordinal): one.id for one in crowd}
        return {
            places[shard, ordinal]
            for shard in range(256)
            for ordinal in ledger_upkeep.accepted_ordinals(
                self.redis, LedgerRef(Tenant(TENANT), RunId(run), LEG, shard)
            )
        }

    def ledger(self, run: str) -> LedgerView:
        return ledger_upkeep.counts(self.redis, Tenant(TENANT), RunId(run), LEG)

    # checks that hold of every run that is over

    def check_balanced(self, run: str, crowd: Crowd) -> Books:
        """Books, provider and ledger agree about a run that is over, whatever happened to it."""
        books = self.books(run)
        assert books.verdict.balanced, books.verdict.errors
        found = books.as_json()
        assert found["audience"] == len(crowd)
        assert found["pending"] == 0
        parts = ("accepted", "skipped_total", "failed", "expired", "cancelled", "unknown")
        assert sum(found[part] for part in parts) == len(crowd)
        stats = self.stats(run)
        assert stats["duplicates"] == 0
        got = self.accepted(run)
        bits = {
            crowd.people[recipient].message(run) for recipient in self.ledger_accepted(run, crowd)
        }
        assert bits <= set(got), "the ledger has a message that the provider has not"
        assert len(bits) == found["accepted"]
        ledger = self.ledger(run)
        assert ledger.claims == 0, "every claim is settled"
        assert ledger.held == found["unknown"]
        # What the provider has beyond what we know of is in doubt, and told to be.
        assert found["accepted"] <= stats["unique"] <= found["accepted"] + found["unknown"]
        by_message = {one.message(run): one for one in crowd}
        for message, row in got.items():
            assert row["address"] == by_message[message].email
        return books

    def taskmanager(self, job: str) -> tuple[str, int]:
        """The service and process in which a job of one subtask runs."""
        (name,) = flink_jobs.taskmanagers_of(self.home, self.jobs.ids[job])
        pid = processes(self.home)[name].pid
        assert pid is not None
        return name, pid


def reasons(rows: dict[tuple[int, int], tuple[str, str]]) -> Counter[tuple[str, str]]:
    """How many recipients by class and reason."""
    return Counter(rows.values())


def page_of(one: One) -> int:
    """The page that a recipient is in."""
    return one.ordinal // PAGE_SIZE
