"""The reconciling part of the webhook-ingest job: unknowns that webhooks prove become accepted.

    unknown outcomes ─▶ keyed state ─▶ look: ledger ▸ events in ClickHouse ▸ ledger ─▶ outcomes

The rules are ``transforms.reconcile``. The ledger is written first, then the outcome is emitted
and the watch ends; a crash between leaves the watch, and the next look finds the accepted bit and
emits. Ordinary outcomes and webhooks cost one comparison.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from schemas.codec import decode_state, encode
from schemas.errors import Corrupt, MissingLedger, MissingSnapshot, Unavailable
from schemas.ids import LegId, RunId, Tenant, send_id
from schemas.pages import PAGE_SIZE
from schemas.reasons import Reason
from schemas.records import EngagementEvent, Outcomes
from transforms.ledger import Claim, Entry, Held, LedgerRef
from transforms.reconcile import (
    Proof,
    ReconcilePolicy,
    Watch,
    accepted,
    indexes_of,
    merged,
    name_of,
    without,
)

log = logging.getLogger(__name__)

_PAUSE = timedelta(seconds=15)
"""After a server did not answer."""


class Settler(Protocol):
    """The ledger and the table of events. Every method raises Unavailable: try again later."""

    def entries(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
        """What the ledger says of these. Raises MissingLedger, Corrupt."""

    def reconcile(self, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
        """Claims and unknowns become accepted; what stands now. Raises MissingLedger, Corrupt."""

    def proofs(
        self, tenant: Tenant, run: RunId, sends: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Proof]:
        """What providers' events prove of these send ids, each with its shard and ordinal."""

    def close(self) -> None:
        """Let the connections go."""


class PageIds(Protocol):
    """A page's recipients."""

    @property
    def recipient_ids(self) -> Sequence[str]:
        """Ids by position in the page."""


class ReadableSnapshot(Protocol):
    """A snapshot whose pages can be read."""

    def read_index(self, shard: int, page: int) -> PageIds:
        """A page. Raises CorruptPage."""


class PageStore(Protocol):
    """Where snapshots are."""

    def open_snapshot(self, name: str) -> ReadableSnapshot:
        """A snapshot. Raises MissingSnapshot."""


class Reconciler:
    """The unknowns that one writer watches. ``state`` is its keyed MapState, name to bytes."""

    def __init__(
        self,
        state: Any,
        settler: Settler,
        store: PageStore,
        policy: ReconcilePolicy,
        now: datetime,
    ) -> None:
        self._state = state
        self._settler = settler
        self._store = store
        self._patience = policy.patience
        self._watch = Watch(policy)
        for name, data in state.items():
            self._watch.put(name, indexes_of(decode_state(bytes(data), Outcomes)), now)

    def __len__(self) -> int:
        return len(self._watch)

    @property
    def soonest(self) -> datetime | None:
        """When the next look is due."""
        return self._watch.soonest

    def take(self, unknowns: Outcomes, now: datetime) -> None:
        """Watch these, once their rows are written."""
        name = name_of(unknowns)
        kept = self._state.get(name)
        whole = merged(None if kept is None else decode_state(bytes(kept), Outcomes), unknowns)
        self._state.put(name, encode(whole))
        self._watch.put(name, indexes_of(whole), now)

    def heard(self, event: EngagementEvent, now: datetime) -> None:
        """An event passes by; where it is of a watched message, look soon."""
        self._watch.heard(event, PAGE_SIZE, now)

    def look(self, now: datetime) -> list[Outcomes]:
        """Look after what is due; the outcomes to emit."""
        runs: dict[tuple[Tenant, RunId], dict[str, Outcomes]] = defaultdict(dict)
        for name in self._watch.due(now):
            page = decode_state(bytes(self._state.get(name)), Outcomes)
            runs[page.tenant, page.run][name] = page
        found: list[Outcomes] = []
        for (tenant, run), pages in runs.items():
            try:
                found += self._look_at_run(tenant, run, pages, now)
            except (Unavailable, MissingLedger) as error:
                # A ledger that is gone may be rebuilt: what is watched stays watched.
                log.warning("unknowns of run %s wait: %s", run, error)
                self._watch.postpone(pages, now + _PAUSE)
        return found

    def _look_at_run(
        self, tenant: Tenant, run: RunId, pages: Mapping[str, Outcomes], now: datetime
    ) -> list[Outcomes]:
        proofs: dict[str, dict[int, Proof]] = {}
        ended: dict[str, set[int]] = {}
        sends: dict[str, tuple[str, int]] = {}
        for name, page in pages.items():
            ref = _ref(page)
            indexes = indexes_of(page)
            try:
                entries = self._settler.entries(ref, _ordinals(page, indexes))
                ids = self._store.open_snapshot(page.snapshot).read_index(page.shard, page.page)
                own = {
                    send_id(tenant, run, page.leg, ids.recipient_ids[index]): (name, index)
                    for index, entry in zip(indexes, entries, strict=True)
                    if isinstance(entry.matter, Claim | Held)
                }
            except (Corrupt, MissingSnapshot, IndexError) as error:
                log.error("unknowns of page %r are left to a person: %s", name, error)
                ended[name] = set(indexes)
                continue
            proofs[name] = {
                index: Proof(Reason.LEDGER_ACCEPTED)
                for index, entry in zip(indexes, entries, strict=True)
                if entry.accepted
            }
            # What is neither accepted nor open was settled by hand, to be sent again.
            ended[name] = set(indexes) - {index for _, index in own.values()}
            sends.update({str(send): place for send, place in own.items()})
        self._prove(tenant, run, pages, sends, proofs)
        outcomes = []
        for name, page in pages.items():
            told = proofs.get(name, {})
            if told:
                outcomes.append(accepted(page, told, now))
            self._keep(name, page, ended[name] | set(told), now)
        return outcomes

    def _prove(
        self,
        tenant: Tenant,
        run: RunId,
        pages: Mapping[str, Outcomes],
        sends: Mapping[str, tuple[str, int]],
        proofs: Mapping[str, dict[int, Proof]],
    ) -> None:
        """Ask the events about what is open, and let the ledger know first."""
        if not sends:
            return
        places = {
            send: (pages[name].shard, pages[name].page * PAGE_SIZE + index)
            for send, (name, index) in sends.items()
        }
        proven: dict[str, dict[int, Proof]] = defaultdict(dict)
        for send, proof in self._settler.proofs(tenant, run, places).items():
            name, index = sends[send]
            proven[name][index] = proof
        for name, found in proven.items():
            page = pages[name]
            try:
                entries = self._settler.reconcile(_ref(page), _ordinals(page, found))
            except (Unavailable, MissingLedger) as error:
                log.warning("unknowns of run %s wait: %s", run, error)
                continue
            for (index, proof), entry in zip(found.items(), entries, strict=True):
                if entry.accepted:
                    proofs[name][index] = proof

    def _keep(self, name: str, page: Outcomes, gone: set[int], now: datetime) -> None:
        left = without(page, gone)
        if left is None or left.at + self._patience <= now:
            self._state.remove(name)
            self._watch.drop(name)
            return
        if gone:
            self._state.put(name, encode(left))
        self._watch.looked(name, indexes_of(left), now)


def _ref(page: Outcomes) -> LedgerRef:
    return LedgerRef(page.tenant, page.run, LegId(page.leg), page.shard)


def _ordinals(page: Outcomes, indexes: Mapping[int, Proof] | Sequence[int]) -> list[int]:
    return [page.page * PAGE_SIZE + index for index in indexes]
