"""Snapshots from CSV and Parquet: ``make bench SECTION=audience``.

Made-up profiles of 18 columns, with duplicates and bad rows, a segment over them. Each build is a
process of its own, interpreter included; its memory is the most that it ever held.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipelines.audience import AudienceRequest, build_audience
from schemas.ids import Tenant
from sinks.store import FileStore
from stack.profiles import generate

PEOPLE = int(os.environ.get("FANFARE_BENCH_PROFILES", "2000000"))
FEWER = PEOPLE // 4
SEGMENT = "age >= 18"


def _build(source: Path, store: Path) -> None:
    """In a process of its own: build, and say how long and with how much memory."""
    began, cpu = time.perf_counter(), time.process_time()
    request = AudienceRequest((source,), Tenant("acme"), SEGMENT)
    counts = build_audience(request, FileStore(store)).manifest.counts
    took, spent = time.perf_counter() - began, time.process_time() - cpu
    # Not getrusage's: that takes over what the process that started this one held.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "read": counts.read,
                "seconds": took,
                "cpu": spent + children.ru_utime + children.ru_stime,
                "peak_mb": peak,
                "children_peak_mb": children.ru_maxrss / 1024,
            }
        )
    )


def _measured(source: Path, store: Path) -> dict[str, float]:
    words = [sys.executable, "-m", "bench.audience", str(source), str(store)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fanfare-bench-") as name:
        folder = Path(name)
        for count, end in ((PEOPLE, ""), (FEWER, f"_at_{FEWER // 1000}k")):
            for kind, prefix in (("csv", ""), ("parquet", "parquet_")):
                source = folder / f"people{end}.{kind}"
                generate(count, seed=1, out=source)
                found = _measured(source, folder / f"{kind}{end}")
                figures[f"{prefix}profiles_per_s{end}"] = found["read"] / found["seconds"]
                figures[f"{prefix}cpu_s_per_million{end}"] = found["cpu"] / found["read"] * 1e6
                peak = max(found["peak_mb"], found["children_peak_mb"])
                figures[f"{prefix}peak_rss_mb{end}"] = peak
                source.unlink()
    return figures


if __name__ == "__main__":
    _build(Path(sys.argv[1]), Path(sys.argv[2]))
