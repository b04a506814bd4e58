"""One connection to Redis for an event loop, with many commands on their way at once.

redis-py takes a connection out of its pool for each command and sets three timers: 110 µs a call
(m), of which a delivery loop makes a hundred for a thousand messages. Here commands that come
together leave in one write, answers are handed out in their order, and one timer watches the
oldest. Dialling, TLS, login and reading are redis-py's; the connection is made at the first
command, and again at the next one after it broke. No command is ever repeated.
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
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as Late


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
            with suppress(asyncio.CancelledError):
                await session.task

    async def aclose(self) -> None:
        """Break the connection for good. Idempotent."""
        self._closed = True
        await self.disconnect()


class _Session:
    """One connection, from before it is made until it breaks."""

    def __init__(self, connection: Any, timeout_s: float) -> None:
        self.over = False
        self._connection = connection
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[float, asyncio.Future[Any]]] = deque()
        """When each command is late, and its answer; in the order in which they were sent."""
        self._unsent: list[bytes] = []
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.task = self._loop.create_task(self._run())

    def submit(self, command: bytes) -> asyncio.Future[Any]:
        """Send a command."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        late = self._loop.time() + self._timeout_s
        self._waiting.append((late, answer))
        self._unsent.append(command)
        self._news.set()
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

    async def _run(self) -> None:
        try:
            await self._connection.connect()
            self._connection.socket_timeout = None  # one timer watches all commands
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write())
                tasks.create_task(self._read())
        except BaseExceptionGroup as group:
            self._ended(group.exceptions[0])
        except BaseException as error:
            self._ended(error)
            if not isinstance(error, Exception):
                raise
        finally:
            with suppress(Exception):
                await self._connection.disconnect(nowait=True)

    def _ended(self, error: BaseException) -> None:
        self.end(error if isinstance(error, Exception) else Broken("the connection was given up"))

    async def _write(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            together = b"".join(self._unsent)
            self._unsent.clear()
            await self._connection.send_packed_command(together, check_health=False)

    async def _read(self) -> None:
        while True:
            answer: Any
            try:
                answer = await self._connection.read_response(disconnect_on_error=False)
            except ResponseError as error:
                answer = error
            if not self._waiting:
                raise Broken("Redis answered what nobody had asked")
            _, asked = self._waiting.popleft()
            if asked.done():
                continue
            if isinstance(answer, ResponseError):
                asked.set_exception(answer)
            else:
                asked.set_result(answer)
