"""Entry point of the campaigns job: ``flink run -py jobs/campaigns.py``."""

from __future__ import annotations

from functools import partial

from jobs.environment import environment, require_durable_redis
from jobs.settings import CampaignsSettings, load
from pipelines.campaigns import Streams, build
from pipelines.coordinate import CoordinateParts
from pipelines.decide import DecideParts
from schemas import topics
from sinks import kafka
from sinks.redis_ports import connect_opt_outs, connect_registry
from sinks.store import FileStore
from transforms.coordinate import CoordinatePolicy
from transforms.examine import misfits
from transforms.routing import TopicRouter


def main() -> None:
    """Wire the job with its settings and hand it to Flink."""
    settings = load(CampaignsSettings)
    flink = environment(settings)
    group = "fanfare-campaigns"
    outcomes = kafka.source(
        flink, settings.kafka, [settings.topic(topics.OUTCOMES)], group, "outcomes"
    )
    control = kafka.source(
        flink,
        settings.kafka,
        [settings.topic(topics.COMMANDS), settings.topic(topics.PAGE_RESULTS)],
        group,
        "control",
    ).union(outcomes)
    consent = kafka.source(
        flink, settings.kafka, [settings.topic(topics.CONSENT)], group, "consent"
    )
    sink = kafka.sink(
        settings.kafka,
        TopicRouter(settings.topic_prefix),
        transactions=f"{settings.topic_prefix}fanfare-campaigns",
        transaction_timeout=settings.transaction_timeout,
    )
    redis = settings.redis.get_secret_value()
    require_durable_redis(redis)
    build(
        Streams(control, outcomes, consent),
        sink,
        CoordinateParts(
            snapshots=partial(FileStore, settings.store),
            registry=partial(connect_registry, redis),
            examine=misfits,
            policy=CoordinatePolicy(
                window=settings.window,
                commit=settings.checkpoint_interval,
                silence=settings.transaction_timeout + settings.silence_margin,
            ),
            dead_letter_ratio=settings.dead_letter_ratio,
            dead_letter_window=settings.dead_letter_window,
        ),
        DecideParts(
            store=partial(FileStore, settings.store),
            opt_outs=partial(connect_opt_outs, redis),
            dead_letter_ratio=settings.dead_letter_ratio,
            dead_letter_window=settings.dead_letter_window,
        ),
        kafka.byte_type(),
    )
    flink.execute("fanfare-campaigns")


if __name__ == "__main__":
    main()
