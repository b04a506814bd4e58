"""An SMTP server (RFC 5321) with the extensions that senders of much mail use.

PIPELINING, SIZE, 8BITMIME, SMTPUTF8, ENHANCEDSTATUSCODES; STARTTLS with a certificate; AUTH
PLAIN and LOGIN with credentials. Our id is in ``X-Fanfare-Send-Id``, else it is the left part of
the Message-ID; run, tenant, leg and reference are in ``X-Fanfare-Run``, ``-Tenant``, ``-Leg`` and
``-Ref``.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import ssl
from typing import TYPE_CHECKING

from stack.simulator.connection import Connection, now_ms
from stack.simulator.faults import UNANSWERED, Fault, FaultKind

if TYPE_CHECKING:
    from stack.simulator.provider import Simulator

HOSTNAME = "smtp.fanfare.invalid"
MAX_LINE_BYTES = 4096

_MAIL = re.compile(rb"MAIL FROM: ?<([^<>]*)>((?: [^ ]+)*) *", re.IGNORECASE)
_RCPT = re.compile(rb"RCPT TO: ?<([^<>]+)>((?: [^ ]+)*) *", re.IGNORECASE)


def header(head: bytes, name: bytes) -> str:
    """The unfolded value of a header in ``head`` (which begins with CRLF); '' if absent."""
    at = head.lower().find(b"\r\n" + name + b":")
    if at < 0:
        return ""
    at += len(name) + 3
    end = head.find(b"\r\n", at)
    while end >= 0 and head[end + 2 : end + 3] in (b" ", b"\t"):
        end = head.find(b"\r\n", end + 2)
    value = head[at:] if end < 0 else head[at:end]
    return value.replace(b"\r\n", b"").strip().decode("utf-8", "replace")


_ARGUMENT_HEADERS = (
    ("ff_tenant", b"x-fanfare-tenant"),
    ("ff_leg", b"x-fanfare-leg"),
    ("ff_ref", b"x-fanfare-ref"),
)


class SmtpConnection(Connection):
    """One client's connection to the SMTP provider."""

    provider = "smtp"

    def __init__(self, simulator: Simulator) -> None:
        super().__init__(simulator)
        self._simulator = simulator
        self._buffer = bytearray()
        self._replies: list[bytes] = []
        self._greeted = False
        self._extended = False
        self._secure = False
        self._user: str | None = None
        self._login: list[str] | None = None
        self._messages = 0
        self._in_data = False
        self._searched = 0
        self._skipping = False
        self._fault: Fault | None = None
        self._clear()

    def _clear(self) -> None:
        self._sender: str | None = None
        self._recipients: list[str] = []
        self._utf8 = False
        self.started_ms = 0

    def _abandon(self) -> None:
        """End a transaction that came to no message; its start counts, its run is unknown."""
        if self.started_ms:
            self._simulator.starts.add("", self.started_ms)
        self._clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet, unless there are too many connections or no service."""
        simulator = self._simulator
        settings = simulator.config.smtp
        others = sum(1 for other in simulator.connections if isinstance(other, SmtpConnection))
        super().connection_made(transport)
        if settings.max_connections is not None and others >= settings.max_connections:
            simulator.refuse("", "too_many_connections")
            self._bye(b"421 4.7.0 too many connections")
            self._send()
        elif not (simulator.smtp_outage and simulator.outage(settings.outage, "", self)):
            self._replies.append(f"220 {HOSTNAME} ESMTP ready\r\n".encode())
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a message that never became whole."""
        if self._in_data and not self.closing:
            self._simulator.refuse("", "incomplete")
        self._abandon()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self.hung or self.closing:
            return
        self._buffer += data
        if not self.busy:
            self.run()

    @property
    def is_open(self) -> bool:
        """Whether a message has begun and has no answer."""
        return self.busy or self._sender is not None

    def _send(self) -> None:
        if self._replies:
            data = b"".join(self._replies)
            self._replies.clear()
            self.transport.write(data)

    def _reply(self, line: bytes) -> None:
        self._replies.append(line + b"\r\n")

    def _bye(self, line: bytes) -> None:
        self._reply(line)
        self._send()
        self.close_gently()

    def proceed(self) -> None:
        """Follow commands and take messages, collecting the replies of a pipeline."""
        while not self.busy and not self.closing:
            if self._in_data:
                if not self._take_data():
                    break
                continue
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > MAX_LINE_BYTES:
                    self._bye(b"500 5.5.2 line too long")
                break
            line = bytes(self._buffer[:end]).rstrip(b"\r")
            del self._buffer[: end + 1]
            if len(line) > MAX_LINE_BYTES:
                self._reply(b"500 5.5.2 line too long")
            elif self._login is not None:
                self._continue_login(line)
            else:
                self._command(line)
        if not self.closing:
            self._send()

    def _command(self, line: bytes) -> None:
        verb = line[:4].upper()
        if verb == b"MAIL":
            self._mail(line)
        elif verb == b"RCPT":
            self._rcpt(line)
        elif verb == b"DATA":
            self._data(line)
        elif verb in (b"EHLO", b"HELO"):
            self._hello(verb, line)
        elif verb == b"RSET":
            self._abandon()
            self._reply(b"250 2.0.0 Ok")
        elif verb == b"NOOP":
            self._reply(b"250 2.0.0 Ok")
        elif verb == b"QUIT":
            self._bye(b"221 2.0.0 Bye")
        elif line.upper() == b"STARTTLS":
            self._starttls()
        elif verb == b"AUTH":
            self._auth(line)
        elif verb == b"VRFY":
            self._reply(b"252 2.0.0 send some mail, I'll try")
        elif verb == b"HELP":
            self._reply(b"214 2.0.0 see RFC 5321")
        else:
            self._reply(b"500 5.5.2 command not recognised")

    def _hello(self, verb: bytes, line: bytes) -> None:
        if not line[4:].strip():
            self._reply(b"501 5.5.4 the name of the client is missing")
            return
        self._abandon()
        self._greeted = True
        self._extended = verb == b"EHLO"
        if not self._extended:
            self._reply(b"250 " + HOSTNAME.encode())
            return
        simulator = self._simulator
        lines = [
            HOSTNAME.encode(),
            b"PIPELINING",
            b"SIZE %d" % simulator.config.smtp.max_message_bytes,
            b"8BITMIME",
            b"SMTPUTF8",
            b"ENHANCEDSTATUSCODES",
        ]
        if simulator.tls is not None and not self._secure:
            lines.append(b"STARTTLS")
        if simulator.smtp_users:
            lines.append(b"AUTH PLAIN LOGIN")
        for extension in lines[:-1]:
            self._reply(b"250-" + extension)
        self._reply(b"250 " + lines[-1])

    def _parameters(self, raw: bytes) -> dict[str, str]:
        found = {}
        for word in raw.split():
            name, _, value = word.decode("latin-1").partition("=")
            found[name.upper()] = value
        return found

    def _address(self, raw: bytes) -> str | None:
        """The address, or None after a reply that says why not."""
        try:
            address = raw.decode("utf-8")
        except UnicodeDecodeError:
            self._reply(b"553 5.1.3 the address is not UTF-8")
            return None
        if not address.isascii() and not self._utf8:
            self._reply(b"553 5.6.7 the address needs SMTPUTF8")
            return None
        return address

    def _mail(self, line: bytes) -> None:
        simulator = self._simulator
        settings = simulator.config.smtp
        if not self._greeted:
            self._reply(b"503 5.5.1 say EHLO first")
            return
        if simulator.smtp_users and self._user is None:
            simulator.refuse("", "unauthorized")
            self._reply(b"530 5.7.0 authentication required")
            return
        if self._sender is not None:
            self._reply(b"503 5.5.1 a message has begun already")
            return
        match = _MAIL.fullmatch(line)
        if match is None:
            self._reply(b"501 5.5.4 syntax: MAIL FROM:<address>")
            return
        started = now_ms()
        parameters = self._parameters(match[2])
        for name in parameters:
            if name not in ("SIZE", "BODY", "SMTPUTF8", "AUTH"):
                self._reply(b"555 5.5.4 unknown parameter")
                return
        size = parameters.get("SIZE", "0")
        if not (size.isascii() and size.isdigit()):
            self._reply(b"501 5.5.4 SIZE is not a number")
            return
        self._utf8 = "SMTPUTF8" in parameters
        address = self._address(match[1])
        if address is None:
            return
        if simulator.smtp_outage and simulator.outage(settings.outage, "", self):
            simulator.starts.add("", started)
            return
        allowed = settings.max_messages_per_connection
        if allowed is not None and self._messages >= allowed:
            simulator.starts.add("", started)
            simulator.refuse("", "too_many_messages")
            self._bye(b"421 4.7.0 too many messages in this connection")
            return
        if int(size) > settings.max_message_bytes:
            simulator.starts.add("", started)
            simulator.refuse("", "too_large")
            self._reply(b"552 5.3.4 the message is too large")
            return
        limit = simulator.limiter.take(settings.rate_limit, f"smtp:{self._user or ''}", started)
        if limit is not None and not limit.allowed:
            simulator.starts.add("", started)
            simulator.refuse("", "rate_limited")
            self._reply(b"451 4.7.1 rate limit exceeded, try again later")
            return
        self._sender = address
        self.started_ms = started
        self._reply(b"250 2.1.0 Ok")

    def _rcpt(self, line: bytes) -> None:
        simulator = self._simulator
        settings = simulator.config.smtp
        if self._sender is None:
            self._reply(b"503 5.5.1 MAIL first")
            return
        match = _RCPT.fullmatch(line)
        if match is None:
            self._reply(b"501 5.5.4 syntax: RCPT TO:<address>")
            return
        address = self._address(match[1])
        if address is None:
            return
        if "@" not in address:
            self._reply(b"501 5.1.3 the address has no domain")
            return
        if len(self._recipients) >= settings.max_recipients:
            self._reply(b"452 4.5.3 too many recipients")
            return
        rule = simulator.smtp_rules.match(address) if simulator.smtp_rules else None
        if rule is not None and rule.action == "reject":
            simulator.refuse("", "rule")
            enhanced = "4.1.1" if rule.smtp_code < 500 else "5.1.1"
            message = rule.message.encode("ascii", "replace").replace(b"\n", b" ")
            self._reply(f"{rule.smtp_code} {enhanced} ".encode() + message.replace(b"\r", b" "))
            return
        code = simulator.draw_rcpt()
        if code:
            simulator.count_fault("smtp.rcpt_error")
            simulator.refuse("", f"rcpt_{code}")
            self._reply(b"%d %d.2.1 simulated refusal" % (code, code // 100))
            return
        self._recipients.append(address)
        self._reply(b"250 2.1.5 Ok")

    def _data(self, line: bytes) -> None:
        if len(line.strip()) != 4:
            self._reply(b"501 5.5.4 syntax: DATA")
        elif self._sender is None:
            self._reply(b"503 5.5.1 MAIL first")
        elif not self._recipients:
            # The transaction is over: a pipelining client goes on with the next MAIL.
            self._abandon()
            self._reply(b"554 5.5.1 no valid recipients")
        else:
            self._in_data = True
            self._searched = 0
            self._skipping = False
            self._fault = self._simulator.smtp_faults.draw(self._simulator.rng)
            self._reply(b"354 End data with <CR><LF>.<CR><LF>")

    def _take_data(self) -> bool:
        """Take the message if it is whole; False to wait for more."""
        buffer = self._buffer
        fault = self._fault
        if not self._skipping and buffer.startswith(b".\r\n"):
            raw, used = b"", 3
        else:
            end = buffer.find(b"\r\n.\r\n", max(0, self._searched - 4))
            if end < 0:
                self._searched = len(buffer)
                if fault is not None and fault.kind is FaultKind.RESET_BEFORE and buffer:
                    self._strike_before(fault, "")
                elif len(buffer) > self._simulator.config.smtp.max_message_bytes:
                    self._skipping = True
                    del buffer[:-4]
                    self._searched = len(buffer)
                return False
            raw, used = bytes(buffer[: end + 2]), end + 5
        del buffer[:used]
        self._in_data = False
        if self._skipping or len(raw) > self._simulator.config.smtp.max_message_bytes:
            self._simulator.refuse("", "too_large")
            self._abandon()
            self._reply(b"552 5.3.4 the message is too large")
            return True
        if b"\r\n." in raw or raw.startswith(b"."):
            raw = raw.replace(b"\r\n..", b"\r\n.")
            raw = raw[1:] if raw.startswith(b"..") else raw
        self._message(raw)
        return True

    def _message(self, raw: bytes) -> None:
        simulator = self._simulator
        settings = simulator.config.smtp
        fault, self._fault = self._fault, None
        end = raw.find(b"\r\n\r\n")
        head = b"\r\n" + (raw if end < 0 else raw[:end])
        run = header(head, b"x-fanfare-run")
        simulator.starts.add(run, self.started_ms)
        smtp_id = header(head, b"message-id")
        send_id = header(head, b"x-fanfare-send-id")
        if not send_id and smtp_id.startswith("<"):
            send_id = smtp_id[1:].partition("@")[0]
        recipients = self._recipients
        self._clear()
        if fault is not None and self._strike_before(fault, run):
            return
        self._messages += 1
        message_id = simulator.next_message_id()
        arguments = {"ff_send_id": send_id, "ff_run": run}
        for argument, name in _ARGUMENT_HEADERS:
            if value := header(head, name):
                arguments[argument] = value
        label = fault.kind.value if fault is not None and fault.kind in UNANSWERED else None
        known = simulator.accept(
            send_id=send_id,
            run=run,
            address=recipients[0],
            at_ms=now_ms(),
            provider=self.provider,
            message_id=message_id,
            index=0,
            arguments=arguments,
            fault=label,
            body=raw,
            smtp_id=smtp_id,
        )
        answer = b"250 2.0.0 Ok: queued as " + message_id.encode() + b"\r\n"
        latency = simulator.smtp_latency
        if fault is None and latency is None:
            self._replies.append(answer)
            return
        self._send()
        self.busy = True
        self.open_ids = [known]
        simulator.finish(self, fault, answer, settings.faults, latency, _code_answer)

    def _strike_before(self, fault: Fault, run: str) -> bool:
        """Strike with a fault that comes before acceptance; False if it comes after."""
        simulator = self._simulator
        match fault.kind:
            case FaultKind.ERROR:
                simulator.struck(fault, self.provider)
                simulator.refuse(run, f"error_{fault.status}")
                latency = simulator.smtp_latency
                self._send()
                self.busy = True
                if latency is None:
                    self.answer(_code_answer(fault.status))
                else:
                    self.answer_later(_code_answer(fault.status), latency(simulator.rng))
            case FaultKind.HANG_BEFORE:
                simulator.struck(fault, self.provider)
                simulator.refuse(run, "hang_before")
                self._send()
                self.hang()
            case FaultKind.RESET_BEFORE:
                self._abandon()
                simulator.struck(fault, self.provider)
                simulator.refuse(run, "reset_before")
                self.reset()
            case _:
                return False
        return True

    def _starttls(self) -> None:
        tls = self._simulator.tls
        if tls is None or self._secure:
            self._reply(b"502 5.5.1 STARTTLS is not offered")
            return
        self._reply(b"220 2.0.0 ready to start TLS")
        self._send()
        # What came in clear after STARTTLS could be injected by a third party (RFC 3207, 6).
        self._buffer.clear()
        self._greeted = False
        self._user = None
        self._abandon()
        self.busy = True
        self._simulator.spawn(self._upgrade(tls))

    async def _upgrade(self, tls: ssl.SSLContext) -> None:
        try:
            transport = await asyncio.get_running_loop().start_tls(
                self.transport, self, tls, server_side=True
            )
        except (OSError, asyncio.CancelledError):
            self.closing = True
            self.transport.abort()
            return
        if transport is not None:
            self.transport = transport
        self._secure = True
        self.busy = False
        self.run()

    def _auth(self, line: bytes) -> None:
        words = line.split()
        if not self._simulator.smtp_users:
            self._reply(b"502 5.5.1 AUTH is not offered")
        elif not self._extended or self._user is not None or self._sender is not None:
            self._reply(b"503 5.5.1 AUTH is not possible now")
        elif len(words) in (2, 3) and words[1].upper() == b"PLAIN":
            if len(words) == 3:
                self._plain(words[2])
            else:
                self._login = ["PLAIN"]
                self._reply(b"334 ")
        elif len(words) in (2, 3) and words[1].upper() == b"LOGIN":
            self._login = ["LOGIN"]
            if len(words) == 3:
                self._continue_login(words[2])
            else:
                self._reply(b"334 VXNlcm5hbWU6")
        else:
            self._reply(b"504 5.5.4 mechanism not known")

    def _decode(self, word: bytes) -> str | None:
        try:
            return base64.b64decode(word, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return None

    def _plain(self, word: bytes) -> None:
        parts = (self._decode(word) or "").split("\0")
        if len(parts) != 3:
            self._reply(b"501 5.5.2 the credentials can't be read")
        else:
            self._authenticate(parts[1], parts[2])

    def _continue_login(self, line: bytes) -> None:
        state = self._login or []
        if line == b"*":
            self._login = None
            self._reply(b"501 5.7.0 cancelled")
        elif state == ["PLAIN"]:
            self._login = None
            self._plain(line)
        elif (word := self._decode(line)) is None:
            self._login = None
            self._reply(b"501 5.5.2 the credentials can't be read")
        elif len(state) == 1:
            self._login = [*state, word]
            self._reply(b"334 UGFzc3dvcmQ6")
        else:
            self._login = None
            self._authenticate(state[1], word)

    def _authenticate(self, user: str, password: str) -> None:
        if self._simulator.smtp_users.get(user) == password:
            self._user = user
            self._reply(b"235 2.7.0 authenticated")
        else:
            self._simulator.refuse("", "unauthorized")
            self._reply(b"535 5.7.8 the credentials are wrong")


def _code_answer(code: int) -> bytes:
    return b"%d %d.3.0 simulated reply\r\n" % (code, code // 100)
