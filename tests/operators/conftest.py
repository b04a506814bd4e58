from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.audience import AudienceRequest, build_audience
from schemas.topics import TOPICS
from sinks.clickhouse import connect, create_tables
from sinks.store import FileStore, Snapshot
from stack.layout import Home, endpoints
from stack.profiles import generate
from stack.topics import create_topics
from tests.operators.place import Place
from tests.stack_fixture import running_stack


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    root = tmp_path_factory.mktemp("operators")
    with running_stack(root, only=("kafka", "redis", "clickhouse")) as home:
        client = connect(endpoints(home).clickhouse)
        create_tables(client)
        client.close()
        yield home


@pytest.fixture(scope="session")
def audience(servers: Home, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    folder: Path = tmp_path_factory.mktemp("people")
    generate(600, 7, folder / "people.csv")
    store = FileStore(endpoints(servers).store)
    built = build_audience(AudienceRequest((folder / "people.csv",), "acme"), store)
    return store.open_snapshot(built.snapshot)


@pytest.fixture
def place(servers: Home, audience: Snapshot, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    name = f"r{time.time_ns()}"
    monkeypatch.setenv("FANFARE_TOPIC_PREFIX", f"{name}.")
    create_topics(endpoints(servers).kafka, f"{name}.")
    made = Place(servers, name, audience)
    for topic in TOPICS:
        made.eventually("the topic is there", lambda topic=topic: made.has(topic.name))
    yield made
    made.close()
