"""Names of things, and how derived ones are derived.

Everything below the gateway is derived: a replay makes the same identifiers again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from hashlib import sha1
from typing import NewType

Tenant = NewType("Tenant", str)
"""A customer; whatever belongs to one is never seen by another."""
RunId = NewType("RunId", str)
"""One launch of a campaign, unique within its tenant."""
LegId = NewType("LegId", str)
"""A run on one channel; named by its channel."""
RecipientId = NewType("RecipientId", str)
"""The tenant's own identifier of a person."""
SnapshotId = NewType("SnapshotId", str)
"""32 hex digits: the content of an audience snapshot."""
ObjectId = NewType("ObjectId", str)
"""64 hex digits: the SHA-256 of a stored object."""
SendId = NewType("SendId", str)
"""The identity of one message to one person; travels in the provider's own field."""

_NAMESPACE = uuid.UUID("5fd6a0f0-8f6c-5c60-9f0e-2b1d7c3a4e11").bytes
_SEPARATOR = "\x1f"
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def derive(kind: str, parts: Iterable[str | int]) -> str:
    """A UUIDv5 of ``kind`` and ``parts``: the same for the same parts, for ever."""
    name = _SEPARATOR.join([kind, *map(str, parts)])
    digest = sha1(_NAMESPACE + name.encode(), usedforsecurity=False).hexdigest()
    # RFC 9562, 5.5: the version in the 13th digit, the variant in the two first bits of the 17th.
    variant = _VARIANT[digest[16]]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"


def send_id(tenant: str, run: str, leg: str, recipient: str) -> SendId:
    """The identity of the message that a leg owes a recipient.

    It has no generation: whatever is decided again is still the same message.
    """
    return SendId(derive("send", (tenant, run, leg, recipient)))


def run_key(tenant: str, run: str) -> str:
    """The Flink key of a run in coordinate, and its name in Redis."""
    return f"{tenant}/{run}"
