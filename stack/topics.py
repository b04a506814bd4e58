"""Creating the Kafka topics of ``schemas.topics``."""

from __future__ import annotations

from datetime import timedelta

from kafka.admin import KafkaAdminClient, NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

from schemas.errors import Unavailable
from schemas.topics import TOPICS

_MILLISECOND = timedelta(milliseconds=1)


def create_topics(servers: str, prefix: str = "", replicas: int = 1) -> list[str]:
    """Create the topics that are missing; says which.

    Raises:
        Unavailable: the broker does not answer.
    """
    try:
        admin = KafkaAdminClient(bootstrap_servers=servers.split(","))
    except KafkaError as error:
        raise Unavailable(f"Kafka at {servers} does not answer: {error}") from error
    try:
        existing = set(admin.list_topics())
        missing = [topic for topic in TOPICS if prefix + topic.name not in existing]
        wanted = [
            NewTopic(
                name=prefix + topic.name,
                num_partitions=topic.partitions,
                replication_factor=replicas,
                topic_configs={
                    "retention.ms": str(int(topic.retention / _MILLISECOND)),
                    "cleanup.policy": "compact" if topic.compacted else "delete",
                    "max.message.bytes": str(topic.largest + 64 * 1024),
                },
            )
            for topic in missing
        ]
        if wanted:
            try:
                admin.create_topics(wanted)
            except TopicAlreadyExistsError:
                return create_topics(servers, prefix, replicas)
        return [topic.name for topic in missing]
    except KafkaError as error:
        raise Unavailable(f"Kafka at {servers} created no topics: {error}") from error
    finally:
        admin.close()
