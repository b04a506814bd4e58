"""Kafka for everything that is no Flink job: a producer, and reading topics from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from schemas.errors import Unavailable


def producer(servers: str) -> KafkaProducer:
    """A producer whose acknowledged records are the broker's: idempotent, all replicas."""
    return KafkaProducer(
        bootstrap_servers=servers.split(","), acks="all", enable_idempotence=True, linger_ms=5
    )


@contextmanager
def _consumer(servers: str) -> Iterator[KafkaConsumer]:
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=servers.split(","),
            isolation_level="read_committed",
            enable_auto_commit=False,
            fetch_max_wait_ms=50,
        )
    except KafkaError as error:
        raise Unavailable(f"Kafka at {servers} does not answer: {error}") from error
    try:
        yield consumer
    except KafkaError as error:
        raise Unavailable(f"Kafka at {servers} could not be read: {error}") from error
    finally:
        consumer.close()


def _partitions(consumer: KafkaConsumer, topic: str) -> list[TopicPartition]:
    found = consumer.partitions_for_topic(topic)
    if not found:
        raise Unavailable(f"there is no topic {topic}: run `fanfare up` or create the topics")
    return [TopicPartition(topic, number) for number in sorted(found)]


def read_all(servers: str, topic: str) -> Iterator[bytes]:
    """The values of all committed records that a topic has now, by partition in order."""
    with _consumer(servers) as consumer:
        partitions = _partitions(consumer, topic)
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        consumer.seek_to_beginning(*partitions)
        left = {one for one in partitions if consumer.position(one) < ends[one]}
        while left:
            for records in consumer.poll(timeout_ms=500).values():
                for record in records:
                    if record.value is not None:
                        yield record.value
            left = {one for one in left if consumer.position(one) < ends[one]}


@contextmanager
def read_from_end(servers: str, topic: str, back: int = 0) -> Iterator[Callable[[], list[bytes]]]:
    """A function that gives the values that came since its last call.

    It begins ``back`` records before the end of each partition.
    """
    with _consumer(servers) as consumer:
        partitions = _partitions(consumer, topic)
        consumer.assign(partitions)
        begins = consumer.beginning_offsets(partitions)
        for partition, end in consumer.end_offsets(partitions).items():
            consumer.seek(partition, max(begins[partition], end - back))

        def poll() -> list[bytes]:
            batches = consumer.poll(timeout_ms=100).values()
            return [
                record.value
                for records in batches
                for record in records
                if record.value is not None
            ]

        yield poll
