"""The send ledger for everybody but delivery: made at launch, looked at, reconciled, dropped.

Blocking calls, for Flink threads and the command line. All of them may be repeated, and raise
``Unavailable`` where Redis does not answer in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from schemas.codec import from_millis
from schemas.errors import Corrupt, MissingLedger
from schemas.ids import LegId, RunId, Tenant
from schemas.pages import SHARDS, delivery_key
from schemas.reasons import Lane
from sinks import ledger_layout as layout
from sinks.ledger import refused_or
from sinks.redis_client import Client, Script, command, unavailable
from transforms import ledger as rules
from transforms.ledger import (
    BIT,
    NOTHING,
    Claim,
    Closed,
    Entry,
    Held,
    LedgerRef,
    LedgerView,
    Matter,
    RecipientKey,
)


def create(
    client: Client, tenant: Tenant, run: RunId, leg: LegId, counts: Sequence[int], dataset: str
) -> None:
    """Make the ledgers of a leg, one for each of the 256 ``counts``; never clears or shortens one.

    ``dataset`` names this making: derive it, so that a replay creates the same. Raises
    ``Corrupt`` where one exists as another, or is damaged.
    """
    if len(counts) != SHARDS:
        raise ValueError(f"a leg has {SHARDS} ledgers, not {len(counts)}")
    refs = [LedgerRef(tenant, run, leg, shard) for shard in range(SHARDS)]
    calls: list[tuple[tuple[str, ...], list[Any]]] = []
    for ref, count in zip(refs, counts, strict=True):
        keys = layout.ledger_keys(ref)
        calls.append(((keys.meta, keys.bits), [dataset, count]))
    with unavailable(f"create the ledgers of {tenant}/{run}/{leg}"):
        answers = layout.CREATE.run_many(client, calls)
    for ref, count, answer in zip(refs, counts, answers, strict=True):
        if answer == [b"damaged"]:
            raise Corrupt(
                f"{layout.ledger_keys(ref).meta} and its bitmap are not both there: Redis lost "
                "a part; drop this ledger and rebuild it from the outcomes"
            )
        if answer != [dataset.encode(), count]:
            raise Corrupt(rules.differs(ref, answer[0].decode(), answer[1], dataset, count))


def drop(client: Client, tenant: Tenant, run: RunId, leg: LegId) -> None:
    """Forget the ledgers of a leg, at the end of their retention."""
    with unavailable(f"drop the ledgers of {tenant}/{run}/{leg}"):
        pipe = client.pipeline(transaction=False)
        for shard in range(SHARDS):
            keys = layout.ledger_keys(LedgerRef(tenant, run, leg, shard))
            pipe.unlink(keys.meta, keys.open, keys.bits)
        pipe.execute()


def view(client: Client, ref: LedgerRef) -> LedgerView:
    """A ledger's counts. Raises ``MissingLedger``."""
    return _views(client, [ref])[0]


def counts(client: Client, tenant: Tenant, run: RunId, leg: LegId) -> LedgerView:
    """The counts of a whole leg; ``seq`` is the sum. Raises ``MissingLedger``."""
    refs = [LedgerRef(tenant, run, leg, shard) for shard in range(SHARDS)]
    views = _views(client, refs)
    return LedgerView(
        views[0].dataset,
        sum(each.seq for each in views),
        sum(each.count for each in views),
        sum(each.accepted for each in views),
        sum(each.claims for each in views),
        sum(each.held for each in views),
        sum(each.closed for each in views),
    )


def claims_of_owners(client: Client, tenant: Tenant, run: RunId, leg: LegId, lane: Lane) -> int:
    """Claims of a leg by the newest owners of a lane's keys, those in doubt left out.

    Raises ``MissingLedger``, ``Unavailable``.
    """
    refs = [LedgerRef(tenant, run, leg, shard) for shard in range(SHARDS)]
    found = 0
    for ref, one in zip(refs, _views(client, refs), strict=True):
        if not one.claims:
            continue
        owner = layout.epoch_key(lane, delivery_key(ref.shard))
        with unavailable(f"read {owner}"):
            epoch = int(command(client, "GET", owner) or 0)
        found += sum(
            isinstance(matter, Claim) and matter.epoch == epoch and not matter.doubt
            for matter in list_open(client, ref).values()
        )
    return found


def list_open(client: Client, ref: LedgerRef) -> Mapping[int, Matter]:
    """The open matters by ordinal. Raises ``MissingLedger``, ``Corrupt``."""
    keys = layout.ledger_keys(ref)
    with unavailable(f"list {keys.open}"):
        found: dict[bytes, bytes] = command(client, "HGETALL", keys.open)
        exists = client.exists(keys.meta)
    if not exists:
        raise MissingLedger(rules.absent(ref))
    return {
        layout.ordinal_from(at): layout.matter_from(matter) for at, matter in sorted(found.items())
    }


def entries(client: Client, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
    """What stands of these ordinals; nothing is changed. Raises ``MissingLedger``, ``Corrupt``."""
    keys = layout.ledger_keys(ref)
    gets = [word for ordinal in ordinals for word in ("GET", "u1", ordinal)]
    with unavailable(f"look at the ledger {keys.meta}"):
        pipe = client.pipeline(transaction=True)
        queue: Any = pipe.execute_command
        queue("HGET", keys.meta, "count")
        queue("STRLEN", keys.bits)
        if ordinals:
            queue("BITFIELD_RO", keys.bits, *gets)
            queue("HMGET", keys.open, *map(layout.ordinal_bytes, ordinals))
        count, length, *found = pipe.execute()
    if count is None or length * 8 < int(count):
        raise MissingLedger(rules.absent(ref))
    for ordinal in ordinals:
        if ordinal >= int(count):
            raise Corrupt(rules.beyond(ordinal, int(count)))
    bits, matters = found or ((), ())
    return tuple(
        BIT if bit else NOTHING if matter is None else Entry(matter=layout.matter_from(matter))
        for bit, matter in zip(bits, matters, strict=True)
    )


def accepted_ordinals(client: Client, ref: LedgerRef) -> list[int]:
    """The ordinals whose bit is set, ascending. Raises ``MissingLedger``."""
    keys = layout.ledger_keys(ref)
    with unavailable(f"read {keys.bits}"):
        bits: bytes = command(client, "GET", keys.bits) or b""
        exists = client.exists(keys.meta)
    if not exists:
        raise MissingLedger(rules.absent(ref))
    return layout.ordinals_of(bits)


def reconcile(client: Client, ref: LedgerRef, ordinals: Sequence[int]) -> tuple[Entry, ...]:
    """Webhooks tell of these messages: claims and unknowns become accepted. Answers what stands.

    Raises ``MissingLedger``, ``Corrupt``.
    """
    answer = _run(client, layout.RECONCILE, ref, [layout.ordinal_bytes(each) for each in ordinals])
    return tuple(map(_entry, answer[2:]))


def settle_by_hand(
    client: Client, ref: LedgerRef, ordinal: int, held: Held, accepted: bool
) -> bool:
    """Settle an unknown as ``list_open`` showed it; false when something else stands there now.

    ``accepted`` false lets it be sent again; order it afterwards. Raises ``MissingLedger``,
    ``Corrupt``. A repeat answers false: read the ledger to see which it was.
    """
    word = "accepted" if accepted else "resend"
    arguments = [layout.ordinal_bytes(ordinal), word, layout.held_bytes(held)]
    answer = _run(client, layout.SETTLE_BY_HAND, ref, arguments)
    return bool(answer[2])


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A ledger that was written anew."""

    seq: int
    epoch: int
    """Of its delivery key."""
    accepted: int
    open: int


def rebuild(
    client: Client,
    ref: LedgerRef,
    lane: Lane,
    dataset: str,
    count: int,
    accepted: bytes,
    matters: Mapping[int, Held | Closed],
    by: str,
    raise_epoch: bool | None,
) -> Rebuilt:
    """Write a ledger anew; ``sinks.ledger_rebuild`` has the rules, and nobody else may call this.

    ``accepted`` is a bitmap as Redis has them (ordinal 0 is the first byte's highest bit), at full
    length. Accepted bits that are still there stay. ``raise_epoch``: True always, False where no
    rebuild raised it yet, None not. Raises ``Corrupt`` where another ledger stands there.
    """
    if len(accepted) != (count + 7) // 8:
        raise ValueError(f"{len(accepted)} bytes are no bitmap of {count} recipients")
    keys = layout.ledger_keys(ref)
    raising = "" if raise_epoch is None else str(int(raise_epoch))
    arguments: list[Any] = [dataset, count, accepted, by, raising]
    for ordinal, matter in matters.items():
        arguments += [layout.ordinal_bytes(ordinal), layout.matter_bytes(matter)]
    names = (keys.meta, keys.bits, keys.open, keys.epoch(lane), f"{keys.bits}:new")
    with unavailable(f"rebuild the ledger {keys.meta}"):
        answer = layout.REBUILD.run(client, names, arguments)
    if answer[0] == b"differs":
        raise Corrupt(rules.differs(ref, answer[1].decode(), answer[2], dataset, count))
    return Rebuilt(*answer[1:])


def last_rebuilt(client: Client, ref: LedgerRef) -> tuple[datetime, str] | None:
    """When and by whom a ledger was rebuilt last; None: never."""
    keys = layout.ledger_keys(ref)
    with unavailable(f"look at the ledger {keys.meta}"):
        at_ms, by = command(client, "HMGET", keys.meta, "rebuilt_ms", "rebuilt_by")
    return None if at_ms is None else (from_millis(int(at_ms)), by.decode())


def opt_out(client: Client, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None:
    """Stop sends to a recipient that are decided already; remembered for twenty minutes.

    ``shard`` is the recipient's. ``scopes`` are what was withdrawn (``transforms.ledger.scope``);
    an erasure withdraws ``*/*``. Call it before the withdrawal is taken as done.
    """
    key = layout.opt_outs_key(delivery_key(shard))
    members = [layout.opt_out_member(recipient, each) for each in scopes]
    with unavailable("remember an opt-out"):
        layout.OPT_OUT.run(client, (key,), members)


def opt_in(client: Client, shard: int, recipient: RecipientKey, scopes: Iterable[str]) -> None:
    """Forget opt-outs of exactly these scopes: the person has granted them anew."""
    key = layout.opt_outs_key(delivery_key(shard))
    with unavailable("forget an opt-out"):
        client.zrem(key, *[layout.opt_out_member(recipient, each) for each in scopes])


def _views(client: Client, refs: Sequence[LedgerRef]) -> list[LedgerView]:
    calls: list[tuple[tuple[str, ...], list[Any]]] = []
    for ref in refs:
        keys = layout.ledger_keys(ref)
        calls.append(((keys.meta, keys.bits, keys.open), []))
    with unavailable(f"count {calls[0][0][0]}"):
        answers = layout.VIEW.run_many(client, calls)
    views = []
    for ref, answer in zip(refs, answers, strict=True):
        _, dataset, *numbers = refused_or(answer, ref, None, None)
        views.append(LedgerView(dataset.decode(), *numbers))
    return views


def _run(client: Client, script: Script, ref: LedgerRef, arguments: list[Any]) -> Any:
    keys = layout.ledger_keys(ref)
    with unavailable(f"write the ledger {keys.meta}"):
        answer = script.run(client, (keys.meta, keys.bits, keys.open), ["", "", "", *arguments])
    return refused_or(answer, ref, None, None)


def _entry(answer: Any) -> Entry:
    if isinstance(answer, bytes):
        return Entry(matter=layout.matter_from(answer))
    return BIT if answer else NOTHING
