from __future__ import annotations

from collections.abc import Iterator

import pytest
from clickhouse_connect.driver.client import Client

from sinks.clickhouse import connect, create_tables
from tests.servers import clickhouse_server


@pytest.fixture(scope="session")
def clickhouse_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with clickhouse_server(tmp_path_factory.mktemp("clickhouse")) as (_, url):
        yield url


@pytest.fixture(scope="session")
def clickhouse(clickhouse_url: str) -> Iterator[Client]:
    client = connect(clickhouse_url)
    create_tables(client)
    yield client
    client.close()
