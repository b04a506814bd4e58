"""Connections to Redis, and Lua scripts on them.

The client never repeats a command by itself: a call that failed may or may not have been carried
out, and only the caller knows what repeating means. Whatever a working server might answer next
time (connection refused or reset, timeout, loading, read-only, full) raises ``Unavailable``; every
call of ``sinks.ledger``, ``sinks.runs`` and ``sinks.shaping`` may then be repeated as it is.

Redis must not evict (``maxmemory-policy noeviction``) and must log every write before it answers
(``appendonly yes``, ``appendfsync always``): ``check_durability`` says so where it isn't so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha1
from importlib.resources import files
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from schemas.errors import FanfareError, Unavailable
from sinks.redis_pipeline import PipelinedRedis

TIMEOUT = timedelta(seconds=5)
"""How long a call waits for Redis unless told otherwise."""

_PASSING = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
    "UNBLOCKED",
)
"""Beginnings of error answers that say 'not now'. All others are defects, and pass as they are."""
_IN_A_SCRIPT = re.compile(rf"Error running script .*: -(?:{'|'.join(_PASSING)})\b")
"""Redis 6 puts the answer to a script's command behind words of its own."""

Client = redis.Redis
AsyncClient = PipelinedRedis


def command(client: Client, *words: Any) -> Any:
    """The answer to a command; errors are redis-py's."""
    execute: Any = client.execute_command
    return execute(*words)


async def command_async(client: AsyncClient, *words: Any) -> Any:
    """The answer to a command; errors are redis-py's."""
    return await client.execute_command(*words)


def connect(url: str, timeout: timedelta = TIMEOUT, connections: int = 4) -> Client:
    """A blocking client: for Flink threads and the command line."""
    seconds = timeout.total_seconds()
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=seconds,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        retry_on_error=[],
    )
    return redis.Redis(connection_pool=pool)


def connect_async(url: str, timeout: timedelta = TIMEOUT) -> AsyncClient:
    """A client for an asyncio loop."""
    return PipelinedRedis(url, timeout)


def _passes(error: ResponseError) -> bool:
    # redis-py takes the first word of these away.
    if isinstance(error, OutOfMemoryError | ReadOnlyError):
        return True
    return str(error).startswith(_PASSING) or bool(_IN_A_SCRIPT.search(str(error)))


@contextmanager
def unavailable(doing: str) -> Iterator[None]:
    """Turn what may pass into ``Unavailable``, naming what was being done."""
    try:
        yield
    except ResponseError as error:
        if not _passes(error):
            raise
        raise Unavailable(f"Redis refused to {doing}: {error}; try again") from error
    except (RedisError, OSError, TimeoutError) as error:
        raise Unavailable(f"Redis did not answer to {doing}: {error}; try again") from error


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, run by its hash, and sent whole where the server does not know it (yet)."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.text.encode()).hexdigest())  # noqa: S324  # Redis names scripts so

    def call(self, keys: tuple[str, ...], arguments: list[Any]) -> tuple[Any, ...]:
        """The command that runs this script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)

    def run(self, client: Client, keys: tuple[str, ...], arguments: list[Any]) -> Any:
        """Run it; errors are redis-py's."""
        try:
            return command(client, *self.call(keys, arguments))
        except NoScriptError:
            return command(client, "EVAL", self.text, len(keys), *keys, *arguments)

    async def run_async(
        self, client: AsyncClient, keys: tuple[str, ...], arguments: list[Any]
    ) -> Any:
        """Run it; errors are redis-py's."""
        try:
            return await command_async(client, *self.call(keys, arguments))
        except NoScriptError:
            return await command_async(client, "EVAL", self.text, len(keys), *keys, *arguments)

    def run_many(self, client: Client, calls: list[tuple[tuple[str, ...], list[Any]]]) -> list[Any]:
        """Run it for each, in one pipeline and without a transaction; errors are redis-py's.

        All are run or repeated by the caller: only for scripts that may run twice.
        """
        for attempt in ("EVALSHA", "EVAL"):
            pipe = client.pipeline(transaction=False)
            queue: Any = pipe.execute_command
            for keys, arguments in calls:
                text = self.sha if attempt == "EVALSHA" else self.text
                queue(attempt, text, len(keys), *keys, *arguments)
            try:
                return pipe.execute()
            except NoScriptError:
                continue  # none was run: all have the same hash
        raise AssertionError("EVAL does not answer NOSCRIPT")


def script(*names: str, **constants: float) -> Script:
    """The script made of ``redis_scripts/NAME.lua`` in this order, after these constants."""
    lines = [f"local {name} = {value}" for name, value in constants.items()]
    folder = files("sinks") / "redis_scripts"
    lines += [(folder / f"{name}.lua").read_text(encoding="utf-8") for name in names]
    return Script("\n".join(lines))


def check_durability(client: Client) -> None:
    """Refuse a Redis that may forget what it answered. Raises ``FanfareError``, ``Unavailable``.

    Servers that hide their configuration (managed ones) are asked what INFO tells.
    """
    with unavailable("tell its settings"):
        info: dict[str, Any] = command(client, "INFO")
        try:
            fsync = command(client, "CONFIG GET", "appendfsync").get("appendfsync", "always")
        except ResponseError:
            fsync = "always"
    faults = []
    if not info.get("aof_enabled"):
        faults.append("appendonly is off: set it to yes")
    elif fsync != "always":
        faults.append(f"appendfsync is {fsync}: set it to always")
    if info.get("maxmemory_policy", "noeviction") != "noeviction":
        faults.append(f"maxmemory-policy is {info['maxmemory_policy']}: set it to noeviction")
    if faults:
        raise FanfareError("Redis may lose the ledger of sends: " + "; ".join(faults))
