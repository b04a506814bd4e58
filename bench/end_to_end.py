"""Launch to last outcome with everything on: ``make bench SECTION=e2e``.

All three jobs, Kafka, Redis, ClickHouse and the provider by SMTP; webhooks off, since the figure is
of what goes out. From the command written to the event that says the run is completed, which is
when the coordinator has the last outcome; how far behind the books are then is told beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from bench.decide import CAPS
from bench.harness import (
    SMTP,
    TENANT,
    Cpu,
    audience,
    campaign,
    command,
    follow,
    own_stack,
    per_million,
    resident_mb,
)
from schemas.records import CommandKind
from sinks.store import FileStore
from stack.cli_books import look, settled
from stack.jobs import STANDARD
from stack.layout import endpoints
from stack.simulator.client import Control

PEOPLE = int(os.environ.get("FANFARE_BENCH_PEOPLE", "500000"))
WARM = 20_000


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    with (
        own_stack(STANDARD, taskmanagers=len(STANDARD)) as where,
        tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder,
    ):
        store = FileStore(where.store)
        warm = audience(store, Path(folder), WARM, first=10_000_000)
        built = audience(store, Path(folder), PEOPLE)
        control = Control(endpoints(where).simulator)
        control.configure({"webhooks": {"url": None}})
        command(where, CommandKind.LAUNCH, "warm", campaign("warm", warm.snapshot, SMTP))
        follow(where, "warm", timedelta(minutes=3))
        cpu = Cpu(where)
        one = campaign("bench", built.snapshot, SMTP, caps=CAPS)
        written = command(where, CommandKind.LAUNCH, "bench", one)
        ended = follow(where, "bench", timedelta(minutes=15))
        spent, memory = cpu.spent(), resident_mb(where)
        seconds = (ended.at - written.issued_at).total_seconds()
        began = time.monotonic()
        while not settled(books := look("bench", TENANT, where.root)):
            if time.monotonic() - began > 300:
                raise RuntimeError("the books are not settled after 300 s")
            time.sleep(0.2)
        behind = time.monotonic() - began
        if not books.verdict.balanced:
            raise RuntimeError(f"the books do not balance: {books.verdict.errors}")
        stats = control.stats("bench")
    return {
        "recipients_per_s": PEOPLE / seconds,
        "seconds": seconds,
        "books_behind_s": behind,
        "duplicates": stats["duplicates"],
        **per_million(spent, PEOPLE),
        **{f"{kind}_rss_mb": size for kind, size in memory.items()},
    }
