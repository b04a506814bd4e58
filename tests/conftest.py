"""Fixtures for all tests, and how they are shared between two processes."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.stack_fixture"]


@pytest.hookimpl(tryfirst=True)  # before the groups are written into the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have one process run all that need a Flink, beginning at once: they take longest.

    First those that start one of their own: two cores bear one at a time. Last what breaks all.
    """
    on_stack = sorted(filter(_needs_flink, items), key=_how_late)
    for item in on_stack:
        item.add_marker(pytest.mark.xdist_group("stack"))
    others = [item for item in items if not _needs_flink(item)]
    items[:] = on_stack + others


def _needs_flink(item: pytest.Item) -> bool:
    return _needs_stack(item) or item.get_closest_marker("engine") is not None


def _how_late(item: pytest.Item) -> int:
    return _needs_stack(item) + (item.path.parent.name == "chaos")


def _needs_stack(item: pytest.Item) -> bool:
    return "stack" in getattr(item, "fixturenames", ())
