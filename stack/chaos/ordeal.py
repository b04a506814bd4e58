"""One run of chaos: stack and jobs up, traffic on, fault after fault, then the records compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from schemas.errors import FanfareError, StackFailed, Unavailable
from sinks.store import FileStore
from stack import flink_jobs, lifecycle
from stack.chaos.checker import Findings, check
from stack.chaos.evidence import Struck
from stack.chaos.nemesis import SETTINGS, Nemesis, settings_for
from stack.chaos.records import Trial, read_evidence, read_outcomes
from stack.chaos.schedule import schedule
from stack.chaos.traffic import Campaigns, CriticalMessages, wait_until
from stack.crowd import Crowd, build_crowds
from stack.jobs import JOBS, start_jobs
from stack.layout import Home, endpoints, read_state
from stack.simulator.client import Control
from stack.supervisor import is_supervised

TASKMANAGERS = 6
"""Four jobs and two to spare, where chaos starts the stack itself."""
_JOBS_START = timedelta(minutes=4)
_FIRST_FLOW = timedelta(minutes=3)
_SETTLED = timedelta(minutes=5)
_WEBHOOKS_S = 120


@dataclass(frozen=True, slots=True)
class Size:
    """How much is sent. ``ahead_s``: so much work, at its rate, lies before each stream."""

    people: int
    rate: float
    interval: timedelta
    ahead_s: float
    hurry: float


FULL = Size(16_000, 40.0, timedelta(milliseconds=250), 60.0, 400.0)
QUICK = Size(2_500, 25.0, timedelta(milliseconds=250), 15.0, 300.0)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run of chaos found. ``broke_off``: why the schedule was not carried out to its end."""

    seed: int
    planned: int
    faults: tuple[Struck, ...]
    findings: Findings
    seconds: float
    broke_off: str = ""

    @property
    def sound(self) -> bool:
        """Whether all faults were lived through and every promise was kept."""
        return self.findings.sound and not self.broke_off and len(self.faults) == self.planned


def _drain_webhooks(control: Control) -> bool:
    """Wait for all webhooks, for as long as any are taken; whether none remains."""
    taken = -1
    while not control.drain_webhooks(_WEBHOOKS_S):
        before, taken = taken, int(control.ask("/webhooks")["acked_events"])
        if taken == before:
            return False
    return True


def undergo(home: Home, seed: int, quick: bool, tell: Callable[[str], None]) -> Result:
    """Carry a schedule out and judge what came of it.

    A stack that runs in ``home`` is used and left as it was; else one is started, and stopped.

    Raises:
        StackFailed: the stack, a job or the first sends did not start.
        Unavailable: a server did not answer when the records were read.
    """
    found_running = is_supervised(home)
    try:
        return _undergo(home, seed, quick, tell, None if found_running else TASKMANAGERS)
    finally:
        if not found_running:
            tell("stopping the stack")
            lifecycle.down(home)


def _undergo(
    home: Home, seed: int, quick: bool, tell: Callable[[str], None], taskmanagers: int | None
) -> Result:
    began = time.monotonic()
    size = QUICK if quick else FULL
    lifecycle.up(home, taskmanagers=taskmanagers)
    state = read_state(home)
    if state is None or state.taskmanagers < len(JOBS):
        raise StackFailed(
            f"chaos runs {len(JOBS)} jobs, and the stack has fewer TaskManagers: "
            "`fanfare down`, then `fanfare up --taskmanagers 6`"
        )
    ours = {job.name for job in flink_jobs.running_jobs(home)}
    start_jobs(home, tell, _JOBS_START, names=tuple(JOBS))
    tag = f"{seed}-{time.time_ns() // 1_000_000_000}"
    crowd = _crowd(home, size.people)
    tell(
        f"seed {seed}: the stack and {len(JOBS)} jobs run; an audience of {len(crowd):,}, "
        f"{len(crowd.consenting()):,} of whom want the messages ({time.monotonic() - began:.0f} s)"
    )
    control = Control(endpoints(home).simulator)
    before = control.settings()
    control.configure(SETTINGS)
    campaigns = Campaigns(home, crowd, tag, size.rate)
    critical = CriticalMessages(home, crowd, tag, size.interval, seed)
    try:
        faults, planned, why = _strike_all(
            home, Nemesis(home, campaigns, critical, tell), campaigns, critical,
            seed, quick, size, tell,
        )  # fmt: skip
        tell("no more faults: what is left is sent, the records are compared")
        with suppress(Unavailable):
            Control(endpoints(home).simulator).configure(settings_for(None))
        for end in (critical.finish, lambda: campaigns.hurry(size.hurry)):
            try:
                end()
            except FanfareError as error:
                why = why or str(error)
        _await_outcomes(home, critical.trial())
        drained = _drain_webhooks(Control(endpoints(home).simulator))
        evidence = read_evidence(home, [*campaigns.trials(), critical.trial()], _SETTLED)
    finally:
        with suppress(FanfareError):
            Control(endpoints(home).simulator).configure(before)
        if JOBS["delivery-critical"].name not in ours:
            _cancel(home, JOBS["delivery-critical"].name)
    if not drained:
        told = (f"the receiver has taken no webhook for {_WEBHOOKS_S} s, and some remain",)
        evidence = replace(evidence, book_errors=evidence.book_errors + told)
    findings = check(evidence, faults)
    return Result(seed, planned, tuple(faults), findings, time.monotonic() - began, why)


def _strike_all(
    home: Home,
    nemesis: Nemesis,
    campaigns: Campaigns,
    critical: CriticalMessages,
    seed: int,
    quick: bool,
    size: Size,
    tell: Callable[[str], None],
) -> tuple[list[Struck], int, str]:
    """Strike one after the other; what was done, how many there were to be, why it ended early."""
    critical.prepare()
    campaigns.keep_going(size.ahead_s)
    critical.start()
    nemesis.wait_flowing(_FIRST_FLOW)
    planned = schedule(seed, quick)
    done: list[Struck] = []
    for number, fault in enumerate(planned, 1):
        time.sleep(fault.calm_s)
        try:
            campaigns.keep_going(size.ahead_s)
            tell(f"[{number}/{len(planned)}] {time.strftime('%H:%M:%S')}")
            done.append(nemesis.strike(fault))
        except FanfareError as error:
            tell(f"broken off at '{fault.name}': {error}")
            return done, len(planned), f"{fault.name}: {error}"
    return done, len(planned), ""


def _crowd(home: Home, people: int) -> Crowd:
    folder: Path = home.root / "chaos"
    folder.mkdir(parents=True, exist_ok=True)
    # Nobody of an earlier run: what those did with their consent is no part of this one.
    first = time.time_ns() // 1_000_000_000 * 1_000
    return build_crowds(FileStore(home.store), folder, people, first)[0]


def _await_outcomes(home: Home, trial: Trial) -> None:
    """Wait until every critical message that was ordered has an outcome in Kafka."""
    wanted = {(trial.run, one.shard, one.ordinal) for one in trial.people}
    servers = endpoints(home).kafka
    # What never comes is a loss, and the checker's to find.
    with suppress(StackFailed):
        wait_until(
            lambda: wanted <= set(read_outcomes(servers, [trial.run])),
            _SETTLED,
            "every critical message has an outcome",
        )


def _cancel(home: Home, name: str) -> None:
    with suppress(FanfareError):
        for job in flink_jobs.running_jobs(home):
            if job.name == name:
                flink_jobs.cancel(home, job.id)
