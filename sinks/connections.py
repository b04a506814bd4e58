"""Connections to providers: dialling, a pool with a fair queue, and what is known when one breaks.

After a break there is one question: can the server have accepted something? A request of which
the last byte is still here cannot have been; one that has left entirely may have been. Sockets
answer it: the transports' write buffer limit is zero, so `unsent` is true exactly while bytes
are waiting in this process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import select
import socket
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

from schemas.errors import Unavailable


class NotSent(Unavailable):
    """The request never left whole: nothing was accepted. `reason` is a stable word."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class InDoubt(Unavailable):
    """The request left and no usable answer came. `reason` is a stable word."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Wire(asyncio.Protocol):
    """One connection, used by one request at a time.

    Subclasses call `busy_until` when a phase begins and implement `expired` (the phase took too
    long) and `broken` (the connection is gone).
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.usable = True
        self.unsent = False
        self.on_gone: Callable[[Wire], None] | None = None
        self.idle_since = self.loop.time()
        self._limit = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.gone = False
        """Whether there is no connection any more."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there (with TLS: its handshake is done)."""
        self.attach(cast(asyncio.Transport, transport))

    def attach(self, transport: asyncio.Transport) -> None:
        """Use this transport from now on (a new one after STARTTLS)."""
        self.transport = transport
        secure = transport.get_extra_info("ssl_object") is not None
        # TLS transports pause at the limit, plain ones above it.
        transport.set_write_buffer_limits(high=1 if secure else 0, low=0)
        self._poll = select.poll()
        raw = transport.get_extra_info("socket")
        # TLS has things of its own to say on an idle connection (session tickets).
        events = select.POLLRDHUP if secure else select.POLLRDHUP | select.POLLIN
        self._poll.register(raw.fileno(), events)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            self.usable = False

    def pause_writing(self) -> None:
        """Some bytes of what was written have not left this process."""
        self.unsent = True

    def resume_writing(self) -> None:
        """All bytes have left this process."""
        self.unsent = False

    def write(self, data: bytes) -> None:
        """Write; what fails at once has not left whole either."""
        self.transport.write(data)
        if self.transport.is_closing():
            self.unsent = True

    def fresh(self, idle: float) -> bool:
        """Whether an idle connection can carry a request: alive, silent and not too old.

        Looks at the socket itself: the loop may not have been told yet that the server closed.
        Anything to read on an idle connection makes it unusable (with TLS: its end does).
        """
        if not self.usable or self.loop.time() - self.idle_since > idle:
            return False
        return not self._poll.poll(0)

    def busy_until(self, limit: float) -> None:
        """Have `expired` called at `limit` (loop time) unless it is moved; 0 means never.

        The timer is left running between requests and moved only towards earlier times, so that
        most requests set none.
        """
        self._limit = limit
        if limit and (self._timer is None or limit < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(limit, self._on_timer)
            self._timer_at = limit

    def _on_timer(self) -> None:
        self._timer = None
        limit = self._limit
        if not limit:
            return
        if self.loop.time() >= limit - 0.001:
            self.expired()
        else:
            self.busy_until(limit)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever closed it."""
        self.gone = True
        self.usable = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.broken()
        if self.on_gone is not None:
            self.on_gone(self)

    def abort(self) -> None:
        """Close at once, without a good-bye."""
        self.usable = False
        if not self.gone:  # some versions of asyncio can't abort TLS that has ended
            self.transport.abort()

    def bye(self) -> None:
        """Close after what is buffered has left."""
        self.usable = False
        self.transport.close()

    def expired(self) -> None:
        """The current phase has taken longer than it may."""
        raise AssertionError("a wire with a limit implements expired")

    def broken(self) -> None:
        """The connection is gone."""
        raise AssertionError("a wire implements broken")


W = TypeVar("W", bound=Wire)
A = TypeVar("A")


Done = Callable[[A | Exception], None]


class Request(ABC, Generic[W, A]):
    """What wants a wire until its deadline (loop time). `done` hears of its end once.

    A callback, not a future: a task for each message would cost a tenth of what sending it does.
    """

    __slots__ = ("_done", "over", "until", "wire")

    def __init__(self, until: float, done: Done[A]) -> None:
        self.until = until
        self.over = False
        """Nobody waits for it any more."""
        self.wire: W | None = None
        """The wire that it has for itself at present."""
        self._done = done

    @abstractmethod
    def begin(self, wire: W) -> bool:
        """Go out on a wire; false where it does not, after its end."""

    def end(self, result: A | Exception) -> None:
        """It has its answer, or will have none."""
        self.wire = None
        if not self.over:
            self.over = True
            self._done(result)

    def cancel(self) -> None:
        """Wait no more. The wire that it has breaks: what is on it is in doubt."""
        self.over = True
        if self.wire is not None:
            self.wire.abort()


async def awaited(start: Callable[[Done[A]], Callable[[], None]]) -> A:
    """The answer of what is started with a callback and says how it is cancelled."""
    answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()

    def done(result: A | Exception) -> None:
        if answer.done():
            return
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    cancel = start(done)
    try:
        return await answer
    except asyncio.CancelledError:
        cancel()
        raise


class Pool(Generic[W]):
    """At most `size` wires; requests that come when all are busy go out in turn."""

    def __init__(
        self, connect: Callable[[float], Awaitable[W]], size: int, idle: timedelta
    ) -> None:
        self.size = size
        self._connect = connect
        self._idle_s = idle.total_seconds()
        self._idle: list[W] = []
        self._all: set[W] = set()
        self._open = 0
        self._waiting: deque[Request[W, Any]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._dials: set[asyncio.Task[None]] = set()
        self._closed = False

    def submit(self, request: Request[W, Any]) -> None:
        """Have a request go out on a fresh wire, now or when one is free.

        It fails with `NotSent` where there is none by its deadline or the pool is closed, or with
        what dialling raised.
        """
        if self._closed:
            request.end(_closed())
            return
        idle = self._idle
        while idle:
            wire = idle.pop()
            if wire.fresh(self._idle_s):
                if not request.begin(wire):
                    idle.append(wire)
                return
            self._open -= 1
            wire.abort()
        if self._open < self.size:
            self._open += 1
            self._dial(request)
        else:
            self._waiting.append(request)
            self._watch(request.until)

    def next_request(self) -> Request[W, Any] | None:
        """The request that has waited longest: whoever asks must have it go out."""
        waiting = self._waiting
        while waiting:
            request = waiting.popleft()
            if not request.over:
                return request
        return None

    def give(self, wire: W) -> None:
        """Give a wire back; one that is not `usable` makes room for another."""
        wire.idle_since = wire.loop.time()
        while (request := self.next_request()) is not None:
            if not wire.fresh(self._idle_s):
                if wire.usable:
                    wire.abort()
                self._dial(request)
                return
            if request.begin(wire):
                return
        if wire.usable and not self._closed:
            self._idle.append(wire)
        else:
            self._open -= 1

    async def close(self) -> None:
        """Close every wire; who waits is told so. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            request.end(_closed())
        self._idle.clear()
        for dial in self._dials:
            dial.cancel()
        for wire in list(self._all):
            wire.bye()
        for _ in range(100):
            if not self._all and not self._dials:
                return
            await asyncio.sleep(0.01)
        for wire in list(self._all):
            wire.abort()

    def _watch(self, until: float) -> None:
        """One timer for all who wait: it is moved only towards earlier times."""
        if self._timer is None or until < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(until, self._expire)
            self._timer_at = until

    def _expire(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time() + 0.001
        for request in tuple(self._waiting):
            if request.until <= now:
                request.end(NotSent("queue-timeout", "all connections were busy"))
        self._waiting = deque(one for one in self._waiting if not one.over)
        if self._waiting:
            self._watch(min(request.until for request in self._waiting))

    def _dial(self, request: Request[W, Any]) -> None:
        """Open a wire, in a place that is taken already, for a request."""
        task = asyncio.get_running_loop().create_task(self._dialled(request))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)

    async def _dialled(self, request: Request[W, Any]) -> None:
        try:
            wire = await self._connect(request.until)
        except BaseException as error:
            self._make_room()
            request.end(error if isinstance(error, Exception) else _closed())
            if not isinstance(error, Exception):
                raise
            return
        self._all.add(wire)
        wire.on_gone = self._gone
        if self._closed or not wire.usable:
            wire.abort()
            self._all.discard(wire)
            self._make_room()
            lost = NotSent("connection-lost", "the server closed the new connection")
            request.end(_closed() if self._closed else lost)
        elif request.over or not request.begin(wire):
            self.give(wire)

    def _make_room(self) -> None:
        """A place is free: for who waits longest, if anybody does."""
        request = None if self._closed else self.next_request()
        if request is None:
            self._open -= 1
        else:
            self._dial(request)

    def _gone(self, wire: Wire) -> None:
        self._all.discard(cast(W, wire))
        if wire in self._idle:
            self._idle.remove(wire)
            self._make_room()


def _closed() -> NotSent:
    return NotSent("closed", "the client is closed")


P = TypeVar("P", bound=asyncio.Protocol)
_RESOLVED_FOR_S = 30.0


class Endpoint:
    """Where a provider is. Names are resolved here and the checked address is what is dialled.

    With `allow_private` false, addresses that are not globally reachable are refused, in every
    spelling: a name that resolves to one, an IPv4 address inside an IPv6 one (OWASP, server-side
    request forgery prevention).
    """

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext | None, *, allow_private: bool
    ) -> None:
        self.host = host
        self.port = port
        self.tls = tls
        self._allow_private = allow_private
        self._addresses: list[str] = []
        self._resolved_at = 0.0
        self._turn = 0
        self._resolving = asyncio.Lock()

    async def dial(self, make: Callable[[], P], until: float) -> P:
        """Connect (and shake hands, when there is TLS) to one of the addresses.

        Raises:
            NotSent: reason `connect-timeout`, `connect-failed`, `name-not-found`,
                `address-not-allowed`, `certificate-refused` or `tls-failed`.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(until):
                addresses = await self._resolve(loop)
                self._turn += 1
                failure = ""
                for offset in range(len(addresses)):
                    address = addresses[(self._turn + offset) % len(addresses)]
                    try:
                        _, protocol = await loop.create_connection(
                            make,
                            address,
                            self.port,
                            ssl=self.tls,
                            server_hostname=self.host if self.tls is not None else None,
                        )
                    except ssl.SSLCertVerificationError as error:
                        raise NotSent("certificate-refused", error.verify_message) from None
                    except ssl.SSLError as error:
                        raise NotSent("tls-failed", error.reason or "") from None
                    except OSError as error:
                        failure = error.strerror or type(error).__name__
                        continue
                    return protocol
                raise NotSent("connect-failed", failure)
        except TimeoutError:
            raise NotSent("connect-timeout", f"{self.host}:{self.port}") from None

    async def _resolve(self, loop: asyncio.AbstractEventLoop) -> list[str]:
        if self._addresses and loop.time() - self._resolved_at < _RESOLVED_FOR_S:
            return self._addresses
        async with self._resolving:  # hundreds of wires dial at once when a campaign begins
            if self._addresses and loop.time() - self._resolved_at < _RESOLVED_FOR_S:
                return self._addresses
            return await self._look_up(loop)

    async def _look_up(self, loop: asyncio.AbstractEventLoop) -> list[str]:
        try:
            found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            if self._addresses:
                self._resolved_at = loop.time()
                return self._addresses
            raise NotSent("name-not-found", self.host) from None
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not self._allow_private:
            addresses = [address for address in addresses if is_global(address)]
            if not addresses:
                raise NotSent("address-not-allowed", f"{self.host} is no public address")
        self._addresses, self._resolved_at = addresses, loop.time()
        return addresses


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_global(address: str) -> bool:
    """Whether an IP address is publicly reachable, also as the IPv4 address that it wraps."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast
