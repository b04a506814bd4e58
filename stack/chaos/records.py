"""Reading the records: the provider's, Kafka's and the ledger's, ClickHouse's."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from schemas import topics
from schemas.codec import decode, to_millis
from schemas.errors import MalformedRecord, Missing, Unavailable
from schemas.ids import RunId, Tenant
from schemas.pages import PAGE_SIZE, SHARDS
from schemas.reasons import Lane
from schemas.records import Outcomes
from schemas.tables import STEPS, StepKind
from sinks import ledger_upkeep
from sinks.books import Books
from sinks.clickhouse import asking, connect
from sinks.kafka_client import read_all
from sinks.redis_client import connect as connect_redis
from stack.chaos.evidence import Acceptance, Entry, Evidence, Owed, Place, Told
from stack.cli_books import look, settled
from stack.crowd import LEG, TENANT, One
from stack.layout import Home, endpoints
from stack.simulator.client import Control
from transforms.books import PENDING, Step, class_of
from transforms.delivery import REPEATED
from transforms.ledger import Claim, Held, LedgerRef

_REDIS_PATIENCE = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Trial:
    """A run whose records are read: everybody in its audience, or, on the critical lane, whom
    the producer ordered."""

    run: str
    lane: Lane
    people: Sequence[One]

    def owed(self) -> list[Owed]:
        """The lines of the audience."""
        return [
            Owed(
                (self.run, one.shard, one.ordinal),
                one.message(self.run),
                one.email or "",
                self.lane,
                one.consenting,
            )
            for one in self.people
        ]


def read_evidence(home: Home, trials: Sequence[Trial], patience: timedelta) -> Evidence:
    """Everything about these runs, once ClickHouse has all that Kafka has.

    Books that do not settle in time are told as an error among the evidence.

    Raises:
        Unavailable: a server does not answer.
    """
    at = endpoints(home)
    errors = [
        error
        for trial in trials
        if trial.lane is Lane.PROMOTIONAL
        for error in _book_errors(home, trial.run, patience)
    ]
    control = Control(at.simulator)
    runs = [trial.run for trial in trials]
    return Evidence(
        tuple(owed for trial in trials for owed in trial.owed()),
        tuple(
            Acceptance(row["send_id"], row["address"], int(row["accepted_at_ms"]))
            for run in runs
            for row in control.messages(run)
        ),
        read_outcomes(at.kafka, runs),
        read_ledger(at.redis, runs),
        read_classes(at.clickhouse, runs),
        tuple(errors),
    )


def read_outcomes(servers: str, runs: Iterable[str]) -> Mapping[Place, tuple[Told, ...]]:
    """What the outcomes topic says of every recipient, repeated words too."""
    wanted = frozenset(runs)
    found: dict[Place, list[Told]] = defaultdict(list)
    for value in read_all(servers, topics.OUTCOMES):
        try:
            record = decode(value, Outcomes)
        except MalformedRecord:
            continue  # Anybody may have written it; were it ours, somebody's outcome is missing.
        if record.run not in wanted:
            continue
        at_ms, base = to_millis(record.at), record.page * PAGE_SIZE
        for group in record.groups:
            told = Told(group.outcome, group.generation, at_ms, group.detail.startswith(REPEATED))
            for index in group.indexes:
                found[record.run, record.shard, base + index].append(told)
    return {place: tuple(words) for place, words in found.items()}


def read_ledger(url: str, runs: Iterable[str]) -> Mapping[Place, Entry]:
    """What the ledgers hold. Raises ``MissingLedger`` where one is gone."""
    client = connect_redis(url, _REDIS_PATIENCE)
    found: dict[Place, Entry] = {}
    try:
        for run in runs:
            for shard in range(SHARDS):
                ref = LedgerRef(Tenant(TENANT), RunId(run), LEG, shard)
                for ordinal in ledger_upkeep.accepted_ordinals(client, ref):
                    found[run, shard, ordinal] = Entry.ACCEPTED
                for ordinal, matter in ledger_upkeep.list_open(client, ref).items():
                    kind = (
                        Entry.CLAIM
                        if isinstance(matter, Claim)
                        else Entry.HELD
                        if isinstance(matter, Held)
                        else Entry.CLOSED
                    )
                    found[run, shard, ordinal] = kind
    finally:
        client.close()
    return found


def read_classes(url: str, runs: Iterable[str]) -> Mapping[Place, str]:
    """ClickHouse's class of every recipient that it has a row of."""
    client = connect(url)
    steps: dict[Place, list[Step]] = defaultdict(list)
    try:
        for run in runs:
            rows = asking(
                client,
                "SELECT shard, ordinal, generation, toInt8(kind), reason, rank "  # noqa: S608
                f"FROM {STEPS.name} FINAL WHERE tenant = {{t:String}} AND run = {{r:String}}",
                {"t": TENANT, "r": run},
            ).result_rows
            for shard, ordinal, generation, kind, reason, rank in rows:
                steps[run, int(shard), int(ordinal)].append(
                    Step(
                        LEG,
                        int(shard),
                        int(ordinal),
                        int(generation),
                        StepKind(int(kind)),
                        str(reason),
                        int(rank),
                    )
                )
    finally:
        client.close()
    return {place: class_of(found)[0] for place, found in steps.items()}


def _book_errors(home: Home, run: str, patience: timedelta) -> list[str]:
    """What is wrong with the books of a run, after waiting for them to settle."""
    until = time.monotonic() + patience.total_seconds()
    books: Books | None = None
    while books is None or not settled(books):
        try:
            books = look(run, TENANT, home.root)
        except (Missing, Unavailable) as error:
            if time.monotonic() > until:
                return [f"the books of {run} can't be read: {error}"]
        if time.monotonic() > until:
            break
        time.sleep(0.3)
    if books is None:
        return [f"the books of {run} can't be read"]
    errors = [f"{run}: {error}" for error in books.verdict.errors]
    if not settled(books):
        errors.append(
            f"the books of {run} are not settled after {patience.total_seconds():.0f} s: it is "
            f"{books.status}, {books.counts.pending} {PENDING}, lag {books.lag}"
        )
    return errors
