"""One ledger's desk: claims and settlements of a ledger, one call at a time.

The ledger carries out at most one call per sequence number, so calls of one ledger are made one
after the other; while one is under way the next gathers. A call whose answer was lost is repeated:
the ledger finds what was done, or does it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.errors import Corrupt, Fenced, MissingLedger, Unavailable
from transforms.ledger import (
    Ask,
    Claims,
    LedgerRef,
    Moved,
    Owner,
    Seen,
    Settled,
    Settlement,
    Settlements,
    Verdict,
)

log = logging.getLogger(__name__)

LARGEST_CALL = 64
"""Items of one call: a script blocks Redis while it runs, at about 10 µs an item."""
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0
_REFUSED_WAIT_S = 2.0


class Ledger(Protocol):
    """The calls of ``sinks.ledger`` that a desk makes."""

    async def look(self, ref: LedgerRef, owner: Owner) -> Seen:
        """How far a ledger is. Raises ``MissingLedger``, ``Unavailable``."""

    async def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims | Moved:
        """Ask for leave to send."""

    async def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements | Moved:
        """Record what became of claimed requests."""


OnVerdicts = Callable[[Sequence[Verdict]], None]
OnSettled = Callable[[Settled], None]


@dataclass(slots=True)
class Question:
    """Claims asked for together, and who wants to know."""

    scopes: tuple[str, ...]
    asks: Sequence[Ask]
    answer: OnVerdicts


class LedgerDesk:
    """Belongs to one event loop. Callbacks must not raise."""

    def __init__(
        self,
        ledger: Ledger,
        ref: LedgerRef,
        owner: Callable[[], Awaitable[Owner]],
        seen: Seen | None,
        fenced: Callable[[Exception], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.ref = ref
        self.seen = seen
        self.marked: Seen | None = seen
        """What Flink's state knows; the owner of the desk keeps it."""
        self.refused = ""
        """Why the ledger can't be used at present; empty while it can."""
        self._ledger = ledger
        self._owner = owner
        self._fenced = fenced
        self._failed = failed
        self._questions: deque[Question] = deque()
        self._settlements: deque[tuple[Settlement, OnSettled]] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing waits for an answer."""
        return self._task is None

    def ask(self, question: Question) -> None:
        """Claim; the answer comes by the question's callback."""
        self._questions.append(question)
        self._wake()

    def settle(self, settlement: Settlement, on_settled: OnSettled) -> None:
        """Settle; the answer comes by the callback, after the ledger has it."""
        self._settlements.append((settlement, on_settled))
        self._wake()

    def drop_questions(self) -> None:
        """Forget claims not asked yet: the engine stops."""
        self._questions.clear()

    def _wake(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._settlements or self._questions:
                if self._settlements:
                    await self._settle_some()
                if self._questions:
                    await self._ask_one()
        except Fenced as error:
            self._fenced(error)
        except Exception as error:  # a defect: the job must fail, not wait for ever
            self._failed(error)
        finally:
            self._task = None

    async def _settle_some(self) -> None:
        taken = [
            self._settlements.popleft() for _ in range(min(LARGEST_CALL, len(self._settlements)))
        ]
        wanted = [settlement for settlement, _ in taken]

        async def call(owner: Owner, seen: Seen) -> Settlements | Moved:
            return await self._ledger.settle(self.ref, owner, seen, wanted)

        done = await self._insist(call)
        if isinstance(done, Settlements):
            for (_, on_settled), settled in zip(taken, done.answers, strict=True):
                on_settled(settled)

    async def _ask_one(self) -> None:
        question = self._questions.popleft()

        async def call(owner: Owner, seen: Seen) -> Claims | Moved:
            return await self._ledger.claim(self.ref, owner, seen, question.scopes, question.asks)

        done = await self._insist(call)
        if isinstance(done, Claims):
            question.answer(done.verdicts)

    async def _insist(
        self, call: Callable[[Owner, Seen], Awaitable[Claims | Settlements | Moved]]
    ) -> Claims | Settlements:
        """Repeat a call until it is carried out. Raises ``Fenced`` only."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                owner = await self._owner()
                if self.seen is None:
                    self.seen = await self._ledger.look(self.ref, owner)
                answer = await call(owner, self.seen)
            except Unavailable as error:
                log.warning("%s: %s; trying again", self.ref, error)
                await asyncio.sleep(wait_s)
                wait_s = min(_LONGEST_WAIT_S, wait_s * 2)
                continue
            except (MissingLedger, Corrupt) as error:
                # Nothing is sent on a ledger that is gone or older than it was: wait for repair.
                if self.refused != str(error):
                    log.error("%s", error)
                self.refused = str(error)
                await asyncio.sleep(_REFUSED_WAIT_S)
                continue
            self.refused = ""
            self.seen = Seen(self.seen.dataset, answer.seq)
            if not isinstance(answer, Moved):
                return answer
