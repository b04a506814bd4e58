"""The desk of a ledger: one call at a time, repeated until answered, and what it tells whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest

from schemas.errors import Corrupt, Fenced, Unavailable
from schemas.ids import LegId, RunId, Tenant
from schemas.pages import SHARDS
from schemas.reasons import Lane, RunStatus
from sinks.ledger_desk import CROWD, LARGEST_CALL, LedgerDesk
from tests.delivery.ports import Memory, MemoryLedger
from transforms.ledger import (
    Action,
    Ask,
    Claims,
    LedgerRef,
    Moved,
    Owner,
    RecipientKey,
    Seen,
    Settled,
    SettledKind,
    Settlement,
    Settlements,
    Verdict,
    VerdictKind,
    scopes_of,
)

TENANT, RUN, LEG = Tenant("acme"), RunId("spring"), LegId("email")
REF = LedgerRef(TENANT, RUN, LEG, 7)
FAR_MS = 4_000_000_000_000


class Counting(MemoryLedger):
    """Says how large calls were, and how many were under way at once."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.sizes: list[int] = []
        self.at_once = 0
        self.most_at_once = 0

    async def claim(
        self, ref: LedgerRef, owner: Owner, seen: Seen, scopes: Sequence[str], asks: Sequence[Ask]
    ) -> Claims | Moved:
        self.sizes.append(len(asks))
        async with self:
            return await super().claim(ref, owner, seen, scopes, asks)

    async def settle(
        self, ref: LedgerRef, owner: Owner, seen: Seen, settlements: Sequence[Settlement]
    ) -> Settlements | Moved:
        async with self:
            return await super().settle(ref, owner, seen, settlements)

    async def __aenter__(self) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.001)

    async def __aexit__(self, *_: object) -> None:
        self.at_once -= 1


class Asked:
    """A question that keeps what it was told."""

    def __init__(self, ordinals: Sequence[int], topic: str = "offers", hopeless: bool = False):
        self.scopes = scopes_of("email", topic)
        self.asks: Sequence[Ask] = [
            Ask(each, 1, 0, "fake", RecipientKey(bytes(8)), FAR_MS, FAR_MS) for each in ordinals
        ]
        self.hopeless = hopeless
        self.told: list[object] = []

    def answer(self, verdicts: Sequence[Verdict]) -> None:
        self.told.append([each.kind for each in verdicts])

    def withdraw(self) -> None:
        self.told.append("withdrawn")

    def late(self) -> None:
        self.told.append("late")

    def impossible(self, error: Corrupt) -> bool:
        self.told.append("impossible")
        return self.hopeless


async def until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    for _ in range(1_000_000):
        if done():
            return
        assert time.monotonic() < limit
        await asyncio.sleep(0.002)


class Setting:
    def __init__(self, seen: Seen | None = None) -> None:
        self.memory = Memory()
        self.memory.ledger.create(TENANT, RUN, LEG, [100] * SHARDS, "d1")
        self.memory.ledger.publish(TENANT, RUN, 1, RunStatus.RUNNING)
        self.ledger = Counting(self.memory)
        self.fenced: list[Exception] = []
        self.failed: list[BaseException] = []
        self.news = 0
        self._owner: Owner | None = None
        self.desk = LedgerDesk(
            self.ledger, REF, self.owner, seen, self.hear, self.fenced.append, self.failed.append
        )

    def hear(self) -> None:
        self.news += 1

    async def owner(self) -> Owner:
        if self._owner is None:
            self._owner = Owner(Lane.PROMOTIONAL, 7, self.memory.ledger.acquire_epoch(
                Lane.PROMOTIONAL, 7))  # fmt: skip
        return self._owner

    async def quiet(self) -> None:
        await until(lambda: self.desk.idle)


CLAIMED = VerdictKind.CLAIMED


def test_questions_of_the_same_scopes_are_asked_together() -> None:
    async def story() -> None:
        at = Setting()
        questions = [Asked(range(n * 10, n * 10 + 10)) for n in range(9)]
        other = Asked([95], topic="news")
        for each in (*questions, other):
            at.desk.ask(each)
        await at.quiet()
        assert [each.told for each in questions] == [[[CLAIMED] * 10]] * 9
        assert other.told == [[CLAIMED]]
        assert at.ledger.sizes == [60, 30, 1]
        assert max(at.ledger.sizes) <= LARGEST_CALL
        assert at.ledger.most_at_once == 1

    asyncio.run(story())


def test_a_crowded_desk_is_busy() -> None:
    async def story() -> None:
        at = Setting()
        for n in range(CROWD):
            assert not at.desk.busy
            at.desk.ask(Asked([n]))
        assert at.desk.busy
        await at.quiet()
        assert not at.desk.busy

    asyncio.run(story())


def test_settlements_are_told_after_the_ledger_has_them() -> None:
    async def story() -> None:
        at, told = Setting(), []

        def settled(result: Settled) -> None:
            told.append((result.kind, at.memory.ledger.view(REF).accepted))

        at.desk.ask(Asked(range(70)))
        await at.quiet()
        for n in range(70):
            at.desk.settle(Settlement(n, 1, 0, Action.ACCEPT), settled)
        await at.quiet()
        assert told[0] == (SettledKind.DONE, LARGEST_CALL)
        assert told[-1] == (SettledKind.DONE, 70)
        assert len(told) == 70

    asyncio.run(story())


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_lost_answer_is_asked_for_again(lost: int) -> None:
    async def story() -> None:
        at, told = Setting(), []
        question = Asked([1, 2])
        await at.owner()
        at.memory.lost_answers = lost
        at.desk.ask(question)
        await at.quiet()
        assert question.told == ["late", [CLAIMED, CLAIMED]]
        at.memory.lost_answers = lost
        at.desk.settle(Settlement(1, 1, 0, Action.ACCEPT), lambda each: told.append(each.kind))
        await at.quiet()
        assert told == [SettledKind.DONE]

    asyncio.run(story())


def test_an_absent_ledger_hands_questions_back_and_keeps_settlements() -> None:
    async def story() -> None:
        at, told = Setting(), []
        at.desk.ask(Asked([1]))
        await at.quiet()
        shards = dict(at.memory.ledger.shards)
        at.memory.ledger.shards.clear()
        at.desk.settle(Settlement(1, 1, 0, Action.ACCEPT), lambda each: told.append(each.kind))
        question = Asked([2])
        at.desk.ask(question)
        await until(lambda: bool(question.told))
        assert question.told == ["withdrawn"]
        assert at.desk.busy and "absent" in at.desk.refused
        assert told == []
        at.memory.ledger.shards.update(shards)
        await at.quiet()
        assert told == [SettledKind.DONE]
        assert at.news == 1 and not at.desk.busy

    asyncio.run(story())


def test_a_ledger_behind_what_was_seen_is_refused() -> None:
    async def story() -> None:
        at = Setting(Seen("d1", 5))
        question = Asked([1])
        at.desk.ask(question)
        await until(lambda: bool(question.told))
        assert question.told == ["withdrawn"]
        assert "Redis lost writes" in at.desk.refused

    asyncio.run(story())


def test_an_impossible_question_spoils_no_other() -> None:
    async def story() -> None:
        at = Setting()
        good, bad, later = Asked([1]), Asked([100], hopeless=True), Asked([2])
        for each in (good, bad, later):
            at.desk.ask(each)
        await at.quiet()
        assert good.told == later.told == [[CLAIMED]]
        assert bad.told == ["impossible"]
        assert not at.desk.refused

    asyncio.run(story())


def test_a_successor_ends_the_desk_and_everybody_is_told() -> None:
    async def story() -> None:
        at = Setting()
        at.desk.ask(Asked([1]))
        await at.quiet()
        at.memory.ledger.acquire_epoch(Lane.PROMOTIONAL, 7)
        questions = [Asked([2]), Asked([3], topic="news")]
        for each in questions:
            at.desk.ask(each)
        await at.quiet()
        assert [each.told for each in questions] == [["withdrawn"], ["withdrawn"]]
        assert [type(each) for each in at.fenced] == [Fenced]
        late = Asked([4])
        at.desk.ask(late)
        assert late.told == ["withdrawn"]
        assert not at.failed

    asyncio.run(story())


def test_a_defect_is_heard_of() -> None:
    async def story() -> None:
        at = Setting()
        question = Asked([1])

        def answer(verdicts: Sequence[Verdict]) -> None:
            raise ZeroDivisionError

        question.answer = answer  # type: ignore[method-assign]
        at.desk.ask(question)
        await at.quiet()
        assert [type(each) for each in at.failed] == [ZeroDivisionError]

    asyncio.run(story())


def test_unavailable_for_long_is_waited_for_without_haste() -> None:
    async def story() -> None:
        at = Setting()
        await at.owner()
        at.memory.down = True
        question = Asked([1])
        at.desk.ask(question)
        await asyncio.sleep(0.4)
        assert at.memory.calls < 8
        assert question.told in ([], ["late"])
        at.memory.down = False
        await at.quiet()
        assert question.told[-1] == [CLAIMED]
        with pytest.raises(Unavailable):
            at.memory.down = True
            at.memory.call(lambda: None)

    asyncio.run(story())
