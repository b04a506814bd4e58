"""Fixtures of the client and adapter tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tests.providers.servers import Certificates, make_certificates

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine on each kind of loop that is supported, with a time limit."""

    def limited(coroutine: Coroutine[Any, Any, None]) -> None:
        async def main() -> None:
            async with asyncio.timeout(20):
                await coroutine

        request.param(main())

    return limited
