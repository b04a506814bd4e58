"""Carries faults out on the real processes of an embedded stack, and waits until sends flow."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from schemas.errors import FanfareError, StackFailed, Unavailable
from schemas.ids import RunId, Tenant
from schemas.reasons import Lane
from sinks import ledger_upkeep, slots
from sinks.redis_client import connect as connect_redis
from stack import flink_jobs, lifecycle
from stack.chaos.evidence import InFlight, Struck
from stack.chaos.schedule import JOB_PARTS, Deed, Fault, Part, Trouble
from stack.chaos.traffic import Campaigns, CriticalMessages, wait_until
from stack.crowd import LEG, TENANT
from stack.jobs import JOBS
from stack.layout import Home, ProcessInfo, State, endpoints, processes, read_state
from stack.process import wait_gone
from stack.simulator.client import Control
from stack.supervisor import leftovers
from stack.upgrade import upgrade

Tell = Callable[[str], None]

SETTINGS: Mapping[str, Any] = {
    "sendgrid": {"latency": {"kind": "uniform", "min_ms": 150.0, "max_ms": 700.0}},
    "smtp": {"latency": {"kind": "uniform", "min_ms": 150.0, "max_ms": 700.0}},
    # Nobody bounces or leaves: who agreed is owed every run.
    "webhooks": {
        "proportions": {
            "delivered": 1.0,
            "bounce": 0.0,
            "dropped": 0.0,
            "spamreport": 0.0,
            "unsubscribe": 0.0,
        }
    },
}
"""The provider: slow enough that requests are open whenever something is killed."""

_LANES = {Part.DELIVERY: Lane.PROMOTIONAL, Part.CRITICAL: Lane.CRITICAL}
_STRIKES = 0.1
_CALM_FAULTS = {
    "hang_after_rate": 0.0,
    "hang_before_rate": 0.0,
    "reset_before_rate": 0.0,
    "reset_after_rate": 0.0,
    "ambiguous_rate": 0.0,
}
_DOUBTFUL = ("ambiguous", "hang_before", "hang_after", "reset_before", "reset_after")
_FLOWS_AGAIN = timedelta(minutes=5)
_HUNG = timedelta(seconds=60)
_BUSY = timedelta(seconds=20)
_RESTARTED = timedelta(minutes=3)
_FLOWING_MESSAGES = 5
_CLAIMS_LOOKS = 10
_REDIS_PATIENCE = timedelta(seconds=5)
_GRACE_MS = 1_000


def now_ms() -> int:
    """Epoch milliseconds."""
    return time.time_ns() // 1_000_000


def settings_for(trouble: Trouble | None) -> dict[str, Any]:
    """What the provider is told to do, or, for None, to do no more."""
    faults, limit = dict(_CALM_FAULTS), None
    match trouble:
        case Trouble.HANG_AFTER:
            faults["hang_after_rate"] = _STRIKES
        case Trouble.HANG_BEFORE:
            faults["hang_before_rate"] = _STRIKES
        case Trouble.RESET_BEFORE:
            faults["reset_before_rate"] = _STRIKES
        case Trouble.RESET_AFTER:
            faults["reset_after_rate"] = _STRIKES
        case Trouble.THROTTLED:
            limit = 5
        case Trouble.AMBIGUOUS | None:
            pass
    http = dict(faults)
    if trouble is Trouble.AMBIGUOUS:
        # SMTP has no such answer: a reply of 4xx or 5xx to the message is a refusal (RFC 5321).
        http |= {"ambiguous_rate": _STRIKES, "ambiguous_status": 502}
    rate_limit = {"per_second": limit}
    return {
        "sendgrid": {"faults": http, "rate_limit": rate_limit},
        "smtp": {"faults": faults, "rate_limit": rate_limit},
    }


@dataclass(frozen=True, slots=True)
class _Doubt:
    """What the provider has hung, reset or answered ambiguously until now."""

    counted: int
    unanswered: Counter[str]
    """Requests by message."""
    left: Counter[str]
    """Requests by message whose client left before it was answered."""
    critical_refused: int


class Nemesis:
    """The hand that strikes. Belongs to one thread."""

    def __init__(
        self, home: Home, campaigns: Campaigns, critical: CriticalMessages, tell: Tell
    ) -> None:
        self._home = home
        self._campaigns = campaigns
        self._critical = critical
        self._tell = tell
        self._control = Control(endpoints(home).simulator)

    def strike(self, fault: Fault) -> Struck:
        """Do it, and wait until every job runs and sends of both lanes flow again.

        Raises:
            StackFailed: sends do not flow again; the message says after what.
        """
        self._wait_busy()
        open_before = int(self._control.open_requests()["count"])
        self._campaigns.look()
        remaining = self._campaigns.remaining
        self._tell(f"{fault.name}: {open_before} requests in flight, {remaining:,} messages remain")
        at_ms = now_ms()
        left, note = self._do(fault)
        try:
            self.wait_flowing()
        except StackFailed as error:
            raise StackFailed(f"after '{fault.name}': {error}") from error
        ended_ms = now_ms()
        for lane, found in left.items():
            note += (
                f"{'; ' if note else ''}{lane.value}: {found.slots} slots, {found.claims} claims, "
                f"{found.open} open at the provider, {found.doubtful} in doubt there"
            )
        self._tell(f"    flows again after {(ended_ms - at_ms) / 1000:.1f} s. {note}")
        return Struck(fault, at_ms, ended_ms, open_before, remaining, left, note)

    def _do(self, fault: Fault) -> tuple[dict[Lane, InFlight], str]:
        part = fault.part
        match fault.deed:
            case Deed.KILL if part is not None:
                return self._kill(part), ""
            case Deed.STOP if part is not None:
                return self._stop(part, fault.lasts_s), ""
            case Deed.PROVIDER if fault.trouble is not None:
                return self._mislead(fault.trouble, fault.lasts_s), ""
            case Deed.MACHINE:
                return self._restart_machine(), ""
            case Deed.PAUSE:
                return {}, self._pause(fault.lasts_s)
            case Deed.RATE:
                run = self._campaigns.longest()
                self._campaigns.set_rate(run, self._campaigns.rate * 1.5)
                return {}, f"{run} at {self._campaigns.rate * 1.5:g}/s"
            case Deed.UPGRADE:
                upgrade(self._home, lambda line: self._tell(f"    {line}"))
                return {}, ""
        raise AssertionError(f"{fault} can't be done")

    # --- processes

    def _process_of(self, part: Part) -> ProcessInfo:
        name = part.value
        if part in JOB_PARTS:
            ids = {job.name: job.id for job in flink_jobs.running_jobs(self._home)}
            found = flink_jobs.taskmanagers_of(self._home, ids[JOBS[part.value].name])
            name = min(found)
        return processes(self._home)[name]

    def _kill(self, part: Part) -> dict[Lane, InFlight]:
        info = self._process_of(part)
        left = self._stop_and_count([(part, info)])
        _signal(info, signal.SIGKILL)

        def is_back() -> bool:
            now = processes(self._home)[info.name]
            return now.state is State.READY and now.pid != info.pid and now.alive

        wait_until(is_back, _RESTARTED, f"{info.name} is started again")
        return left

    def _stop(self, part: Part, seconds: float) -> dict[Lane, InFlight]:
        info = self._process_of(part)
        before = self._doubt() if part is Part.SIMULATOR else None
        left = self._stop_and_count([(part, info)])
        _signal(info, signal.SIGSTOP)
        try:
            self._sleep(seconds, "still stopped" if part is not Part.SIMULATOR else "")
        finally:
            # The supervisor may have given it up meanwhile.
            if info.identity is not None:
                info.identity.send(signal.SIGCONT)
        if before is not None:
            self.wait_flowing()
            return self._doubted(before, stopped=True)
        return left

    def _restart_machine(self) -> dict[Lane, InFlight]:
        state = read_state(self._home)
        if state is None or state.supervisor is None:
            raise StackFailed(f"no stack runs in {self._home.root}; run `fanfare up`")
        left = self._stop_and_count([(part, self._process_of(part)) for part in _LANES])
        # The provider is no part of the machine: what it has accepted, it has written down.
        for run in self._campaigns.runs:
            self._control.ask(f"/messages?run={run.run}&limit=1")
        state.supervisor.send(signal.SIGKILL)
        everything = leftovers(self._home)
        for identity in everything:
            identity.send(signal.SIGKILL)
        remaining = wait_gone([state.supervisor, *everything], timedelta(seconds=20))
        if remaining:
            raise StackFailed(f"processes {[one.pid for one in remaining]} could not be killed")
        began = time.monotonic()
        lifecycle.up(self._home, taskmanagers=state.taskmanagers)
        self._tell(f"    everything is up again after {time.monotonic() - began:.1f} s")
        self._control = Control(endpoints(self._home).simulator)
        self._control.configure(SETTINGS)
        return left

    def _stop_and_count(self, struck: Iterable[tuple[Part, ProcessInfo]]) -> dict[Lane, InFlight]:
        """Stop the delivery processes among these, and count what each has under way."""
        lanes = [(_LANES[part], info) for part, info in struck if part in _LANES]
        for _, info in lanes:
            _signal(info, signal.SIGSTOP)
        if not lanes:
            return {}
        in_use = {lane: slots.in_use(self._home.slots, info.pid or 0) for lane, info in lanes}
        # At once: the provider goes on answering.
        open_ids = self._control.open_requests()["send_ids"]
        urgent = sum(one in self._critical.ids for one in open_ids)
        opened = {Lane.CRITICAL: urgent, Lane.PROMOTIONAL: len(open_ids) - urgent}
        return {lane: InFlight(in_use[lane], opened[lane], self._claims(lane)) for lane, _ in lanes}

    def _claims(self, lane: Lane) -> int:
        """What the newest owners of a lane have claimed, once all that was under way to Redis has
        arrived there. Claims of processes that died earlier are theirs, and in doubt already."""
        runs = (
            [self._critical.run_name]
            if lane is Lane.CRITICAL
            else [one.run for one in self._campaigns.runs if one.remaining]
        )
        client = connect_redis(endpoints(self._home).redis, _REDIS_PATIENCE)
        looks: list[int] = []
        try:
            while len(looks) < _CLAIMS_LOOKS and not (len(looks) > 1 and looks[-1] == looks[-2]):
                looks.append(
                    sum(
                        ledger_upkeep.claims_of_owners(
                            client, Tenant(TENANT), RunId(run), LEG, lane
                        )
                        for run in runs
                    )
                )
                time.sleep(0.05)
        finally:
            client.close()
        return looks[-1]

    # --- the provider

    def _mislead(self, trouble: Trouble, seconds: float) -> dict[Lane, InFlight]:
        before = self._doubt()
        self._control.configure(settings_for(trouble))
        try:
            self._sleep(seconds, "still at it")
        finally:
            self._control.configure(settings_for(None))

        def all_gone() -> bool:
            requests = self._control.open_requests()["requests"]
            return all(one["state"] != "hung" for one in requests)

        wait_until(all_gone, _HUNG, "requests that hang are given up")
        return self._doubted(before)

    def _doubt(self) -> _Doubt:
        faults = self._control.faults()
        refused = self._control.stats(self._critical.run_name)["refused"]
        unanswered = faults["unanswered"]
        return _Doubt(
            sum(
                count
                for name, count in faults["counts"].items()
                if name.rpartition(".")[2] in _DOUBTFUL
            ),
            Counter(one for kind in _DOUBTFUL for one in unanswered.get(kind, ())),
            Counter(unanswered.get("client_left", ())),
            sum(refused.get(kind, 0) for kind in ("hang_before", "reset_before")),
        )

    def _doubted(self, before: _Doubt, stopped: bool = False) -> dict[Lane, InFlight]:
        """What came to be in doubt since; one that was stopped hung whatever it did not answer."""
        after = self._doubt()
        critical = self._urgent(after.unanswered - before.unanswered)
        critical += after.critical_refused - before.critical_refused
        promotional = after.counted - before.counted - critical
        if stopped:
            left = after.left - before.left
            urgent = self._urgent(left)
            critical += urgent
            promotional += left.total() - urgent
        return {
            Lane.PROMOTIONAL: InFlight(doubtful=max(0, promotional)),
            Lane.CRITICAL: InFlight(doubtful=critical),
        }

    def _urgent(self, requests: Counter[str]) -> int:
        """How many requests are of critical messages: each may have made a duplicate."""
        return sum(count for one, count in requests.items() if one in self._critical.ids)

    # --- runs

    def _pause(self, seconds: float) -> str:
        run = self._campaigns.longest()
        written_ms = now_ms()
        self._campaigns.pause(run)
        self._sleep(seconds, f"{run} still paused")
        late = self._control.starts_after(run, written_ms + _GRACE_MS)
        self._campaigns.resume(run)
        return f"{late} requests of {run} started later than a second after the pause was asked for"

    # --- waiting

    def _wait_busy(self) -> None:
        wait_until(
            lambda: int(self._control.open_requests()["count"]) > 0,
            _BUSY,
            "requests are open before the next fault",
        )

    def wait_flowing(self, patience: timedelta = _FLOWS_AGAIN) -> None:
        """Wait until every server is ready, every job runs, and both lanes send again."""
        seen: list[tuple[int, int]] = []
        why = ["nothing was looked at"]

        def flows() -> bool:
            if self._critical.failure is not None:
                raise StackFailed(f"critical messages ended: {self._critical.failure!r}")
            try:
                seen.append(self._sent())
                why[0] = self._not_running() or (f"sent {seen[0]} at first, {seen[-1]} at last")
            except FanfareError as error:
                why[0] = str(error)
                return False
            if why[0].startswith("sent"):
                calm, urgent = seen[-1][0] - seen[0][0], seen[-1][1] - seen[0][1]
                return calm >= _FLOWING_MESSAGES and urgent >= 1
            return False

        try:
            wait_until(flows, patience, "sends of both lanes flow")
        except StackFailed as error:
            raise StackFailed(f"{error} ({why[0]})") from None

    def _sent(self) -> tuple[int, int]:
        urgent = int(self._control.stats(self._critical.run_name)["unique"])
        return self._campaigns.look(), urgent

    def _not_running(self) -> str:
        """What does not run; empty when all does."""
        for name, info in processes(self._home).items():
            if info.state is not State.READY or not info.alive:
                return f"{name} is {info.state.value} {info.why}"
        listed = {job.name: job for job in flink_jobs.running_jobs(self._home)}
        for name, entry in JOBS.items():
            job = listed.get(entry.name)
            if job is None:
                return f"job {name} is gone"
            if not flink_jobs.tasks_running(self._home, job.id):
                return f"job {name} is {job.state}, not all its tasks run"
        return ""

    def _sleep(self, seconds: float, what: str) -> None:
        """Let time pass; tell how sends go meanwhile."""
        until = time.monotonic() + seconds
        told = time.monotonic()
        while (now := time.monotonic()) < until:
            time.sleep(min(0.5, until - now))
            if what and now - told > 10:
                told = now
                try:
                    calm, urgent = self._sent()
                except Unavailable as error:
                    self._tell(f"    {what}: {error}")
                else:
                    self._tell(f"    {what}: {calm:,} promotional, {urgent:,} critical sent")


def _signal(info: ProcessInfo, number: signal.Signals) -> None:
    if info.identity is None or not info.identity.send(number):
        raise StackFailed(f"{info.name} runs no more: {number.name} reached nobody")
