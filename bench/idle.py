"""Everything up and nothing to do: ``make bench SECTION=stack``.

The whole stack with its three jobs, two minutes after they run (their compilers have ended):
processor time as a share of one core over the next minute, and resident memory.
"""

from __future__ import annotations

import os
import time

from bench.harness import Cpu, own_stack, resident_mb
from stack.jobs import STANDARD

SECONDS = float(os.environ.get("FANFARE_BENCH_IDLE_S", "60"))


def run() -> dict[str, float]:
    """Measure; {figure: number}."""
    with own_stack(STANDARD) as where:
        time.sleep(2 * SECONDS)
        cpu = Cpu(where)
        time.sleep(SECONDS)
        spent, memory = cpu.spent(), resident_mb(where)
    shares = {kind: seconds / SECONDS * 100 for kind, seconds in spent.items()}
    return {
        "idle_cpu_pct": sum(shares.values()),
        "rss_mb": sum(memory.values()),
        **{f"{kind}_idle_cpu_pct": share for kind, share in shares.items()},
        **{f"{kind}_rss_mb": size for kind, size in memory.items()},
    }
