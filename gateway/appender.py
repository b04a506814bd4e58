"""Appending to Kafka from asyncio: a value is in the log when ``append`` returns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError

from schemas.errors import InvalidInput, Unavailable

_log = logging.getLogger(__name__)
_LINGER_MS = 5


class Appender:
    """One producer, acknowledged by all replicas, shared by all requests.

    It is not idempotent: what is posted twice is told apart by whoever reads it, and an idempotent
    producer of kafka-python 3.0 whose batch expires while a broker is away never sends again.

    The producer is made at first need and again after an error that it may not survive, so that
    the receiver starts and recovers without a broker. Its calls may block; they run on one thread.
    Concurrent appends travel in one batch.
    """

    def __init__(self, kafka: str, timeout: timedelta, in_flight: int) -> None:
        self._kafka = kafka.split(",")
        self._timeout = timeout
        self._in_flight = in_flight
        self._waiting = 0
        self._producer: KafkaProducer | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kafka")

    async def append(self, topic: str, key: str, value: bytes) -> None:
        """Append a value; return when every in-sync replica has it.

        Raises:
            Unavailable: nobody acknowledged in time; the value may be in the log all the same.
            InvalidInput: the broker's limit is below the value's size.
        """
        if self._waiting >= self._in_flight:
            raise Unavailable(f"{self._waiting} requests wait for Kafka already")
        self._waiting += 1
        try:
            # The producer's own timeout comes first; this one is for calls that block before it.
            async with asyncio.timeout(self._timeout.total_seconds() + 2):
                await self._append(topic, key.encode(), value)
        except TimeoutError as error:
            raise Unavailable(f"Kafka did not answer within {self._timeout}") from error
        finally:
            self._waiting -= 1

    async def _append(self, topic: str, key: bytes, value: bytes) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def hand(error: BaseException | None) -> None:
            # The loop is closed when the process stops while the broker answers.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(finish, error)

        def send() -> None:
            try:
                sent: Any = self._ready().send(topic, value=value, key=key)
            except Exception as error:
                hand(error)
                return
            sent.add_callback(lambda _: hand(None))
            sent.add_errback(hand)

        self._thread.submit(send)
        try:
            await done
        except MessageSizeTooLargeError as error:
            raise InvalidInput(f"Kafka refuses a value of {len(value)} bytes: {error}") from error
        except KafkaError as error:
            if not getattr(error, "retriable", False):
                self._thread.submit(self._discard)
            raise Unavailable(
                f"Kafka did not acknowledge: {type(error).__name__}: {error}"
            ) from error

    def _ready(self) -> KafkaProducer:
        if self._producer is None:
            timeout_ms = int(self._timeout.total_seconds() * 1000)
            self._producer = KafkaProducer(
                bootstrap_servers=self._kafka,
                acks="all",
                enable_idempotence=False,
                linger_ms=_LINGER_MS,
                max_block_ms=timeout_ms // 2,
                request_timeout_ms=timeout_ms // 2,
                delivery_timeout_ms=timeout_ms,
                bootstrap_timeout_ms=timeout_ms // 2,
                reconnect_backoff_max_ms=1_000,
                max_request_size=2 * 1024 * 1024,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )
        return self._producer

    def _discard(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            _log.warning("the Kafka producer is made anew")
            producer.close(timeout=0)

    async def close(self) -> None:
        """Wait for what is under way, then close."""
        loop = asyncio.get_running_loop()

        def close() -> None:
            if self._producer is not None:
                self._producer.close(timeout=self._timeout.total_seconds())

        await loop.run_in_executor(self._thread, close)
        self._thread.shutdown(wait=False)
