"""What choices cost, side by side: ``make bench SECTION=variants``.

- the campaigns job under Flink with state in RocksDB and on the heap, exactly once and at least
  once: the same run with two caps, each in a stack of its own, by turns
- delivery's loop by SMTP with fewer and with more messages in flight, by turns
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import delivery, engine_decide
from bench.decide import CAPS
from bench.harness import audience, own_stack
from sinks.store import FileStore
from stack import flink_jobs
from stack.flink_jobs import submit, wait_running
from stack.jobs import JOBS, PATIENCE
from stack.layout import PROJECT_ROOT, Home

PEOPLE = 200_000
"""So many states fit into a TaskManager's heap as well."""
ROUNDS = 3
TURNS = 2
IN_FLIGHT = (64, 192, 320)


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the campaigns job, and how Flink says that it runs so."""

    script: Path
    backend: str
    mode: str
    flink: Mapping[str, str] = field(default_factory=dict)


_JOB, _REPEATING = JOBS["campaigns"].script, PROJECT_ROOT / "bench" / "at_least_once.py"
_HEAP = {"state.backend.type": "hashmap"}
VARIANTS: Mapping[str, Variant] = {
    "": Variant(_JOB, "RocksDB", "exactly_once"),
    "heap_state_": Variant(_JOB, "HashMap", "exactly_once", _HEAP),
    "at_least_once_": Variant(_REPEATING, "RocksDB", "at_least_once"),
}


def _require(where: Home, job: str, variant: Variant) -> None:
    """Raise RuntimeError where Flink runs the job otherwise than it is to be measured, or where it
    failed over meanwhile."""
    found = flink_jobs.rest(where, "GET", f"/jobs/{job}/checkpoints/config")
    backend, mode = str(found["state_backend"]), str(found["mode"])
    if variant.backend not in backend or mode != variant.mode:
        raise RuntimeError(f"the job runs with {backend}, {mode}; wanted {variant}")
    if failures := flink_jobs.failures(where, job):
        raise RuntimeError(f"the job failed over: {failures}")


def _decide(variant: Variant) -> Mapping[str, float]:
    with (
        own_stack(
            (), taskmanagers=1, flink=variant.flink, FANFARE_WINDOW=str(engine_decide.WINDOW)
        ) as where,
        tempfile.TemporaryDirectory(prefix="fanfare-bench-") as folder,
    ):
        job = submit(where, variant.script, parallelism=1)
        wait_running(where, job, PATIENCE)
        _require(where, job, variant)
        store = FileStore(where.store)
        warm = audience(store, Path(folder), engine_decide.WARM, first=10_000_000)
        built = audience(store, Path(folder), PEOPLE)
        engine_decide.decide(where, "bench-warm", warm.snapshot, engine_decide.WARM, CAPS)
        found = engine_decide.decide(where, "bench-run", built.snapshot, PEOPLE, CAPS)
        _require(where, job, variant)
        return found


def _in_flight() -> dict[str, float]:
    rates: dict[int, list[float]] = {count: [] for count in IN_FLIGHT}
    with delivery.place(delivery.PEOPLE) as servers:
        servers.deliver("smtp")
        for _ in range(ROUNDS):
            for count in IN_FLIGHT:
                rates[count].append(servers.deliver("smtp", in_flight=count).per_s)
    return {
        f"loop_smtp_{count}_in_flight_per_s": statistics.median(found)
        for count, found in rates.items()
    }


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(TURNS):
        for name, variant in VARIANTS.items():
            found[name].append(_decide(variant))
    figures = {
        f"decide_{name}{figure}": statistics.median(one[figure] for one in measured)
        for name, measured in found.items()
        for figure in ("recipients_per_s", "cpu_s_per_million", "taskmanager_cpu_s_per_million")
    }
    return figures | _in_flight()
