"""Tokens that stand for 'this person, this topic, this channel' in unsubscribe links.

A token is signed, not encrypted: whoever holds it can read the recipient id in it, and nobody
without the secret can make one. It holds no address. The URI alone must identify recipient and
list (RFC 8058, section 3.1), and short URLs survive header folding (DKIM covers the header), so
the signature is truncated to 128 bits (RFC 2104, section 5 allows half of the hash).
"""

from __future__ import annotations

import binascii
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass

from schemas.errors import InvalidInput
from schemas.profile import MAX_RECIPIENT_ID_BYTES

_VERSION, _WIDE = b"\x01", b"\x02"
"""Also how many bytes a field's length has: two are only needed for the longest recipient ids."""
_LONGEST_FIELD = MAX_RECIPIENT_ID_BYTES
_CONTEXT = b"fanfare-unsubscribe"
_MAC_BYTES = 16
_LONGEST_TOKEN = 2048
_SHORTEST_SECRET = 16


class InvalidToken(InvalidInput):
    """An unsubscribe token that this secret did not sign, or that is damaged."""


@dataclass(frozen=True, slots=True)
class Unsubscription:
    """What a token says. `topic` is empty for 'everything on this channel'."""

    tenant: str
    recipient_id: str
    topic: str
    channel: str


def require_long(secret: bytes) -> None:
    """Raise InvalidInput for a secret that can be guessed."""
    if len(secret) < _SHORTEST_SECRET:
        raise InvalidInput(
            f"the unsubscribe secret has {len(secret)} bytes: use at least {_SHORTEST_SECRET}"
        )


def make_token(secret: bytes, tenant: str, recipient_id: str, topic: str, channel: str) -> str:
    """Make the token; the same arguments always give the same one (about 3 µs).

    Raises:
        InvalidInput: the secret is shorter than 16 bytes, or a field longer than 256.
    """
    require_long(secret)
    fields = [field.encode() for field in (tenant, recipient_id, topic, channel)]
    longest = max(map(len, fields))
    if longest > _LONGEST_FIELD:
        raise InvalidInput(f"a field of an unsubscribe token is longer than {_LONGEST_FIELD} bytes")
    version = _VERSION if longest < 256 else _WIDE
    body = bytearray(version)
    for field in fields:
        body += len(field).to_bytes(version[0], "big")
        body += field
    return urlsafe_b64encode(body + _mac(secret, body)).rstrip(b"=").decode("ascii")


def read_token(secret: bytes, token: str) -> Unsubscription:
    """Verify and read a token, comparing in constant time.

    Raises:
        InvalidToken: the token is damaged, of an unknown version or signed by another secret.
    """
    if len(token) > _LONGEST_TOKEN or len(secret) < _SHORTEST_SECRET:
        raise InvalidToken("the unsubscribe token or its secret has an impossible length")
    try:
        raw = urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))
    except (UnicodeEncodeError, binascii.Error, ValueError):
        raise InvalidToken("the unsubscribe token is not base64url") from None
    body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
    if not hmac.compare_digest(_mac(secret, body), mac):
        raise InvalidToken("the unsubscribe token's signature does not match")
    if body[:1] not in (_VERSION, _WIDE):
        raise InvalidToken("the unsubscribe token has an unknown version")
    fields: list[str] = []
    at, width = 1, body[0]
    while at < len(body):
        begin = at + width
        at = begin + int.from_bytes(body[at:begin], "big")
        fields.append(body[begin:at].decode())
    if len(fields) != 4:
        raise InvalidToken("the unsubscribe token does not hold four fields")
    return Unsubscription(*fields)


def _mac(secret: bytes, body: bytes | bytearray) -> bytes:
    return hmac.digest(secret, _CONTEXT + body, "sha256")[:_MAC_BYTES]
