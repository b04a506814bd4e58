"""The send ledger for delivery: claim before a request leaves, settle after.

``transforms.ledger`` has the rules; here they run as Lua scripts, each atomic, on Redis's clock.
The calls of one ledger run one after the other (``sinks.ledger_desk``), since each names the
sequence number it has seen: that is how a lost answer's late twin is told apart. Different ledgers
are independent.

A call that raises ``Unavailable`` may have been carried out; repeat it as it is, however often.
All other errors are final for the process (``Fenced``) or the ledger (``MissingLedger``,
``LedgerRolledBack``, ``Corrupt``), and have changed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from schemas.errors import Corrupt, Fenced, LedgerRolledBack, MissingLedger
from schemas.pages import delivery_key
from schemas.reasons import Lane, RunStatus
from sinks import ledger_layout as layout
from sinks.redis_client import AsyncClient, Script, command_async, unavailable
from transforms import ledger as rules
from transforms.ledger import (
    Ask,
    Claim,
    Claims,
    Closed,
    LedgerRef,
    Moved,
    Owner,
    Seen,
    Settled,
    SettledKind,
    Settlement,
    Settlements,
    Verdict,
    VerdictKind,
)

_VERDICTS = (
    rules.NOT_RUNNING,
    rules.CLAIMED,
    rules.REPEATED,
    rules.ACCEPTED,
    rules.STALE,
    rules.NOT_RUNNING,
)
_ANSWERS = (rules.DONE, rules.DONE, rules.SETTLED_ACCEPTED, rules.SETTLED_NOTHING)
_STATUS = {status.value.encode(): status for status in RunStatus}


async def acquire_epoch(client: AsyncClient, lane: Lane, key: int) -> int:
    """Take a delivery key over: the next epoch; every earlier one is fenced from now on.

    Call it at a key's first touch after ``open``, never keep it in Flink's state: two crashes
    would use it twice. Repeating it after ``Unavailable`` skips an epoch, which does no harm.
    """
    with unavailable(f"take over delivery key {key}"):
        epoch: int = await command_async(client, "INCR", layout.epoch_key(lane, key))
    return epoch


async def look(client: AsyncClient, ref: LedgerRef) -> Seen:
    """How far a ledger is, for a writer whose state has seen nothing of it yet.

    Raises ``MissingLedger``, ``Unavailable``.
    """
    keys = layout.ledger_keys(ref)
    with unavailable(f"look at the ledger {keys.meta}"):
        dataset, seq = await command_async(client, "HMGET", keys.meta, "dataset", "seq")
    if dataset is None or seq is None:
        raise MissingLedger(rules.absent(ref))
    return Seen(dataset.decode(), int(seq))


async def accepted(client: AsyncClient, ref: LedgerRef, ordinals: Sequence[int]) -> Set[int]:
    """Which of these recipients have the message, as ``LedgerModel.accepted``.

    Reads the bits from the lowest ordinal to the highest. Raises ``Unavailable``; a ledger that is
    not there has no bits, and the next claim tells.
    """
    keys = layout.ledger_keys(ref)
    first, last = min(ordinals) // 8, max(ordinals) // 8
    with unavailable(f"read the ledger {keys.bits}"):
        bits: bytes = await command_async(client, "GETRANGE", keys.bits, first, last)
    return set(ordinals).intersection(layout.ordinals_of(bits, first))


async def claim(
    client: AsyncClient,
    ref: LedgerRef,
    owner: Owner,
    seen: Seen,
    scopes: Sequence[str],
    asks: Sequence[Ask],
) -> Claims | Moved:
    """One claim at exactly the sequence seen, as ``LedgerModel.claim``."""
    keys = layout.ledger_keys(ref)
    arguments: list[Any] = [owner.lane.value, "\n".join(scopes)]
    arguments += map(layout.ask_bytes, asks)
    answer = await _run(
        client, layout.CLAIM, ref, owner, seen, (keys.run, keys.opt_outs), arguments
    )
    if isinstance(answer, Moved):
        return answer
    verdicts = [
        _VERDICTS[each] if type(each) is int else _standing(each)  # one of the two hot loops
        for each in answer[4:]
    ]
    return Claims(answer[1], answer[2], _STATUS.get(answer[3]), tuple(verdicts))


async def settle(
    client: AsyncClient,
    ref: LedgerRef,
    owner: Owner,
    seen: Seen,
    settlements: Sequence[Settlement],
) -> Settlements | Moved:
    """One settle at exactly the sequence seen, as ``LedgerModel.settle``."""
    arguments: list[Any] = [layout.settlement_bytes(each) for each in settlements]
    answer = await _run(client, layout.SETTLE, ref, owner, seen, (), arguments)
    if isinstance(answer, Moved):
        return answer
    answers = [
        _ANSWERS[each]
        if type(each) is int
        else Settled(SettledKind.STANDS, layout.matter_from(each))
        for each in answer[3:]
    ]
    return Settlements(answer[1], answer[2], tuple(answers))


def _standing(data: bytes) -> Verdict:
    matter = layout.matter_from(data)
    if isinstance(matter, Claim):
        return Verdict(VerdictKind.WAIT, matter)
    kind = VerdictKind.CLOSED if isinstance(matter, Closed) else VerdictKind.HELD
    return Verdict(kind, matter)


async def _run(
    client: AsyncClient,
    script: Script,
    ref: LedgerRef,
    owner: Owner,
    seen: Seen,
    more_keys: tuple[str, ...],
    arguments: list[Any],
) -> Any:
    rules.own_key(ref, owner)
    keys = layout.ledger_keys(ref)
    with unavailable(f"write the ledger {keys.meta}"):
        answer = await script.run_async(
            client,
            (keys.meta, keys.bits, keys.open, keys.epoch(owner.lane), *more_keys),
            [seen.dataset, seen.seq, layout.epoch_bytes(owner.epoch), *arguments],
        )
    return refused_or(answer, ref, owner, seen)


def refused_or(answer: Any, ref: LedgerRef, owner: Owner | None, seen: Seen | None) -> Any:
    """The answer of a ledger's script, ``Moved``, or the error of a call refused whole."""
    match answer:
        case [b"ok", *_]:
            return answer
        case [b"moved", seq]:
            return Moved(seq)
        case [b"missing"]:
            raise MissingLedger(rules.absent(ref))
        case [b"outside", ordinal, count]:
            raise Corrupt(rules.beyond(ordinal, count))
        case [b"rolled back", dataset, seq] if seen:
            raise LedgerRolledBack(rules.rolled_back(ref, dataset.decode(), seq, seen))
        case [b"epoch lost", epoch] if owner:
            raise LedgerRolledBack(rules.fenced(owner, epoch))
        case [b"fenced", epoch] if owner:
            raise Fenced(rules.fenced(owner, epoch))
    raise Corrupt(f"key {delivery_key(ref.shard)}: a ledger's script answered {answer!r}")
