"""The campaigns job: runs are coordinated by run, decided by shard.

    commands, page results, outcomes ─▶ coordinate ──orders──▶ decide ─▶ page results, sends
                                            │          outcomes, consent ─┘        │
                                            └──── closings, audit events ──────────┴─▶ one sink

All that both write goes through one sink in one Kafka transaction per checkpoint: a decision's
sends, its result and the state that made it are committed together or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pyflink.common import Types
from pyflink.datastream import DataStream, ProcessFunction
from pyflink.datastream.connectors.kafka import KafkaSink

from pipelines.coordinate import CoordinateOperator, CoordinateParts
from pipelines.decide import DecideOperator, DecideParts
from schemas.codec import name_of
from schemas.pages import SHARD_KEYS, SHARDS
from transforms.routing import run_key_of, shard_number


@dataclass(frozen=True, slots=True)
class Streams:
    """What the job reads; values are bytes."""

    control: DataStream
    """Commands, page results and outcomes."""
    outcomes: DataStream
    consent: DataStream


def flink_key_of(data: bytes) -> int:
    """The Flink key of a record's shard."""
    return SHARD_KEYS[shard_number(bytes(data))]


def coordinate_key_of(data: bytes) -> str:
    """The Flink key of a record's run."""
    return run_key_of(bytes(data))


class _Only(ProcessFunction):  # type: ignore[misc]
    """Lets through the records that a predicate of their names keeps."""

    def __init__(self, keep: Callable[[str | None], bool]) -> None:
        self._keep = keep

    def process_element(self, value: bytes, ctx: ProcessFunction.Context) -> Iterator[bytes]:
        if self._keep(name_of(bytes(value))):
            yield value


def is_order(name: str | None) -> bool:
    """Whether a record stays inside the job."""
    return name == "PageOrder"


def is_for_others(name: str | None) -> bool:
    """Whether a record leaves the job."""
    return name != "PageOrder"


def build(
    streams: Streams,
    sink: KafkaSink,
    coordinate: CoordinateParts,
    decide: DecideParts,
    output: Any,
) -> None:
    """Wire the campaigns job. ``output`` is the type of encoded records."""
    coordinated = (
        streams.control.key_by(coordinate_key_of, key_type=Types.STRING())
        .process(CoordinateOperator(coordinate), output_type=output)
        .name("coordinate")
        .uid("coordinate")
    )
    orders = coordinated.process(_Only(is_order), output_type=output).name("orders").uid("orders")
    audit = coordinated.process(_Only(is_for_others), output_type=output).name("audit").uid("audit")
    decided = (
        orders.union(streams.outcomes, streams.consent)
        .key_by(flink_key_of, key_type=Types.INT())
        .process(DecideOperator(decide), output_type=output)
        .name("decide")
        .uid("decide")
        .set_max_parallelism(SHARDS)
    )
    decided.union(audit).sink_to(sink).name("decisions").uid("decisions-sink")
