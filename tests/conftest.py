"""Fixtures for all tests, and which of them need a Flink."""

from __future__ import annotations

import pytest

_LATE = ("test_upgrade.py",)
pytest_plugins = ["tests.stack_fixture"]


@pytest.hookimpl(tryfirst=True)  # before a choice by markers is made
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a Flink: `make test` runs it beside the rest.

    First come tests that start a Flink of their own, since two cores bear one at a time; last what
    breaks all, and, of the rest, what starts a whole stack.
    """
    for item in items:
        if _needs_stack(item):
            item.add_marker(pytest.mark.engine)
    items.sort(key=_how_late)


def _how_late(item: pytest.Item) -> int:
    return _needs_stack(item) + (item.path.parent.name == "chaos" or item.path.name in _LATE)


def _needs_stack(item: pytest.Item) -> bool:
    return "stack" in getattr(item, "fixturenames", ())
