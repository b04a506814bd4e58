"""Signatures of providers' webhooks, verified on the raw bytes before anything is parsed. Pure.

SendGrid (Event Webhook security features): ECDSA over P-256 with SHA-256; signed are the timestamp
header's text and then the body, byte by byte, its closing CRLF included; the signature is base64 of
DER; the key is base64 of a DER SubjectPublicKeyInfo. No tolerance of age is defined, and repeated
posts reach back a day: replays are harmless because events are counted by their id.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from schemas.errors import InvalidInput

SIGNATURE_HEADER = "x-twilio-email-event-webhook-signature"
TIMESTAMP_HEADER = "x-twilio-email-event-webhook-timestamp"

Key = ec.EllipticCurvePublicKey
_ALGORITHM = ec.ECDSA(hashes.SHA256())


def read_key(text: str) -> Key:
    """A verification key as SendGrid shows it: base64 DER.

    Raises:
        InvalidInput: it is no P-256 public key.
    """
    try:
        key = serialization.load_der_public_key(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput(
            f"a webhook verification key is no base64 DER public key: {error}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("a webhook verification key is not on the curve P-256")
    return key


def verify(keys: Sequence[Key], timestamp: str, body: bytes, signature: str) -> bool:
    """Whether any of ``keys`` signed ``timestamp`` and ``body``. Several keys: rotation."""
    try:
        der = base64.b64decode(signature, validate=True)
        signed = timestamp.encode("ascii") + body
    except (binascii.Error, ValueError):
        return False
    for key in keys:
        try:
            key.verify(der, signed, _ALGORITHM)
        except InvalidSignature:
            continue
        return True
    return False
