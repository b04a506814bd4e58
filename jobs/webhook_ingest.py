"""Entry point of the webhook-ingest job: ``flink run -py jobs/webhook_ingest.py``."""

from __future__ import annotations

from functools import partial

from pyflink.common import Configuration

from jobs.environment import environment
from jobs.settings import IngestSettings, load
from pipelines.webhook_ingest import IngestParts, build
from schemas import topics
from sinks import kafka
from sinks.store import FileStore
from sinks.unknowns import connect_settler
from sinks.warehouse import Warehouse
from transforms.reconcile import ReconcilePolicy
from transforms.routing import TopicRouter

_SOURCES = {
    "webhooks": topics.WEBHOOKS_RAW,
    "page-results": topics.PAGE_RESULTS,
    "outcomes": topics.OUTCOMES,
    "runs": topics.RUNS,
    "dead-letters": topics.DEAD_LETTERS,
}


def main() -> None:
    """Wire the job with its settings and hand it to Flink."""
    settings = load(IngestSettings)
    clickhouse = settings.clickhouse.get_secret_value()
    redis = settings.redis.get_secret_value()
    flink = environment(settings, exactly_once=False)
    configuration = Configuration()
    configuration.set_string("python.metric.enabled", "true")
    flink.configure(configuration)
    first, *others = (
        kafka.source(flink, settings.kafka, [settings.topic(topic)], settings.ingest_group, uid)
        for uid, topic in _SOURCES.items()
    )
    build(
        first.union(*others),
        kafka.sink(settings.kafka, TopicRouter(settings.topic_prefix), transactions=None),
        IngestParts(
            tables=partial(Warehouse, clickhouse),
            store=partial(FileStore, settings.store),
            flush_after=settings.flush_after,
            batch_rows=settings.batch_rows,
            dead_letter_ratio=settings.dead_letter_ratio,
            dead_letter_window=settings.dead_letter_window,
            settler=partial(connect_settler, redis, clickhouse) if redis else None,
            reconcile=ReconcilePolicy(
                grace=settings.reconcile_grace, patience=settings.reconcile_patience
            ),
        ),
        settings.parallelism,
        kafka.byte_type(),
    )
    flink.execute("fanfare-webhook-ingest")


if __name__ == "__main__":
    main()
