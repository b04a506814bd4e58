"""The receiver as a process of its own, over real HTTP, with a real broker and without one."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

from schemas import topics
from schemas.codec import decode
from schemas.records import ConsentChange, ConsentStatus, RawWebhook
from stack.layout import Home, endpoints
from tests.stack_fixture import eventually
from transforms.unsubscribe import make_token

PRIVATE = ec.generate_private_key(ec.SECP256R1())
PUBLIC = base64.b64encode(
    PRIVATE.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
).decode()
SECRET = "a secret of sufficient length"
LIMIT = 200_000


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Receiver:
    def __init__(
        self, port: int, process: subprocess.Popen[bytes], prefix: str, kafka: str
    ) -> None:
        self.port, self.process, self.prefix, self.kafka = port, process, prefix, kafka

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())

    def post(self, body: bytes, tenant: str = "acme", signature: str | None = None) -> Answer:
        stamp = str(int(time.time()))
        own = PRIVATE.sign(stamp.encode() + body, ec.ECDSA(hashes.SHA256()))
        return self.ask(
            "POST",
            f"/webhooks/sendgrid/{tenant}",
            body,
            X_Twilio_Email_Event_Webhook_Signature=signature or base64.b64encode(own).decode(),
            X_Twilio_Email_Event_Webhook_Timestamp=stamp,
        )

    def counter(self, name: str, result: str) -> int:
        text = self.ask("GET", "/metrics").body.decode()
        found = re.search(rf'^fanfare_receiver_{name}{{result="{result}"}} (\d+)$', text, re.M)
        return int(found[1]) if found else 0

    def logged(self, topic: str) -> list[bytes]:
        partition = TopicPartition(self.prefix + topic, 0)
        consumer = KafkaConsumer(bootstrap_servers=self.kafka)
        consumer.assign([partition])
        end = consumer.end_offsets([partition])[partition]
        consumer.seek_to_beginning(partition)
        values: list[bytes] = []
        while consumer.position(partition) < end:
            for records in consumer.poll(500).values():
                values += [record.value for record in records]
        consumer.close()
        return values


@contextlib.contextmanager
def receiving(kafka: str, prefix: str = "") -> Iterator[Receiver]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.receiver", "--port", str(port)],
        env=os.environ
        | {
            "FANFARE_KAFKA": kafka,
            "FANFARE_TOPIC_PREFIX": prefix,
            "FANFARE_WEBHOOK_KEYS": f'{{"acme": ["{PUBLIC}"]}}',
            "FANFARE_WEBHOOK_PUBLIC_KEY": "",
            "FANFARE_UNSUBSCRIBE_SECRET": SECRET,
            "FANFARE_WEBHOOK_BODY_LIMIT": str(LIMIT),
            "FANFARE_WEBHOOK_BODY_TIMEOUT": "PT1S",
            "FANFARE_KAFKA_TIMEOUT": "PT2S",
        },
    )
    receiver = Receiver(port, process, prefix, kafka)

    def up() -> bool:
        assert process.poll() is None
        try:
            return receiver.ask("GET", "/healthz").status == 200
        except OSError:
            return False

    try:
        eventually(up, what="the receiver answers")
        yield receiver
    finally:
        process.terminate()
        process.wait(15)


@pytest.fixture(scope="module")
def receiver(stack: Home) -> Iterator[Receiver]:
    kafka = endpoints(stack).kafka
    prefix = f"r{time.time_ns()}."
    admin = KafkaAdminClient(bootstrap_servers=kafka)
    admin.create_topics(
        [NewTopic(prefix + name, 1, 1) for name in (topics.WEBHOOKS_RAW, topics.CONSENT)]
    )
    admin.close()
    with receiving(kafka, prefix) as running:
        yield running


def test_a_signed_body_is_in_the_log_byte_by_byte_when_it_is_answered(receiver: Receiver) -> None:
    body = b'[{"event":"open"}]\r\n'
    assert receiver.post(body).status == 202
    raw = decode(receiver.logged(topics.WEBHOOKS_RAW)[-1], RawWebhook)
    assert (raw.body, raw.tenant, raw.provider) == (body, "acme", "sendgrid")


def test_many_at_once_all_arrive(receiver: Receiver) -> None:
    bodies = [b'[{"n":%d}]' % number for number in range(300)]
    with ThreadPoolExecutor(32) as pool:
        assert {answer.status for answer in pool.map(receiver.post, bodies)} == {202}
    found = {decode(value, RawWebhook).body for value in receiver.logged(topics.WEBHOOKS_RAW)}
    assert found >= set(bodies)


def test_what_is_refused_is_counted_and_leaves_nothing_else(receiver: Receiver) -> None:
    before = len(receiver.logged(topics.WEBHOOKS_RAW))
    counted = {
        why: receiver.counter("webhooks_total", why)
        for why in ("invalid_signature", "unsigned", "unknown_tenant", "oversized", "incomplete")
    }
    assert receiver.post(b"[]", signature="AAAA").status == 403
    assert receiver.ask("POST", "/webhooks/sendgrid/acme", b"[]").status == 403
    assert receiver.post(b"[]", tenant="nobody").status == 403
    assert receiver.ask("POST", "/webhooks/sendgrid", b"[]").status == 403
    assert receiver.post(b"x" * (LIMIT + 1)).status == 413
    assert chunked(receiver, LIMIT * 50).startswith(b"HTTP/1.1 413")
    assert chunked(receiver, 10, finished=False).startswith(b"HTTP/1.1 408")
    for why, number in {"invalid_signature": 1, "unsigned": 1, "unknown_tenant": 2, "oversized": 2,
                        "incomplete": 1}.items():  # fmt: skip
        assert receiver.counter("webhooks_total", why) == counted[why] + number
    assert len(receiver.logged(topics.WEBHOOKS_RAW)) == before


def chunked(receiver: Receiver, size: int, finished: bool = True) -> bytes:
    """Post without saying how much; the answer's beginning."""
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=20) as wire:
        wire.sendall(
            b"POST /webhooks/sendgrid/acme HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"X-Twilio-Email-Event-Webhook-Signature: AAAA\r\n"
            b"X-Twilio-Email-Event-Webhook-Timestamp: 1\r\n\r\n"
        )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(-(-size // 10_000)):
                part = b"x" * min(size, 10_000)
                wire.sendall(b"%x\r\n%b\r\n" % (len(part), part))
            if finished:
                wire.sendall(b"0\r\n\r\n")
        return wire.recv(1000)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/x-www-form-urlencoded", b"List-Unsubscribe=One-Click"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\n'
            b"One-Click\r\n--b--\r\n",
        ),
    ],
)
def test_one_click_withdraws_and_may_be_repeated(
    receiver: Receiver, content_type: str, body: bytes
) -> None:
    token = make_token(SECRET.encode(), "acme", "ann", "news", "email")
    for _ in range(2):
        assert receiver.ask("POST", f"/u/{token}", body, Content_Type=content_type).status == 200
    change = decode(receiver.logged(topics.CONSENT)[-1], ConsentChange)
    assert (change.tenant, change.recipient_id, change.channel, change.topic, change.status) == (
        "acme", "ann", "email", "news", ConsentStatus.WITHDRAWN,
    )  # fmt: skip


def test_following_the_link_only_asks(receiver: Receiver) -> None:
    before = len(receiver.logged(topics.CONSENT))
    token = make_token(SECRET.encode(), "acme", "ann", "<b>news</b>", "email")
    page = receiver.ask("GET", f"/u/{token}")
    assert page.status == 200
    assert b'<form method="post">' in page.body
    assert b"<b>news" not in page.body
    assert receiver.ask("HEAD", f"/u/{token}").status in (200, 405)
    for method in ("GET", "POST"):
        assert receiver.ask(method, f"/u/{token[:-4]}AAAA").status == 404
    assert len(receiver.logged(topics.CONSENT)) == before


def test_it_costs_nothing_to_wait(receiver: Receiver) -> None:
    process = psutil.Process(receiver.process.pid)
    used = process.cpu_times()
    time.sleep(3)
    now = process.cpu_times()
    assert (now.user + now.system) - (used.user + used.system) < 0.1


def test_without_a_broker_it_starts_and_asks_to_come_again() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with receiving(f"127.0.0.1:{nobody.getsockname()[1]}") as receiver:
            answer = receiver.post(b"[]")
            assert answer.status == 503
            assert answer.headers["retry-after"] == "15"
            assert receiver.counter("webhooks_total", "unavailable") == 1
            assert receiver.ask("GET", "/healthz").status == 200


def test_a_missing_or_wrong_setting_is_named() -> None:
    for setting, value in {"FANFARE_KAFKA": None, "FANFARE_WEBHOOK_PUBLIC_KEY": "no key"}.items():
        env = {name: value for name, value in os.environ.items() if "FANFARE" not in name}
        env |= {"FANFARE_KAFKA": "127.0.0.1:1"}
        if value is None:
            del env[setting]
        else:
            env[setting] = value
        done = subprocess.run(
            [sys.executable, "-m", "gateway.receiver"], env=env, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert setting in done.stderr
        assert "Traceback" not in done.stderr
