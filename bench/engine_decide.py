"""The campaigns job under Flink: ``make bench SECTION=decide``.

Kafka, the campaigns job alone, Redis. A run whose window is unlimited is launched; measured from
the first decision to the last, as the page results say it. RocksDB, exactly once, consent
looked up in state for everybody, with two cap rules and without, and (``again``) another campaign
to the same people, who have the state that the first one left.
"""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from bench.decide import CAPS
from bench.harness import SMTP, Cpu, audience, campaign, command, own_stack, per_million
from schemas import topics
from schemas.codec import decode, to_millis
from schemas.pages import bitmap_from
from schemas.records import CapRule, CommandKind, PageResult
from sinks.kafka_client import read_from_end
from sinks.store import FileStore
from stack.layout import Home, endpoints

PEOPLE = int(os.environ.get("FANFARE_BENCH_PEOPLE", "500000"))
WARM = 50_000
WINDOW = 1_000_000_000
"""Recipients that may be open at once: nothing waits for outcomes."""
_PATIENCE = timedelta(minutes=5)


def decide(
    where: Home, run: str, snapshot: str, people: int, caps: tuple[CapRule, ...]
) -> dict[str, float]:
    """One run, from its launch to its last decision."""
    cpu = Cpu(where)
    decided, moments = 0, []
    until = time.monotonic() + _PATIENCE.total_seconds()
    with read_from_end(endpoints(where).kafka, topics.PAGE_RESULTS, back=0) as poll:
        poll()
        command(where, CommandKind.LAUNCH, run, campaign(run, snapshot, SMTP, caps=caps))
        while decided < people:
            for value in poll():
                result = decode(value, PageResult)
                if result.run == run:
                    decided += bitmap_from(result.sends).bit_count()
                    moments.append(to_millis(result.decided_at))
            if time.monotonic() > until:
                raise RuntimeError(f"{run}: {decided} of {people} decided after {_PATIENCE}")
    seconds = (max(moments) - min(moments)) / 1000
    return {"recipients_per_s": people / seconds, **per_million(cpu.spent(), people)}


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    figures: dict[str, float] = {}
    with (
        own_stack(("campaigns",), taskmanagers=1, FANFARE_WINDOW=str(WINDOW)) as where,
        tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder,
    ):
        store = FileStore(where.store)
        warm = audience(store, Path(folder), WARM, first=10_000_000)
        decide(where, "bench-warm", warm.snapshot, WARM, CAPS)
        # The first two have people of their own: nobody has a state that an earlier run left.
        ours, others = (
            audience(store, Path(folder), PEOPLE, first=number * 10_000_000).snapshot
            for number in (2, 3)
        )
        for name, snapshot, caps in (
            ("", ours, CAPS),
            ("no_caps_", others, ()),
            ("again_", ours, CAPS),
        ):
            found = decide(where, f"bench-{name}run", snapshot, PEOPLE, caps)
            figures |= {f"{name}{figure}": number for figure, number in found.items()}
    return figures
