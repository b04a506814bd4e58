"""What delivery reads of the store: definitions of legs, and people by page."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from schemas.codec import decode
from schemas.errors import Corrupt, FanfareError, InvalidTemplate, MissingSnapshot
from schemas.ids import RecipientId
from schemas.message import Message
from schemas.pages import PAGE_SIZE
from schemas.reasons import Reason
from schemas.records import CampaignSpec, Send
from schemas.snapshot import PageBody, PageIndex
from transforms.decide import leg_of
from transforms.ledger import RecipientKey, recipient_key
from transforms.personalise import LegContext, leg_context, message_to

log = logging.getLogger(__name__)

OPEN_SNAPSHOTS = 16
"""Snapshots kept open: a manifest of ten million recipients takes a second to read and check."""
NO_RECIPIENT = RecipientKey(bytes(8))
_NO_ROUTE = "the leg's routes name no account of this deployment"


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
        """A snapshot. Raises ``MissingSnapshot``, ``Corrupt``."""


@dataclass(slots=True)
class Rendered:
    """Parallel to the indexes asked for: messages, and what opt-outs call their recipients."""

    messages: list[Message | None] = field(default_factory=list)
    keys: list[RecipientKey] = field(default_factory=list)
    failed: dict[int, tuple[Reason, str]] = field(default_factory=dict)
    """By index: who can't be written to, and why."""


class Reader:
    """Reads definitions and pages; keeps snapshots open. Belongs to one thread."""

    def __init__(self, store: Store, receiver: str, unsubscribe_secret: bytes) -> None:
        self._store = store
        self._receiver = receiver
        self._secret = unsubscribe_secret
        self._snapshots: OrderedDict[str, Pages] = OrderedDict()

    def leg(self, send: Send) -> LegContext | tuple[Reason, str]:
        """What all messages of a send's leg share, or why none of them can be sent."""
        try:
            spec = decode(self._store.get_object("spec", send.spec), CampaignSpec)
            return leg_context(spec, leg_of(spec, send.leg), self._receiver, self._secret)
        except InvalidTemplate as error:
            log.error("run %s: its template can't be used: %s", send.run, error)
            return Reason.RENDERING_FAILED, str(error)
        except (FanfareError, OSError) as error:
            log.error("run %s: its definition can't be read: %s", send.run, error)
            return Reason.NO_ROUTE, str(error)

    def beyond(self, send: Send, indexes: Sequence[int]) -> dict[int, tuple[Reason, str]]:
        """Those of the indexes that the page does not have; none where it can't be read."""
        page = self._index(send)
        if isinstance(page, tuple) or max(indexes) < len(page.recipient_ids):
            return {}
        count = len(page.recipient_ids)
        return {index: _beyond(send, index, count) for index in indexes if index >= count}

    def recipients(self, send: Send, indexes: Sequence[int]) -> Rendered:
        """The recipients' keys, no message yet. None is ``beyond``."""
        rendered = Rendered([None] * len(indexes))
        page = self._index(send)
        if isinstance(page, tuple):
            rendered.keys = [NO_RECIPIENT] * len(indexes)
            rendered.failed = dict.fromkeys(indexes, page)
            return rendered
        ids = page.recipient_ids
        rendered.keys = [recipient_key(send.tenant, ids[index]) for index in indexes]
        return rendered

    def render(
        self,
        send: Send,
        context: LegContext,
        indexes: Sequence[int],
        rendered: Rendered,
        since: int,
    ) -> None:
        """Messages to these recipients, the positions of ``rendered`` from ``since`` on."""
        try:
            snapshot = self._snapshot(send.snapshot)
            ids = snapshot.read_index(send.shard, send.page).recipient_ids
            body = snapshot.read_body(send.shard, send.page)
        except (FanfareError, OSError) as error:
            rendered.failed.update(dict.fromkeys(indexes, _unreadable(error)))
            return
        base, failed = send.page * PAGE_SIZE, rendered.failed
        for position, index in enumerate(indexes, since):
            reference = f"{send.shard}.{base + index}.{send.generation}"
            recipient = RecipientId(ids[index])
            try:
                # The thread's own time: a starved machine must not fail anybody's message.
                rendered.messages[position] = message_to(
                    context, recipient, body, index, reference, time.thread_time
                )
            except FanfareError as error:
                failed[index] = (Reason.RENDERING_FAILED, str(error))

    def recipient(self, send: Send, index: int) -> str:
        """Who that is; empty, and said in the log, where the page can't be read."""
        page = self._index(send)
        if isinstance(page, tuple):
            log.error("an address of run %s can't be suppressed: %s", send.run, page[1])
            return ""
        return page.recipient_ids[index]

    def _index(self, send: Send) -> PageIndex | tuple[Reason, str]:
        try:
            return self._snapshot(send.snapshot).read_index(send.shard, send.page)
        except (FanfareError, OSError) as error:
            return _unreadable(error)

    def _snapshot(self, name: str) -> Pages:
        snapshot = self._snapshots.get(name)
        if snapshot is None:
            snapshot = self._snapshots[name] = self._store.open_snapshot(name)
            if len(self._snapshots) > OPEN_SNAPSHOTS:
                self._snapshots.popitem(last=False)
        else:
            self._snapshots.move_to_end(name)
        return snapshot


def no_route() -> tuple[Reason, str]:
    """Why a message can't be sent whose route is no account of this deployment."""
    return Reason.NO_ROUTE, _NO_ROUTE


def _unreadable(error: Exception) -> tuple[Reason, str]:
    missing = isinstance(error, MissingSnapshot) or not isinstance(error, Corrupt)
    return Reason.MISSING_SNAPSHOT if missing else Reason.CORRUPT_PAGE, str(error)


def _beyond(send: Send, index: int, count: int) -> tuple[Reason, str]:
    return (
        Reason.CORRUPT_PAGE,
        f"page {send.page} of shard {send.shard} has {count} recipients and none at {index}: the "
        "order was made for another snapshot",
    )
