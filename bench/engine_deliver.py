"""The delivery job under Flink: ``make bench SECTION=deliver``.

Kafka, delivery alone, Redis and the provider simulator. Sends to everybody are written into the
topic at once, as decide writes them; measured from the first acceptance to the last. Messages of
3 KB, 10 variables, 3 links; ledger on; by SMTP, and by HTTP with an answer after 50 ms. Processor
time is of all processes from the first send written to the last outcome.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from bench.delivery import launch, sends_to_all
from bench.harness import (
    SENDGRID,
    SMTP,
    Cpu,
    audience,
    own_stack,
    per_million,
)
from pipelines.audience import BuiltAudience
from schemas import topics
from schemas.codec import encode
from schemas.ids import RunId
from schemas.reasons import Channel, Lane
from schemas.records import Route
from sinks.kafka_client import producer
from sinks.store import FileStore
from stack.layout import Home, endpoints
from stack.simulator.client import Control

PEOPLE = int(os.environ.get("FANFARE_BENCH_PEOPLE", "200000"))
WARM = 20_000
LATENCY_MS = 50.0
_PATIENCE_S = 300.0


def deliver(where: Home, built: BuiltAudience, run: str, route: Route) -> dict[str, float]:
    """One run, from sends in Kafka to the last acceptance."""
    at = endpoints(where)
    control = Control(at.simulator)
    cpu = Cpu(where)
    run_id = RunId(run)
    spec = launch(at.redis, FileStore(where.store), built, run_id, route)
    sender = producer(at.kafka)
    topic = topics.sends_topic(Lane.PROMOTIONAL, Channel.EMAIL)
    for send in sends_to_all(built, spec, run_id):
        sender.send(topic, encode(send))
    sender.close()
    people = built.manifest.counts.audience
    until = time.monotonic() + _PATIENCE_S
    while int(control.stats(run)["unique"]) < people:
        if time.monotonic() > until:
            raise RuntimeError(f"{run}: {control.stats(run)} of {people} after {_PATIENCE_S:g} s")
        time.sleep(0.1)
    time.sleep(1)  # settled, told, checkpointed
    spent = cpu.spent()
    accepted = [int(one["accepted_at_ms"]) for one in control.messages(run)]
    if len(accepted) != people:
        raise RuntimeError(f"{run}: {len(accepted)} acceptances for {people} people")
    seconds = (max(accepted) - min(accepted)) / 1000
    return {"per_s": people / seconds, **per_million(spent, people)}


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    figures: dict[str, float] = {}
    with (
        own_stack(("delivery",), taskmanagers=1) as where,
        tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder,
    ):
        store = FileStore(where.store)
        warm = audience(store, Path(folder), WARM, first=10_000_000)
        built = audience(store, Path(folder), PEOPLE)
        latency = {"kind": "fixed", "ms": LATENCY_MS}
        control = Control(endpoints(where).simulator)
        control.configure({"webhooks": {"url": None}, "sendgrid": {"latency": latency}})
        for kind, route in (("smtp", SMTP), ("http", SENDGRID)):
            deliver(where, warm, f"bench-warm-{kind}", route)
            found = deliver(where, built, f"bench-{kind}", route)
            figures |= {f"{kind}_{name}": number for name, number in found.items()}
    return figures
