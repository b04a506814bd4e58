"""A run under test: what decide and delivery would say back, and what was said so far."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from schemas.ids import LegId, ObjectId
from schemas.pages import bitmap_bytes, bitmap_from, bitmap_of, indexes_of
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import (
    CampaignSpec,
    Command,
    CommandKind,
    DeferGroup,
    OutcomeGroup,
    Outcomes,
    PageOrder,
    PageResult,
    Reorder,
    SkipGroup,
)
from schemas.state import RunState
from tests.decide.people import EMAIL, NOON, campaign, leg
from transforms.coordinate import (
    CoordinatePolicy,
    Coordinator,
    Effects,
    LaunchFacts,
    PageKey,
    RunMemory,
)
from transforms.decide import page_result

SPEC_ID = ObjectId("5" * 64)
FINAL = (Outcome.ACCEPTED, Outcome.UNKNOWN, Outcome.FAILED, Outcome.EXPIRED, Outcome.CANCELLED)
_REASONS = {
    Outcome.ACCEPTED: Reason.PROVIDER_ACCEPTED,
    Outcome.UNKNOWN: Reason.NO_ANSWER,
    Outcome.FAILED: Reason.PROVIDER_REFUSED,
    Outcome.EXPIRED: Reason.DEADLINE,
    Outcome.CANCELLED: Reason.RUN_CANCELLED,
    Outcome.STALE: Reason.DECISION_TOO_OLD,
}


def one_leg(**changes: Any) -> CampaignSpec:
    """A campaign by e-mail alone."""
    return campaign(**{"legs": (leg(campaign().legs[0].channel),), **changes})


class Field:
    """One run and its clock. ``orders`` and ``closings`` are all that was asked for so far."""

    def __init__(
        self,
        counts: tuple[int, ...],
        spec: CampaignSpec | None = None,
        **policy: Any,
    ) -> None:
        self.counts = counts
        self.spec = spec or one_leg()
        self.policy = CoordinatePolicy(**{"progress_interval": timedelta(days=9), **policy})
        self.memory = RunMemory()
        self.coordinator = Coordinator(self.memory, self.policy)
        self.now = NOON
        self.orders: list[PageOrder] = []
        self.closings: list[Outcomes] = []
        self.events: list[Any] = []
        self.last = Effects()
        self.commands = 0

    # steps

    def step(self, effects: Effects) -> Effects:
        self.last = effects
        self.orders += effects.orders
        self.closings += effects.closings
        self.events += effects.events
        self.memory.dirty.clear()
        return effects

    def launch(self, ready: bool = True, **facts: Any) -> Effects:
        command = self.command(CommandKind.LAUNCH, launch=self.spec)
        found = LaunchFacts(SPEC_ID, self.counts, **facts)
        self.step(self.coordinator.on_command(command, self.now, found))
        if ready and self.last.create_ledger:
            self.step(self.coordinator.on_ledger_created(self.now))
        return self.last

    def command(self, kind: CommandKind, **fields: Any) -> Command:
        self.commands += 1
        name = fields.pop("name", f"command-{self.commands}")
        return Command(name, self.spec.tenant, self.spec.run, kind, self.now, "somebody", **fields)

    def tell(self, kind: CommandKind, **fields: Any) -> Effects:
        command = self.command(kind, **fields)
        return self.step(self.coordinator.on_command(command, self.now, None))

    def tick(self, later: timedelta = timedelta()) -> Effects:
        self.now += later
        return self.step(self.coordinator.on_tick(self.now))

    def hear(self, record: PageResult | Outcomes) -> Effects:
        if isinstance(record, PageResult):
            return self.step(self.coordinator.on_result(record, self.now))
        return self.step(self.coordinator.on_outcomes(record, self.now))

    def restart(self) -> None:
        """Forget what is not kept in state."""
        memory = RunMemory(self.run, dict(self.memory.pages))
        memory.recount()
        self.memory = self.coordinator.memory = memory

    def reorder(self, page: int, *indexes: int, shard: int = 0, leg: LegId = EMAIL) -> Effects:
        one = Reorder(leg, shard, page, bitmap_bytes(bitmap_of(indexes)))
        return self.tell(CommandKind.REORDER, reorders=(one,))

    # what the others would say

    def result(
        self,
        order: PageOrder,
        skips: tuple[int, ...] = (),
        deferrals: dict[datetime, tuple[int, ...]] | None = None,
    ) -> PageResult:
        sends = bitmap_from(order.ordinals) & ~bitmap_of(skips)
        groups = []
        for until, indexes in (deferrals or {}).items():
            sends &= ~bitmap_of(indexes)
            bits = bitmap_bytes(bitmap_of(indexes))
            groups.append(DeferGroup(Reason.QUIET_HOURS, until, bits))
        skipped = SkipGroup(Reason.NO_CONSENT, bitmap_bytes(bitmap_of(skips)))
        return page_result(
            order, self.now, bitmap_bytes(sends), (skipped,) if skips else (), tuple(groups)
        )

    def outcomes(
        self, order: PageOrder, outcome: Outcome, *indexes: int, generation: int | None = None
    ) -> Outcomes:
        group = OutcomeGroup(
            outcome,
            _REASONS[outcome],
            "",
            order.generation if generation is None else generation,
            indexes,
        )
        return Outcomes(
            order.tenant,
            order.run,
            order.leg,
            order.snapshot,
            order.shard,
            order.page,
            self.now,
            (group,),
        )

    def accept_all(self) -> None:
        """Let everything that is ordered, and whatever that makes room for, be accepted."""
        done = 0
        while done < len(self.orders):
            order = self.orders[done]
            done += 1
            self.hear(self.result(order))
            self.hear(self.outcomes(order, Outcome.ACCEPTED, *members(order)))

    # what is known

    @property
    def run(self) -> RunState:
        assert self.memory.run is not None
        return self.memory.run

    @property
    def status(self) -> RunStatus:
        return self.run.status

    @property
    def note(self) -> str:
        """What the newest audit event says."""
        note: str = self.events[-1].note
        return note

    def open_of(self, key: PageKey) -> list[tuple[int, list[int]]]:
        """Generation and members of a page's open orders."""
        page = self.memory.pages.get(key)
        orders = page.orders if page else ()
        return [(one.generation, indexes_of(bitmap_from(one.unresolved))) for one in orders]

    def state(self) -> object:
        """All that is kept of the run."""
        return self.run, dict(self.memory.pages)


def members(order: PageOrder) -> list[int]:
    """The page-relative indexes of an order."""
    return indexes_of(bitmap_from(order.ordinals))
