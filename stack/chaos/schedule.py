"""The faults of a run, drawn from its seed: the same seed makes the same schedule."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Part(Enum):
    """What a fault strikes: a job (by the TaskManager that runs it) or a server."""

    DELIVERY = "delivery"
    CRITICAL = "delivery-critical"
    CAMPAIGNS = "campaigns"
    INGEST = "webhook-ingest"
    JOBMANAGER = "flink-jobmanager"
    KAFKA = "kafka"
    REDIS = "redis"
    CLICKHOUSE = "clickhouse"
    RECEIVER = "receiver"
    SIMULATOR = "simulator"


JOB_PARTS = frozenset({Part.DELIVERY, Part.CRITICAL, Part.CAMPAIGNS, Part.INGEST})
"""Parts that are a job's TaskManager; their values are the jobs' names in ``stack.jobs``."""


class Deed(Enum):
    """What is done."""

    KILL = "kill"
    """SIGKILL; the supervisor starts another."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT later."""
    MACHINE = "machine"
    """Every process of the stack at once, the supervisor too; then `up`."""
    PROVIDER = "provider"
    """The provider misbehaves for a while."""
    PAUSE = "pause"
    """A run is paused, and resumed later."""
    RATE = "rate"
    """A run gets another rate."""
    UPGRADE = "upgrade"
    """All jobs are stopped behind savepoints and submitted again."""


class Trouble(Enum):
    """How the provider misbehaves."""

    HANG_AFTER = "hangs after accepting"
    HANG_BEFORE = "hangs before accepting"
    RESET_BEFORE = "resets mid-body"
    RESET_AFTER = "resets after accepting"
    AMBIGUOUS = "accepts and answers 502"
    THROTTLED = "answers 429"


_NAMES = {
    Part.DELIVERY: "TaskManager of delivery",
    Part.CRITICAL: "TaskManager of the critical lane",
    Part.CAMPAIGNS: "TaskManager of the campaigns job",
    Part.INGEST: "TaskManager of webhook-ingest",
    Part.JOBMANAGER: "JobManager",
    Part.KAFKA: "Kafka broker",
    Part.REDIS: "Redis",
    Part.CLICKHOUSE: "ClickHouse",
    Part.RECEIVER: "webhook receiver",
    Part.SIMULATOR: "provider",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. ``calm_s``: how long sends flow before it; ``lasts_s``: how long it goes on."""

    deed: Deed
    part: Part | None = None
    trouble: Trouble | None = None
    lasts_s: float = 0.0
    calm_s: float = 0.0

    @property
    def name(self) -> str:
        """For people; faults of one name are one line of the contract."""
        what = _NAMES[self.part] if self.part is not None else ""
        match self.deed:
            case Deed.KILL:
                return f"{what} killed"
            case Deed.STOP:
                return f"{what} stopped for {self.lasts_s:g} s"
            case Deed.MACHINE:
                return "machine restarted"
            case Deed.PROVIDER:
                return f"provider {self.trouble.value if self.trouble else ''}"
            case Deed.PAUSE:
                return "run paused and resumed"
            case Deed.RATE:
                return "rate of a run changed"
            case Deed.UPGRADE:
                return "jobs upgraded"


STOP_S = 60.0
_KILLS = {
    Part.DELIVERY: 4,
    Part.CRITICAL: 2,
    Part.CAMPAIGNS: 3,
    Part.INGEST: 2,
    Part.JOBMANAGER: 3,
    Part.KAFKA: 3,
    Part.REDIS: 3,
    Part.CLICKHOUSE: 2,
    Part.RECEIVER: 2,
}
_STOPPED = (
    Part.DELIVERY,
    Part.CAMPAIGNS,
    Part.JOBMANAGER,
    Part.KAFKA,
    Part.REDIS,
    Part.CLICKHOUSE,
    Part.RECEIVER,
    Part.SIMULATOR,
)
_TROUBLE_S = 8.0
_QUICK = (
    Fault(Deed.KILL, Part.DELIVERY),
    Fault(Deed.KILL, Part.CRITICAL),
    Fault(Deed.KILL, Part.CAMPAIGNS),
    Fault(Deed.KILL, Part.JOBMANAGER),
    Fault(Deed.KILL, Part.REDIS),
    Fault(Deed.KILL, Part.KAFKA),
    Fault(Deed.PROVIDER, trouble=Trouble.RESET_AFTER, lasts_s=3.0),
    Fault(Deed.PROVIDER, trouble=Trouble.AMBIGUOUS, lasts_s=3.0),
    Fault(Deed.STOP, Part.REDIS, lasts_s=4.0),
)


def _all() -> Iterable[Fault]:
    for part, times in _KILLS.items():
        yield from [Fault(Deed.KILL, part)] * times
    for part in _STOPPED:
        yield Fault(Deed.STOP, part, lasts_s=STOP_S)
    for trouble in Trouble:
        yield Fault(Deed.PROVIDER, trouble=trouble, lasts_s=_TROUBLE_S)
    yield Fault(Deed.MACHINE)
    yield Fault(Deed.RATE)


def schedule(seed: int, quick: bool = False) -> tuple[Fault, ...]:
    """The faults in their order; pause and upgrade come in the middle of them.

    ``quick`` is a short one for the tests: no upgrade, and nothing that takes a minute.
    """
    draw = random.Random(seed)  # noqa: S311 - a schedule is drawn, not a secret
    faults = list(_QUICK if quick else _all())
    draw.shuffle(faults)
    pause = Fault(Deed.PAUSE, lasts_s=3.0 if quick else 8.0)
    middle = [pause] if quick else [pause, Fault(Deed.UPGRADE)]
    draw.shuffle(middle)
    third = len(faults) // 3
    for fault in middle:
        faults.insert(draw.randint(third, len(faults) - third), fault)
    low, high = (0.5, 1.5) if quick else (2.0, 6.0)
    return tuple(
        Fault(one.deed, one.part, one.trouble, one.lasts_s, round(draw.uniform(low, high), 2))
        for one in faults
    )
