"""A lean SMTP client for submission and relays (RFC 5321, 2920, 3207, 4954, 6152, 6531).

N connections, messages one after the other on each. With PIPELINING a message takes two round
trips: MAIL, RCPT and DATA in one write, then the text and its dot. Where another message waits,
its commands go out behind that dot (RFC 2920, 3.1), and it takes one. Nothing is accepted before
its dot has left, so everything up to there may be tried again; what breaks after it is in doubt.
Idle connections are looked at before use instead of asked with NOOP: a connection found dead at
MAIL has cost nothing but a new one.
"""

from __future__ import annotations

import asyncio
import binascii
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import NamedTuple, cast

from schemas.errors import InvalidInput, Unavailable
from sinks.connections import Endpoint, InDoubt, NotSent, Pool, Request, Wire, awaited


class SmtpTls(Enum):
    """How a connection is protected. There is no 'if offered': that protects from nobody."""

    NONE = "none"
    STARTTLS = "starttls"
    IMPLICIT = "implicit"


class SmtpReply(NamedTuple):
    """A reply: its code, enhanced status code (RFC 3463) if there is one, and text."""

    code: int
    enhanced: str | None
    text: str


class SmtpOutcome(NamedTuple):
    """The reply that decided: of the dot if everything went well, else of the step refused.

    `step` is one of `connect`, `auth`, `mail`, `rcpt`, `data`, `end`.
    """

    step: str
    reply: SmtpReply

    @property
    def accepted(self) -> bool:
        """Whether the server took responsibility for the message."""
        return self.step == "end" and 200 <= self.reply.code < 300


@dataclass(frozen=True, slots=True)
class Extensions:
    """What the server offers, as of its last EHLO. `size` is 0 when it names no limit."""

    pipelining: bool = False
    eight_bit_mime: bool = False
    smtputf8: bool = False
    starttls: bool = False
    size: int = 0
    auth: frozenset[str] = frozenset()


class Envelope(NamedTuple):
    """One message to one recipient; `data` is dot-stuffed and ends in CRLF, without the dot."""

    mail_from: str
    rcpt_to: str
    data: bytes
    smtputf8: bool = False


class SmtpRefused(Unavailable):
    """The server does not want us: greeting, EHLO, STARTTLS or AUTH was refused."""

    def __init__(self, outcome: SmtpOutcome) -> None:
        super().__init__(f"SMTP {outcome.step} refused: {outcome.reply.code}")
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class SmtpTimeouts:
    """How long each phase may take; a message's own deadline covers them all."""

    connect: timedelta = timedelta(seconds=10)
    command: timedelta = timedelta(seconds=15)
    end_of_data: timedelta = timedelta(seconds=60)


DEFAULT_TIMEOUTS = SmtpTimeouts()
_ADDRESS = re.compile(r"[^\s<>@\x00-\x1f\x7f]{1,64}@[A-Za-z0-9.\-]{1,253}")
_HOSTNAME = re.compile(r"[A-Za-z0-9.\-\[\]:]{1,255}")
_LONGEST_REPLY = 65_536


class SmtpClient:
    """A pool of sessions with one server. Not to be shared between event loops.

    Args:
        credentials: user and password for AUTH PLAIN, or LOGIN where that is all there is.
        insecure_auth: allow credentials over a connection without TLS (a local relay).
        messages_per_connection: a session is left politely after so many.

    Raises:
        InvalidInput: the settings contradict each other.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        hostname: str,
        security: SmtpTls = SmtpTls.STARTTLS,
        credentials: tuple[str, str] | None = None,
        insecure_auth: bool = False,
        connections: int = 16,
        messages_per_connection: int = 1000,
        tls: ssl.SSLContext | None = None,
        timeouts: SmtpTimeouts = DEFAULT_TIMEOUTS,
        allow_private: bool = False,
        idle: timedelta = timedelta(seconds=60),
    ) -> None:
        if not _HOSTNAME.fullmatch(hostname):
            raise InvalidInput("the SMTP client's own host name can't be used in EHLO")
        if credentials is not None and security is SmtpTls.NONE and not insecure_auth:
            raise InvalidInput("SMTP credentials need TLS, or insecure_auth for a local relay")
        if security is not SmtpTls.NONE and tls is None:
            tls = ssl.create_default_context()
        self._tls = tls
        self._security = security
        self._host = host
        self._hostname = hostname
        self._credentials = credentials
        self._per_connection = messages_per_connection
        self._connect_s = timeouts.connect.total_seconds()
        self._command_s = timeouts.command.total_seconds()
        self._end_s = timeouts.end_of_data.total_seconds()
        self._endpoint = Endpoint(
            host,
            port,
            tls if security is SmtpTls.IMPLICIT else None,
            allow_private=allow_private,
        )
        self._pool: Pool[_SmtpWire] = Pool(self._connect, connections, idle)

    @property
    def connections(self) -> int:
        """The most messages in flight at once."""
        return self._pool.size

    async def send(
        self, make: Callable[[Extensions], Envelope], deadline: timedelta
    ) -> SmtpOutcome:
        """Make one attempt; `deadline` covers waiting, connecting, commands and the answer.

        `make` is called once, when a session is there and it is known what it offers; what it
        raises is passed on, and nothing has been sent then.

        Raises:
            NotSent: broken or too late before the final dot had left.
            InDoubt: after.
            SmtpRefused: no session could be opened.
        """
        return await awaited(lambda done: self.submit(make, deadline, done))

    def submit(
        self,
        make: Callable[[Extensions], Envelope],
        deadline: timedelta,
        done: Callable[[SmtpOutcome | Exception], None],
    ) -> Callable[[], None]:
        """`send`, with the outcome, or what it would raise, given to `done`; returns what cancels
        it."""
        until = asyncio.get_running_loop().time() + deadline.total_seconds()
        request = _Sending(make, until, done)
        self._pool.submit(request)
        return request.cancel

    async def close(self) -> None:
        """Leave all sessions. Idempotent."""
        await self._pool.close()

    def _wire(self) -> _SmtpWire:
        return _SmtpWire(self._pool, self._command_s, self._end_s, self._per_connection)

    async def _connect(self, until: float) -> _SmtpWire:
        loop = asyncio.get_running_loop()
        until = min(until, loop.time() + self._connect_s)
        wire = await self._endpoint.dial(self._wire, until)
        try:
            async with asyncio.timeout_at(until):
                await self._open_session(loop, wire)
        except TimeoutError:
            wire.abort()
            raise NotSent("connect-timeout", "the SMTP server was too slow") from None
        except ssl.SSLCertVerificationError as error:
            wire.abort()
            raise NotSent("certificate-refused", error.verify_message) from None
        except (ssl.SSLError, OSError) as error:
            wire.abort()
            raise NotSent("tls-failed", type(error).__name__) from None
        except BaseException:
            wire.abort()
            raise
        return wire

    async def _open_session(self, loop: asyncio.AbstractEventLoop, wire: _SmtpWire) -> None:
        _expect(await wire.command(b""), "connect", 220)
        await self._hello(wire)
        if self._security is SmtpTls.STARTTLS and self._tls is not None:
            if not wire.extensions.starttls:
                raise NotSent("starttls-not-offered", "the SMTP server offers no STARTTLS")
            _expect(await wire.command(b"STARTTLS\r\n"), "connect", 220)
            wire.forget_plaintext()
            transport = await loop.start_tls(
                wire.transport, wire, self._tls, server_hostname=self._host
            )
            if transport is None:
                raise NotSent("tls-failed", "the connection closed during STARTTLS")
            wire.forget_plaintext()
            wire.attach(transport)
            await self._hello(wire)
        if self._credentials is not None:
            await self._login(wire, *self._credentials)
        wire.opened()

    async def _hello(self, wire: _SmtpWire) -> None:
        reply = await wire.command(b"EHLO %b\r\n" % self._hostname.encode("ascii"))
        if reply.code in (500, 502, 504):
            reply = await wire.command(b"HELO %b\r\n" % self._hostname.encode("ascii"))
            wire.extensions = Extensions()
        else:
            wire.extensions = _read_extensions(reply.text)
        _expect(reply, "connect", 250)

    async def _login(self, wire: _SmtpWire, user: str, password: str) -> None:
        if "PLAIN" in wire.extensions.auth or "LOGIN" not in wire.extensions.auth:
            secret = _b64(f"\0{user}\0{password}")
            reply = await wire.command(b"AUTH PLAIN %b\r\n" % secret)
        else:
            reply = await wire.command(b"AUTH LOGIN\r\n")
            if reply.code == 334:
                reply = await wire.command(_b64(user) + b"\r\n")
            if reply.code == 334:
                reply = await wire.command(_b64(password) + b"\r\n")
        _expect(reply, "auth", 235)


def _b64(text: str) -> bytes:
    return binascii.b2a_base64(text.encode(), newline=False)


def _expect(reply: SmtpReply, step: str, code: int) -> None:
    if reply.code != code:
        raise SmtpRefused(SmtpOutcome(step, reply))


def _read_extensions(text: str) -> Extensions:
    offered: dict[str, list[str]] = {}
    for line in text.split("\n")[1:]:
        keyword, *parameters = line.upper().replace("=", " ").split() or [""]
        offered.setdefault(keyword, []).extend(parameters)
    size = offered.get("SIZE", ["0"])[:1] or ["0"]
    return Extensions(
        pipelining="PIPELINING" in offered,
        eight_bit_mime="8BITMIME" in offered,
        smtputf8="SMTPUTF8" in offered,
        starttls="STARTTLS" in offered,
        size=int(size[0]) if size[0].isdigit() else 0,
        auth=frozenset(offered.get("AUTH", ())),
    )


_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?=\s|$)")


def _read_reply(lines: list[bytes]) -> SmtpReply:
    text = "\n".join([line[4:].decode("utf-8", "replace").rstrip() for line in lines])
    enhanced = _ENHANCED.match(text)
    return SmtpReply(int(lines[-1][:3]), enhanced[1] if enhanced else None, text)


_STEPS = ("mail", "rcpt", "data")
_STEPS_AFTER_REFUSAL = ("rset", *_STEPS)
_FOLLOWED_BYTES = 65_536
"""No message goes out behind a longer text: what of it had left, could not be told from the other's
commands."""


class _Sending(Request["_SmtpWire", SmtpOutcome]):
    """A message on its way, and the reply that decides."""

    __slots__ = ("_make", "commands", "data")

    def __init__(
        self,
        make: Callable[[Extensions], Envelope],
        until: float,
        done: Callable[[SmtpOutcome | Exception], None],
    ) -> None:
        super().__init__(until, done)
        self._make = make
        self.commands: list[bytes] = []
        self.data = b""

    def begin(self, wire: _SmtpWire) -> bool:
        if not self.prepared(wire.extensions):
            return False
        wire.start(self)
        return True

    def prepared(self, offered: Extensions) -> bool:
        """Make the envelope, for a server that offers this; false where it can't be made."""
        try:
            envelope = self._make(offered)
            for address in (envelope.mail_from, envelope.rcpt_to):
                if not _ADDRESS.fullmatch(address):
                    raise InvalidInput("an envelope address would break the SMTP session")
        except Exception as error:
            self.end(error)
            return False
        mail = f"MAIL FROM:<{envelope.mail_from}>"
        if offered.size:
            mail += f" SIZE={len(envelope.data)}"
        if offered.eight_bit_mime and not envelope.data.isascii():
            mail += " BODY=8BITMIME"
        if envelope.smtputf8:
            mail += " SMTPUTF8"
        self.data = envelope.data
        self.commands = [f"{mail}\r\n".encode(), f"RCPT TO:<{envelope.rcpt_to}>\r\n".encode(),
                         b"DATA\r\n"]  # fmt: skip
        return True


class _SmtpWire(Wire):
    """A session: idle, in a command (opening), or in a message, perhaps with another behind it."""

    def __init__(
        self, pool: Pool[_SmtpWire], command_s: float, end_s: float, messages: int
    ) -> None:
        super().__init__()
        self.extensions = Extensions()
        self._pool = pool
        self._command_s = command_s
        self._end_s = end_s
        self._messages_left = messages
        self._buffer = b""
        self._lines: list[bytes] = []
        self._size = 0
        self._command: asyncio.Future[SmtpReply] | None = None
        self._opening = True
        self._unasked: list[SmtpReply] = []
        self._current: _Sending | None = None
        self._next: _Sending | None = None
        """Its commands went out behind the current one's dot, its text did not."""
        self._steps: tuple[str, ...] = _STEPS
        self._to_write: list[bytes] = []
        self._at = 0
        self._refused: SmtpOutcome | None = None
        self._ending = False
        self._in_transaction = False
        self._phase_until = 0.0
        self._reading = False
        self._free = False

    def command(self, line: bytes) -> asyncio.Future[SmtpReply]:
        """Send one command while the session is being opened; an empty one awaits the greeting."""
        future: asyncio.Future[SmtpReply] = self.loop.create_future()
        if not self.usable:
            future.set_exception(NotSent("connection-lost", "the SMTP server hung up"))
        elif not line and self._unasked:
            future.set_result(self._unasked.pop(0))
        else:
            self._command = future
            if line:
                self.write(line)
        return future

    def forget_plaintext(self) -> None:
        """What came before TLS may be an attacker's: having any is the end (RFC 3207)."""
        if self._buffer or self._lines or self._unasked:
            raise NotSent("tls-failed", "the SMTP server sent text before TLS began")

    def opened(self) -> None:
        """The session is ready: from now on an unasked reply is a good-bye."""
        self._opening = False
        if self._unasked:
            self.usable = False

    def start(self, message: _Sending) -> None:
        """Send a message's commands, or the first of them."""
        commands = message.commands
        if self._in_transaction:
            commands.insert(0, b"RSET\r\n")
        self._begin(message, _STEPS_AFTER_REFUSAL if self._in_transaction else _STEPS)
        if self.extensions.pipelining:
            self._to_write = []
            self.write(b"".join(commands))
        else:
            self._to_write = commands[1:]
            self.write(commands[0])
        self._phase(message, self._command_s)

    def _begin(self, message: _Sending, steps: tuple[str, ...]) -> None:
        self._current = message
        message.wire = self
        self._steps = steps
        self._at = 0
        self._refused = None
        self._ending = False
        self._messages_left -= 1
        self._in_transaction = True

    def _phase(self, message: _Sending, seconds: float) -> None:
        """A phase of the current message begins, and may take so long."""
        self._phase_until = min(message.until, self.loop.time() + seconds)
        self.busy_until(self._phase_until)

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > _LONGEST_REPLY:
            self._fail("malformed-answer")
            return
        if self._buffer:
            data = self._buffer + data
        lines = data.split(b"\n")
        self._buffer = lines.pop()
        self._reading = True
        for line in lines:
            self._lines.append(line)
            if line[3:4] == b"-":
                continue
            if not line[:3].isdigit() or len(line) < 3:
                self._fail("malformed-answer")
                break
            collected, self._lines = self._lines, []
            self._size = 0
            if self._current is not None and not self._ending:
                self._on_step(self._current, collected)
            else:
                self._on_reply(_read_reply(collected))
        self._reading = False
        if self._free:
            # Only now: what follows an answer unasked is a good-bye, not another message's reply.
            self._free = False
            self._pool.give(self)

    def _on_reply(self, reply: SmtpReply) -> None:
        if self._command is not None:
            command, self._command = self._command, None
            if not command.done():
                command.set_result(reply)
        elif self._current is None:
            if self._opening:
                self._unasked.append(reply)
            else:
                self.abort()
        else:
            self._on_end(reply)

    def _on_step(self, message: _Sending, lines: list[bytes]) -> None:
        step = self._steps[self._at]
        self._at += 1
        last = lines[-1]
        fine = last.startswith(b"354") if step == "data" else last.startswith(b"2")
        if not fine and self._refused is None:
            self._refused = SmtpOutcome(step, _read_reply(lines))
        if last.startswith(b"421"):
            self.usable = False
        elif step == "data" and fine and self._refused is not None:
            # RFC 2920, 3.1: it waits for a text that nobody may get. Hanging up ends that.
            self.usable = False
        if not self.usable or (self._refused is not None and self._to_write):
            self._settle(self._refused or SmtpOutcome(step, _read_reply(lines)))
        elif self._to_write:
            self.write(self._to_write.pop(0))
            self._phase(message, self._command_s)
        elif self._at == len(self._steps):
            if self._refused is not None:
                self._settle(self._refused)
            else:
                self._finish(message)

    def _finish(self, message: _Sending) -> None:
        """Send the text and its dot, and the commands of a message that waits."""
        self._ending = True
        self._next = following = self._following(message)
        if following is None:
            self.write(message.data + b".\r\n")
        else:
            self.write(b"%b.\r\n%b" % (message.data, b"".join(following.commands)))
        self._phase(message, self._end_s)
        if following is not None and following.until < self._phase_until:
            self.busy_until(following.until)

    def _following(self, message: _Sending) -> _Sending | None:
        """Who waits for a wire, where all are busy, and can go out behind this message."""
        if (
            not self.extensions.pipelining
            or self._messages_left <= 0
            or len(message.data) > _FOLLOWED_BYTES
        ):
            return None
        while (waiting := cast(_Sending | None, self._pool.next_request())) is not None:
            if waiting.prepared(self.extensions):
                return waiting
        return None

    def _on_end(self, reply: SmtpReply) -> None:
        self._in_transaction = False
        if reply.code == 421:
            self.usable = False
        if self.unsent and self._next is None:
            self.usable = False
            if 200 <= reply.code < 300:
                self._fail("malformed-answer")
                return
        self._settle(SmtpOutcome("end", reply))

    def eof_received(self) -> bool:
        self.usable = False
        return False

    def bye(self) -> None:
        if self.usable and self._current is None and not self._opening:
            self.write(b"QUIT\r\n")
        super().bye()

    def broken(self) -> None:
        self._fail("connection-lost")

    def expired(self) -> None:
        following = self._next
        if following is None or self.loop.time() >= self._phase_until - 0.001:
            self._fail("timeout")
        else:  # It stays where it is: the session ends before its text is asked for.
            following.end(NotSent("timeout", "the message before it took too long"))
            self.busy_until(self._phase_until)

    def _fail(self, reason: str) -> None:
        self.usable = False
        if self._command is not None:
            command, self._command = self._command, None
            if not command.done():
                command.set_exception(NotSent(reason, "the SMTP session could not be opened"))
        if self._current is None:
            self.abort()
        elif self._refused is not None:
            self._settle(self._refused)
        elif self._ending and (not self.unsent or self._next is not None):
            # With another's commands behind it, what has not left may be those alone.
            self._settle(InDoubt(reason, "the message left and no answer came"))
        else:
            self._settle(NotSent(reason, "the message did not leave whole"))

    def _settle(self, result: SmtpOutcome | NotSent | InDoubt) -> None:
        message, following = self._current, self._next
        if message is None:
            return
        self._current = self._next = None
        if following is not None and self.usable and not following.over:
            self._begin(following, _STEPS)
            self._phase(following, self._command_s)
        else:
            self.busy_until(0.0)
            if following is not None:
                self.usable = False
                following.end(NotSent("connection-lost", "the session ended before its turn"))
            if not self.usable:
                self.abort()
            elif self._messages_left <= 0:
                self.bye()
            if self._reading:
                self._free = True
            else:
                self._pool.give(self)
        message.end(result)
