from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.audience import BuiltAudience
from sinks.engine import DeliveryEngine
from sinks.redis_client import command
from sinks.store import FileStore
from tests.delivery.world import MemoryServer, Operator, RealServer, Server, Shop, build_people
from tests.ledger.server import RedisServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileStore, BuiltAudience]:
    return build_people(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="session")
def delivery_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "memory":
        yield MemoryServer()
        return
    real = RealServer(request.getfixturevalue("delivery_redis").url)
    command(real.client, "FLUSHALL")  # circuits and rates of the test before
    yield real
    real.client.close()


@pytest.fixture
def shop(server: Server, people: tuple[FileStore, BuiltAudience]) -> Callable[..., Shop]:
    def make(**spec: Any) -> Shop:
        return Shop(*people, server, f"run-{next(_numbers)}", **spec)

    return make


@pytest.fixture
def operator() -> Operator:
    return Operator()


@pytest.fixture
def running(operator: Operator) -> Iterator[Callable[[DeliveryEngine], DeliveryEngine]]:
    """Starts engines under the operator and stops them after the test."""
    engines: list[DeliveryEngine] = []

    def run(engine: DeliveryEngine) -> DeliveryEngine:
        engines.append(engine)
        operator.start(engine)
        return engine

    yield run
    for engine in engines:
        engine.stop()
