"""How ledgers lie in Redis: keys, bytes of matters, asks and settlements, the scripts.

All keys of a delivery key ``k`` share the hash tag ``{fdK}``, so that each script's keys are in
one slot of a Redis Cluster::

    fanfare:{fdK}:epoch:LANE                          integer
    fanfare:{fdK}:epoch:LANE:holder                   the loop that has it (sinks.handover)
    fanfare:life:LOOP                                 there for as long as that loop lives
    fanfare:{fdK}:ledger:TENANT/RUN/LEG/SHARD:meta    hash: dataset, seq, count
    fanfare:{fdK}:ledger:TENANT/RUN/LEG/SHARD:bits    bitmap, bit = ordinal, at full length
    fanfare:{fdK}:ledger:TENANT/RUN/LEG/SHARD:open    hash: ordinal (4 bytes) -> matter
    fanfare:{fdK}:run:TENANT/RUN                      hash: version, status, ... (sinks.runs)
    fanfare:{fdK}:optouts                             sorted set: recipient key + scope, by time

Names are percent-encoded, so that no tenant can name another's key. The bytes of a matter are
described in ``redis_scripts/ledger.lua``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from schemas.errors import Corrupt
from schemas.pages import delivery_key
from schemas.reasons import Lane, Outcome, Reason
from sinks.redis_client import script
from transforms.ledger import (
    OPT_OUT_MEMORY_MS,
    Action,
    Ask,
    Claim,
    Closed,
    Held,
    LedgerRef,
    Matter,
    RecipientKey,
    Settlement,
)

CLAIM = script("ledger", "claim", OPT_OUT_MEMORY_MS=OPT_OUT_MEMORY_MS)
SETTLE = script("ledger", "settle")
RECONCILE = script("ledger", "reconcile")
SETTLE_BY_HAND = script("ledger", "settle_by_hand")
CREATE = script("create")
VIEW = script("view")
REBUILD = script("rebuild")
OPT_OUT = script("opt_out", OPT_OUT_MEMORY_MS=OPT_OUT_MEMORY_MS)

_HEAD = struct.Struct(">cIIHBQ")
_ASK = struct.Struct(">IIHQQ8s")
_SETTLEMENT = struct.Struct(">IIHc")
_EPOCH = struct.Struct(">I")
_ACTION = {
    Action.ACCEPT: b"a",
    Action.RELEASE: b"r",
    Action.DOUBT: b"d",
    Action.HOLD: b"h",
    Action.CLOSE: b"x",
}
_HELD = {0: Reason.NO_ANSWER, 1: Reason.CLAIM_IN_DOUBT}


@dataclass(frozen=True, slots=True)
class LedgerKeys:
    """The keys of one ledger and of what its scripts look at beside it."""

    meta: str
    bits: str
    open: str
    run: str
    opt_outs: str

    def epoch(self, lane: Lane) -> str:
        """The key of the epoch, in the same slot."""
        return self.opt_outs.removesuffix("optouts") + f"epoch:{lane.value}"


def tag(key: int) -> str:
    """The beginning of all keys of a delivery key."""
    return f"fanfare:{{fd{key}}}:"


def run_name(tenant: str, run: str) -> str:
    """A run's name inside keys."""
    return f"{quote(tenant, safe='')}/{quote(run, safe='')}"


def epoch_key(lane: Lane, key: int) -> str:
    """The key of the epoch of a delivery key."""
    return f"{tag(key)}epoch:{lane.value}"


def holder_key(lane: Lane, key: int) -> str:
    """Which loop has a delivery key: the name that it gave itself (``sinks.handover``)."""
    return f"{epoch_key(lane, key)}:holder"


def life_key(loop: str) -> str:
    """There for as long as a loop says that it lives."""
    return f"fanfare:life:{loop}"


def ordinals_of(bits: bytes, first_byte: int = 0) -> list[int]:
    """The ordinals whose bit is set, ascending, in a ledger's bits from a byte on."""
    return [
        byte_at * 8 + bit
        for byte_at, byte in enumerate(bits, first_byte)
        if byte
        for bit in range(8)
        if byte << bit & 128
    ]


def opt_outs_key(key: int) -> str:
    """The key of a delivery key's memory of opt-outs."""
    return f"{tag(key)}optouts"


@lru_cache(maxsize=4096)
def ledger_keys(ref: LedgerRef) -> LedgerKeys:
    """The keys of a ledger."""
    start = tag(delivery_key(ref.shard))
    run = run_name(ref.tenant, ref.run)
    name = f"{start}ledger:{run}/{quote(ref.leg, safe='')}/{ref.shard}:"
    return LedgerKeys(
        f"{name}meta", f"{name}bits", f"{name}open", f"{start}run:{run}", f"{start}optouts"
    )


def epoch_bytes(epoch: int) -> bytes:
    """An epoch as scripts compare it."""
    return _EPOCH.pack(epoch)


def ordinal_bytes(ordinal: int) -> bytes:
    """An ordinal as the field of a matter."""
    return _EPOCH.pack(ordinal)


def ordinal_from(data: bytes) -> int:
    """The ordinal of a field."""
    ordinal: int = _EPOCH.unpack(data)[0]
    return ordinal


def ask_bytes(ask: Ask) -> bytes:
    """An ask as the claim script reads it."""
    return (
        _ASK.pack(
            ask.ordinal,
            ask.generation,
            ask.attempt,
            ask.deadline_ms,
            ask.valid_until_ms,
            ask.recipient,
        )
        + ask.provider.encode()
    )


def settlement_bytes(each: Settlement) -> bytes:
    """A settlement as the settle script reads it."""
    head = _SETTLEMENT.pack(each.ordinal, each.generation, each.attempt, _ACTION[each.action])
    if each.action is Action.CLOSE:
        return head + f"{each.outcome.value}/{each.reason.value}".encode()
    return head


def held_bytes(held: Held) -> bytes:
    """A held matter as it lies in Redis."""
    flag = int(held.reason is Reason.CLAIM_IN_DOUBT)
    head = _HEAD.pack(b"h", held.epoch, held.generation, held.attempt, flag, held.at_ms)
    return head + held.provider.encode()


def matter_bytes(matter: Held | Closed) -> bytes:
    """A matter that a rebuild writes, as it lies in Redis; claims are never written so."""
    if isinstance(matter, Held):
        return held_bytes(matter)
    head = _HEAD.pack(b"x", matter.epoch, matter.generation, matter.attempt, 0, matter.at_ms)
    return head + f"{matter.outcome.value}/{matter.reason.value}".encode()


def matter_from(data: bytes) -> Matter:
    """The matter of these bytes. Raises ``Corrupt``."""
    try:
        kind, epoch, generation, attempt, flag, at_ms = _HEAD.unpack_from(data)
        text = data[_HEAD.size :].decode()
        if kind == b"c":
            return Claim(epoch, generation, attempt, text, at_ms, bool(flag))
        if kind == b"h":
            return Held(epoch, generation, attempt, text, at_ms, _HELD[flag])
        if kind == b"x":
            outcome, reason = text.split("/")
            return Closed(epoch, generation, attempt, Outcome(outcome), Reason(reason), at_ms)
    except (struct.error, ValueError, KeyError) as error:
        raise Corrupt(f"a matter of the ledger is not readable: {data!r}: {error}") from error
    raise Corrupt(f"a matter of the ledger is of no known kind: {data!r}")


def opt_out_member(recipient: RecipientKey, scope: str) -> bytes:
    """A member of the memory of opt-outs."""
    return recipient + scope.encode()
