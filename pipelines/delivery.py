"""Delivery: what is owed lives in keyed state, requests run beside it.

    sends ─▶ key by delivery key ─▶ deliver ─▶ outcomes, dead letters, consent

``process_element`` records and hands over, it never waits; a timer, armed while anything is owed,
collects what is done, removes it from state and emits. The state of a key is the sends that are
not finished, as they came, and how far each ledger was seen. After a restart they are all handed
over again: the ledger knows what became of each message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol
from weakref import finalize

from pyflink.common import Types
from pyflink.datastream import DataStream, KeyedProcessFunction, RuntimeContext
from pyflink.datastream.connectors.kafka import KafkaSink
from pyflink.datastream.state import MapStateDescriptor

from pipelines.dead_letters import DeadLetterGate
from schemas.codec import decode, encode, to_millis
from schemas.errors import MalformedRecord
from schemas.pages import DELIVERY_FLINK_KEYS, DELIVERY_KEYS, delivery_key
from schemas.records import Send
from transforms.delivery import Collected, ledger_name
from transforms.metrics import DELIVERY, DELIVERY_GROUP
from transforms.routing import shard_number


class Engine(Protocol):
    """The loop that delivers. All methods return at once and may be called from one thread."""

    def start(self) -> None:
        """Start the loop."""

    def take_over(self, key: int) -> None:
        """Before anything else of a delivery key."""

    def submit(self, key: int, name: str, send: Send, mark: str | None) -> None:
        """Owe the recipients of a send an outcome; ``mark``: how far its ledger was seen."""

    def collect(self, key: int) -> Collected:
        """What is done since the last call."""

    def counts(self) -> Mapping[str, int]:
        """Counters since the start, by the names of ``transforms.metrics.DELIVERY``."""

    def stop(self) -> None:
        """Start nothing new, let requests in flight finish within their deadline, end the loop."""


@dataclass(frozen=True, slots=True)
class DeliveryParts:
    """What delivery is given; ``engine`` is called once where the operator opens."""

    engine: Callable[[], Engine]
    source_name: str
    dead_letter_ratio: float
    dead_letter_window: int


_BEAT_MS = 500
"""Outcomes of a page gather for so long: a record of many is far cheaper than many records."""
_PARKED_BEAT_MS = 1000


class DeliveryOperator(KeyedProcessFunction):  # type: ignore[misc]
    """Keyed by delivery key. In: sends. Out: outcomes, dead letters, consent changes."""

    def __init__(self, parts: DeliveryParts) -> None:
        self._parts = parts

    def open(self, runtime_context: RuntimeContext) -> None:
        """Start the loop; a key's work is taken up at its first touch."""
        parts = self._parts
        self._sends = runtime_context.get_map_state(
            MapStateDescriptor("sends", Types.STRING(), Types.PICKLED_BYTE_ARRAY())
        )
        self._marks = runtime_context.get_map_state(
            MapStateDescriptor("ledgers", Types.STRING(), Types.STRING())
        )
        self._gate = DeadLetterGate("delivery", parts.dead_letter_ratio, parts.dead_letter_window)
        self._armed: dict[int, int] = {}
        self._taken: set[int] = set()
        metrics = runtime_context.get_metrics_group().add_group(DELIVERY_GROUP)
        self._metrics = {name: metrics.counter(name) for name in DELIVERY}
        self._counted = dict.fromkeys(DELIVERY, 0)
        self._count_at = 0.0
        self._engine = parts.engine()
        self._engine.start()
        # PyFlink calls `close` at the end of a bounded input alone: a task that is cancelled, fails
        # or stops behind a savepoint only lets go of its operators.
        self._end = finalize(self, self._engine.stop)

    def close(self) -> None:
        """End the loop; what is owed is in the checkpoint."""
        end = getattr(self, "_end", None)
        if end is not None:
            end()

    def process_element(self, value: bytes, ctx: KeyedProcessFunction.Context) -> Iterator[bytes]:
        """Record a send and hand it over."""
        key = _delivery_key(ctx.get_current_key())
        data = bytes(value)
        try:
            send = decode(data, Send)
        except MalformedRecord as error:
            self._metrics["malformed"].inc()
            now = datetime.now(UTC)
            source = self._parts.source_name
            yield self._gate.letter(data, error, now, step="read", source=source)
            return
        self._gate.good()
        name = work_name(send)
        self._take_over(key)
        self._sends.put(name, data)
        self._engine.submit(key, name, send, self._marks.get(ledger_name(send)))
        self._arm(key, ctx, _BEAT_MS)

    def on_timer(self, timestamp: int, ctx: KeyedProcessFunction.OnTimerContext) -> Iterator[bytes]:
        """Collect what is done."""
        key = _delivery_key(ctx.get_current_key())
        if self._armed.get(key, timestamp) != timestamp:
            return
        self._armed.pop(key, None)
        self._take_over(key)
        collected = self._engine.collect(key)
        for record in collected.records:
            yield encode(record)
        for ledger, mark in collected.marks.items():
            self._marks.put(ledger, mark)
        for name in collected.finished:
            self._sends.remove(name)
        self._count()
        if collected.owed:
            self._arm(key, ctx, _BEAT_MS if collected.moving else _PARKED_BEAT_MS)

    def _take_over(self, key: int) -> None:
        """After a restart: hand over all that the key's state owes."""
        if key in self._taken:
            return
        self._taken.add(key)
        self._engine.take_over(key)
        for name, data in self._sends.items():
            send = decode(bytes(data), Send)
            self._engine.submit(key, name, send, self._marks.get(ledger_name(send)))

    def _arm(self, key: int, ctx: KeyedProcessFunction.Context, beat_ms: int) -> None:
        """Collect after a beat; a later timer that is set already finds itself superseded."""
        at = to_millis(datetime.now(UTC)) + beat_ms
        if self._armed.get(key, at + 1) <= at:
            return
        self._armed[key] = at
        ctx.timer_service().register_processing_time_timer(at)

    def _count(self) -> None:
        """Pass the loop's counters on to Flink, once a second."""
        now = time.monotonic()
        if now < self._count_at:
            return
        self._count_at = now + 1
        for name, count in self._engine.counts().items():
            if count != self._counted[name]:
                self._metrics[name].inc(count - self._counted[name])
                self._counted[name] = count


_KEY_OF_FLINK_KEY = {flink: key for key, flink in enumerate(DELIVERY_FLINK_KEYS)}


def _delivery_key(flink_key: int) -> int:
    return _KEY_OF_FLINK_KEY[flink_key]


def work_name(send: Send) -> str:
    """The name of a send in state: a page, a generation and what is valid for equally long."""
    return (
        f"{send.tenant}/{send.run}/{send.leg}/{send.shard}/{send.page}/{send.generation}/"
        f"{to_millis(send.valid_until)}"
    )


def flink_key_of(data: bytes) -> int:
    """The Flink key of a send: its key group is the delivery key of its shard."""
    return DELIVERY_FLINK_KEYS[delivery_key(shard_number(bytes(data)))]


def build(sends: DataStream, sink: KafkaSink, parts: DeliveryParts, output: Any) -> None:
    """Wire the delivery job of one lane. ``output`` is the type of encoded records."""
    done = (
        sends.key_by(flink_key_of, key_type=Types.INT())
        .process(DeliveryOperator(parts), output_type=output)
        .name("deliver")
        .uid("deliver")
        .set_max_parallelism(DELIVERY_KEYS)
    )
    done.sink_to(sink).name("outcomes").uid("outcomes-sink")
