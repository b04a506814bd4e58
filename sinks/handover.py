"""A delivery key passes from one loop to the next without leaving anything in doubt.

A task that is cancelled, and not killed, lets its requests in flight be answered and settled; its
successor may be deployed before that. Were the key's next epoch taken at once, the claims of those
requests would be in doubt for nothing. So each loop says every `BEAT` that it lives, each key says
which loop has it, and a successor waits until the loop before it has ended or says no more, but
no longer than `PATIENCE`.

This is courtesy, not safety: what keeps two loops from sending one message is the epoch alone.
Nothing here is asked before a claim, and without Redis nobody waits.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from datetime import timedelta

from redis.exceptions import RedisError

from schemas.errors import Unavailable
from schemas.reasons import Lane
from sinks import ledger_layout as layout
from sinks.redis_client import AsyncClient, command_async, unavailable

log = logging.getLogger(__name__)

BEAT = timedelta(milliseconds=500)
"""How often a loop says that it lives."""
SILENCE = timedelta(milliseconds=1500)
"""After so long without a word a loop counts as dead; Flink takes longer to deploy another."""
PATIENCE = timedelta(seconds=3)
"""How long a loop that lives is waited for: it may never have heard that it is to end."""
_LOOK_S = 0.05


class Handover:
    """One loop's part in it. Belongs to one event loop."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._name = secrets.token_hex(8)
        self._chore: asyncio.Task[None] | None = None

    async def await_predecessor(self, lane: Lane, key: int) -> None:
        """Wait until the loop that has the key has ended, is dead, or is waited for too long.

        Raises ``Unavailable``.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE.total_seconds()
        with unavailable(f"ask who has delivery key {key}"):
            holder = await command_async(self._client, "GET", layout.holder_key(lane, key))
            if holder is None or holder.decode() == self._name:
                return
            life = layout.life_key(holder.decode())
            while await command_async(self._client, "EXISTS", life):
                if loop.time() > until:
                    log.warning(
                        "delivery key %d: its loop still lives after %g s and is fenced now",
                        key,
                        PATIENCE.total_seconds(),
                    )
                    return
                await asyncio.sleep(_LOOK_S)

    async def hold(self, lane: Lane, key: int) -> None:
        """Say that this loop has a key, and from now on that it lives. Raises ``Unavailable``."""
        with unavailable(f"say who has delivery key {key}"):
            if self._chore is None:
                self._chore = asyncio.get_running_loop().create_task(self._live())
                await self._say()
            await command_async(self._client, "SET", layout.holder_key(lane, key), self._name)

    async def end(self) -> None:
        """Say that this loop has ended: whoever waits for it goes on."""
        if self._chore is None:
            return
        self._chore.cancel()
        await asyncio.wait([self._chore])
        with suppress(Unavailable, RedisError), unavailable("say that delivery's loop has ended"):
            await command_async(self._client, "DEL", layout.life_key(self._name))

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(BEAT.total_seconds())
            try:
                await self._say()
            except Unavailable as error:
                log.debug("nobody hears that delivery's loop lives: %s", error)
            except RedisError as error:
                log.warning("Redis will not hear that delivery's loop lives: %s", error)

    async def _say(self) -> None:
        silence_ms = SILENCE // timedelta(milliseconds=1)
        with unavailable("say that delivery's loop lives"):
            await command_async(
                self._client, "SET", layout.life_key(self._name), "1", "PX", silence_ms
            )
