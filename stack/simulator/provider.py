"""The simulator itself: what its two providers and its control server share."""

from __future__ import annotations

import asyncio
import random
import secrets
import ssl
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from stack.simulator.config import ConfigError, Faults, Outage, SimulatorConfig
from stack.simulator.connection import Connection, now_ms
from stack.simulator.faults import (
    Fault,
    FaultKind,
    FaultPlan,
    RateLimiter,
    Rules,
    latency_draw,
    outage_now,
)
from stack.simulator.http_wire import HttpConnection, response
from stack.simulator.record import Record
from stack.simulator.starts import Starts
from stack.simulator.webhooks import Webhooks

FLUSH_S = 0.1


class Simulator:
    """State of one simulator; lives in one event loop and is not thread-safe."""

    def __init__(
        self,
        config: SimulatorConfig,
        record_dir: Path,
        webhook_key: ec.EllipticCurvePrivateKey,
        *,
        sendgrid_keys: frozenset[str] = frozenset(),
        smtp_users: dict[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        allow_remote: bool = False,
    ) -> None:
        self.record = Record(record_dir)
        self.starts = Starts()
        self.limiter = RateLimiter()
        self.open: set[Any] = set()
        self.connections: set[Any] = set()
        self.smtp_users = smtp_users or {}
        self.tls = tls
        self.begun_ms = now_ms()
        self.failure: str | None = None
        self.on_failure: Callable[[], None] | None = None
        self._allow_remote = allow_remote
        self._keys = sendgrid_keys
        self._known_keys: dict[str, str | None] = {}
        self._id_prefix = secrets.token_urlsafe(9)
        self._id_count = 0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._clear_counts()
        self.config = config
        self.webhooks = Webhooks(lambda: self.config, webhook_key, record_dir / "events.pending")
        self.configure(config)
        self.rng = random.Random(config.seed)

    def _clear_counts(self) -> None:
        self.refused: dict[str, dict[str, int]] = {}
        self.fault_counts: dict[str, int] = {}

    def configure(self, config: SimulatorConfig) -> None:
        """Take new settings. Raises ConfigError, and keeps the old ones, if they can't be had."""
        old, self.config = self.config, config
        if problem := self.webhooks.check_url(self._allow_remote):
            self.config = old
            raise ConfigError([("webhooks.url", problem)])
        if old.seed != config.seed:
            self.rng = random.Random(config.seed)
        sendgrid, smtp = config.sendgrid, config.smtp
        self.sendgrid_faults = FaultPlan(sendgrid.faults)
        self.sendgrid_latency = latency_draw(sendgrid.latency)
        self.sendgrid_rules = Rules(sendgrid.rules)
        self.sendgrid_outage = sendgrid.outage != Outage()
        self.smtp_faults = FaultPlan(smtp.faults)
        self.smtp_latency = latency_draw(smtp.latency)
        self.smtp_rules = Rules(smtp.rules)
        self.smtp_outage = smtp.outage != Outage()
        self._rcpt_plan = FaultPlan(Faults(error_rates=smtp.rcpt_error_rates))

    def sendgrid_key(self, authorization: str) -> str | None:
        """The key of an Authorization header, or None if it is not accepted."""
        try:
            return self._known_keys[authorization]
        except KeyError:
            scheme, _, key = authorization.partition(" ")
            known = key in self._keys if self._keys else key != ""
            good = known and scheme.lower() == "bearer"
            if len(self._known_keys) > 1000:
                self._known_keys.clear()
            self._known_keys[authorization] = key if good else None
            return key if good else None

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def next_message_id(self) -> str:
        """A provider's message id: 22 characters, never used before."""
        self._id_count += 1
        return f"{self._id_prefix}{self._id_count:010x}"

    def refuse(self, run: str, reason: str) -> None:
        """Count a refusal."""
        reasons = self.refused.get(run)
        if reasons is None:
            reasons = self.refused[run] = {}
        reasons[reason] = reasons.get(reason, 0) + 1

    def count_fault(self, name: str) -> None:
        """Count a fault by name."""
        self.fault_counts[name] = self.fault_counts.get(name, 0) + 1

    def struck(self, fault: Fault, provider: str) -> None:
        """Count a fault that struck."""
        suffix = f"_{fault.status}" if fault.kind is FaultKind.ERROR else ""
        self.count_fault(f"{provider}.{fault.kind.value}{suffix}")

    def draw_rcpt(self) -> int:
        """The reply code of a simulated refusal at RCPT, or 0."""
        fault = self._rcpt_plan.draw(self.rng)
        return fault.status if fault is not None else 0

    def outage(self, settings: Outage, run: str, connection: Connection) -> bool:
        """Treat the connection as the outage says; False if there is none now."""
        if not outage_now(settings, now_ms()):
            return False
        self.count_fault(f"{connection.provider}.outage_{settings.mode}")
        self.refuse(run, "outage")
        if settings.mode == "hang":
            connection.hang()
        elif settings.mode == "reset":
            connection.reset()
        elif isinstance(connection, HttpConnection):
            body = b'{"errors":[{"message":"service unavailable","field":null,"help":null}]}'
            connection.answer(response(settings.status, body))
        else:
            connection.transport.write(b"421 4.3.2 service not available\r\n")
            connection.close_gently()
        return True

    def accept(
        self,
        *,
        send_id: str,
        run: str,
        address: str,
        at_ms: int,
        provider: str,
        message_id: str,
        index: int,
        arguments: dict[str, Any],
        fault: str | None,
        body: bytes,
        smtp_id: str,
    ) -> str:
        """Record a message and plan its events. Returns its id: a made one if it had none."""
        anonymous = not send_id
        if anonymous:
            send_id = f"{message_id}.{index}"
        config = self.config
        before = self.record.accept(
            send_id=send_id,
            run=run,
            address=address,
            at_ms=at_ms,
            provider=provider,
            provider_message_id=message_id,
            arguments=arguments,
            fault=fault,
            anonymous=anonymous,
            body=body if config.keep_bodies else None,
            keep_bodies=config.keep_bodies,
        )
        self._flush_soon()
        if config.webhooks.url is not None and (provider != "smtp" or config.smtp.webhooks):
            rules = self.smtp_rules if provider == "smtp" else self.sendgrid_rules
            self.webhooks.schedule(
                send_id=send_id,
                address=address,
                arguments=arguments,
                accepted_ms=at_ms,
                message_id=f"{message_id}.recvd-sim-{index}",
                smtp_id=smtp_id,
                acceptance=before,
                rule=rules.match(address) if rules else None,
            )
        return send_id

    def finish(
        self,
        connection: Connection,
        fault: Fault | None,
        answer: bytes,
        faults: Faults,
        latency: Callable[[random.Random], float] | None,
        refusal: Callable[[int], bytes],
    ) -> None:
        """Answer an accepted message late or wrongly."""
        if fault is not None:
            self.struck(fault, connection.provider)
            if fault.kind is FaultKind.HANG_AFTER:
                ids = connection.open_ids
                connection.hang()
                connection.hung_ids = ids
                return
            if fault.kind is FaultKind.RESET_AFTER:
                connection.reset()
                return
            if fault.kind is FaultKind.AMBIGUOUS:
                answer = refusal(fault.status)
            elif fault.kind is FaultKind.SLOW:
                connection.answer_slowly(
                    answer, faults.slow_chunk_bytes, faults.slow_interval_ms / 1000.0
                )
                return
        if latency is None:
            connection.answer(answer)
        else:
            connection.answer_later(answer, latency(self.rng))

    def unanswered(self, send_ids: list[str], fault: str) -> None:
        """Remember accepted messages whose client left before the answer."""
        for send_id in send_ids:
            self.record.note_unanswered(send_id, fault)
        self.count_fault(fault)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        try:
            self.record.flush()
        except OSError as error:
            # A record with holes would let a checker see losses that are none.
            self.failure = f"cannot write {self.record.path}: {error}"
            print(self.failure, file=sys.stderr)
            if self.on_failure is not None:
                self.on_failure()

    async def reset(self) -> None:
        """Forget all messages, counts, starts and pending events; settings stay."""
        await self.webhooks.reset()
        self.record.reset()
        self.starts.reset()
        self.limiter.reset()
        self._clear_counts()
        self.rng = random.Random(self.config.seed)
        self.begun_ms = now_ms()

    async def close(self) -> int:
        """Drop connections, write everything out; returns how many events were saved unsent."""
        for connection in list(self.connections):
            connection.transport.abort()
            # The loop would say so later than the record is closed.
            connection.connection_lost(None)
        for task in list(self._tasks):
            task.cancel()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        pending = await self.webhooks.close()
        self.record.close()
        return pending
