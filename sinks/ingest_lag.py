"""How many records Kafka holds that ingestion has not taken in, by its committed offsets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from schemas.errors import Unavailable

_LOOKED_AT = 5_000
"""Offsets of a partition that are looked at one by one; beyond, their number is the answer."""


def records_behind(
    servers: str, group: str, topics: Sequence[str], within: timedelta = timedelta(seconds=5)
) -> int:
    """Records after the offsets that ``group`` has committed; 0: all is taken in.

    Offsets are committed when a checkpoint completes, so the answer is too high by what came since
    then, and never too low. Marks of transactions are no records: what lies between the committed
    offset and the end is read, so that they are not counted.

    Raises:
        Unavailable: Kafka does not answer, or a topic does not exist.
    """
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=servers.split(","),
            group_id=group,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            fetch_max_wait_ms=50,
        )
    except KafkaError as error:
        raise Unavailable(f"Kafka at {servers} does not answer: {error}") from error
    try:
        return _behind(consumer, topics, time.monotonic() + within.total_seconds())
    except KafkaError as error:
        raise Unavailable(f"Kafka at {servers} could not be read: {error}") from error
    finally:
        consumer.close()


def _behind(consumer: KafkaConsumer, topics: Sequence[str], until: float) -> int:
    partitions: list[TopicPartition] = []
    for topic in topics:
        found = consumer.partitions_for_topic(topic)
        if not found:
            raise Unavailable(f"there is no topic {topic}: run `fanfare up` or create the topics")
        partitions += [TopicPartition(topic, number) for number in sorted(found)]
    begins, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    behind = 0
    near: dict[TopicPartition, int] = {}
    for partition in partitions:
        committed = consumer.committed(partition)
        start = max(int(committed or 0), int(begins[partition]))
        if ends[partition] - start > _LOOKED_AT:
            behind += int(ends[partition]) - start
        elif ends[partition] > start:
            near[partition] = start
    consumer.assign(list(near))
    for partition, start in near.items():
        consumer.seek(partition, start)
    left = set(near)
    while left and time.monotonic() < until:
        for records in consumer.poll(timeout_ms=200).values():
            behind += len(records)
        left = {one for one in left if consumer.position(one) < ends[one]}
    # What could not be looked at in time counts in full.
    return behind + sum(int(ends[one]) - int(consumer.position(one)) for one in left)
