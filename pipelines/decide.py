"""The shell around decide: loads what is known of a page's people, decides, saves, emits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from pyflink.common import Types
from pyflink.datastream import KeyedProcessFunction, RuntimeContext
from pyflink.datastream.state import MapStateDescriptor

from pipelines.dead_letters import DeadLetterGate
from schemas.codec import decode, encode, name_of
from schemas.errors import (
    Corrupt,
    CorruptPage,
    InvalidCampaign,
    MalformedRecord,
    MissingObject,
    MissingSnapshot,
    UnknownSchema,
)
from schemas.reasons import Reason
from schemas.records import CampaignSpec, ConsentChange, ConsentStatus, Outcomes, PageOrder
from transforms.consent import change_bytes
from transforms.decide import PageFacts, decide_page, fold_page_outcomes, skip_page, state_key

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
        self._store = parts.store()
        self._opt_outs = parts.opt_outs()
        self._specs: dict[str, CampaignSpec] = {}
        self._gate = DeadLetterGate("decide", parts.dead_letter_ratio, parts.dead_letter_window)

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
                    self._consent(decode(data, ConsentChange))
                case other:
                    raise UnknownSchema(
                        "decide takes PageOrder, Outcomes and ConsentChange, got "
                        f"{other or 'bytes'} beginning {data[:10].hex(' ')!r}"
                    )
        except MalformedRecord as error:
            yield self._gate.letter(data, error, now, step="read", source="decide's topics")
            return
        self._gate.good()

    def _decide(self, order: PageOrder, now: datetime) -> Iterator[bytes]:
        try:
            spec = self._spec(order.spec)
            index = self._store.open_snapshot(order.snapshot).read_index(order.shard, order.page)
            decided = decide_page(order, spec, index, self._states(order.tenant), now)
        except (CorruptPage, Corrupt) as error:
            log.error("page %d of shard %d is skipped: %s", order.page, order.shard, error)
            yield encode(skip_page(order, Reason.CORRUPT_PAGE, now))
            return
        except (MissingSnapshot, MissingObject) as error:
            log.error("page %d of shard %d is skipped: %s", order.page, order.shard, error)
            yield encode(skip_page(order, Reason.MISSING_SNAPSHOT, now))
            return
        except (InvalidCampaign, MalformedRecord) as error:
            # The order would otherwise never be answered, and its run never end.
            log.error("page %d of shard %d is skipped: %s", order.page, order.shard, error)
            yield self._gate.letter(
                encode(order), error, now, step="decide", source="coordinate's orders"
            )
            yield encode(skip_page(order, Reason.CORRUPT_PAGE, now))
            return
        self._keep(order.tenant, decided.states)
        yield encode(decided.result)
        for send in decided.sends:
            yield encode(send)

    def _fold(self, outcomes: Outcomes) -> None:
        try:
            snapshot = self._store.open_snapshot(outcomes.snapshot)
            index = snapshot.read_index(outcomes.shard, outcomes.page)
        except (Corrupt, MissingSnapshot) as error:
            log.error("outcomes of run %s can't be folded into caps: %s", outcomes.run, error)
            return
        states = self._states(outcomes.tenant)
        self._keep(outcomes.tenant, fold_page_outcomes(outcomes, index, states))

    def _consent(self, change: ConsentChange) -> None:
        key = state_key(change.tenant, change.recipient_id)
        kept = self._people.get(key)
        after = change_bytes(None if kept is None else bytes(kept), change)
        if after is not None:
            self._people.put(key, after)
        granted = change.status is ConsentStatus.GRANTED
        remember = self._opt_outs.opt_in if granted else self._opt_outs.opt_out
        remember(change.tenant, change.recipient_id, change.channel, change.topic)

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
