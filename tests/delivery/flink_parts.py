"""What the test of the operator runs inside Flink's own interpreter."""

from __future__ import annotations

from functools import partial

from pipelines.delivery import DeliveryParts
from schemas.records import Route
from sinks.engine import DeliveryEngine, EnginePolicy
from sinks.providers.fake import FakeProvider
from sinks.redis_ports import connect_ledger, connect_shaper
from sinks.store import FileStore

ROUTE = Route("fake", "main")


def engine(url: str, root: str) -> DeliveryEngine:
    """An engine whose provider takes everything."""
    return DeliveryEngine(
        EnginePolicy(),
        partial(connect_ledger, url),
        partial(connect_shaper, url, ()),
        lambda: [(ROUTE, FakeProvider(), 8)],
        partial(FileStore, root),
    )


def parts(url: str, root: str) -> DeliveryParts:
    """The operator's parts."""
    return DeliveryParts(partial(engine, url, root), "sends", 1.0, 100)
