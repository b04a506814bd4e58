"""Delivery's loop: shape, render, claim, request, settle, outcome; one thread, one event loop.

The Flink operator hands over sends and collects what became of them; both only touch queues. A
*line* is a run's leg: its works take turns in small batches. Waiting, paused and broken-circuit
work holds no permit. An outcome is emitted only after the ledger has it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

import uvloop

from schemas.codec import decode, to_millis
from schemas.errors import (
    Corrupt,
    InvalidTemplate,
    MissingObject,
    MissingSnapshot,
    RenderingFailed,
    Unavailable,
)
from schemas.ids import RecipientId
from schemas.message import Answer, Message, Provider, Verdict
from schemas.pages import PAGE_SIZE, bitmap_from
from schemas.reasons import Lane, Outcome, Reason
from schemas.records import (
    CampaignSpec,
    Route,
    Send,
)
from schemas.snapshot import PageBody, PageIndex
from sinks.delivery_records import records_of
from sinks.delivery_work import Batch, Completion, Line, Work
from sinks.ledger_desk import Ledger, LedgerDesk, Question
from sinks.permits import Permits
from transforms.decide import leg_of
from transforms.delivery import (
    LOOK_AGAIN,
    Again,
    Collected,
    Next,
    RetryPolicy,
    SettleAction,
    Told,
    Tries,
    Turn,
    after_answer,
    after_grant,
    after_settled,
    after_verdict,
    settlement_of,
    unsent,
)
from transforms.ledger import (
    Ask,
    LedgerRef,
    Owner,
    RecipientKey,
    Seen,
    Settled,
    SettledKind,
    VerdictKind,
    recipient_key,
    scopes_of,
)
from transforms.ledger import Verdict as LedgerVerdict
from transforms.personalise import leg_context, message_to
from transforms.shaping import Grant

log = logging.getLogger(__name__)

BATCH = 32
"""Messages that are shaped, rendered and claimed together."""
_NO_ROUTE = "the leg's routes name no account of this deployment"
_NO_RECIPIENT = RecipientKey(bytes(8))


class Epochs(Protocol):
    """Where epochs of delivery keys come from."""

    async def acquire_epoch(self, lane: Lane, key: int) -> int:
        """The next epoch of a delivery key; its predecessor is fenced from now on."""


class FullLedger(Ledger, Epochs, Protocol):
    """What the loop needs of the ledger."""


class Shaper(Protocol):
    """The shared token buckets and circuit breakers."""

    async def take(self, route: Route, tenant: str, run: str, lane: Lane, wanted: int) -> Grant:
        """Take up to ``wanted`` tokens. Raises ``Unavailable``."""

    async def put_back(self, unused: int, grant: Grant) -> None:
        """Put back tokens with which nothing was sent. Raises ``Unavailable``."""

    async def report(
        self, route: Route, accepted: int, failed: int, throttled: timedelta | None
    ) -> None:
        """What the provider said since the last report. Raises ``Unavailable``."""


class Pages(Protocol):
    """An opened snapshot."""

    def read_index(self, shard: int, page: int) -> PageIndex:
        """Ids of a page. Raises ``CorruptPage``."""

    def read_body(self, shard: int, page: int) -> PageBody:
        """Addresses and attributes of a page. Raises ``CorruptPage``."""


class Store(Protocol):
    """Where specs and pages are read."""

    def get_object(self, kind: str, name: str) -> bytes:
        """A stored object. Raises ``MissingObject``, ``Corrupt``."""

    def open_snapshot(self, name: str) -> Pages:
        """A snapshot. Raises ``MissingSnapshot``."""


@dataclass(slots=True)
class Account:
    """A provider's account: the adapter and its permits."""

    route: Route
    name: str
    provider: Provider
    permits: Permits
    accepted: int = 0
    failed: int = 0
    throttled: timedelta | None = None


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """What a deployment decides of delivery."""

    lane: Lane = Lane.PROMOTIONAL
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    request_timeout: timedelta = timedelta(seconds=30)
    stop_timeout: timedelta = timedelta(seconds=20)
    receiver: str = ""
    unsubscribe_secret: bytes = b""


@dataclass(slots=True)
class _Key:
    """What the loop knows of a delivery key."""

    marks: dict[str, Seen]
    owner: asyncio.Future[Owner] | None = None
    fenced: bool = False
    desks: dict[LedgerRef, LedgerDesk] = field(default_factory=dict)


class DeliveryEngine:
    """See the module. Public methods are called from the operator's thread."""

    def __init__(
        self,
        policy: EnginePolicy,
        ledger: Callable[[], FullLedger],
        shaper: Callable[[], Shaper],
        accounts: Callable[[], Sequence[tuple[Route, Provider, int]]],
        store: Callable[[], Store],
    ) -> None:
        self._policy = policy
        self._make_ledger = ledger
        self._make_shaper = shaper
        self._make_accounts = accounts
        self._make_store = store
        self._inbox: deque[Callable[[], None]] = deque()
        self._outbox: dict[int, deque[Completion]] = {}
        self._owed: dict[int, dict[str, int]] = {}
        self._keys: dict[int, _Key] = {}
        self._lines: dict[tuple[str, str, str], Line] = {}
        self._requests: set[asyncio.Task[None]] = set()
        self._random = random.Random()  # noqa: S311 - jitter of retries
        self._stopping = False
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="delivery-loop", daemon=True)
        self.counts: Counter[str] = Counter()

    # called from the operator's thread

    def start(self) -> None:
        """Start the loop; raises what kept it from starting."""
        self._thread.start()
        self._started.wait()
        self._raise_failure()

    def take_over(self, key: int, marks: Mapping[str, str]) -> None:
        """Before anything else of a key: how far its ledgers were seen."""
        seen = {name: _mark_from(mark) for name, mark in marks.items()}
        self._outbox[key] = deque()
        self._owed[key] = {}
        self._keys[key] = _Key(seen)

    def submit(self, key: int, name: str, send: Send) -> None:
        """Owe a send's recipients an outcome; a send that is owed already is nothing new."""
        owed = self._owed[key]
        if name in owed:
            return
        count = bitmap_from(send.ordinals).bit_count()
        owed[name] = count
        self._call(lambda: self._admit(key, name, send))

    def collect(self, key: int) -> Collected:
        """What is done since the last call. Raises what ended the loop."""
        self._raise_failure()
        done: list[Completion] = []
        outbox = self._outbox[key]
        while outbox:
            done.append(outbox.popleft())
        owed = self._owed[key]
        finished = []
        for completion in done:
            name = completion.work.name
            owed[name] -= 1
            if owed[name] == 0:
                del owed[name]
                finished.append(name)
        marks = {}
        known = self._keys[key]
        for ref, desk in tuple(known.desks.items()):
            if desk.seen is not None and desk.seen != desk.marked:
                desk.marked = desk.seen
                marks[ledger_name(ref)] = f"{desk.seen.dataset}:{desk.seen.seq}"
        moving = bool(done) or not all(line.parked for line in tuple(self._lines.values()))
        return Collected(tuple(records_of(done)), tuple(finished), marks, len(owed), moving)

    def stop(self) -> None:
        """Start nothing new, let what is in flight finish, end the loop."""
        if self._thread.is_alive():
            self._call(self._begin_stop)
            self._thread.join(self._policy.stop_timeout.total_seconds() + 10)

    def _call(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._drain)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError("delivery's loop ended") from self._failure

    # the loop's thread

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._loop = runner.get_loop()
                runner.run(self._run())
        except BaseException as error:  # the operator raises it at its next look
            log.exception("delivery's loop ended")
            self._failure = error
        finally:
            self._started.set()

    async def _run(self) -> None:
        self._stopped = asyncio.Event()
        self._ledger = self._make_ledger()
        self._shaper = self._make_shaper()
        self._store = self._make_store()
        self._accounts = {
            route: Account(route, account_name(route), provider, Permits(permits))
            for route, provider, permits in self._make_accounts()
        }
        for account in self._accounts.values():
            await account.provider.open()
        reporter = asyncio.create_task(self._report())
        self._started.set()
        self._drain()
        try:
            await self._stopped.wait()
            await self._finish()
        finally:
            reporter.cancel()
            for account in self._accounts.values():
                await account.provider.close()

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _begin_stop(self) -> None:
        self._stopping = True
        self._stopped.set()

    async def _finish(self) -> None:
        """Let requests in flight be answered and settled; start nothing."""
        for line in self._lines.values():
            if line.task is not None:
                line.task.cancel()
        desks = [desk for key in self._keys.values() for desk in key.desks.values()]
        for desk in desks:
            desk.drop_questions()
        until = self._loop.time() + self._policy.stop_timeout.total_seconds()
        while self._loop.time() < until:
            if not self._requests and all(desk.idle for desk in desks):
                return
            await asyncio.sleep(0.02)
        log.warning("stopped with %d requests in flight", len(self._requests))

    def _admit(self, key: int, name: str, send: Send) -> None:
        known = self._keys[key]
        ref = LedgerRef(send.tenant, send.run, send.leg, send.shard)
        desk = known.desks.get(ref)
        if desk is None:
            desk = known.desks[ref] = LedgerDesk(
                self._ledger,
                ref,
                lambda: self._owner(key),
                known.marks.get(ledger_name(ref)),
                lambda error: self._fence(key, error),
                self._fail,
            )
        line_name = (send.tenant, send.run, send.leg)
        line = self._lines.get(line_name)
        if line is None:
            line = self._lines[line_name] = Line(*line_name)
        line.works.append(Work(key, name, send, line, desk))
        line.news.set()
        if line.task is None:
            line.task = self._loop.create_task(self._drive(line))
            line.task.add_done_callback(self._line_ended)

    def _line_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()

    def _request_ended(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        self._line_ended(task)

    def _fail(self, error: BaseException) -> None:
        self._failure = error

    async def _owner(self, key: int) -> Owner:
        """This process's ownership of a key: its epoch is taken at first touch."""
        known = self._keys[key]
        if known.owner is None:
            known.owner = self._loop.create_future()
            try:
                epoch = await self._ledger.acquire_epoch(self._policy.lane, key)
            except BaseException as error:
                failed, known.owner = known.owner, None
                if not isinstance(error, Unavailable):
                    failed.cancel()
                    raise
                failed.set_exception(error)
                failed.exception()
                raise
            known.owner.set_result(Owner(self._policy.lane, key, epoch))
        return await asyncio.shield(known.owner)

    def _fence(self, key: int, error: Exception) -> None:
        """A successor owns the key: nothing more of it is ours to say."""
        log.warning("delivery key %d is another process's now: %s", key, error)
        self.counts["fenced"] += 1
        self._keys[key].fenced = True
        for line in self._lines.values():
            for work in line.works:
                if work.key == key:
                    work.ready.clear()
                    work.waiting.clear()

    async def _drive(self, line: Line) -> None:
        """Take batches of a line for as long as it has work."""
        while not self._stopping:
            batch = line.next_batch(self._loop.time(), BATCH)
            if batch is None:
                await self._pause(line)
                continue
            if line.context is None and line.broken is None:
                await self._prepare(line, batch.work.send)
            account = self._account(line, batch.route)
            if account is None:
                broken = line.broken or Reason.NO_ROUTE
                self._ask(batch, None, None, dict.fromkeys(batch.indexes, (broken, _NO_ROUTE)))
                continue
            await self._offer(line, batch, account)

    async def _pause(self, line: Line) -> None:
        line.news.clear()
        soonest = line.soonest()
        line.parked = soonest is None or soonest > self._loop.time() + 1
        wait_s = 1.0 if soonest is None else max(0.0, min(1.0, soonest - self._loop.time()))
        try:
            async with asyncio.timeout(wait_s):
                await line.news.wait()
        except TimeoutError:
            return

    async def _prepare(self, line: Line, send: Send) -> None:
        try:
            spec = decode(self._store.get_object("spec", send.spec), CampaignSpec)
            line.context = leg_context(
                spec,
                leg_of(spec, send.leg),
                self._policy.receiver,
                self._policy.unsubscribe_secret,
            )
        except (MissingObject, Corrupt) as error:
            log.error("run %s: its definition can't be read: %s", line.run, error)
            line.broken = Reason.NO_ROUTE
        except InvalidTemplate as error:
            log.error("run %s: its template can't be used: %s", line.run, error)
            line.broken = Reason.RENDERING_FAILED

    def _account(self, line: Line, route: int) -> Account | None:
        context = line.context
        if context is None or route >= len(context.routes):
            return None
        return self._accounts.get(context.routes[route])

    async def _offer(self, line: Line, batch: Batch, account: Account) -> None:
        """Get permits and tokens for a batch, and send what both allow."""
        work = batch.work
        permits = await account.permits.take(len(batch.indexes))
        self._put_back(batch, permits)
        try:
            grant = await self._shaper.take(
                account.route, line.tenant, line.run, self._policy.lane, permits
            )
        except Unavailable as error:
            account.permits.give(permits)
            self._put_back(batch, 0)
            log.warning("run %s waits for its tokens: %s", line.run, error)
            await asyncio.sleep(0.25)
            return
        except BaseException:
            account.permits.give(permits)
            raise
        send = work.send
        routes = len(line.context.routes) if line.context is not None else 0
        turn = after_grant(
            grant, datetime.now(UTC), send.valid_until, send.deadline, batch.route, routes
        )
        line.parked = turn is Turn.PARK
        if turn is Turn.SEND:
            account.permits.give(permits - grant.granted)
            self._put_back(batch, grant.granted)
            self._ask(batch, account, grant)
            return
        account.permits.give(permits)
        match turn:
            case Turn.ASK:
                self._ask(batch, None, None)
            case Turn.NEXT_ROUTE:
                for index in batch.indexes:
                    tries = work.tries.get(index, Tries())
                    work.tries[index] = Tries(batch.route + 1, 0, tries.total)
                self._put_back(batch, 0)
            case Turn.PARK:
                self._put_back(batch, 0)
                await asyncio.sleep(LOOK_AGAIN.total_seconds())
            case Turn.WAIT:
                self._put_back(batch, 0)
                wait_s = max(0.001, grant.wait_ms / 1000) if grant.wait_ms else 0.2
                line.parked = wait_s > 1
                await asyncio.sleep(min(1.0, wait_s))

    @staticmethod
    def _put_back(batch: Batch, keep: int) -> None:
        """Give all but the first ``keep`` messages back to the front of their work."""
        rest = batch.indexes[keep:]
        del batch.indexes[keep:]
        batch.work.ready.extendleft(reversed(rest))

    def _ask(
        self,
        batch: Batch,
        account: Account | None,
        grant: Grant | None,
        doomed: Mapping[int, tuple[Reason, str]] | None = None,
    ) -> None:
        """Render, then claim.

        Without an account nothing is rendered: the ledger is expected to refuse, or the messages
        are ``doomed`` and are closed with their reasons once claimed.
        """
        work = batch.work
        send = work.send
        messages, keys, failed = self._render(work, batch.indexes, account is not None)
        failed |= doomed or {}
        base = send.page * PAGE_SIZE
        name = account.name if account is not None else ""
        asks = [
            Ask(
                ordinal=base + index,
                generation=send.generation,
                attempt=work.tries.get(index, Tries()).total,
                provider=name,
                recipient=keys[position],
                valid_until_ms=to_millis(send.valid_until),
                deadline_ms=to_millis(send.deadline),
            )
            for position, index in enumerate(batch.indexes)
        ]

        def answered(verdicts: Sequence[LedgerVerdict]) -> None:
            self._judged(batch, account, grant, messages, failed, verdicts)

        context = work.line.context
        scopes = scopes_of(send.channel.value, context.topic if context is not None else "*")
        work.desk.ask(Question(scopes, asks, answered))

    def _render(
        self, work: Work, indexes: Sequence[int], wanted: bool
    ) -> tuple[list[Message | None], list[RecipientKey], dict[int, tuple[Reason, str]]]:
        """Messages in order of the indexes, what opt-outs call them, and who can't be written to.

        Where no message is wanted, only the recipients' keys are needed.
        """
        send = work.send
        context = work.line.context
        failed: dict[int, tuple[Reason, str]] = {}
        try:
            snapshot = self._store.open_snapshot(send.snapshot)
            ids = snapshot.read_index(send.shard, send.page).recipient_ids
            body = snapshot.read_body(send.shard, send.page) if wanted else None
        except (Corrupt, MissingSnapshot) as error:
            reason = (
                Reason.MISSING_SNAPSHOT
                if isinstance(error, MissingSnapshot)
                else Reason.CORRUPT_PAGE
            )
            failed = {index: (reason, str(error)) for index in indexes}
            return [None] * len(indexes), [_NO_RECIPIENT] * len(indexes), failed
        messages: list[Message | None] = []
        keys: list[RecipientKey] = []
        base = send.page * PAGE_SIZE
        for index in indexes:
            recipient = RecipientId(ids[index])
            keys.append(recipient_key(send.tenant, recipient))
            message: Message | None = None
            if body is not None and context is not None:
                reference = f"{send.shard}.{base + index}.{send.generation}"
                try:
                    message = message_to(context, recipient, body, index, reference, time.monotonic)
                except RenderingFailed as error:
                    failed[index] = (Reason.RENDERING_FAILED, str(error))
            messages.append(message)
        return messages, keys, failed

    def _judged(
        self,
        batch: Batch,
        account: Account | None,
        grant: Grant | None,
        messages: Sequence[Message | None],
        failed: Mapping[int, tuple[Reason, str]],
        verdicts: Sequence[LedgerVerdict],
    ) -> None:
        """Act on the ledger's verdicts."""
        work = batch.work
        used = 0
        for index, message, verdict in zip(batch.indexes, messages, verdicts, strict=True):
            tries = work.tries.get(index, Tries())
            then = after_verdict(verdict, tries, datetime.now(UTC), work.send.valid_until)
            if then is None:
                repeated = verdict.kind is VerdictKind.REPEATED
                if message is not None and account is not None:
                    used += 1
                    task = self._loop.create_task(
                        self._request(work, index, message, account, repeated)
                    )
                    self._requests.add(task)
                    task.add_done_callback(self._request_ended)
                elif index in failed:
                    self._close(work, index, *failed[index])
                else:
                    self._release(work, index)
                continue
            self._follow(work, index, then, None)
        if account is not None and grant is not None and grant.granted > used:
            account.permits.give(grant.granted - used)
            self._put_tokens_back(account, grant, grant.granted - used)

    def _put_tokens_back(self, account: Account, grant: Grant, unused: int) -> None:
        async def put_back() -> None:
            try:
                await self._shaper.put_back(unused, grant)
            except Unavailable as error:
                log.info("%d unused tokens of %s are lost: %s", unused, account.name, error)

        task = self._loop.create_task(put_back())
        self._requests.add(task)
        task.add_done_callback(self._request_ended)

    def _follow(self, work: Work, index: int, then: Told | Again, answer: Answer | None) -> None:
        """Tell the books what the ledger has, or wait for the next try."""
        if isinstance(then, Again):
            if then.tries != Tries():
                work.tries[index] = then.tries
            self._wait(work, index, then.wait)
            return
        self._complete(work, index, then, answer)

    def _close(self, work: Work, index: int, reason: Reason, detail: str) -> None:
        """A claimed message that can't be sent: the refusal is recorded like a provider's."""
        following = Next(SettleAction.CLOSE, Outcome.FAILED, reason)
        answer = Answer(Verdict.REFUSED, reason.value, detail=detail)
        self._settle(work, index, following, answer, "")

    def _release(self, work: Work, index: int) -> None:
        """Claimed though a refusal was expected: the run changed meanwhile. Look again soon."""
        following = unsent(work.tries.get(index, Tries()))
        self._settle(work, index, following, Answer(Verdict.RETRYABLE, "not-sent"), "")

    async def _request(
        self, work: Work, index: int, message: Message, account: Account, repeated: bool
    ) -> None:
        """One attempt: it leaves only here, after its claim."""
        tries = work.tries.get(index, Tries())
        self.counts["requests"] += 1
        try:
            answer = await account.provider.send(message, self._policy.request_timeout)
        finally:
            account.permits.give(1)
        self.counts[answer.verdict.value] += 1
        self._note(account, answer)
        context = work.line.context
        routes = len(context.routes) if context is not None else 1
        following = after_answer(
            answer, tries, routes, self._policy.lane, self._policy.retry, self._random
        )
        if repeated:
            self.counts["repeated"] += 1
        self._settle(work, index, following, answer, account.name)

    @staticmethod
    def _note(account: Account, answer: Answer) -> None:
        if answer.verdict is Verdict.THROTTLED:
            pause = answer.retry_after or timedelta(seconds=1)
            account.throttled = max(account.throttled or pause, pause)
        elif answer.verdict in (Verdict.RETRYABLE, Verdict.IN_DOUBT, Verdict.ACCOUNT):
            account.failed += 1
        else:
            account.accepted += 1

    def _settle(
        self, work: Work, index: int, following: Next, answer: Answer, provider: str
    ) -> None:
        tries = work.tries.get(index, Tries())
        settlement = settlement_of(
            work.send.page * PAGE_SIZE + index,
            work.send.generation,
            tries,
            following,
            answer.verdict,
        )

        def settled(result: Settled) -> None:
            then = after_settled(result, following, tries, provider)
            self._follow(work, index, then, answer if result.kind is SettledKind.DONE else None)

        work.desk.settle(settlement, settled)

    def _wait(self, work: Work, index: int, wait: timedelta) -> None:
        """Keep a message for its next try, but no longer than its decision is good for."""
        if self._keys[work.key].fenced:
            return
        until = min(work.send.valid_until, work.send.deadline) - datetime.now(UTC)
        seconds = max(0.0, min(wait, max(until, timedelta(0))).total_seconds())
        work.wait(index, self._loop.time() + max(seconds, 0.001))
        work.line.news.set()

    def _complete(self, work: Work, index: int, told: Told, answer: Answer | None) -> None:
        if self._keys[work.key].fenced:
            return
        tries = work.tries.pop(index, Tries())
        work.left -= 1
        dead = self._recipient(work, index) if told.reason is Reason.ADDRESS_REFUSED else ""
        self.counts[told.outcome.value] += 1
        self._outbox[work.key].append(
            Completion(
                work,
                index,
                told.outcome,
                told.reason,
                work.send.generation if told.generation is None else told.generation,
                told.provider,
                answer.provider_message_id or "" if answer is not None else "",
                tries.total + 1 if told.provider else tries.total,
                answer.detail if answer is not None else "",
                datetime.now(UTC),
                dead,
            )
        )

    def _recipient(self, work: Work, index: int) -> str:
        send = work.send
        try:
            snapshot = self._store.open_snapshot(send.snapshot)
            return snapshot.read_index(send.shard, send.page).recipient_ids[index]
        except (Corrupt, MissingSnapshot) as error:
            log.error("an address of run %s can't be suppressed: %s", send.run, error)
            return ""

    async def _report(self) -> None:
        """Tell the shared buckets what providers said."""
        while True:
            await asyncio.sleep(0.1)
            for account in self._accounts.values():
                accepted, failed, throttled = account.accepted, account.failed, account.throttled
                if not (accepted or failed or throttled):
                    continue
                account.accepted, account.failed, account.throttled = 0, 0, None
                try:
                    await self._shaper.report(account.route, accepted, failed, throttled)
                except Unavailable as error:
                    log.info("a report on %s is lost: %s", account.name, error)


def account_name(route: Route) -> str:
    """The name of an account in claims and outcomes."""
    return f"{route.provider}:{route.account}"


def ledger_name(ref: LedgerRef) -> str:
    """The name of a ledger in Flink's state."""
    return f"{ref.tenant}/{ref.run}/{ref.leg}/{ref.shard}"


def _mark_from(mark: str) -> Seen:
    dataset, _, seq = mark.rpartition(":")
    return Seen(dataset, int(seq))
