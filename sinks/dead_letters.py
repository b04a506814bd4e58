"""Dead letters: reading their topic, and what replaying or discarding one means.

The topic is the truth: ClickHouse has only an index, the bytes are here. What was done with a
letter is remembered in the same topic, as the letter again with attributes ``handled``, ``by``,
``note``, ``handled_at`` and ``command_id``: whoever reads the topic knows it, and the index counts
the letter once. A letter that comes again after it was handled is open again.

A letter of recipients (leg, shard, page, ordinals) is replayed as an order under a new generation:
decided, capped and claimed again, so that what was accepted meanwhile is not sent. A letter of a
record is replayed by writing the record to its topic again, where it can be read now: readers
fold, and do not count, so reading twice does no harm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import Any

from schemas import records
from schemas.codec import decode, encode, name_of
from schemas.errors import FanfareError, InvalidInput, MalformedRecord, Missing
from schemas.ids import LegId, RunId, Tenant, derive
from schemas.pages import PAGE_SIZE, bitmap_bytes, bitmap_from, indexes_of
from schemas.reasons import Reason
from schemas.records import Command, CommandKind, DeadLetter, RawWebhook, Reorder
from sinks import ledger_upkeep
from sinks.redis_client import Client as Redis
from transforms.ledger import LedgerRef
from transforms.routing import topic_of
from transforms.webhooks import SENDGRID, parse_sendgrid

HANDLED = "handled"
PAGES_A_COMMAND = 2_000
_EVENT_STEPS = ("ingest/event", "ingest/consent")
"""Steps whose originals are elements of a webhook's body."""


class State(Enum):
    """What was done with a letter."""

    OPEN = "open"
    REPLAYED = "replayed"
    DISCARDED = "discarded"


class NotReplayable(FanfareError):
    """A letter that can't be replayed now; the message says why."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter with its history."""

    letter: DeadLetter
    """As it came last; ``first_at`` and ``last_at`` are of all times that it came."""
    count: int
    """How often it came. A restart may repeat it."""
    state: State
    handled: tuple[Mapping[str, str], ...] = ()
    """What was done with it, in order: attributes as in the module's docstring."""

    @property
    def recipients(self) -> int:
        """How many recipients it is about."""
        return bitmap_from(self.letter.ordinals).bit_count()

    @property
    def is_of_recipients(self) -> bool:
        """Whether a replay is an order, rather than a record written again."""
        one = self.letter
        return bool(one.run and one.leg and one.shard >= 0 and one.page >= 0 and one.ordinals)

    def as_json(self, *, whole: bool = False) -> dict[str, Any]:
        """For programs; ``whole``: with original bytes and recipients."""
        one = self.letter
        told: dict[str, Any] = {
            "id": one.letter_id,
            "state": self.state.value,
            "reason": one.reason.value,
            "step": one.step,
            "tenant": one.tenant,
            "run": one.run,
            "leg": one.leg,
            "source": one.source,
            "detail": one.detail,
            "first_at": one.first_at.isoformat(),
            "last_at": one.last_at.isoformat(),
            "count": self.count,
            "recipients": self.recipients,
            "bytes": len(one.original),
        }
        if whole:
            told |= {
                "shard": one.shard,
                "page": one.page,
                "generation": one.generation,
                "ordinals": self.ordinals(),
                "attributes": dict(one.attributes),
                "record": name_of(one.original),
                "original": one.original.hex(),
                "handled": [dict(each) for each in self.handled],
            }
        return told

    def ordinals(self) -> list[int]:
        """The recipients, by ordinal of the shard."""
        if not self.is_of_recipients:
            return []
        first = self.letter.page * PAGE_SIZE
        return [first + index for index in indexes_of(bitmap_from(self.letter.ordinals))]


def read_letters(values: Iterable[bytes]) -> dict[str, Letter]:
    """The letters of a topic's values, by id, in the order in which each came first.

    A value that is no dead letter is left out: it can't have been written by a job.
    """
    found: dict[str, Letter] = {}
    for value in values:
        try:
            one = decode(value, DeadLetter)
        except MalformedRecord:
            continue
        found[one.letter_id] = _after(found.get(one.letter_id), one)
    return found


def _after(known: Letter | None, one: DeadLetter) -> Letter:
    mark = one.attributes.get(HANDLED)
    if mark is not None:
        bare = {k: v for k, v in one.attributes.items() if k not in _MARKS}
        plain = replace(one, attributes=bare)
        # The letter itself may have left the topic before its mark.
        base = known or Letter(plain, 1, State.OPEN)
        done = {name: one.attributes[name] for name in _MARKS if name in one.attributes}
        return replace(base, state=State(mark), handled=(*base.handled, done))
    if known is None:
        return Letter(one, 1, State.OPEN)
    first = min(known.letter.first_at, one.first_at)
    last = max(known.letter.last_at, one.last_at)
    reopened = not known.handled or one.last_at > _handled_at(known.handled[-1])
    return replace(
        known,
        letter=replace(one, first_at=first, last_at=last),
        count=known.count + 1,
        state=State.OPEN if reopened else known.state,
    )


_MARKS = (HANDLED, "by", "note", "handled_at", "command_id")


def _handled_at(mark: Mapping[str, str]) -> datetime:
    return datetime.fromisoformat(mark["handled_at"])


def marked(
    letter: Letter, state: State, by: str, note: str, now: datetime, command_id: str = ""
) -> DeadLetter:
    """The record that remembers what was done with a letter."""
    mark = {
        HANDLED: state.value,
        "by": by,
        "note": note,
        "handled_at": now.isoformat(),
        "command_id": command_id,
    }
    return replace(letter.letter, attributes={**letter.letter.attributes, **mark})


def find(letters: Mapping[str, Letter], wanted: Sequence[str]) -> list[Letter]:
    """The letters of these ids, or of unambiguous beginnings of ids.

    Raises:
        Missing: there is none, or more than one.
    """
    found = []
    for name in wanted:
        fits = [letters[name]] if name in letters else []
        if not fits and len(name) >= 4:
            fits = [one for key, one in letters.items() if key.startswith(name)]
        if len(fits) != 1:
            many = f"{len(fits)} dead letters begin with it" if fits else "there is none"
            raise Missing(f"dead letter {name!r}: {many}; see `fanfare dead-letters list`")
        found += fits
    return found


def select(
    letters: Iterable[Letter],
    *,
    tenant: str | None = None,
    run: str | None = None,
    reason: Reason | None = None,
    only_open: bool = False,
) -> list[Letter]:
    """Letters of a run, of a reason; oldest first.

    Letters whose record names nobody are of every tenant.
    """
    return sorted(
        (
            one
            for one in letters
            if (tenant is None or one.letter.tenant in ("", tenant))
            and (run is None or one.letter.run == run)
            and (reason is None or one.letter.reason is reason)
            and not (only_open and one.state is not State.OPEN)
        ),
        key=lambda one: (one.letter.first_at, one.letter.letter_id),
    )


def orders(letters: Sequence[Letter], by: str, note: str, now: datetime) -> list[Replay]:
    """The commands that order the recipients of letters again, by run.

    A command's id is derived from its letters and how often they were handled: two people who
    replay the same letters give one order.
    """
    runs: dict[tuple[str, str], dict[tuple[str, int, int], list[Letter]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for one in letters:
        place = one.letter.leg, one.letter.shard, one.letter.page
        runs[one.letter.tenant, one.letter.run][place].append(one)
    replays = []
    for (tenant, run), pages in sorted(runs.items()):
        places = sorted(pages)
        for begin in range(0, len(places), PAGES_A_COMMAND):
            some = places[begin : begin + PAGES_A_COMMAND]
            members = tuple(one for place in some for one in pages[place])
            parts = [f"{one.letter.letter_id}.{len(one.handled)}" for one in members]
            reasons = sorted({one.letter.reason.value for one in members})
            command = Command(
                command_id=derive("replay", (tenant, run, *sorted(parts))),
                tenant=Tenant(tenant),
                run=RunId(run),
                kind=CommandKind.REORDER,
                issued_at=now,
                issued_by=by,
                note=f"{len(members)} dead letters ({', '.join(reasons)}) replayed: {note}",
                reorders=tuple(_reorder(place, pages[place]) for place in some),
            )
            replays.append(Replay(command, members))
    return replays


@dataclass(frozen=True, slots=True)
class Replay:
    """An order and the letters that it answers."""

    command: Command
    letters: tuple[Letter, ...]


def _reorder(place: tuple[str, int, int], letters: Sequence[Letter]) -> Reorder:
    leg, shard, page = place
    bits = 0
    for one in letters:
        bits |= bitmap_from(one.letter.ordinals)
    return Reorder(LegId(leg), shard, page, bitmap_bytes(bits))


def check_ledgers(redis: Redis, command: Command) -> None:
    """Refuse an order whose ledger is gone.

    Raises:
        MissingLedger: nothing would be sent without it.
        Unavailable: Redis.
    """
    for leg, shard in sorted({(one.leg, one.shard) for one in command.reorders}):
        ledger_upkeep.view(redis, LedgerRef(command.tenant, command.run, leg, shard))


def record_again(letter: Letter, now: datetime) -> bytes:
    """The record to write again: the original, or a webhook of nothing but the original event.

    Raises:
        NotReplayable: it can't be read now either, or nothing that a topic takes is there.
    """
    one = letter.letter
    if not one.original:
        raise NotReplayable(f"dead letter {one.letter_id} holds no record and no recipients")
    if one.step in _EVENT_STEPS and name_of(one.original) is None:
        return _webhook_again(one, now)
    name = name_of(one.original)
    if name is None:
        raise NotReplayable(
            f"dead letter {one.letter_id}: its {len(one.original)} bytes are no record of a schema "
            "that is known here; deploy the schema of its writer, or discard it"
        )
    try:
        record: object = decode(one.original, getattr(records, name))
        topic_of(one.original)
        if isinstance(record, RawWebhook):
            _parsed(record)
    except (InvalidInput, AttributeError) as error:
        raise NotReplayable(
            f"dead letter {one.letter_id} would fail again: {error}; discard it, or deploy what "
            "reads it"
        ) from error
    return one.original


def _webhook_again(one: DeadLetter, now: datetime) -> bytes:
    """An event that was refused, in a body of its own; arrived when it first came."""
    raw = RawWebhook(
        webhook_id=derive("replayed-event", (one.letter_id, now.isoformat())),
        provider=SENDGRID,
        tenant=Tenant(one.tenant),
        received_at=one.first_at,
        headers={},
        body=b"[" + one.original + b"]",
    )
    try:
        _parsed(raw)
    except InvalidInput as error:
        raise NotReplayable(f"dead letter {one.letter_id} would fail again: {error}") from error
    return encode(raw)


def _parsed(raw: RawWebhook) -> None:
    bad = parse_sendgrid(raw).bad if raw.provider == SENDGRID else ()
    if bad:
        raise InvalidInput(f"event {bad[0].index}: {bad[0].why}")
