"""One face for the fake and the real adapters, so that one suite can test them all."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from enum import Enum, auto

from schemas.message import Answer, Content, Message, Provider, Sender, Verdict
from sinks.providers.fake import FakeProvider, accept
from sinks.providers.sendgrid import SendGrid
from sinks.providers.smtp import Smtp
from sinks.smtp_client import SmtpTls
from tests.providers.servers import (
    Certificates,
    Reader,
    ScriptedSmtp,
    Server,
    Writer,
    forever,
    http_answer,
    read_request,
)

API_KEY = "SG.secretsecretsecret.secretsecretsecretsecretsecret"
PASSWORD = "correct-horse"


class Does(Enum):
    """What the provider does with the next messages."""

    ACCEPT = auto()
    THROTTLE = auto()
    REFUSE = auto()
    DEAD = auto()
    ACCOUNT = auto()
    HANG = auto()
    DROP = auto()
    """Closes after the whole request has been read, without an answer."""


def message(n: int = 0, **changes: object) -> Message:
    fields: dict[str, object] = {
        "send_id": f"00000000-0000-5000-8000-{n:012d}",
        "tenant": "acme",
        "run": "spring-1",
        "leg": "email",
        "to_address": f"person{n}@example.com",
        "to_name": f"Persephone {n}",
        "sender": Sender("news@acme.example", "Acme", "help@acme.example"),
        "content": Content("Hello", "<p>Hello</p>", "Hello"),
        "unsubscribe_url": "https://u.acme.example/t/opaque-token-of-the-recipient",
        "headers": {},
    }
    return Message(**{**fields, **changes})  # type: ignore[arg-type]


class Harness:
    """A provider, what it does, and what arrived. `arrived` and `taken` hold send ids."""

    provider: Provider

    def __init__(self) -> None:
        self.does = Does.ACCEPT
        self.arrived: list[str] = []
        self._taken: list[str] = []
        self._stack = AsyncExitStack()

    @property
    def taken(self) -> list[str]:
        return self._taken

    async def __aenter__(self) -> Harness:
        await self.start()
        await self.provider.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.provider.close()
        await self._stack.aclose()

    async def start(self) -> None:
        raise AssertionError("a harness starts its provider")

    async def unreachable(self) -> Provider:
        """The same adapter, pointed at nobody."""
        raise AssertionError("a harness can point its provider at nobody")


class FakeHarness(Harness):
    async def start(self) -> None:
        self.provider = FakeProvider(self._script, connections=3)

    def _script(self, taken: Message) -> Answer | None:
        self.arrived.append(taken.send_id)
        if self.does is Does.ACCEPT:
            self._taken.append(taken.send_id)
            return accept(taken)
        return {
            Does.THROTTLE: Answer(Verdict.THROTTLED, "rate-limited", None, timedelta(seconds=2)),
            Does.REFUSE: Answer(Verdict.REFUSED, "payload-refused"),
            Does.DEAD: Answer(Verdict.ADDRESS_DEAD, "address-refused"),
            Does.ACCOUNT: Answer(Verdict.ACCOUNT, "credentials-refused"),
            Does.HANG: None,
            Does.DROP: Answer(Verdict.IN_DOUBT, "connection-lost"),
        }[self.does]

    async def unreachable(self) -> Provider:
        return FakeProvider(lambda _: Answer(Verdict.RETRYABLE, "connect-failed"))


class SendGridHarness(Harness):
    def __init__(self, certificates: Certificates | None) -> None:
        super().__init__()
        self._certificates = certificates
        self.bodies: list[dict[str, object]] = []
        self.answer: bytes | None = None

    async def start(self) -> None:
        tls = self._certificates
        self.server = await self._stack.enter_async_context(
            Server(self._handle, tls.server if tls else None)
        )
        self.provider = self._adapter(self.server.port)

    def _adapter(self, port: int) -> SendGrid:
        tls = self._certificates
        return SendGrid(
            API_KEY,
            base_url=f"{'https' if tls else 'http'}://localhost:{port}",
            connections=3,
            tls=tls.client if tls else None,
            allow_private=True,
        )

    async def unreachable(self) -> Provider:
        return self._adapter(await free_port())

    async def _handle(self, reader: Reader, writer: Writer) -> None:
        while True:
            request = await read_request(reader)
            assert request.line == "POST /v3/mail/send HTTP/1.1"
            assert request.headers["authorization"] == f"Bearer {API_KEY}"
            body = json.loads(request.body)
            self.bodies.append(body)
            person = body["personalizations"][0]
            send_id = person["custom_args"]["ff_send_id"]
            self.arrived.append(send_id)
            address = person["to"][0]["email"]
            if self.does is Does.HANG:
                await forever()
            if self.does is Does.DROP:
                return
            if self.does is Does.ACCEPT:
                self._taken.append(send_id)
            writer.write(self.answer or self._answer(address))
            await writer.drain()

    def _answer(self, address: str) -> bytes:
        def errors(text: str, field: str | None) -> bytes:
            return json.dumps(
                {"errors": [{"message": text, "field": field, "help": None}]}
            ).encode()

        return {
            Does.ACCEPT: lambda: http_answer("202 Accepted", X_Message_Id="sg-1"),
            Does.THROTTLE: lambda: http_answer(
                "429 Too Many Requests", errors(f"slow down {address}", None), Retry_After="2"
            ),
            Does.REFUSE: lambda: http_answer(
                "400 Bad Request", errors(f"bad content for {address}", "content.0.value")
            ),
            Does.DEAD: lambda: http_answer(
                "400 Bad Request",
                errors(f"{address} is no valid address", "personalizations.0.to.0.email"),
            ),
            Does.ACCOUNT: lambda: http_answer(
                "401 Unauthorized", errors(f"the key {API_KEY} is revoked", None)
            ),
        }[self.does]()


class SmtpHarness(Harness):
    def __init__(self, certificates: Certificates | None) -> None:
        super().__init__()
        self._certificates = certificates

    async def start(self) -> None:
        tls = self._certificates
        self.smtp = ScriptedSmtp(
            extensions=["PIPELINING", "8BITMIME", "AUTH PLAIN"] + (["STARTTLS"] if tls else []),
            tls=tls.server if tls else None,
        )
        self._scripts = _LiveScript(self)
        self.smtp.script = self._scripts  # type: ignore[assignment]
        self.server = await self._stack.enter_async_context(Server(self.smtp))
        self.provider = self._adapter(self.server.port)

    def _adapter(self, port: int) -> Smtp:
        tls = self._certificates
        return Smtp(
            "localhost",
            port,
            hostname="client.example",
            connections=3,
            security=SmtpTls.STARTTLS if tls else SmtpTls.NONE,
            tls=tls.client if tls else None,
            credentials=("user", PASSWORD),
            insecure_auth=True,
            allow_private=True,
        )

    async def unreachable(self) -> Provider:
        return self._adapter(await free_port())

    @property
    def taken(self) -> list[str]:
        found = [re.search(rb"X-Fanfare-Send-Id: (\S+)", d.data) for d in self.smtp.delivered]
        return [match[1].decode() for match in found if match]


class _LiveScript(dict[str, str]):
    """Looks up what the harness does at the moment a command arrives."""

    def __init__(self, harness: SmtpHarness) -> None:
        super().__init__()
        self._harness = harness

    def get(self, verb: str, normal: str) -> str:  # type: ignore[override]
        harness = self._harness
        does = harness.does
        command = harness.smtp.commands[-1] if harness.smtp.commands else ""
        if verb == "RCPT":
            number = re.search(r"person(\d+)@", command)
            harness.arrived.append(
                f"00000000-0000-5000-8000-{int(number[1]):012d}" if number else command
            )
            if does is Does.DEAD:
                return f"550 5.1.1 <{command[9:-1]}> unknown user"
            if does is Does.THROTTLE:
                return f"451 4.7.1 slow down {command[9:-1]}"
        if verb == "AUTH" and does is Does.ACCOUNT:
            return f"535 5.7.8 the password {PASSWORD} is wrong"
        if verb == ".":
            if does is Does.REFUSE:
                return "554 5.6.0 this text is not wanted"
            if does is Does.HANG:
                return "hang"
            if does is Does.DROP:
                return "drop"
        return normal


async def free_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


HARNESSES: dict[str, Callable[[Certificates], Harness]] = {
    "fake": lambda _: FakeHarness(),
    "sendgrid": lambda _: SendGridHarness(None),
    "sendgrid-tls": SendGridHarness,
    "smtp": lambda _: SmtpHarness(None),
    "smtp-starttls": SmtpHarness,
}

__all__ = ["API_KEY", "HARNESSES", "PASSWORD", "Does", "Harness", "message"]
