"""Entry point of the delivery job of a lane: ``flink run -py jobs/delivery.py``."""

from __future__ import annotations

from functools import partial

from pyflink.common import Configuration

from jobs.environment import environment, require_durable_redis
from jobs.settings import DeliverySettings, load
from pipelines.delivery import DeliveryParts, build
from schemas.pages import DELIVERY_KEYS
from schemas.reasons import Channel
from schemas.topics import sends_topic
from sinks import kafka
from sinks.accounts import open_accounts
from sinks.engine import DeliveryEngine, EnginePolicy
from sinks.redis_ports import connect_ledger, connect_shaper
from sinks.store import FileStore
from transforms.routing import TopicRouter


def main() -> None:
    """Wire the job with its settings and hand it to Flink."""
    settings = load(DeliverySettings)
    flink = environment(settings, max_parallelism=DELIVERY_KEYS)
    configuration = Configuration()
    configuration.set_string("python.metric.enabled", "true")
    flink.configure(configuration)
    lane = settings.lane
    name = f"fanfare-delivery-{lane.value}"
    topic = sends_topic(lane, Channel.EMAIL)
    sends = kafka.source(flink, settings.kafka, [settings.topic(topic)], name, "sends")
    sink = kafka.sink(settings.kafka, TopicRouter(settings.topic_prefix), transactions=None)
    redis = settings.redis.get_secret_value()
    require_durable_redis(redis)
    accounts = settings.accounts()
    engine = partial(
        DeliveryEngine,
        EnginePolicy(
            lane=lane,
            request_timeout=settings.request_timeout,
            receiver=settings.public_url,
            unsubscribe_secret=settings.unsubscribe_secret.get_secret_value().encode(),
            slots=settings.slots,
        ),
        partial(connect_ledger, redis),
        partial(connect_shaper, redis, accounts),
        partial(open_accounts, accounts),
        partial(FileStore, settings.store),
    )
    build(
        sends,
        sink,
        DeliveryParts(
            engine=engine,
            source_name=topic,
            dead_letter_ratio=settings.dead_letter_ratio,
            dead_letter_window=settings.dead_letter_window,
        ),
        kafka.byte_type(),
    )
    flink.execute(name)


if __name__ == "__main__":
    main()
