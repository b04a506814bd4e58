"""Delivery's loop: shape, claim, render, request, settle, outcome; all of it on one event loop.

Each stream (a run's leg on one route) has a driver that takes batches for as long as it has work:
permits, then tokens, then the ledger's leave, then the requests. Messages are rendered while the
ledger is asked. Waiting, paused and broken-circuit work holds no permit. An outcome is told only
after the ledger has it.

A permit is taken before the claim and given back after the settle: whoever kills the process leaves
in doubt no more messages than permits were in use (`sinks.slots` shows how many).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from schemas.codec import to_millis
from schemas.errors import Corrupt, Unavailable
from schemas.message import Answer, Message, Provider, Verdict
from schemas.pages import PAGE_SIZE
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from schemas.records import Route, Send
from sinks.delivery_pages import Reader, Rendered, Store, no_route
from sinks.delivery_work import (
    Account,
    Batch,
    Completion,
    Key,
    Line,
    Stream,
    Work,
    indexes_owed,
)
from sinks.ledger_desk import LARGEST_CALL, Ledger, LedgerDesk
from sinks.permits import Permits
from sinks.slots import SlotBoard
from transforms.delivery import (
    REPLAYABLE,
    Again,
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
    Seen,
    Settled,
    SettledKind,
    VerdictKind,
    scopes_of,
)
from transforms.ledger import Verdict as LedgerVerdict
from transforms.metrics import answer_counter, outcome_counter
from transforms.personalise import LegContext
from transforms.shaping import Grant

log = logging.getLogger(__name__)

BATCH = LARGEST_CALL
"""Messages that are claimed together, if the permits allow."""
ROUND = 4 * BATCH
"""Messages for which permits and tokens are taken together."""
RECALL_S = 60.0
"""For so long after its start a loop looks what of a send is done before it stands in line."""
LINE_KEPT_S = 60.0
"""How long a line with nothing left is kept: its template is compiled, its definition read."""
_RENDERED_TOGETHER = 16
"""Messages that are rendered before the loop looks whether anything else is to be done."""
_REPORT_S = 0.1
_TIDY_S = 5.0
_SHORTEST_TOKEN_WAIT_S = 0.005
"""Tokens gather for so long at least; the buckets hold what comes in 50 ms."""
_LONGEST_WAIT_S = 1.0
_FIRST_PARK_S = 0.2
_UNHEARD_WAIT_S = 0.25
_SOONEST_S = 0.05
"""How soon a decision that has run out is taken to the ledger again, where its clock is behind."""
_ANSWERS = {verdict: answer_counter(verdict) for verdict in Verdict}
_OUTCOMES = {outcome: outcome_counter(outcome) for outcome in Outcome}
_NO_TIME = timedelta(0)
_NOWHERE = Route("", "")


class FullLedger(Ledger, Protocol):
    """What the loop needs of the ledger."""

    async def acquire_epoch(self, lane: Lane, key: int) -> int:
        """The next epoch of a delivery key; its predecessor is fenced from now on."""

    async def accepted(self, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
        """Which of these recipients have the message. Raises ``Unavailable``."""

    async def close(self) -> None:
        """Let the connections go."""


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

    async def close(self) -> None:
        """Let the connections go."""


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """What a deployment decides of delivery."""

    lane: Lane = Lane.PROMOTIONAL
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    request_timeout: timedelta = timedelta(seconds=30)
    stop_timeout: timedelta = timedelta(seconds=20)
    receiver: str = ""
    unsubscribe_secret: bytes = b""
    slots: Path | None = None
    """Where others see how many requests are in flight (``sinks.slots``); None: nowhere."""


class DeliveryLoop:
    """Belongs to one event loop; see the module.

    ``counts`` has the names of ``transforms.metrics.DELIVERY``. ``failed`` hears of defects.
    """

    def __init__(
        self,
        policy: EnginePolicy,
        ledger: FullLedger,
        shaper: Shaper,
        accounts: Sequence[tuple[Route, Provider, int]],
        store: Store,
        counts: dict[str, int],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.policy = policy
        self.counts = counts
        self.stopping = False
        self._ledger = ledger
        self._shaper = shaper
        self._reader = Reader(store, policy.receiver, policy.unsubscribe_secret)
        self._board = board = SlotBoard(policy.slots) if policy.slots is not None else None
        self._accounts = {
            route: Account(
                route,
                f"{route.provider}:{route.account}",
                provider,
                Permits(permits, min(BATCH, permits // 4), watch=board.cell() if board else None),
            )
            for route, provider, permits in accounts
        }
        self._failed = failed
        self._lines: dict[tuple[str, str, str, str], Line] = {}
        self._keys: dict[int, Key] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._flying = 0
        """Requests that have no answer yet."""
        self._random = random.Random()  # noqa: S311 - jitter of retries
        self._stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._recall_until = self._loop.time() + RECALL_S

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the accounts; close all that was opened on the way out."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._shaper.close)
            stack.push_async_callback(self._ledger.close)
            if self._board is not None:
                stack.callback(self._board.close)
            for account in self._accounts.values():
                stack.push_async_callback(account.provider.close)
                await account.provider.open()
            for chore in (self._report(), self._tidy()):
                task = self._loop.create_task(chore)
                task.add_done_callback(self._ended)
                stack.callback(task.cancel)
            yield

    async def stopped(self) -> None:
        """Wait for the stop, then let requests in flight be answered and settled."""
        await self._stopped.wait()
        drivers = [
            stream.task
            for line in self._lines.values()
            for stream in line.streams.values()
            if stream.task is not None
        ]
        for task in drivers:
            task.cancel()
        await asyncio.gather(*drivers, return_exceptions=True)
        desks = [desk for key in self._keys.values() for desk in key.desks.values()]
        for desk in desks:
            desk.close_questions()
        until = self._loop.time() + self.policy.stop_timeout.total_seconds()
        while self._tasks or self._flying or not all(desk.idle for desk in desks):
            if self._loop.time() > until:
                log.warning("stopped with %d requests in flight", self._flying)
                return
            await asyncio.sleep(0.02)

    def begin_stop(self) -> None:
        """Start nothing new."""
        self.stopping = True
        self._stopped.set()

    def moving(self) -> bool:
        """Whether any stream may do something soon. May be called from another thread."""
        return any(
            not stream.parked
            for line in self._lines.copy().values()
            for stream in line.streams.copy().values()
        )

    def admit(self, key: Key, name: str, send: Send, seen: Seen | None) -> None:
        """Take up a send."""
        self._keys[key.number] = key
        line = self._line(send)
        desk = self._desk(key, send, seen)
        work = Work(key, name, send, line, desk)
        desk.users += 1
        line.left += work.left
        stream, indexes = self._stream(line, 0), indexes_owed(send)
        if len(indexes) > 1 and self._loop.time() < self._recall_until:
            key.under_way += len(indexes)
            self._spawn(self._recall(stream, work, indexes))
        else:
            stream.add(work, indexes)

    async def _recall(self, stream: Stream, work: Work, indexes: list[int]) -> None:
        """Take up a send of which a predecessor may have done much.

        Who has the message needs no token: at a low rate a successor would spend minutes on
        asking for those. They go to the ledger at once, whose word is the outcome; the others
        stand in the line.
        """
        key, desk = work.key, work.desk
        base = work.send.page * PAGE_SIZE
        try:
            await self._owner(key)  # its predecessor writes no more
            found = await self._ledger.accepted(desk.ref, [base + index for index in indexes])
        except Unavailable as error:
            log.info("%s: not read beforehand: %s", desk.ref, error)
            found = frozenset()
        if key.fenced is not None:
            return
        known = [index for index in indexes if base + index in found]
        rest = [index for index in indexes if base + index not in found]
        key.under_way -= len(rest)
        if rest:
            stream.add(work, rest)
        self.counts["recalled"] += len(known)
        for begin in range(0, len(known), BATCH):
            self._ask(Batch(work, stream, known[begin : begin + BATCH]), None, None)

    def _line(self, send: Send) -> Line:
        name = (send.tenant, send.run, send.leg, send.spec)
        line = self._lines.get(name)
        if line is None:
            found = self._reader.leg(send)
            if isinstance(found, LegContext):
                line = self._lines[name] = Line(name, found, None)
            else:
                line = self._lines[name] = Line(name, None, found)
        return line

    def _desk(self, key: Key, send: Send, seen: Seen | None) -> LedgerDesk:
        ref = LedgerRef(send.tenant, send.run, send.leg, send.shard)
        desk = key.desks.get(ref)
        if desk is None:
            desk = key.desks[ref] = LedgerDesk(
                self._ledger,
                ref,
                lambda: self._owner(key),
                seen,
                self._wake_all,
                lambda error: self._fence(key, error),
                self._failed,
            )
        return desk

    def _stream(self, line: Line, route: int) -> Stream:
        """The stream of a route, and its driver."""
        stream = line.streams.get(route)
        if stream is None:
            context = line.context
            known = context is not None and route < len(context.routes)
            account = self._accounts.get(context.routes[route]) if context and known else None
            stream = line.streams[route] = Stream(line, route, account)
            if not self.stopping:
                stream.task = self._loop.create_task(self._drive(stream))
                stream.task.add_done_callback(self._ended)
        return stream

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run beside the drivers; a stop waits for it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    async def _owner(self, key: Key) -> Owner:
        """This process's ownership of a key: its epoch is taken at first touch."""
        if key.owner is None:
            owner = key.owner = self._loop.create_future()
            try:
                epoch = await self._ledger.acquire_epoch(self.policy.lane, key.number)
            except Exception as error:
                key.owner = None
                owner.set_exception(error)
                owner.exception()  # whoever else waits hears of it; perhaps nobody does
                raise
            owner.set_result(Owner(self.policy.lane, key.number, epoch))
        return await asyncio.shield(key.owner)

    def _fence(self, key: Key, error: Exception) -> None:
        """A successor owns the key: nothing more of it is ours to say."""
        if key.fenced is not None:
            return
        log.warning("delivery key %d is another process's now: %s", key.number, error)
        self.counts["fenced"] += 1
        key.fenced = error
        for line in self._lines.values():
            for stream in line.streams.values():
                stream.drop(key)

    def _wake_all(self) -> None:
        for line in self._lines.values():
            _wake(line)

    # A stream's driver

    async def _drive(self, stream: Stream) -> None:
        """Take batches of a stream for as long as it has work."""
        pause_s = _FIRST_PARK_S
        while not self.stopping:
            account = stream.account
            room = ROUND if account is None else min(ROUND, account.permits.room)
            batches = stream.next_batches(self._loop.time(), BATCH, room)
            if not batches:
                if await self._rest(stream):
                    return
                continue
            batches = [batch for batch in batches if self._strike_out(batch)]
            if not batches:
                continue
            turn, wait_s = await self._offer(stream, batches)
            if turn is not Turn.PARK:
                pause_s = _FIRST_PARK_S
            else:
                self.counts["parked"] += 1
                wait_s, pause_s = pause_s, min(_LONGEST_WAIT_S, pause_s * 2)
            stream.parked = turn is Turn.PARK or wait_s >= _LONGEST_WAIT_S
            if wait_s:
                await asyncio.sleep(wait_s)

    async def _rest(self, stream: Stream) -> bool:
        """Wait for news, or for the next message that is due; true at the end of the line."""
        line, now = stream.line, self._loop.time()
        if not line.left and now - line.since > LINE_KEPT_S and stream.empty:
            del line.streams[stream.route]
            if not line.streams:
                self._lines.pop(line.name, None)
            return True
        stream.news.clear()
        soonest = stream.soonest()
        stream.parked = soonest is None or soonest > now + _LONGEST_WAIT_S
        wait_s = _LONGEST_WAIT_S if soonest is None else min(_LONGEST_WAIT_S, soonest - now)
        timer = self._loop.call_later(max(0.001, wait_s), stream.news.set)
        await stream.news.wait()
        timer.cancel()
        return False

    def _strike_out(self, batch: Batch) -> bool:
        """Fail whom the page does not have; whether anybody is left.

        Nobody can have been written to by them, so their outcome needs no entry in the ledger.
        """
        for index, why in self._reader.beyond(batch.work.send, batch.indexes).items():
            batch.indexes.remove(index)
            self._fail_unledgered(batch.work, index, *why)
        return bool(batch.indexes)

    def _fail_unledgered(self, work: Work, index: int, reason: Reason, detail: str) -> None:
        answer = Answer(Verdict.REFUSED, reason.value, detail=detail)
        self._complete(work, index, Told(Outcome.FAILED, reason), answer, False)

    async def _offer(self, stream: Stream, batches: list[Batch]) -> tuple[Turn, float]:
        """Get permits and tokens for batches, all at once, and send what both allow.

        Says what the buckets said, and how long not to ask them again.
        """
        account, line = stream.account, stream.line
        held, wait_s = 0, 0.0
        try:
            if account is not None:
                held = await account.permits.take(sum(len(one.indexes) for one in batches))
                batches = _kept(batches, held)
            wanted = sum(len(one.indexes) for one in batches)
            route = account.route if account is not None else _NOWHERE
            grant = await self._shaper.take(route, line.tenant, line.run, self.policy.lane, wanted)
            stream.unheard = False
            if grant.granted and grant.status is RunStatus.RUNNING:
                batches = _kept(batches, grant.granted)
                if account is not None:
                    account.permits.give(held - grant.granted)
                    held = 0
                tokens = _Tokens(self, account, grant, len(batches))
                questions = [self._ask(batch, account, tokens) for batch in batches]
                if grant.granted < wanted and grant.wait_ms:
                    wait_s = _token_wait(grant)
            else:
                turns = []
                for batch in batches:
                    turns.append(turn := self._turned_down(stream, batch, grant))
                    if turn is Turn.ASK:
                        held -= len(batch.indexes) if account is not None else 0
                turn = next((one for one in turns if one in (Turn.ASK, Turn.NEXT_ROUTE)), turns[0])
                if turn is Turn.WAIT:
                    self.counts["waits_for_tokens"] += 1
                return turn, _token_wait(grant) if turn in (Turn.WAIT, Turn.PARK) else 0.0
        except Unavailable as error:
            _kept(batches, 0)
            if not stream.unheard:
                log.warning("run %s waits for its tokens: %s", line.run, error)
            stream.unheard = True
            self.counts["waits_for_redis"] += 1
            return Turn.WAIT, _UNHEARD_WAIT_S
        finally:
            if account is not None and held:
                account.permits.give(held)
        await _render_meanwhile(questions)
        return Turn.SEND, wait_s

    def _turned_down(self, stream: Stream, batch: Batch, grant: Grant) -> Turn:
        """What becomes of a batch for which there is no token. Asked, it keeps its permits."""
        send = batch.work.send
        turn = after_grant(
            grant,
            datetime.now(UTC),
            send.valid_until,
            send.deadline,
            stream.route,
            stream.line.routes,
        )
        match turn:
            case Turn.ASK:
                self._ask(batch, stream.account, None)
            case Turn.NEXT_ROUTE:
                self._move_on(batch)
            case _:
                batch.keep(0)
        return turn

    def _move_on(self, batch: Batch) -> None:
        """The route's circuit is open: its messages go the next."""
        work = batch.work
        following = self._stream(work.line, batch.stream.route + 1)
        for index in batch.indexes:
            tries = work.tries_of(index)
            work.tries[index] = Tries(following.route, 0, tries.total)
        following.back(work, batch.indexes)

    def _ask(self, batch: Batch, account: Account | None, tokens: _Tokens | None) -> _Question:
        """Claim. The account's permits for the batch are the question's from now on.

        Without tokens nothing will be rendered: the ledger is expected to refuse. A broken line's
        messages are closed with the reason once claimed.
        """
        work, line = batch.work, batch.stream.line
        send = work.send
        rendered = self._reader.recipients(send, batch.indexes)
        if batch.stream.account is None:
            rendered.failed = dict.fromkeys(batch.indexes, line.broken or no_route())
        base = send.page * PAGE_SIZE
        name = account.name if account is not None and tokens is not None else ""
        valid_until_ms, deadline_ms = to_millis(send.valid_until), to_millis(send.deadline)
        asks = [
            Ask(
                base + index,
                send.generation,
                work.tries_of(index).total,
                name,
                key,
                valid_until_ms,
                deadline_ms,
            )
            for index, key in zip(batch.indexes, rendered.keys, strict=True)
        ]
        topic = line.context.topic if line.context is not None else "*"
        scopes = scopes_of(send.channel.value, topic)
        question = _Question(self, batch, account, tokens, rendered, scopes, asks)
        work.desk.ask(question)
        return question

    def render(self, batch: Batch, rendered: Rendered, begin: int, end: int) -> bool:
        """Render those at these positions of a batch, unless the page is known to be unreadable.

        False after a defect: the job fails of it. Their claims are perhaps under way, and will be
        released, since a message that was not rendered does not leave.
        """
        context = batch.stream.line.context
        indexes = batch.indexes[begin:end]
        if context is not None and not all(index in rendered.failed for index in indexes):
            try:
                self._reader.render(batch.work.send, context, indexes, rendered, begin)
            except Exception as error:
                self._failed(error)
                return False
        return True

    # What the ledger said

    def judged(
        self,
        batch: Batch,
        account: Account | None,
        rendered: Rendered,
        verdicts: Sequence[LedgerVerdict],
        leave: bool,
    ) -> tuple[int, int]:
        """Act on the ledger's verdicts; says how many were claimed, and how many requests leave.

        Each claimed message keeps one of the account's permits until it is settled. Without
        ``leave`` none may be sent: a refusal was expected, or the answer came too late for its
        tokens.
        """
        work, claimed, sent, now = batch.work, 0, 0, datetime.now(UTC)
        for index, message, verdict in zip(batch.indexes, rendered.messages, verdicts, strict=True):
            tries = work.tries_of(index)
            then = after_verdict(verdict, tries, now, work.send.valid_until)
            if then is not None:
                self._follow(work, index, then, None, False)
                continue
            claimed += 1
            if index in rendered.failed:
                self._close(work, index, account, *rendered.failed[index])
            elif message is None or account is None or not leave or self.stopping:
                not_sent = Answer(Verdict.RETRYABLE, "not-sent")
                self._settle(work, index, unsent(tries), not_sent, account, "", False)
            else:
                sent += 1
                repeated = verdict.kind is VerdictKind.REPEATED
                self._request(work, index, message, account, repeated)
        _wake(work.line)
        return claimed, sent

    def withdrawn(self, batch: Batch) -> None:
        """The ledger was not asked."""
        self.counts["ledger_refusals"] += 1
        if batch.work.key.fenced is None:
            batch.keep(0)

    def impossible(self, batch: Batch, rendered: Rendered, error: Corrupt) -> bool:
        """The ledger has no such ordinals: final for a page that can't be read either."""
        if any(index not in rendered.failed for index in batch.indexes):
            return False
        for index in batch.indexes:
            reason, detail = rendered.failed[index]
            self._fail_unledgered(batch.work, index, reason, f"{detail}; {error}")
        _wake(batch.work.line)
        return True

    def put_back(self, account: Account, grant: Grant, unused: int) -> None:
        """Put back tokens with which nothing was sent."""
        if unused:
            self._spawn(self._put_tokens_back(account, grant, unused))

    async def _put_tokens_back(self, account: Account, grant: Grant, unused: int) -> None:
        try:
            await self._shaper.put_back(unused, grant)
        except Unavailable as error:
            log.info("%d unused tokens of %s are lost: %s", unused, account.name, error)

    # A request and its end

    def _request(
        self, work: Work, index: int, message: Message, account: Account, repeated: bool
    ) -> None:
        """One attempt: it leaves only here, after its claim."""
        self.counts["requests"] += 1
        if repeated:
            self.counts["repeated"] += 1
        self._flying += 1
        account.provider.attempt(
            message,
            self.policy.request_timeout,
            lambda answer: self._answered(work, index, account, repeated, answer),
        )

    def _answered(
        self,
        work: Work,
        index: int,
        account: Account,
        repeated: bool,
        answer: Answer | Exception,
    ) -> None:
        self._flying -= 1
        if isinstance(answer, Exception):
            self._failed(answer)
            return
        try:
            self.counts[_ANSWERS[answer.verdict]] += 1
            _note(account, answer)
            following = after_answer(
                answer,
                work.tries_of(index),
                work.line.routes,
                self.policy.lane,
                self.policy.retry,
                self._random,
            )
            self._settle(work, index, following, answer, account, account.name, repeated)
        except Exception as error:  # a defect: the job must fail, not the connection
            self._failed(error)

    def _close(
        self, work: Work, index: int, account: Account | None, reason: Reason, detail: str
    ) -> None:
        """A claimed message that can't be sent: the refusal is recorded like a provider's."""
        following = Next(SettleAction.CLOSE, Outcome.FAILED, reason)
        answer = Answer(Verdict.REFUSED, reason.value, detail=detail)
        self._settle(work, index, following, answer, account, "", False)

    def _settle(
        self,
        work: Work,
        index: int,
        following: Next,
        answer: Answer,
        account: Account | None,
        provider: str,
        repeated: bool,
    ) -> None:
        """Record the end of a claimed message, then tell; the account's permit is free then."""
        tries = work.tries_of(index)
        send = work.send
        settlement = settlement_of(
            send.page * PAGE_SIZE + index, send.generation, tries, following, answer.verdict
        )

        held = [account] if account is not None else []

        def let_go() -> None:
            while held:
                held.pop().permits.give(1)

        def settled(result: Settled) -> None:
            let_go()
            then = after_settled(result, following, tries, provider)
            known = answer if result.kind is SettledKind.DONE else None
            self._follow(work, index, then, known, repeated)

        work.desk.settle(settlement, settled, let_go)

    def _follow(
        self, work: Work, index: int, then: Told | Again, answer: Answer | None, repeated: bool
    ) -> None:
        """Tell the books what the ledger has, or wait for the next try."""
        if isinstance(then, Again):
            if then.tries.total or then.tries.route:
                work.tries[index] = then.tries
            self._wait(work, index, then)
        else:
            self._complete(work, index, then, answer, repeated)

    def _wait(self, work: Work, index: int, then: Again) -> None:
        """Keep a message for its next try, but no longer than its decision is good for."""
        if work.key.fenced is not None:
            return
        wait_s = then.wait.total_seconds()
        if wait_s > _SOONEST_S:
            until = min(work.send.valid_until, work.send.deadline) - datetime.now(UTC)
            wait_s = min(wait_s, max(_SOONEST_S, until.total_seconds()))
        self._stream(work.line, then.tries.route).wait(work, index, self._loop.time() + wait_s)

    def _complete(
        self, work: Work, index: int, told: Told, answer: Answer | None, repeated: bool
    ) -> None:
        key, line, send = work.key, work.line, work.send
        if key.fenced is not None:
            return
        tries = work.tries.pop(index, None) or Tries()
        dead = told.reason is Reason.ADDRESS_REFUSED
        self.counts[_OUTCOMES[told.outcome]] += 1
        if told.outcome is Outcome.FAILED and told.reason in REPLAYABLE:
            self.counts["dead_letters"] += 1
        key.outbox.append(
            Completion(
                work,
                index,
                told.outcome,
                told.reason,
                send.generation if told.generation is None else told.generation,
                told.provider,
                (answer.provider_message_id or "") if answer is not None else "",
                tries.total + 1 if told.provider else tries.total,
                answer.detail if answer is not None else "",
                datetime.now(UTC),
                self._reader.recipient(send, index) if dead else "",
                repeated,
            )
        )
        key.under_way -= 1
        work.left -= 1
        line.left -= 1
        if not work.left:
            work.desk.users -= 1
        if not line.left:
            line.since = self._loop.time()

    # Chores

    async def _report(self) -> None:
        """Tell the shared buckets what providers said."""
        while True:
            await asyncio.sleep(_REPORT_S)
            for account in self._accounts.values():
                accepted, failed, throttled = account.accepted, account.failed, account.throttled
                if not accepted and not failed and throttled is None:
                    continue
                account.accepted, account.failed, account.throttled = 0, 0, None
                try:
                    await self._shaper.report(account.route, accepted, failed, throttled)
                except Unavailable as error:
                    log.info("a report on %s is lost: %s", account.name, error)

    async def _tidy(self) -> None:
        """Forget the desks of ledgers that nothing needs, once Flink's state has their marks."""
        while True:
            await asyncio.sleep(_TIDY_S)
            for key in self._keys.values():
                for ref, desk in tuple(key.desks.items()):
                    if not desk.users and desk.idle and desk.marked == desk.seen:
                        del key.desks[ref]


class _Tokens:
    """The tokens of one take, shared by batches; what none of them used is put back together."""

    __slots__ = ("_account", "_grant", "_loop", "_sharers", "_unused")

    def __init__(
        self, loop: DeliveryLoop, account: Account | None, grant: Grant, sharers: int
    ) -> None:
        self._loop = loop
        self._account = account
        self._grant = grant
        self._sharers = sharers
        self._unused = 0

    def done(self, unused: int) -> None:
        """A batch has used its tokens but for so many."""
        self._unused += unused
        self._sharers -= 1
        if not self._sharers and self._account is not None:
            self._loop.put_back(self._account, self._grant, self._unused)


class _Question:
    """A batch at its ledger's desk, with the permits and tokens that it holds."""

    __slots__ = ("_account", "_batch", "_left", "_loop", "_rendered", "_tokens", "asks", "scopes")

    def __init__(
        self,
        loop: DeliveryLoop,
        batch: Batch,
        account: Account | None,
        tokens: _Tokens | None,
        rendered: Rendered,
        scopes: tuple[str, ...],
        asks: Sequence[Ask],
    ) -> None:
        self.scopes = scopes
        self.asks = asks
        self._loop = loop
        self._batch = batch
        self._account = account
        self._tokens = tokens
        self._rendered = rendered
        self._left = len(asks) if account is not None and tokens is not None else 0
        """How many are to be rendered."""

    def render(self, count: int) -> bool:
        """Render up to so many more messages; whether any are left."""
        begin = len(self.asks) - self._left
        count = min(count, self._left)
        if count:
            self._left -= count
            if not self._loop.render(self._batch, self._rendered, begin, begin + count):
                self._left = 0
        return self._left > 0

    def answer(self, verdicts: Sequence[LedgerVerdict]) -> None:
        """Send what was claimed."""
        leave = self._tokens is not None and not self._loop.stopping
        if leave:
            self.render(self._left)
        claimed, sent = self._loop.judged(
            self._batch, self._account, self._rendered, verdicts, leave
        )
        self._give_back(claimed, sent)

    def withdraw(self) -> None:
        """Try later."""
        self._give_back(0, 0)
        self._loop.withdrawn(self._batch)

    def late(self) -> None:
        """Hold no tokens meanwhile: they would be of another second when the answer comes."""
        self._put_tokens_back(0)

    def impossible(self, error: Corrupt) -> bool:
        """See `DeliveryLoop.impossible`."""
        self.render(self._left)  # perhaps the page can't be read
        settled = self._loop.impossible(self._batch, self._rendered, error)
        if settled:
            self._give_back(0, 0)
        return settled

    def _give_back(self, claimed: int, sent: int) -> None:
        self._left = 0
        self._put_tokens_back(sent)
        account, self._account = self._account, None
        if account is not None:
            account.permits.give(len(self._batch.indexes) - claimed)

    def _put_tokens_back(self, sent: int) -> None:
        tokens, self._tokens = self._tokens, None
        if tokens is not None:
            tokens.done(len(self._batch.indexes) - sent)


def _kept(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first ``count`` messages of batches; the others go back, to be the next."""
    kept: list[Batch] = []
    for batch in batches:
        take = min(count, len(batch.indexes))
        count -= take
        batch.keep(take)
        if take:
            kept.append(batch)
    return kept


async def _render_meanwhile(questions: Sequence[_Question]) -> None:
    """Render while the ledger is asked: what it has answered by then is rendered at once."""
    for question in questions:
        left = True
        while left:
            await asyncio.sleep(0)
            left = question.render(_RENDERED_TOGETHER)


def _wake(line: Line) -> None:
    for stream in line.streams.values():
        stream.news.set()


def _token_wait(grant: Grant) -> float:
    if not grant.wait_ms:
        return _FIRST_PARK_S
    return min(_LONGEST_WAIT_S, max(_SHORTEST_TOKEN_WAIT_S, grant.wait_ms / 1000))


def _note(account: Account, answer: Answer) -> None:
    if answer.verdict is Verdict.THROTTLED:
        pause = answer.retry_after or timedelta(seconds=1)
        account.throttled = max(account.throttled or _NO_TIME, pause)
    elif answer.verdict in (Verdict.RETRYABLE, Verdict.IN_DOUBT, Verdict.ACCOUNT):
        account.failed += 1
    else:
        account.accepted += 1


__all__: Sequence[str] = ["DeliveryLoop", "EnginePolicy", "FullLedger", "Shaper"]
