"""The send ledger for everybody but delivery: made at launch, looked at, reconciled, dropped.

Blocking calls, for Flink threads and the command line. All of them may be repeated, and raise
``Unavailable`` where Redis does not answer in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from schemas.errors import Corrupt, MissingLedger
from schemas.ids import LegId, RunId, Tenant
from schemas.pages import SHARDS, delivery_key
from sinks import ledger_layout as layout
from sinks.ledger import refused_or
from sinks.redis_client import Client, Script, command, unavailable
from transforms import ledger as rules
from transforms.ledger import BIT, NOTHING, Entry, Held, LedgerRef, LedgerView, Matter, RecipientKey


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


def accepted_ordinals(client: Client, ref: LedgerRef) -> list[int]:
    """The ordinals whose bit is set, ascending. Raises ``MissingLedger``."""
    keys = layout.ledger_keys(ref)
    with unavailable(f"read {keys.bits}"):
        bits: bytes = command(client, "GET", keys.bits) or b""
        exists = client.exists(keys.meta)
    if not exists:
        raise MissingLedger(rules.absent(ref))
    return [
        byte_at * 8 + bit
        for byte_at, byte in enumerate(bits)
        if byte
        for bit in range(8)
        if byte << bit & 128
    ]


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
