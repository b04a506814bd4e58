"""Bugs to plant: each puts a mistake that was thinkable back into the code that decides.

A bug is a list of replacements. The simulation must find every one of them, or it proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from schemas import recipient_bytes
from schemas.message import Answer
from schemas.message import Verdict as AnswerVerdict
from schemas.pages import bitmap_bytes, bitmap_from, delivery_key
from schemas.reasons import RunStatus
from schemas.recipient_bytes import Held as Reservation
from schemas.records import CampaignSpec, PageOrder, PageResult, Send
from schemas.state import OpenOrder, PageState
from tests.simulation import actors
from tests.simulation.actors import Delivery, Key, Process, Work
from tests.simulation.world import Request
from transforms import caps, decide, ledger
from transforms.coordinate import Coordinator, Effects, PageKey
from transforms.ledger import (
    NOTHING,
    Action,
    Ask,
    Claim,
    Claims,
    Entry,
    LedgerModel,
    LedgerRef,
    Moved,
    Owner,
    Seen,
    Settled,
    Settlement,
    Verdict,
    VerdictKind,
)

Plant = Callable[[pytest.MonkeyPatch], None]


def claim_after_request(plant: pytest.MonkeyPatch) -> None:
    """The request leaves at once, and is claimed while it is under way."""
    ask, judged = Process._ask, Process._judged

    def eager(self: Process, work: Work, indexes: Sequence[int], account: Any, grant: Any) -> None:
        ask(self, work, indexes, account, grant)
        if account is not None:
            for index in indexes:
                self.request(work, index, account, self.world.operations)

    def too_late(self: Process, work: Work, indexes: Any, account: Any, *rest: Any) -> None:
        if account is None:
            judged(self, work, indexes, account, *rest)

    plant.setattr(Process, "_ask", eager)
    plant.setattr(Process, "_judged", too_late)


def release_without_owner_check(plant: pytest.MonkeyPatch) -> None:
    """A claim that is refused for now deletes what claim there is, whoever's it is."""
    judge = ledger.judge

    def judging(
        found: Entry, ask: Ask, owner: Owner, status: Any, opted_out: bool, now_ms: int
    ) -> tuple[Verdict, Entry]:
        if isinstance(found.matter, Claim):
            if status is RunStatus.PAUSED:
                return ledger.NOT_RUNNING, NOTHING
            if status is RunStatus.RUNNING and now_ms >= ask.valid_until_ms:
                return ledger.STALE, NOTHING
        return judge(found, ask, owner, status, opted_out, now_ms)

    plant.setattr(ledger, "judge", judging)


def epoch_in_flink_state(plant: pytest.MonkeyPatch) -> None:
    """The epoch is one more than the checkpoint knows: two crashes use it twice."""
    snapshot = Delivery._snapshot
    crash = Delivery.crash

    def owner(self: Process, key: Key) -> Owner:
        if key.owner is None:
            kept: dict[int, int] = self.job.__dict__.setdefault("epochs", {})
            epoch = kept[key.number] = kept.get(key.number, 0) + 1
            self.world.redis.ledger.epochs[self.world.setup.lane, key.number] = epoch
            self.took_over(key, epoch)
        assert key.owner is not None
        return key.owner

    def saving(self: Delivery) -> Any:
        self.__dict__["saved_epochs"] = dict(self.__dict__.get("epochs", {}))
        return snapshot(self)

    def restoring(self: Delivery, *, late: bool) -> bool:
        self.__dict__["epochs"] = dict(self.__dict__.get("saved_epochs", {}))
        return crash(self, late=late)

    plant.setattr(Process, "owner", owner)
    plant.setattr(Delivery, "_snapshot", saving)
    plant.setattr(Delivery, "crash", restoring)


def claim_without_generation(plant: pytest.MonkeyPatch) -> None:
    """Another generation's live claim passes for one's own."""
    judge = ledger.judge

    def judging(found: Entry, ask: Ask, *rest: Any) -> tuple[Verdict, Entry]:
        matter = found.matter
        if isinstance(matter, Claim):
            found = Entry(matter=replace(matter, generation=ask.generation))
        return judge(found, ask, *rest)

    plant.setattr(ledger, "judge", judging)


def timeout_as_refusal(plant: pytest.MonkeyPatch) -> None:
    """No answer passes for 'not sent'."""
    answered = Process.answered

    def hopeful(self: Process, request: Request, answer: Answer) -> None:
        if answer.verdict is AnswerVerdict.IN_DOUBT:
            answer = answer._replace(verdict=AnswerVerdict.RETRYABLE)
        answered(self, request, answer)

    plant.setattr(Process, "answered", hopeful)


def refusal_without_trace(plant: pytest.MonkeyPatch) -> None:
    """A final refusal deletes the claim: after a crash it is as if nothing had been said."""
    settle = ledger.settle

    def settling(found: Entry, asked: Settlement, *rest: Any) -> tuple[Settled, Entry]:
        if asked.action is Action.CLOSE:
            asked = asked._replace(action=Action.RELEASE)
        return settle(found, asked, *rest)

    plant.setattr(ledger, "settle", settling)


def two_keys_one_ledger(plant: pytest.MonkeyPatch) -> None:
    """Sends are keyed by generation too, so that two keys write one ledger."""

    def key_of(send: Send) -> int:
        return delivery_key(send.shard + 2 * (send.generation % 2))

    plant.setattr(actors, "key_of", key_of)
    plant.setattr(ledger, "own_key", lambda ref, owner: None)


def deferral_in_open_generation(plant: pytest.MonkeyPatch) -> None:
    """A deferral is ordered again in the generation whose sends are open."""

    def generation_after(self: Coordinator, key: PageKey, page: PageState) -> int:
        return page.generation

    order = Coordinator._order

    def ordering(
        self: Coordinator,
        key: PageKey,
        page: PageState,
        bits: int,
        now: datetime,
        effects: Effects,
    ) -> None:
        order(self, key, page, bits, now, effects)
        page = self.memory.pages[key]
        same: dict[int, OpenOrder] = {}
        for one in page.orders:
            known = same.get(one.generation)
            both = bitmap_from(one.unresolved) | (bitmap_from(known.unresolved) if known else 0)
            same[one.generation] = replace(one, unresolved=bitmap_bytes(both))
        self.memory.put(key, replace(page, orders=tuple(same.values())))

    plant.setattr(Coordinator, "_generation_after", generation_after)
    plant.setattr(Coordinator, "_order", ordering)


def refused_claim_left(plant: pytest.MonkeyPatch) -> None:
    """A claim that is refused because it is stale or paused stays in the ledger."""
    judge = ledger.judge

    def judging(
        found: Entry, ask: Ask, owner: Owner, status: Any, opted_out: bool, now_ms: int
    ) -> tuple[Verdict, Entry]:
        verdict, entry = judge(found, ask, owner, status, opted_out, now_ms)
        if verdict.kind in (VerdictKind.STALE, VerdictKind.NOT_RUNNING) and entry == NOTHING:
            claim = Claim(owner.epoch, ask.generation, ask.attempt, ask.provider, now_ms)
            return verdict, Entry(matter=claim)
        return verdict, entry

    plant.setattr(ledger, "judge", judging)


def reservation_dropped(plant: pytest.MonkeyPatch) -> None:
    """A new decision that does not send drops the reservation of the one before."""
    whole = decide.decide_page

    def deciding(
        order: PageOrder, spec: CampaignSpec, index: Any, states: Any, now: datetime
    ) -> Any:
        decided = whole(order, spec, index, states, now)
        updates = dict(decided.states)
        sent = bitmap_from(decided.result.sends)
        for at, recipient in enumerate(index.recipient_ids):
            data = states(recipient)
            asked = bitmap_from(order.ordinals) & ~sent
            if data is None or not asked >> at & 1:
                continue
            memory = recipient_bytes.read(data)
            held = tuple(one for one in memory.held if (one.run, one.leg) != (order.run, order.leg))
            updates[recipient] = recipient_bytes.write(memory._replace(held=held))
        return replace(decided, states=updates)

    plant.setattr(decide, "decide_page", deciding)


def reservation_refuses_own_run(plant: pytest.MonkeyPatch) -> None:
    """A run's own older reservation refuses its recipient."""
    refusal = caps.refusal

    def refusing(
        required: Any, reservations: Sequence[Reservation], run: str, leg: str, now_ms: int
    ) -> Any:
        return refusal(required, reservations, f"not {run}", leg, now_ms)

    plant.setattr(caps, "refusal", refusing)


def absent_ledger_as_untouched(plant: pytest.MonkeyPatch) -> None:
    """Where a ledger is gone, delivery begins a new one."""
    look, claim = LedgerModel.look, LedgerModel.claim

    def made(self: LedgerModel, ref: LedgerRef, dataset: str) -> None:
        if ref not in self.shards:
            self.shards[ref] = ledger._Shard(dataset, 0, 1000)

    def looking(self: LedgerModel, ref: LedgerRef) -> Seen:
        made(self, ref, f"{ref.run}-made")
        return look(self, ref)

    def claiming(
        self: LedgerModel, ref: LedgerRef, owner: Owner, seen: Seen, *rest: Any
    ) -> Claims | Moved:
        made(self, ref, seen.dataset)
        shard = self.shards[ref]
        if shard.seq < seen.seq and not shard.entries:
            seen = Seen(seen.dataset, shard.seq)
        self.epochs.setdefault((owner.lane, owner.key), owner.epoch)
        return claim(self, ref, owner, seen, *rest)

    plant.setattr(LedgerModel, "look", looking)
    plant.setattr(LedgerModel, "claim", claiming)


def skips_keep_room(plant: pytest.MonkeyPatch) -> None:
    """Who is skipped stays open: the window fills up, the run never ends."""
    whole = Coordinator.on_result

    def folding(self: Coordinator, result: PageResult, now: datetime) -> Effects:
        return whole(self, replace(result, skips=()), now)

    plant.setattr(Coordinator, "on_result", folding)


BUGS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        claim_after_request,
        release_without_owner_check,
        epoch_in_flink_state,
        claim_without_generation,
        timeout_as_refusal,
        refusal_without_trace,
        two_keys_one_ledger,
        deferral_in_open_generation,
        refused_claim_left,
        reservation_dropped,
        reservation_refuses_own_run,
        absent_ledger_as_untouched,
        skips_keep_room,
    )
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The world with one bug in it."""
    with pytest.MonkeyPatch.context() as patch:
        BUGS[name](patch)
        yield
