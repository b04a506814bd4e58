"""What a request and a message cost in CPU, beside the libraries: ``python -m bench.clients``.

One sender process on uvloop, a bare server in another, loopback, keep-alive, no TLS. Figures are
microseconds of CPU in the sender, and messages a second while server and sender share the cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import aiohttp
import aiosmtplib
import uvloop
from pyreqwest.client import ClientBuilder

from schemas.message import Content, Message, Sender, Verdict
from sinks.http1 import HttpClient
from sinks.providers.sendgrid import SendGrid
from sinks.providers.smtp import Smtp
from sinks.smtp_client import Envelope, SmtpClient, SmtpTls

CONNECTIONS = 50
SECONDS = 3.0
DEADLINE = timedelta(seconds=30)
HTML = "<p>Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod</p>\n" * 38
BODY = b'{"personalizations":[' + b"x" * 478 + b"]}"
TEXT = (
    ("Subject: hello\r\nFrom: a@b.example\r\nTo: c@d.example\r\n\r\n" + HTML)
    .replace("</p>\n", "</p>\r\n")
    .encode()
)

HTTP_ANSWER = (
    b"HTTP/1.1 202 Accepted\r\nServer: nginx\r\nDate: Fri, 20 Nov 2026 12:00:00 GMT\r\n"
    b"Content-Length: 0\r\nConnection: keep-alive\r\nX-Message-Id: abcdefghijklmnop\r\n\r\n"
)


class _HttpServer(asyncio.Protocol):
    """Answers 202 to whatever has a Content-Length."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.data) < end + 4 + length:
                return
            self.data = self.data[end + 4 + length :]
            self.transport.write(HTTP_ANSWER)


class _SmtpServer(asyncio.Protocol):
    """Accepts everything, pipelined or not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.data = b""
        self.in_text = False
        self.transport.write(b"220 bench ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        self.data += data
        answer = []
        while True:
            if self.in_text:
                end = self.data.find(b"\r\n.\r\n")
                if end < 0:
                    break
                self.data = self.data[end + 5 :]
                self.in_text = False
                answer.append(b"250 2.0.0 queued as 1234\r\n")
                continue
            end = self.data.find(b"\r\n")
            if end < 0:
                break
            verb = self.data[:4].upper()
            self.data = self.data[end + 2 :]
            if verb == b"EHLO":
                answer.append(
                    b"250-bench\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 10000000\r\n"
                )
            elif verb == b"DATA":
                self.in_text = True
                answer.append(b"354 go\r\n")
            else:
                answer.append(b"250 2.1.0 ok\r\n")
        if answer:
            self.transport.write(b"".join(answer))


async def _serve(kind: str) -> None:
    protocol = {"http": _HttpServer, "smtp": _SmtpServer}[kind]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    # The sender holds our standard input: when it ends, so do we.
    await loop.run_in_executor(None, sys.stdin.read)


async def _measure(send: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """(CPU µs a message, messages a second) with CONNECTIONS senders for SECONDS."""
    for _ in range(20):
        await send()
    count = 0
    until = time.perf_counter() + SECONDS

    async def worker() -> None:
        nonlocal count
        while time.perf_counter() < until:
            await send()
            count += 1

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    spent, took = time.process_time() - cpu, time.perf_counter() - began
    return spent / count * 1e6, count / took


def _message() -> Message:
    return Message(
        send_id="11111111-2222-5333-8444-555555555555",
        tenant="acme",
        run="spring-1",
        leg="email",
        to_address="ann@example.com",
        to_name="Zo\u00eb \u00c5ngstr\u00f6m",
        sender=Sender("news@acme.example", "Acme"),
        content=Content("Hello Zo\u00eb", HTML, None),
        unsubscribe_url="https://u.acme.example/t/abcdefghijklmnopqrstuvwxyz",
    )


async def _http_client(port: int) -> tuple[float, float]:
    client = HttpClient(f"http://127.0.0.1:{port}", connections=CONNECTIONS, allow_private=True)
    headers = {"Authorization": "Bearer x", "Content-Type": "application/json"}
    prepared = client.prepare("POST", "/v3/mail/send", headers)

    async def send() -> None:
        answer = await client.request(prepared, BODY, DEADLINE)
        assert answer.status == 202

    figures = await _measure(send)
    await client.close()
    return figures


async def _pyreqwest(port: int) -> tuple[float, float]:
    url = f"http://127.0.0.1:{port}/v3/mail/send"
    async with ClientBuilder().max_connections(CONNECTIONS).build() as client:

        async def send() -> None:
            request = client.post(url).header("Authorization", "Bearer x").body_bytes(BODY).build()
            answer = await request.send()
            assert answer.status == 202

        return await _measure(send)


async def _aiohttp(port: int) -> tuple[float, float]:
    url = f"http://127.0.0.1:{port}/v3/mail/send"
    headers = {"Authorization": "Bearer x", "Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def send() -> None:
            async with session.post(url, data=BODY) as answer:
                assert answer.status == 202

        return await _measure(send)


async def _adapter(provider: Smtp | SendGrid) -> tuple[float, float]:
    message = _message()

    async def send() -> None:
        answer = await provider.send(message, DEADLINE)
        assert answer.verdict is Verdict.ACCEPTED

    figures = await _measure(send)
    await provider.close()
    return figures


async def _sendgrid(port: int) -> tuple[float, float]:
    return await _adapter(
        SendGrid(
            "key",
            base_url=f"http://127.0.0.1:{port}",
            connections=CONNECTIONS,
            allow_private=True,
        )
    )


async def _smtp_client(port: int) -> tuple[float, float]:
    client = SmtpClient(
        "127.0.0.1",
        port,
        hostname="bench.example",
        security=SmtpTls.NONE,
        connections=CONNECTIONS,
        messages_per_connection=1_000_000,
        allow_private=True,
    )
    envelope = Envelope("a@b.example", "c@d.example", TEXT)

    async def send() -> None:
        outcome = await client.send(lambda _: envelope, DEADLINE)
        assert outcome.accepted

    figures = await _measure(send)
    await client.close()
    return figures


async def _smtp(port: int) -> tuple[float, float]:
    return await _adapter(
        Smtp(
            "127.0.0.1",
            port,
            hostname="bench.example",
            security=SmtpTls.NONE,
            connections=CONNECTIONS,
            messages_per_connection=1_000_000,
            allow_private=True,
        )
    )


async def _aiosmtplib(port: int) -> tuple[float, float]:
    idle: list[aiosmtplib.SMTP] = []
    for _ in range(CONNECTIONS):
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, use_tls=False, start_tls=False)
        await client.connect()
        idle.append(client)

    async def send() -> None:
        client = idle.pop()
        await client.sendmail("a@b.example", ["c@d.example"], TEXT)
        idle.append(client)

    figures = await _measure(send)
    for client in idle:
        client.close()
    return figures


VARIANTS: dict[str, dict[str, Callable[[int], Awaitable[tuple[float, float]]]]] = {
    "http": {
        "ours": _http_client,
        "ours with SendGrid's body": _sendgrid,
        "pyreqwest": _pyreqwest,
        "aiohttp": _aiohttp,
    },
    "smtp": {
        "ours": _smtp_client,
        "ours with MIME": _smtp,
        "aiosmtplib": _aiosmtplib,
    },
}


def run() -> dict[str, float]:
    """Measure all variants; {name: figure}."""
    figures: dict[str, float] = {}
    for kind, variants in VARIANTS.items():
        server = subprocess.Popen(
            [sys.executable, "-m", "bench.clients", "--serve", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert server.stdin is not None and server.stdout is not None
        port = int(server.stdout.readline())
        try:
            for name, variant in variants.items():

                async def measured(
                    variant: Callable[[int], Awaitable[tuple[float, float]]] = variant,
                ) -> tuple[float, float]:
                    return await variant(port)  # noqa: B023

                cpu, rate = uvloop.run(measured())
                figures[f"{kind}.{name}.cpu_us"] = round(cpu, 1)
                figures[f"{kind}.{name}.per_s"] = round(rate)
                print(
                    f"{kind:5} {name:28} {cpu:7.1f} µs CPU {rate:9.0f}/s",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            server.stdin.close()
            server.wait(10)
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        uvloop.run(_serve(sys.argv[2]))
    else:
        print(json.dumps(run()))
