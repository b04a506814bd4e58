"""What both kinds of provider connection share: answering late, slowly, or not at all."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from typing import Any, Protocol

_ESTABLISHED = 1
"""The state in ``struct tcp_info`` of a connection both of whose ends are open (tcp(7))."""


class OpenRequests(Protocol):
    """What a connection tells its server."""

    open: set[Any]
    connections: set[Any]

    def unanswered(self, send_ids: list[str], fault: str) -> None:
        """Accepted messages whose answer never left."""


def now_ms() -> int:
    """Epoch milliseconds."""
    return int(time.time() * 1000)


class Connection(asyncio.Protocol):
    """A server's end of a connection that handles one request after the other.

    A subclass sets ``busy`` before it hands a request on and implements :meth:`proceed`, which
    handles what is buffered until a request is busy. ``open_ids`` names the accepted messages
    that the open request has not been told about.
    """

    provider = ""

    def __init__(self, owner: OpenRequests) -> None:
        self._owner = owner
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.busy = False
        self.hung = False
        self.closing = False
        self.close_after = False
        self.started_ms = 0
        self.open_ids: list[str] = []
        self.hung_ids: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._in_proceed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client has connected."""
        self.transport = transport  # type: ignore[assignment]
        self._owner.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was dropped."""
        self.closing = True
        self._owner.connections.discard(self)
        self._owner.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.open_ids:
            self._owner.unanswered(self.open_ids, "client_left")
            self.open_ids = []

    def proceed(self) -> None:
        """Handle what is buffered, until a request is busy."""
        raise AssertionError(f"{type(self).__name__} must say how it proceeds")

    def answer_later(self, data: bytes, delay_s: float) -> None:
        """Answer the busy request after a delay."""
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.answer, data)

    def answer_slowly(self, data: bytes, chunk: int, interval_s: float) -> None:
        """Answer the busy request a few bytes at a time."""
        self.transport.write(data[:chunk])
        rest = data[chunk:]
        if rest:
            self._timer = asyncio.get_running_loop().call_later(
                interval_s, self.answer_slowly, rest, chunk, interval_s
            )
        else:
            self.answer(b"")

    def answer(self, data: bytes) -> None:
        """Answer the busy request now and go on with what came meanwhile."""
        self._timer = None
        if self.open_ids:
            # Whoever was stopped meanwhile writes to a client that may be gone long ago.
            if _has_left(self.transport):
                self._owner.unanswered(self.open_ids, "client_left")
            self.open_ids = []
        if data:
            self.transport.write(data)
        self.busy = False
        if self.close_after:
            self.closing = True
            self.transport.close()
        if not self._in_proceed:
            self.run()

    def close_gently(self) -> None:
        """Close once the client has read the answer, although it may still be sending."""
        self.closing = True
        if self.transport.can_write_eof():
            # Closing with unread input makes the kernel reset, and the answer would be lost.
            self.transport.write_eof()
            self._timer = asyncio.get_running_loop().call_later(2.0, self.transport.close)
        else:
            self.transport.close()

    def run(self) -> None:
        """Proceed, then tell the server whether a request is open."""
        self._in_proceed = True
        try:
            self.proceed()
        finally:
            self._in_proceed = False
        if self.is_open and not self.closing:
            self._owner.open.add(self)
        else:
            self._owner.open.discard(self)

    @property
    def is_open(self) -> bool:
        """Whether a request has begun and has no answer."""
        return self.busy

    def hang(self) -> None:
        """Never answer; what the client still sends is thrown away until it leaves."""
        self.busy = True
        self.hung = True
        self.open_ids = []

    def reset(self) -> None:
        """Close with a TCP reset."""
        self.closing = True
        self.busy = True
        self.open_ids = []
        pseudo = self.transport.get_extra_info("socket")
        if pseudo is not None:
            with socket.socket(fileno=os.dup(pseudo.fileno())) as duplicate:
                duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def _has_left(transport: asyncio.BaseTransport) -> bool:
    """Whether the client has closed its end, although the loop may not have seen it yet."""
    pseudo = transport.get_extra_info("socket")
    if pseudo is None or transport.is_closing():
        return True
    try:
        state: int = pseudo.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return True
    return state != _ESTABLISHED
