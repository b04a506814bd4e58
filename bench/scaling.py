"""Cost against size, and against subtasks: ``make bench SECTION=scaling``.

- what a decision costs under Flink for campaigns of 10 thousand to a million recipients (to ten
  million with ``FANFARE_BENCH_SCALE=10000000``), and the memory of the campaigns job's process
- what coordinate costs a page, decided twice: all are put off to one moment, and then wait for room
- what the ledger costs Redis for the same sizes, every recipient claimed and settled
- delivery by one subtask and by two, each pinned to a core of its own; the others share both

A cost that grows with the size of a campaign is a defect: twice the work is twice the time.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from bench import coordinate, engine_decide, engine_deliver, ledger
from bench.decide import CAPS
from bench.harness import SMTP, audience, own_stack, resident_mb
from sinks.store import FileStore
from stack.layout import Home, endpoints, processes
from stack.simulator.client import Control

LARGEST = int(os.environ.get("FANFARE_BENCH_SCALE", "1000000"))
SIZES = tuple(size for size in (10_000, 100_000, 1_000_000, 10_000_000) if size <= LARGEST)
DELIVERED = int(os.environ.get("FANFARE_BENCH_PEOPLE", "100000"))


def size_name(size: int) -> str:
    """``10k``, ``1m``: how a figure's name ends."""
    return f"{size // 1_000_000}m" if size >= 1_000_000 else f"{size // 1_000}k"


def _decisions() -> dict[str, float]:
    figures: dict[str, float] = {}
    with (
        own_stack(
            ("campaigns",), taskmanagers=1, FANFARE_WINDOW=str(engine_decide.WINDOW)
        ) as where,
        tempfile.TemporaryDirectory(prefix="fanfare-bench-") as name,
    ):
        store, folder, first = FileStore(where.store), Path(name), 100_000_000
        warm = audience(store, folder, engine_decide.WARM, first=first)
        engine_decide.decide(where, "scale-warm", warm.snapshot, engine_decide.WARM, CAPS)
        for size in SIZES:
            first += size
            built = audience(store, folder, size, first=first)
            end = size_name(size)
            found = engine_decide.decide(where, f"scale-{end}", built.snapshot, size, CAPS)
            again = engine_decide.decide(where, f"again-{end}", built.snapshot, size, CAPS)
            for prefix, one in (("decide", found), ("decide_again", again)):
                for figure in (
                    "cpu_s_per_million",
                    "taskmanager_cpu_s_per_million",
                    "recipients_per_s",
                ):
                    figures[f"{prefix}_{figure}_{end}"] = one[figure]
            figures[f"decide_taskmanager_rss_mb_{end}"] = resident_mb(where)["taskmanager"]
    return figures


def _coordination() -> dict[str, float]:
    return {f"coordinate_us_per_page_{size_name(size)}": coordinate.measure(size) for size in SIZES}


def _ledgers() -> dict[str, float]:
    figures: dict[str, float] = {}
    for size in SIZES:
        found = ledger.measure(size, size)
        end = size_name(size)
        figures[f"ledger_redis_cpu_s_per_million_{end}"] = found["redis_cpu_s_per_million"]
        figures[f"ledger_bytes_{end}"] = found["bytes_per_10m"] * size / 10_000_000
    return figures


def _pin(where: Home, cores: int) -> None:
    """Each TaskManager that works to a core of its own."""
    usable = sorted(os.sched_getaffinity(0))
    for name, info in processes(where).items():
        number = name.removeprefix("flink-taskmanager-")
        if number.isdigit() and info.pid is not None:
            core = usable[(int(number) - 1) % min(cores, len(usable))]
            for thread in psutil.Process(info.pid).threads():
                os.sched_setaffinity(thread.id, {core})


def _subtasks() -> dict[str, float]:
    figures: dict[str, float] = {}
    for count in (1, 2):
        with (
            own_stack(("delivery",), taskmanagers=count, parallelism=count) as where,
            tempfile.TemporaryDirectory(prefix="fanfare-bench-") as name,
        ):
            _pin(where, count)
            store, folder = FileStore(where.store), Path(name)
            warm = audience(store, folder, engine_deliver.WARM, first=10_000_000)
            built = audience(store, folder, DELIVERED)
            Control(endpoints(where).simulator).configure({"webhooks": {"url": None}})
            engine_deliver.deliver(where, warm, "scale-warm", SMTP)
            found = engine_deliver.deliver(where, built, f"scale-{count}", SMTP)
            for figure in ("per_s", "cpu_s_per_million", "taskmanager_cpu_s_per_million"):
                figures[f"smtp_{figure}_subtasks_{count}"] = found[figure]
    return figures


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    return {**_coordination(), **_decisions(), **_ledgers(), **_subtasks()}
