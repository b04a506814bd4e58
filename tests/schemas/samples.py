"""Values of every record, made from its type hints: drawn ones for properties, one fixed for golden
bytes.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from schemas import codec
from schemas.records import CommandKind

GOLDEN = Path(__file__).parent / "golden"
_MEMBERS: dict[Any, int] = {CommandKind: 6}
"""How many members enums had when golden bytes were written, where they have grown since."""
_EPOCH = datetime(2026, 3, 10, 12, 0, 0, 123_000, tzinfo=UTC)


def plain(hint: Any) -> Any:
    """A hint without its NewType."""
    return getattr(hint, "__supertype__", hint)


def optional(hint: Any) -> Any | None:
    """What an optional hint may hold beside None; None for a hint that isn't optional."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = (one for one in typing.get_args(hint) if one is not type(None))
        return inner
    return None


def drawn(hint: Any) -> st.SearchStrategy[Any]:
    """A strategy for values of a hint."""
    hint = plain(hint)
    inner = optional(hint)
    if inner is not None:
        return st.none() | drawn(inner)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return st.lists(drawn(typing.get_args(hint)[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
    if hint is datetime:
        millis = st.integers(-(2**40), 2**45)
        return millis.map(codec.from_millis)
    if hint is timedelta:
        return st.integers(-(2**40), 2**40).map(lambda value: timedelta(milliseconds=value))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    if isinstance(hint, type) and is_dataclass(hint):
        return record(hint)
    return {
        str: st.text(max_size=12),
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        bytes: st.binary(max_size=20),
    }[hint]


def record(kind: type) -> st.SearchStrategy[Any]:
    """A strategy for records of a class."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{one.name: drawn(hints[one.name]) for one in fields(kind)})


def fixed(hint: Any, name: str) -> Any:
    """The one value of a hint that golden bytes hold: nothing empty, nothing absent."""
    hint = plain(hint)
    inner = optional(hint)
    if inner is not None:
        return fixed(inner, name)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return (fixed(item, name), fixed(item, f"{name}-2"))
    if origin is Mapping:
        return {f"{name}-key": f"{name}-värde"}
    number = sum(name.encode())
    if isinstance(hint, type) and issubclass(hint, Enum):
        members = list(hint)
        return members[number % _MEMBERS.get(hint, len(members))]
    if isinstance(hint, type) and is_dataclass(hint):
        return fixed_record(hint)
    if hint is datetime:
        return _EPOCH + timedelta(seconds=number)
    if hint is timedelta:
        return timedelta(milliseconds=number)
    return {
        str: f"{name} ü",
        bool: True,
        int: number,
        float: number / 8,
        bytes: name.encode() + b"\x00\xff",
    }[hint]


def fixed_record(kind: type) -> Any:
    """The one record of a class that golden bytes hold."""
    hints = typing.get_type_hints(kind)
    return kind(**{one.name: fixed(hints[one.name], one.name) for one in fields(kind)})


def golden_path(kind: type) -> Path:
    """Where the golden bytes of a class's current layout are."""
    return GOLDEN / f"{kind.__name__}-{codec.header_of(kind)[2:6].hex()}.hex"


def write_missing() -> list[Path]:
    """Write golden bytes of current layouts that have none. Existing ones are never touched."""
    written = []
    for kind in codec.record_classes():
        path = golden_path(kind)
        if not path.exists():
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(codec.encode(fixed_record(kind)).hex("\n", 40) + "\n")
            written.append(path)
    return written


if __name__ == "__main__":
    for one in write_missing():
        sys.stdout.write(f"wrote {one.name}\n")
