"""A provider in memory, for tests and dry runs: it answers as it is told and keeps what it took.

It passes the same contract suite as the real adapters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from schemas.message import Answer, Message, Verdict
from sinks.providers import Adapter

Script = Callable[[Message], Answer | None]
"""What to answer to a message; None never answers, as a provider that hangs."""


def accept(message: Message) -> Answer:
    """The script of a provider that takes everything; its ids derive from ours."""
    return Answer(Verdict.ACCEPTED, "accepted", f"fake-{message.send_id}")


class FakeProvider(Adapter):
    """A `Provider`. One instance belongs to one event loop.

    Args:
        script: consulted once for each attempt that gets a connection.
        latency: how long each answer takes.

    `attempts` are all messages that arrived, `accepted` those that were taken, in order.
    """

    name = "fake"

    def __init__(
        self,
        script: Script = accept,
        *,
        connections: int = 64,
        latency: timedelta = timedelta(0),
    ) -> None:
        self.script = script
        self.attempts: list[Message] = []
        self.accepted: list[Message] = []
        self._connections = connections
        self._latency = latency
        self._room = asyncio.Semaphore(connections)
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """How many attempts can be in flight at once."""
        return self._connections

    async def open(self) -> None:
        """Nothing to prepare."""

    async def close(self) -> None:
        """What hangs is answered IN_DOUBT; what comes later does not leave."""
        self._closing.set()

    def attempt(
        self, message: Message, deadline: timedelta, done: Callable[[Answer | Exception], None]
    ) -> Callable[[], None]:
        """Answer as the script says; see `Provider.attempt`."""

        async def answer() -> None:
            found: Answer | Exception
            try:
                found = await self._answer(message, deadline)
            except Exception as error:  # of the script
                found = error
            done(found)

        task = asyncio.get_running_loop().create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def give_up() -> None:
            task.cancel()

        return give_up

    async def _answer(self, message: Message, deadline: timedelta) -> Answer:
        left = False
        try:
            async with asyncio.timeout(deadline.total_seconds()), self._room:
                if self._closing.is_set():
                    return Answer(Verdict.RETRYABLE, "closed", detail="the provider is closed")
                answer = self.script(message)
                self.attempts.append(message)
                left = True
                if answer is None:
                    await self._closing.wait()
                    return Answer(Verdict.IN_DOUBT, "connection-lost", detail="closed meanwhile")
                if answer.verdict is Verdict.ACCEPTED:
                    self.accepted.append(message)
                await asyncio.sleep(self._latency.total_seconds())
                return answer
        except TimeoutError:
            if left:
                return Answer(Verdict.IN_DOUBT, "timeout", detail="no answer in time")
            return Answer(Verdict.RETRYABLE, "queue-timeout", detail="all connections were busy")
