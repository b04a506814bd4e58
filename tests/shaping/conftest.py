from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ledger.server import RedisServer


@pytest.fixture(scope="session")
def shaping_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()
