"""One ledger's desk: claims and settlements of a ledger, one call at a time.

The ledger carries out at most one call per sequence number, so calls of one ledger are made one
after the other; while one is under way the next gathers. A call whose answer was lost is repeated
until it is answered: the ledger finds what was done, or does it.

While a ledger is refused (absent, or older than it was seen) nothing is claimed: questions are
handed back, settlements are kept, and the ledger is looked at until it is sound again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from schemas.errors import Corrupt, Fenced, LedgerRolledBack, MissingLedger, Unavailable
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
    rolled_back,
)

log = logging.getLogger(__name__)

LARGEST_CALL = 64
"""Items of one call: a script blocks Redis while it runs, at about 10 µs an item."""
CROWD = 2
"""Questions that a desk takes at a time: one under way and one ready to follow it."""
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0
_REFUSED_WAIT_S = 1.0

Answered = TypeVar("Answered", Claims, Settlements)


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


class Question(Protocol):
    """Claims asked for together, and who wants to know."""

    scopes: tuple[str, ...]
    asks: Sequence[Ask]

    def answer(self, verdicts: Sequence[Verdict]) -> None:
        """The ledger's word."""

    def withdraw(self) -> None:
        """It was not asked, and won't be: the ledger is refused, or the desk closes."""

    def late(self) -> None:
        """The ledger does not answer for now. The answer follows."""

    def impossible(self, error: Corrupt) -> bool:
        """The ledger does not have such ordinals; whether that settles the question."""


OnSettled = Callable[[Settled], None]


class LedgerDesk:
    """Belongs to one event loop. Callbacks must not raise."""

    def __init__(
        self,
        ledger: Ledger,
        ref: LedgerRef,
        owner: Callable[[], Awaitable[Owner]],
        seen: Seen | None,
        news: Callable[[], None],
        fenced: Callable[[Exception], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.ref = ref
        self.seen = seen
        self.marked: Seen | None = seen
        """What Flink's state knows; the owner of the desk keeps it."""
        self.refused = ""
        """Why the ledger can't be used at present; empty while it can."""
        self.users = 0
        """Works that need the desk; the owner of the desk keeps it."""
        self._ledger = ledger
        self._owner = owner
        self._news = news
        self._fenced = fenced
        self._failed = failed
        self._questions: deque[Question] = deque()
        self._asked: tuple[Question, ...] = ()
        self._settlements: deque[tuple[Settlement, OnSettled, Callable[[], None]]] = deque()
        self._alone = 0
        self._calling = False
        self._closed = False
        self._told = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether another question had better wait where it is."""
        return (
            bool(self.refused) or self._closed or len(self._questions) + len(self._asked) >= CROWD
        )

    @property
    def idle(self) -> bool:
        """Whether nothing waits for an answer."""
        return not (self._calling or self._questions or self._settlements)

    def ask(self, question: Question) -> None:
        """Claim; the question hears of it."""
        if self._closed:
            question.withdraw()
            return
        self._questions.append(question)
        self._wake()

    def settle(
        self,
        settlement: Settlement,
        on_settled: OnSettled,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """Settle; the answer comes by the callback, after the ledger has it.

        ``let_go`` is called, perhaps repeatedly, where the answer may not come for long: the
        ledger is refused, or has a new owner.
        """
        if self.refused or self._closed:
            let_go()
        if self._closed:
            return
        self._settlements.append((settlement, on_settled, let_go))
        self._wake()

    def close_questions(self) -> None:
        """Hand back what was not asked yet: the engine stops. Settlements are still made."""
        waiting = tuple(self._questions)
        self._questions.clear()
        for question in waiting:
            question.withdraw()

    def _wake(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._settlements or self._questions or self.refused:
                try:
                    if self.refused:
                        await self._look_again()
                    if self._settlements:
                        await self._settle_some()
                    if self._questions:
                        await self._ask_some()
                except (MissingLedger, Corrupt) as error:
                    self._refuse(error)
        except Fenced as error:
            self._close()
            self._fenced(error)
        except Exception as error:  # a defect: the job must fail, not wait for ever
            self._close()
            self._failed(error)
        finally:
            self._task = None

    def _close(self) -> None:
        """Whoever waits is told or forgotten: a successor reads in the ledger what was done."""
        self._closed = True
        self._let_go()
        self._settlements.clear()
        self._withdraw_asked()
        self.close_questions()

    def _let_go(self) -> None:
        for _, _, let_go in self._settlements:
            let_go()

    def _withdraw_asked(self) -> None:
        asked, self._asked = self._asked, ()
        for question in asked:
            question.withdraw()

    def _refuse(self, error: Exception) -> None:
        """Nothing is sent on a ledger that is gone or older than it was: wait for repair."""
        if self._told != str(error):
            log.error("%s", error)
        self.refused = self._told = str(error)
        self._let_go()
        self._withdraw_asked()
        self.close_questions()

    async def _look_again(self) -> None:
        await asyncio.sleep(_REFUSED_WAIT_S)
        try:
            found = await self._ledger.look(self.ref, await self._owner())
        except Unavailable:
            return
        if self.seen is None:
            self.seen = found
        if found.dataset != self.seen.dataset or found.seq < self.seen.seq:
            raise LedgerRolledBack(rolled_back(self.ref, found.dataset, found.seq, self.seen))
        self.refused = ""
        self._news()

    async def _settle_some(self) -> None:
        size = min(LARGEST_CALL, len(self._settlements))
        # Kept in the queue until the ledger has them: a refused ledger is settled when it is back.
        wanted = [self._settlements[at][0] for at in range(size)]

        async def call(owner: Owner, seen: Seen) -> Settlements | Moved:
            return await self._ledger.settle(self.ref, owner, seen, wanted)

        done = await self._insist(call)
        for settled in done.answers:
            _, on_settled, _ = self._settlements.popleft()
            on_settled(settled)

    async def _ask_some(self) -> None:
        """Ask questions of the same scopes together; one by one where one spoilt the call."""
        together = [self._questions.popleft()]
        size = len(together[0].asks)
        while self._questions and not self._alone:
            size += len(self._questions[0].asks)
            if size > LARGEST_CALL or self._questions[0].scopes != together[0].scopes:
                break
            together.append(self._questions.popleft())
        self._alone = max(0, self._alone - 1)
        try:
            await self._ask(tuple(together))
        except LedgerRolledBack:
            raise
        except Corrupt as error:
            if len(together) > 1:
                self._asked = ()
                self._alone = len(together)
                self._questions.extendleft(reversed(together))
            elif together[0].impossible(error):
                self._asked = ()
            else:
                raise

    async def _ask(self, questions: tuple[Question, ...]) -> None:
        asks = [ask for question in questions for ask in question.asks]
        scopes = questions[0].scopes

        async def call(owner: Owner, seen: Seen) -> Claims | Moved:
            return await self._ledger.claim(self.ref, owner, seen, scopes, asks)

        self._asked = questions
        done = await self._insist(call)
        self._asked = ()
        begin = 0
        for question in questions:
            end = begin + len(question.asks)
            question.answer(done.verdicts[begin:end])
            begin = end

    async def _insist(self, call: Callable[[Owner, Seen], Awaitable[Answered | Moved]]) -> Answered:
        """Repeat a call until it is answered.

        Raises ``Fenced``, ``MissingLedger``, ``Corrupt``: it was refused whole.
        """
        wait_s = _FIRST_WAIT_S
        self._calling = True
        try:
            while True:
                try:
                    owner = await self._owner()
                    if self.seen is None:
                        self.seen = await self._ledger.look(self.ref, owner)
                    answer = await call(owner, self.seen)
                except Unavailable as error:
                    if wait_s == _FIRST_WAIT_S:
                        log.warning("%s: %s; trying until it does", self.ref, error)
                        for question in self._asked:
                            question.late()
                    await asyncio.sleep(wait_s)
                    wait_s = min(_LONGEST_WAIT_S, wait_s * 2)
                    continue
                self.seen = Seen(self.seen.dataset, answer.seq)
                if not isinstance(answer, Moved):
                    if self._told:
                        log.warning("%s: the ledger can be used again", self.ref)
                        self._told = ""
                    return answer
        finally:
            self._calling = False
