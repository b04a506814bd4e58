"""SendGrid's signatures: the published vector, tampering, rotation."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InvalidInput
from transforms.signatures import read_key, verify

# Of sendgrid-python, test/unit/test_eventwebhook.py.
KEY = (
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE83T4O/n84iotIvIW4mdBgQ/7dAfSmpqIM8kF9mN1flpVKS3GRqe62gw+"
    "2fNNRaINXvVpiglSI8eNEc6wEA3F+g=="
)
SIGNATURE = (
    "MEUCIGHQVtGj+Y3LkG9fLcxf3qfI10QysgDWmMOVmxG0u6ZUAiEAyBiXDWzM+uOe5W0JuG+luQAbPIqHh89M15Tlu"
    "LtEZtM="
)
TIMESTAMP = "1600112502"
BODY = (
    b'[{"email":"hello@world.com","event":"dropped","reason":"Bounced Address","sg_event_id":'
    b'"ZHJvcC0xMDk5NDkxOS1MUnpYbF9OSFN0T0doUTRrb2ZTbV9BLTA","sg_message_id":"LRzXl_NHStOGhQ4kofSm_A'
    b'.filterdrecv-p3mdw1-756b745b58-kmzbl-18-5F5FC76C-9.0","smtp-id":"<LRzXl_NHStOGhQ4kofSm_A@ismtp'
    b'd0039p1iad1.sendgrid.net>","timestamp":1600112492}]\r\n'
)


def test_the_published_vector() -> None:
    assert len(BODY) == 327
    assert verify([read_key(KEY)], TIMESTAMP, BODY, SIGNATURE)


def test_the_closing_line_break_is_signed() -> None:
    assert not verify([read_key(KEY)], TIMESTAMP, BODY.rstrip(), SIGNATURE)


@given(st.integers(0, len(BODY) - 1), st.integers(1, 255))
def test_any_other_byte_is_refused(position: int, change: int) -> None:
    body = bytearray(BODY)
    body[position] ^= change
    assert not verify([read_key(KEY)], TIMESTAMP, bytes(body), SIGNATURE)


def test_another_time_another_key_and_rubbish_are_refused() -> None:
    key = read_key(KEY)
    assert not verify([key], "1600112503", BODY, SIGNATURE)
    assert not verify([ec.generate_private_key(ec.SECP256R1()).public_key()], TIMESTAMP, BODY,
                      SIGNATURE)  # fmt: skip
    assert not verify([], TIMESTAMP, BODY, SIGNATURE)
    for rubbish in (
        "",
        "!",
        "AAAA",
        "é",
        base64.b64encode(b"\x30\x06\x02\x01\x00\x02\x01\x00").decode(),
    ):
        assert not verify([key], TIMESTAMP, BODY, rubbish)
    assert not verify([key], "é", BODY, SIGNATURE)


def test_either_key_serves_while_keys_are_rotated() -> None:
    new = ec.generate_private_key(ec.SECP256R1())
    signature = base64.b64encode(new.sign(b"1x", ec.ECDSA(hashes.SHA256()))).decode()
    keys = [read_key(KEY), new.public_key()]
    assert verify(keys, "1", b"x", signature)
    assert verify(keys, TIMESTAMP, BODY, SIGNATURE)


def test_what_is_no_key_is_refused_at_start() -> None:
    def der(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> str:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return base64.b64encode(key.public_bytes(serialization.Encoding.DER, form)).decode()

    for text in ("", "abc", der(ec.generate_private_key(ec.SECP384R1()).public_key()),
                 der(rsa.generate_private_key(65537, 2048).public_key())):  # fmt: skip
        with pytest.raises(InvalidInput):
            read_key(text)
