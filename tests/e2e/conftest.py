from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.world import World
from tests.stack_fixture import RunningJobs


@pytest.fixture(scope="session")
def shared_world(
    running_jobs: RunningJobs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    made = World(running_jobs, tmp_path_factory.mktemp("crowds"))
    yield made
    made.close()


@pytest.fixture
def world(shared_world: World) -> World:
    """The stack with all its jobs running, whatever the test before did to them."""
    shared_world.jobs.ensure()
    return shared_world
