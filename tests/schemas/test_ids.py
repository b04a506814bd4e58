"""Derived identifiers are UUIDs of version 5, for ever the same."""

from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from schemas.ids import derive, send_id

NAMESPACE = uuid.UUID("5fd6a0f0-8f6c-5c60-9f0e-2b1d7c3a4e11")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(TEXT, st.lists(TEXT | st.integers(), max_size=5))
def test_they_are_what_the_standard_says(kind: str, parts: list[str | int]) -> None:
    name = "\x1f".join([kind, *map(str, parts)])
    assert derive(kind, parts) == str(uuid.uuid5(NAMESPACE, name))


def test_a_send_keeps_its_identity_from_release_to_release() -> None:
    expected = uuid.uuid5(NAMESPACE, "\x1f".join(["send", "acme", "r1", "email", "p-1"]))
    assert send_id("acme", "r1", "email", "p-1") == str(expected)
