"""Kafka at the edges of the jobs: sources and sinks for PyFlink.

Values are bytes on both sides; ``schemas.codec`` makes records of them inside operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from pyflink.common import Types
from pyflink.common.serialization import ByteArraySchema
from pyflink.common.watermark_strategy import WatermarkStrategy
from pyflink.datastream import DataStream, StreamExecutionEnvironment
from pyflink.datastream.connectors.base import DeliveryGuarantee
from pyflink.datastream.connectors.kafka import (
    KafkaOffsetsInitializer,
    KafkaRecordSerializationSchema,
    KafkaSink,
    KafkaSource,
)

from schemas.topics import LARGEST_VALUE


def byte_type() -> Any:
    """The type of stream elements that are bytes; a Java proxy, so built where it is used."""
    return Types.PRIMITIVE_ARRAY(Types.BYTE())


def source(
    environment: StreamExecutionEnvironment,
    servers: str,
    topics: Sequence[str],
    group: str,
    uid: str,
) -> DataStream:
    """A stream of the values of ``topics``, committed ones only, from the earliest kept.

    A job that starts without a savepoint reads all that is kept: state is rebuilt, and the ledger
    makes what was sent before safe. Offsets are in the checkpoints; they are committed to
    ``group`` only to be looked at.

    Partitions are looked for when a job starts and not again: they are fixed, and a look that
    fails, as it does while the broker is away, would fail the whole job.
    """
    kafka = (
        KafkaSource.builder()
        .set_bootstrap_servers(servers)
        .set_topics(*topics)
        .set_group_id(group)
        .set_starting_offsets(KafkaOffsetsInitializer.earliest())
        .set_value_only_deserializer(ByteArraySchema())
        .set_property("isolation.level", "read_committed")
        .set_property("partition.discovery.interval.ms", "-1")
        # How often an idle source asks again; what arrives is answered at once.
        .set_property("fetch.max.wait.ms", "1000")
        .build()
    )
    return (
        environment.from_source(kafka, WatermarkStrategy.no_watermarks(), uid, byte_type())
        .name(uid)
        .uid(uid)
    )


def sink(
    servers: str,
    router: Callable[[bytes], str],
    *,
    transactions: str | None,
    transaction_timeout: timedelta = timedelta(minutes=15),
) -> KafkaSink:
    """A sink that writes each value to the topic that ``router`` names.

    ``transactions`` names the transactions of an exactly-once sink: stable, and unique to the
    job. None: at least once, visible at once. The timeout must exceed the longest outage that is
    to be lived through: Flink goes on without the data of a transaction that timed out.
    """
    serializer = (
        KafkaRecordSerializationSchema.builder()
        .set_topic_selector(router)
        .set_value_serialization_schema(ByteArraySchema())
        .build()
    )
    builder = (
        KafkaSink.builder()
        .set_bootstrap_servers(servers)
        .set_record_serializer(serializer)
        .set_property("linger.ms", "5")
        .set_property("batch.size", "131072")
        .set_property("compression.type", "lz4")
        .set_property("max.request.size", str(LARGEST_VALUE + 64 * 1024))
        .set_property("enable.idempotence", "true")
    )
    if transactions is None:
        return builder.set_delivery_guarantee(DeliveryGuarantee.AT_LEAST_ONCE).build()
    return (
        builder.set_delivery_guarantee(DeliveryGuarantee.EXACTLY_ONCE)
        .set_transactional_id_prefix(transactions)
        .set_property(
            "transaction.timeout.ms", str(int(transaction_timeout / timedelta(milliseconds=1)))
        )
        .build()
    )
