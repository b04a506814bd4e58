"""SMTP over real sockets: dialogue, pipelining, TLS, authentication, limits."""

from __future__ import annotations

import asyncio
import http.client
import json
import smtplib
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.simulator.conftest import Provider, mail, running


def _message(send_id: str, text: str = "Hello\n") -> EmailMessage:
    message = EmailMessage()
    message["From"] = "news@example.com"
    message["To"] = f"{send_id}@example.com"
    message["Subject"] = "Grüße"
    message["Message-ID"] = f"<{send_id}@fanfare>"
    message["X-Fanfare-Send-Id"] = send_id
    message["X-Fanfare-Run"] = "run-1"
    message["X-Fanfare-Leg"] = "email"
    message.set_content(text)
    return message


@contextmanager
def _client(provider: Provider) -> Iterator[smtplib.SMTP]:
    client = smtplib.SMTP("127.0.0.1", provider.smtp_port, "client.example", timeout=5)
    try:
        yield client
    finally:
        client.close()


class Dialogue:
    """A raw connection: what is sent and what comes back, line by line."""

    def __init__(self, provider: Provider) -> None:
        self.socket = socket.create_connection(("127.0.0.1", provider.smtp_port), 5)
        self.lines = self.socket.makefile("rb")

    def replies(self, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            line = self.lines.readline().decode().rstrip("\r\n")
            if line[3:4] != "-":
                found.append(line[:3])
            if not line:
                break
        return found

    def say(self, text: str | bytes) -> None:
        self.socket.sendall(text if isinstance(text, bytes) else text.encode())

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()


def test_several_messages_of_one_connection_are_recorded(provider: Provider) -> None:
    with _client(provider) as client:
        for n in range(3):
            assert client.send_message(_message(f"m-{n}")) == {}
        assert {"pipelining", "size", "8bitmime", "smtputf8"} <= set(client.esmtp_features)
        assert client.noop()[0] == 250
        assert client.quit()[0] == 221
    assert provider.get("/stats")["unique"] == 3
    row = provider.get("/message/m-2")["acceptances"][0]
    assert (row["provider"], row["run"], row["address"]) == ("smtp", "run-1", "m-2@example.com")
    assert row["arguments"]["ff_leg"] == "email"


def test_dots_are_unstuffed_and_bodies_kept(provider: Provider) -> None:
    provider.configure(keep_bodies=2)
    text = ".\n..\n.leading dot\nend.\n"
    with _client(provider) as client:
        for send_id in ("one", "two", "three"):
            client.send_message(_message(send_id, text))
    kept = provider.get("/message/three")["acceptances"][0]["body"]
    assert kept.split("\r\n\r\n", 1)[1] == text.replace("\n", "\r\n")
    assert "body" not in provider.get("/message/one")["acceptances"][0]


def test_a_whole_pipeline_is_answered_in_order(provider: Provider) -> None:
    with Dialogue(provider) as dialogue:
        assert dialogue.replies(1) == ["220"]
        dialogue.say("EHLO x\r\nMAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n")
        assert dialogue.replies(4) == ["250", "250", "250", "354"]
        dialogue.say(
            "X-Fanfare-Send-Id: p-1\r\n\r\n.\r\n"
            "MAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n"
            "X-Fanfare-Send-Id: p-2\r\n\r\nx\r\n.\r\n"
            "MAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n.\r\nQUIT\r\n"
        )
        assert dialogue.replies(10) == [
            *("250", "250", "250", "354", "250"),
            *("250", "250", "354", "250", "221"),
        ]
    stats = provider.get("/stats")
    assert (stats["unique"], stats["without_id"]) == (3, 1)
    assert provider.get("/message/p-2")["accepted"] == 1


def test_a_message_in_single_bytes_and_the_id_from_the_message_id(provider: Provider) -> None:
    with Dialogue(provider) as dialogue:
        dialogue.say("EHLO x\r\nMAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n")
        assert dialogue.replies(5)[-1] == "354"
        dialogue.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b".. a\r\nMessage-Id:\r\n <folded@fanfare>\r\n\r\nx\r\n.\r\n":
            dialogue.say(bytes([byte]))
        assert dialogue.replies(1) == ["250"]
    assert provider.get("/message/folded")["accepted"] == 1


def test_commands_out_of_order_and_bad_syntax_are_refused(provider: Provider) -> None:
    with Dialogue(provider) as dialogue:
        for command, code in (
            ("NOOP", "220"),
            ("", "250"),
            ("MAIL FROM:<a@b.c>", "503"),
            ("EHLO", "501"),
            ("HELO x", "250"),
            ("RCPT TO:<a@b.c>", "503"),
            ("DATA", "503"),
            ("MAIL FROM:a@b.c", "501"),
            ("MAIL FROM:<a@b.c> FOO=1", "555"),
            ("MAIL FROM:<ü@b.c>", "553"),
            ("MAIL FROM:<ü@b.c> SMTPUTF8 BODY=8BITMIME", "250"),
            ("MAIL FROM:<a@b.c>", "503"),
            ("RCPT TO:<nobody>", "501"),
            ("DATA", "554"),
            ("RSET", "250"),
            ("STARTTLS", "502"),
            ("AUTH PLAIN x", "502"),
            ("VRFY a", "252"),
            ("NONSENSE", "500"),
            ("QUIT", "221"),
        ):
            if command:
                dialogue.say(command + "\r\n")
            assert dialogue.replies(1) == [code], command


def test_a_message_over_the_size_is_refused_before_and_after(provider: Provider) -> None:
    provider.configure(smtp={"max_message_bytes": 2000})
    with _client(provider) as client, pytest.raises(smtplib.SMTPSenderRefused) as refused:
        client.send_message(_message("big", "x" * 70 + "\n" * 3000))
    assert refused.value.smtp_code == 552
    with Dialogue(provider) as dialogue:
        dialogue.say("EHLO x\r\nMAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n")
        assert dialogue.replies(5)[-1] == "354"
        dialogue.say("X-Fanfare-Send-Id: big\r\n\r\n" + ("x" * 70 + "\r\n") * 5000 + ".\r\n")
        assert dialogue.replies(1) == ["552"]
        dialogue.say("MAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n.\r\n")
        assert dialogue.replies(4) == ["250", "250", "354", "250"]
    stats = provider.get("/stats")
    assert (stats["accepted"], stats["refused"]) == (1, {"too_large": 2})


def test_limits_of_connections_and_of_messages_in_one(provider: Provider) -> None:
    provider.configure(smtp={"max_messages_per_connection": 2, "max_connections": 1})
    with _client(provider) as client:
        client.send_message(_message("a"))
        client.send_message(_message("b"))
        with pytest.raises(smtplib.SMTPConnectError) as refused:
            smtplib.SMTP("127.0.0.1", provider.smtp_port, timeout=5)
        assert refused.value.smtp_code == 421
        with pytest.raises(smtplib.SMTPSenderRefused) as closed:
            client.send_message(_message("c"))
        assert closed.value.smtp_code == 421
    reasons = provider.get("/stats")["refused"]
    assert reasons == {"too_many_connections": 1, "too_many_messages": 1}


def test_more_than_the_rate_is_451(provider: Provider) -> None:
    provider.configure(smtp={"rate_limit": {"per_second": 2}})
    while time.time() % 1.0 > 0.5:
        time.sleep(0.01)
    with _client(provider) as client:
        client.send_message(_message("a"))
        client.send_message(_message("b"))
        with pytest.raises(smtplib.SMTPSenderRefused) as refused:
            client.send_message(_message("c"))
    assert refused.value.smtp_code == 451
    assert refused.value.smtp_error.startswith(b"4.7.1 ")
    assert provider.get("/stats")["unique"] == 2


def _certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "cert.pem", folder / "key.pem"


def test_starttls_and_authentication(tmp_path: Path) -> None:
    certificate, key = _certificate(tmp_path)
    users = tmp_path / "users"
    users.write_text("sender:s3cret:with colon\n")
    trusted = ssl.create_default_context(cafile=str(certificate))
    with running(
        tmp_path / "record",
        *("--smtp-auth-file", str(users)),
        *("--tls-cert", str(certificate), "--tls-key", str(key), "--https"),
    ) as provider:
        with smtplib.SMTP("localhost", provider.smtp_port, timeout=5) as client:
            with pytest.raises(smtplib.SMTPSenderRefused) as refused:
                client.send_message(_message("anonymous"))
            assert refused.value.smtp_code == 530
            client.starttls(context=trusted)
            client.ehlo()
            assert "starttls" not in client.esmtp_features
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.login("sender", "wrong")
            assert client.login("sender", "s3cret:with colon")[0] == 235
            client.send_message(_message("secure"))
        with smtplib.SMTP("localhost", provider.smtp_port, timeout=5) as client:
            client.ehlo()
            client.user, client.password = "sender", "s3cret:with colon"
            assert client.auth("LOGIN", client.auth_login)[0] == 235

        with socket.create_connection(("localhost", provider.smtp_port), 5) as plain:
            plain.recv(1000)
            plain.sendall(b"STARTTLS\r\nVRFY injected\r\n")
            assert plain.recv(1000).startswith(b"220 ")
            with trusted.wrap_socket(plain, server_hostname="localhost") as encrypted:
                encrypted.sendall(b"NOOP\r\n")
                assert encrypted.recv(1000).startswith(b"250 ")

        async def by_library() -> None:
            await aiosmtplib.send(
                _message("library"),
                hostname="localhost",
                port=provider.smtp_port,
                username="sender",
                password="s3cret:with colon",
                start_tls=True,
                tls_context=trusted,
            )

        asyncio.run(by_library())
        assert provider.get("/stats")["unique"] == 2
        secure = http.client.HTTPSConnection(
            "localhost", provider.http_port, timeout=5, context=trusted
        )
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        secure.request("POST", "/v3/mail/send", json.dumps(mail("https")), headers)
        assert secure.getresponse().status == 202
        secure.close()


def test_many_connections_of_aiosmtplib_at_once(provider: Provider) -> None:
    async def connection(number: int) -> None:
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=provider.smtp_port, start_tls=False)
        async with client:
            for n in range(10):
                await client.send_message(_message(f"c{number}-{n}"))

    async def everybody() -> None:
        await asyncio.gather(*(connection(number) for number in range(20)))

    asyncio.run(everybody())
    stats = provider.get("/stats?run=run-1")
    assert (stats["unique"], stats["duplicates"], stats["requests"]) == (200, 0, 200)
