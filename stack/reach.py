"""Where commands find the servers: at a home that is named, else where the environment says.

Where neither is, at the usual home.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from schemas.errors import InvalidInput, StackFailed
from stack.layout import environment
from stack.layout import home as home_at


def reach(home: Path | None = None) -> Mapping[str, str]:
    """The ``FANFARE_`` variables.

    The servers of a ``home`` that is given outrank those that are set in the environment, which
    outrank those of the usual home.

    Raises:
        StackFailed: no stack was started there, and the environment names no Kafka.
    """
    own = {name: value for name, value in os.environ.items() if name.startswith("FANFARE_")}
    if home is not None:
        return {**own, **environment(home_at(home))}
    try:
        return {**environment(home_at(None)), **own}
    except StackFailed:
        if "FANFARE_KAFKA" in own:
            return own
        raise


def variable(name: str, home: Path | None = None) -> str:
    """One variable.

    Raises:
        StackFailed: nothing is set and no stack was started.
        InvalidInput: others are set, this one is not.
    """
    value = reach(home).get(name, "")
    if not value:
        raise InvalidInput(f"{name} is not set, and the embedded stack has no such server")
    return value


def topic_prefix(home: Path | None = None) -> str:
    """What stands before the topics' names; mostly nothing."""
    return reach(home).get("FANFARE_TOPIC_PREFIX", "")
