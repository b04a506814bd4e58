"""Small scripted servers on real sockets, and a certificate authority for an afternoon."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LINGER_RESET = b"\1\0\0\0\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Certificates:
    """TLS contexts: a server's for `localhost`, a client's that trusts it, one that does not."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    stranger: ssl.SSLContext


def make_certificates(folder: Path) -> Certificates:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pem)
    client = ssl.create_default_context(cafile=str(pem))
    return Certificates(server, client, ssl.create_default_context())


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    with suppress(OSError):
        socket.socket(fileno=socket.dup(raw.fileno())).setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET
        )
    writer.transport.abort()


Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Handler = Callable[[Reader, Writer], Awaitable[None]]


class Server:
    """A listening socket whose connections run `handler`; use with `async with`."""

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        self._handler = handler
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.port = 0

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self._tls, limit=2**24
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            await self._handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


async def forever() -> None:
    await asyncio.Event().wait()


@dataclass(slots=True)
class Request:
    line: str
    headers: dict[str, str]
    body: bytes


async def read_request(reader: Reader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *lines = head[:-4].split("\r\n")
    headers = {n.lower(): v.strip() for n, v in (entry.split(":", 1) for entry in lines)}
    return Request(line, headers, await reader.readexactly(int(headers["content-length"])))


def http_answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(slots=True)
class Delivered:
    mail: str
    rcpt: str
    data: bytes


@dataclass(slots=True)
class ScriptedSmtp:
    """An SMTP server. `script` maps a command's verb (or 'connect', '.') to what happens.

    A value is a reply's text, or one of: 'drop' (FIN), 'reset' (RST), 'hang', 'late' (the normal
    one after half a second). A list gives one value to each occurrence and then falls back to
    normal behaviour.
    """

    script: dict[str, str | list[str]] = field(default_factory=dict)
    extensions: list[str] = field(default_factory=lambda: ["PIPELINING", "8BITMIME", "SMTPUTF8"])
    tls: ssl.SSLContext | None = None
    delivered: list[Delivered] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    stop_reading_data: bool = False
    piece: int = 0
    """How many bytes of a reply are written together; 0: all."""

    def _scripted(self, verb: str, normal: str) -> str:
        value = self.script.get(verb, normal)
        if isinstance(value, list):
            value = value.pop(0) if value else normal
        return f"late {normal}" if value == "late" else value

    async def _act(self, writer: Writer, action: str) -> None:
        if action.startswith("late "):
            await asyncio.sleep(0.5)
            action = action[5:]
        if action == "drop":
            raise ConnectionError
        if action == "reset":
            reset(writer)
            raise ConnectionError
        if action == "hang":
            await forever()
        if action:
            reply = action.encode() + b"\r\n"
            size = self.piece or len(reply)
            for begin in range(0, len(reply), size):
                writer.write(reply[begin : begin + size])
                await writer.drain()
                if self.piece:
                    await asyncio.sleep(0.001)

    async def __call__(self, reader: Reader, writer: Writer) -> None:
        await self._act(writer, self._scripted("connect", "220 scripted ESMTP"))
        mail = rcpt = ""
        while line := await reader.readline():
            command = line.decode().rstrip("\r\n")
            self.commands.append(command)
            verb = command.split(" ")[0].split(":")[0].upper()
            self.together.append(bytes(reader._buffer).count(b"\n") + 1)  # type: ignore[attr-defined]
            ok = bool(mail and rcpt)
            normal = {
                "EHLO": "\r\n".join(
                    ["250-scripted", *(f"250-{e}" for e in self.extensions), "250 HELP"]
                ),
                "HELO": "250 scripted",
                "MAIL": "503 5.5.1 nested MAIL" if mail else "250 2.1.0 sender ok",
                "RCPT": "250 2.1.5 recipient ok" if mail else "503 5.5.1 need MAIL",
                "DATA": "354 go ahead" if ok else "503 5.5.1 need RCPT",
                "RSET": "250 2.0.0 flushed",
                "QUIT": "221 2.0.0 bye",
                "STARTTLS": "220 2.0.0 ready",
                "AUTH": "235 2.7.0 welcome",
            }.get(verb, "500 5.5.2 what?")
            action = self._scripted(verb, normal)
            await self._act(writer, action)
            action = action.removeprefix("late ")
            if verb in ("EHLO", "RSET", "HELO"):
                mail = rcpt = ""
            elif verb == "MAIL" and action.startswith("2"):
                mail = command
            elif verb == "RCPT" and action.startswith("2"):
                rcpt = command
            elif verb == "QUIT":
                return
            elif verb == "STARTTLS" and action.startswith("220"):
                await writer.start_tls(self.tls)  # type: ignore[arg-type]
            elif verb == "AUTH" and action.startswith("334"):
                for name in ("user", "password"):
                    answer = (await reader.readline()).decode().strip()
                    self.commands.append(answer)
                    await self._act(
                        writer, self._scripted(name, "334 go" if name == "user" else "235 in")
                    )
            elif verb == "DATA" and action.startswith("354"):
                if self.stop_reading_data:
                    # Its own buffers and the system's would take tens of megabytes.
                    writer.transport.pause_reading()  # type: ignore[attr-defined]
                    await self._act(writer, self._scripted("in-data", "hang"))
                data = await reader.readuntil(b"\r\n.\r\n")
                envelope = Delivered(mail, rcpt, data[:-3])
                action = self._scripted(".", "250 2.0.0 queued as Q123")
                if action.startswith(("2", "late 2")) or action == "hang-after-taking":
                    self.delivered.append(envelope)
                mail = rcpt = ""
                await self._act(writer, "hang" if action == "hang-after-taking" else action)


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until something is so; fail when it is not in time."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while not condition():
        assert loop.time() < until, "it did not happen in time"
        await asyncio.sleep(0.005)
