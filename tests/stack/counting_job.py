"""A job for the tests: Kafka → counts by value in keyed MapState → Kafka, exactly once.

Entry script only; the operator is in `counting_operator`, since the engine ships what is
defined in `__main__` by value.
"""

from __future__ import annotations

import os
import sys

from pyflink.common import Types, WatermarkStrategy
from pyflink.common.serialization import ByteArraySchema
from pyflink.datastream import StreamExecutionEnvironment
from pyflink.datastream.connectors.base import DeliveryGuarantee
from pyflink.datastream.connectors.kafka import (
    KafkaOffsetsInitializer,
    KafkaRecordSerializationSchema,
    KafkaSink,
    KafkaSource,
)

from tests.stack.counting_operator import Count


def main(source_topic: str, sink_topic: str) -> None:
    """Build the job and hand it over."""
    environment = StreamExecutionEnvironment.get_execution_environment()
    environment.set_max_parallelism(256)
    brokers = os.environ["FANFARE_KAFKA"]
    source = (
        KafkaSource.builder()
        .set_bootstrap_servers(brokers)
        .set_topics(source_topic)
        .set_group_id("counting")
        .set_starting_offsets(KafkaOffsetsInitializer.earliest())
        .set_value_only_deserializer(ByteArraySchema())
        .build()
    )
    sink = (
        KafkaSink.builder()
        .set_bootstrap_servers(brokers)
        .set_record_serializer(
            KafkaRecordSerializationSchema.builder()
            .set_topic(sink_topic)
            .set_value_serialization_schema(ByteArraySchema())
            .build()
        )
        .set_delivery_guarantee(DeliveryGuarantee.EXACTLY_ONCE)
        .set_transactional_id_prefix("counting")
        .set_property("transaction.timeout.ms", "600000")
        .build()
    )
    values = environment.from_source(
        source,
        WatermarkStrategy.no_watermarks(),
        "values",
        Types.PRIMITIVE_ARRAY(Types.BYTE()),
    ).uid("values")
    counts = (
        values.key_by(bytes, Types.PICKLED_BYTE_ARRAY())
        .process(Count(), Types.PRIMITIVE_ARRAY(Types.BYTE()))
        .uid("count")
    )
    counts.sink_to(sink).uid("counts")
    environment.execute("counting")


if __name__ == "__main__":
    main(*sys.argv[1:3])
