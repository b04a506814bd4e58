"""The shell around decide: loads what is known of a page's people, decides, saves, emits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from pyflink.common import Types
from pyflink.datastream import KeyedProcessFunction, RuntimeContext
from pyflink.datastream.state import MapStateDescriptor

from pipelines.dead_letters import DeadLetterGate
from schemas.codec import decode, decode_state, encode, name_of, to_millis
from schemas.errors import (
    Corrupt,
    CorruptPage,
    InvalidCampaign,
    MalformedRecord,
    MissingObject,
    MissingSnapshot,
    Unavailable,
    UnknownSchema,
)
from schemas.ids import derive
from schemas.pages import bitmap_from
from schemas.reasons import Reason
from schemas.records import (
    CampaignSpec,
    ConsentChange,
    ConsentStatus,
    DeadLetter,
    Outcomes,
    PageOrder,
    PageResult,
)
from transforms.consent import change_bytes, for_claims, forgotten_by_claims
from transforms.decide import (
    PageFacts,
    decide_page,
    defer_page,
    fold_page_outcomes,
    skip_page,
    state_key,
)
from transforms.metrics import DECIDE, DECIDE_GROUP

log = logging.getLogger(__name__)


class ReadableSnapshot(Protocol):
    """A snapshot whose pages can be read."""

    def read_index(self, shard: int, page: int) -> PageFacts:
        """What decide needs of a page.

        Raises:
            CorruptPage: its hash differs, or there is no such page.
        """


class PageStore(Protocol):
    """Where specs and pages are read."""

    def get_object(self, kind: str, name: str) -> bytes:
        """A stored object. Raises ``MissingObject`` or ``Corrupt``."""

    def open_snapshot(self, name: str) -> ReadableSnapshot:
        """A snapshot. Raises ``MissingSnapshot``."""


class OptOuts(Protocol):
    """Where claims look for withdrawals that came after a decision."""

    def opt_out(self, tenant: str, recipient_id: str, channel: str, topic: str) -> None:
        """Remember a withdrawal for longer than any decision is valid.

        Raises:
            Unavailable: it is not remembered.
        """

    def opt_in(self, tenant: str, recipient_id: str, channel: str, topic: str) -> None:
        """Forget a withdrawal of exactly this scope.

        Raises:
            Unavailable: it may still be remembered.
        """


@dataclass(frozen=True, slots=True)
class DecideParts:
    """What decide is given; factories, called once where the operator opens."""

    store: Callable[[], PageStore]
    opt_outs: Callable[[], OptOuts]
    dead_letter_ratio: float
    dead_letter_window: int


_KEPT_SPECS = 256
_REPEAT = timedelta(milliseconds=500)
"""How soon a consent change that Redis did not take is told again."""


class DecideOperator(KeyedProcessFunction):  # type: ignore[misc]
    """Keyed by shard. In: page orders, outcomes, consent changes. Out: page results and sends."""

    def __init__(self, parts: DecideParts) -> None:
        self._parts = parts

    def open(self, runtime_context: RuntimeContext) -> None:
        """Connect."""
        parts = self._parts
        self._people = runtime_context.get_map_state(
            MapStateDescriptor("people", Types.STRING(), Types.PICKLED_BYTE_ARRAY())
        )
        self._owed_state = runtime_context.get_map_state(
            MapStateDescriptor("owed", Types.STRING(), Types.PICKLED_BYTE_ARRAY())
        )
        self._owed: dict[int, dict[str, ConsentChange]] = {}
        self._armed: dict[int, int] = {}
        self._away_until: datetime | None = None
        self._store = parts.store()
        self._opt_outs = parts.opt_outs()
        self._specs: dict[str, CampaignSpec] = {}
        self._gate = DeadLetterGate("decide", parts.dead_letter_ratio, parts.dead_letter_window)
        metrics = runtime_context.get_metrics_group().add_group(DECIDE_GROUP)
        self._metrics = {name: metrics.counter(name) for name in DECIDE}

    def process_element(self, value: bytes, ctx: KeyedProcessFunction.Context) -> Iterator[bytes]:
        """Decide an order, or fold what came back."""
        now = datetime.now(UTC)
        data = bytes(value)
        try:
            match name_of(data):
                case "PageOrder":
                    yield from self._decide(decode(data, PageOrder), now)
                case "Outcomes":
                    self._fold(decode(data, Outcomes).require_sound())
                case "ConsentChange":
                    self._consent(decode(data, ConsentChange), ctx, now)
                case other:
                    raise UnknownSchema(
                        "decide takes PageOrder, Outcomes and ConsentChange, got "
                        f"{other or 'bytes'} beginning {data[:10].hex(' ')!r}"
                    )
        except MalformedRecord as error:
            self._metrics["malformed"].inc()
            yield self._gate.letter(data, error, now, step="read", source="decide's topics")
            return
        self._gate.good()

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[bytes]:
        """Tell Redis again what it is owed."""
        key: int = ctx.get_current_key()
        # A timer kept in state across a restart must not start a second chain of them.
        if self._armed.get(key, timestamp) == timestamp:
            self._armed.pop(key, None)
            now = datetime.now(UTC)
            for name, change in list(self._owed_of(key).items()):
                if not forgotten_by_claims(change, now) and not self._told(change, now):
                    break
                del self._owed[key][name]
                self._owed_state.remove(name)
            self._arm(key, ctx, now)
        yield from ()

    def _decide(self, order: PageOrder, now: datetime) -> Iterator[bytes]:
        self._metrics["orders"].inc()
        try:
            spec = self._spec(order.spec)
            index = self._store.open_snapshot(order.snapshot).read_index(order.shard, order.page)
            decided = decide_page(order, spec, index, self._states(order.tenant), now)
        except (MissingSnapshot, MissingObject) as error:
            log.error("page %d of shard %d waits: %s", order.page, order.shard, error)
            self._metrics["missing_snapshots"].inc()
            result = defer_page(order, Reason.MISSING_SNAPSHOT, now)
            self._count(result)
            yield encode(result)
            return
        except (CorruptPage, Corrupt, InvalidCampaign, MalformedRecord) as error:
            # The order would otherwise never be answered, and its run never end.
            log.error("page %d of shard %d is skipped: %s", order.page, order.shard, error)
            self._metrics["damaged_pages"].inc()
            if not isinstance(error, Corrupt):
                # Not a damaged file, which says nothing of other campaigns.
                self._gate.bad(error, "decide")
            yield encode(_page_letter(order, error, now))
            result = skip_page(order, Reason.CORRUPT_PAGE, now)
            self._count(result)
            yield encode(result)
            return
        self._keep(order.tenant, decided.states)
        self._count(decided.result)
        yield encode(decided.result)
        for send in decided.sends:
            yield encode(send)

    def _count(self, result: PageResult) -> None:
        count = self._metrics
        count["sent"].inc(bitmap_from(result.sends).bit_count())
        count["skipped"].inc(sum(bitmap_from(one.ordinals).bit_count() for one in result.skips))
        count["deferred"].inc(
            sum(bitmap_from(one.ordinals).bit_count() for one in result.deferrals)
        )

    def _fold(self, outcomes: Outcomes) -> None:
        try:
            snapshot = self._store.open_snapshot(outcomes.snapshot)
            index = snapshot.read_index(outcomes.shard, outcomes.page)
        except (Corrupt, MissingSnapshot) as error:
            log.error("outcomes of run %s can't be folded into caps: %s", outcomes.run, error)
            return
        states = self._states(outcomes.tenant)
        self._keep(outcomes.tenant, fold_page_outcomes(outcomes, index, states))

    def _consent(
        self, change: ConsentChange, ctx: KeyedProcessFunction.Context, now: datetime
    ) -> None:
        key = state_key(change.tenant, change.recipient_id)
        kept = self._people.get(key)
        after = change_bytes(None if kept is None else bytes(kept), change)
        if after is None:
            return
        self._people.put(key, after)
        self._metrics["consent_changes"].inc()
        shard: int = ctx.get_current_key()
        owed = self._owed_of(shard)
        for one in for_claims(after, change, now):
            # Behind what is owed already: of one person's scope Redis must have the latest last.
            if owed or not self._told(one, now):
                name = f"{key}\0{one.channel}\0{one.topic}"
                owed[name] = one
                self._owed_state.put(name, encode(one))
        self._arm(shard, ctx, now)

    def _told(self, change: ConsentChange, now: datetime) -> bool:
        """Whether Redis has it. One that does not answer is not asked for a while: each asking
        takes its time-out, in which nothing is decided."""
        if self._away_until is not None and now < self._away_until:
            return False
        granted = change.status is ConsentStatus.GRANTED
        remember = self._opt_outs.opt_in if granted else self._opt_outs.opt_out
        try:
            remember(change.tenant, change.recipient_id, change.channel, change.topic)
        except Unavailable as error:
            log.warning("a consent change waits until claims can be told of it: %s", error)
            self._metrics["consent_untold"].inc()
            self._away_until = datetime.now(UTC) + _REPEAT
            return False
        self._away_until = None
        return True

    def _owed_of(self, key: int) -> dict[str, ConsentChange]:
        """What Redis must be told of a shard's people yet, by person and scope."""
        owed = self._owed.get(key)
        if owed is None:
            kept = self._owed_state.items()
            owed = {name: decode_state(bytes(data), ConsentChange) for name, data in kept}
            self._owed[key] = owed
        return owed

    def _arm(self, key: int, ctx: KeyedProcessFunction.Context, now: datetime) -> None:
        if self._owed_of(key) and key not in self._armed:
            self._armed[key] = to_millis(now + _REPEAT)
            ctx.timer_service().register_processing_time_timer(self._armed[key])

    def _states(self, tenant: str) -> Callable[[str], bytes | None]:
        get = self._people.get
        prefix = state_key(tenant, "")  # type: ignore[arg-type]
        return lambda recipient_id: get(prefix + recipient_id)

    def _keep(self, tenant: str, states: dict[str, bytes]) -> None:
        put = self._people.put
        prefix = state_key(tenant, "")  # type: ignore[arg-type]
        for recipient_id, data in states.items():
            put(prefix + recipient_id, data)

    def _spec(self, name: str) -> CampaignSpec:
        spec = self._specs.get(name)
        if spec is None:
            spec = decode(self._store.get_object("spec", name), CampaignSpec)
            if len(self._specs) >= _KEPT_SPECS:
                self._specs.clear()
            self._specs[name] = spec
        return spec


def _page_letter(order: PageOrder, error: Exception, now: datetime) -> DeadLetter:
    """The letter of an order's recipients: a replay orders them again, once the page is mended."""
    place = (order.tenant, order.run, order.leg, str(order.shard), str(order.page))
    return DeadLetter(
        letter_id=derive("dead-letter", ("decide", *place, order.ordinals.hex())),
        tenant=order.tenant,
        run=order.run,
        step="decide/page",
        reason=Reason.CORRUPT_PAGE,
        detail=str(error)[:500],
        source="coordinate's orders",
        original=encode(order),
        first_at=now,
        last_at=now,
        leg=order.leg,
        shard=order.shard,
        page=order.page,
        ordinals=order.ordinals,
        generation=order.generation,
    )
