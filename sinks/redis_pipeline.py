"""One connection to Redis for an event loop, with many commands on their way at once.

redis-py takes a connection out of its pool for each command and sets three timers: 110 µs a call
(m), of which a delivery loop makes a hundred for a thousand messages. Here commands that come
together leave in one write, answers are handed out in their order, and one timer watches the
oldest. Dialling, TLS and login are redis-py's, and so are the names of errors; answers are read by
hiredis as they arrive. The connection is made at the first command, and again at the next one after
it broke. No command is ever repeated.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import Any

import hiredis
import redis.asyncio
from redis._parsers.base import BaseParser
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as Late

_MORE = object()
"""An answer that is not whole yet."""


def _error_of(text: str) -> Exception:
    """An error that Redis answered, as redis-py names it."""
    named: Any = BaseParser
    error: Exception = named.parse_error(text)
    return error


class PipelinedRedis:
    """Belongs to one event loop. ``timeout`` is of a command, and of connecting."""

    def __init__(self, url: str, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()
        self._maker: Any = redis.asyncio.ConnectionPool.from_url(
            url,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
        )
        self._session: _Session | None = None
        self._closed = False

    async def execute_command(self, *words: bytes | str | int | float) -> Any:
        """The answer to a command. Errors are redis-py's: whatever is no ``ResponseError`` leaves
        it open whether the command was carried out."""
        if self._closed:
            raise Broken("the client is closed")
        session = self._session
        if session is None or session.over:
            session = self._session = _Session(self._maker.make_connection(), self._timeout_s)
        packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # one word is meant
        return await session.submit(packed)

    async def disconnect(self) -> None:
        """Break the connection; the next command makes another."""
        session, self._session = self._session, None
        if session is not None:
            session.end(Broken("the client is disconnected"))
            await asyncio.wait([session.task])

    async def aclose(self) -> None:
        """Break the connection for good. Idempotent."""
        self._closed = True
        await self.disconnect()


class _Session(asyncio.Protocol):
    """One connection, from before it is made until it breaks."""

    def __init__(self, connection: Any, timeout_s: float) -> None:
        self.over = False
        self._connection = connection
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[float, asyncio.Future[Any]]] = deque()
        """When each command is late, and its answer; in the order in which they were sent."""
        self._unsent: list[bytes] = []
        self._transport: asyncio.WriteTransport | None = None
        self._reader = hiredis.Reader(replyError=_error_of, notEnoughData=_MORE)
        self._timer: asyncio.TimerHandle | None = None
        self.task = self._loop.create_task(self._connect())

    def submit(self, command: bytes) -> asyncio.Future[Any]:
        """Send a command."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        late = self._loop.time() + self._timeout_s
        self._waiting.append((late, answer))
        if not self._unsent and self._transport is not None:
            self._loop.call_soon(self._flush)
        self._unsent.append(command)
        if self._timer is None:
            self._timer = self._loop.call_at(late, self._look)
        return answer

    def end(self, error: Exception) -> None:
        """Give up: whoever waits does not know whether its command was carried out."""
        if self.over:
            return
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
        for _, answer in self._waiting:
            if not answer.done():
                answer.set_exception(copy.copy(error))
        self._waiting.clear()
        self._unsent.clear()
        self._drop()
        self.task.cancel()

    def _look(self) -> None:
        """End where the oldest command is late."""
        self._timer = None
        if not self._waiting:
            return
        late, _ = self._waiting[0]
        if late <= self._loop.time() + 0.001:
            self.end(Late(f"no answer within {self._timeout_s:g} s"))
        else:
            self._timer = self._loop.call_at(late, self._look)

    async def _connect(self) -> None:
        """Have redis-py connect and log in; what is read then comes here."""
        try:
            await self._connection.connect()
        except BaseException as error:
            self.end(error if isinstance(error, Exception) else Broken("connecting was given up"))
            with suppress(Exception):
                await self._connection.disconnect(nowait=True)
            if not isinstance(error, Exception):
                raise
            return
        # Who reads from here on is not told of an end that was read already.
        ended = self._connection._reader.at_eof()
        self._transport = self._connection._writer.transport
        self._transport.set_protocol(self)
        if self.over:  # a cancellation that came while the last word was sent is not heard
            self._drop()
        elif ended or self._transport.is_closing():
            self.end(Broken("Redis closed the connection"))
        else:
            self._flush()

    def _drop(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._connection._close()  # redis-py would warn that it was forgotten

    def _flush(self) -> None:
        if self._transport is not None and self._unsent:
            together = b"".join(self._unsent)
            self._unsent.clear()
            self._transport.write(together)

    def data_received(self, data: bytes) -> None:
        """Hand out the answers that are whole."""
        if self.over:
            return
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        while True:
            try:
                answer = reader.gets()
            except hiredis.HiredisError as error:
                self.end(Broken(f"what Redis said can't be read: {error}"))
                return
            if answer is _MORE:
                return
            if not waiting:
                self.end(Broken("Redis answered what nobody had asked"))
                return
            if isinstance(answer, RedisError) and not isinstance(answer, ResponseError):
                self.end(answer)  # it is loading, say: nothing behind it is answered otherwise
                return
            _, asked = waiting.popleft()
            if asked.done():
                continue
            if isinstance(answer, ResponseError):
                asked.set_exception(answer)
            else:
                asked.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody answers any more."""
        self.end(Broken(f"the connection to Redis broke: {exc or 'it was closed'}"))
