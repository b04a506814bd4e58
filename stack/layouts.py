"""Which layouts are in a stack's state and topics, and whether this version reads them.

They are written down when a version's jobs run. A version that can't read one of them is refused
before anything is stopped or started: afterwards its jobs would fail where a key is first touched,
perhaps hours later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from schemas import codec
from schemas.errors import StackFailed
from stack.layout import Home, replace_file


def _notes(home: Home) -> Path:
    return home.flink / "layouts.json"


def _written(home: Home) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(_notes(home).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StackFailed(
            f"{_notes(home)}, which says what layouts were written, can't be read ({error}); "
            "delete it if this is the version that ran here last"
        ) from error
    return found


def note_layouts(home: Home) -> None:
    """From now on there may be state and records of this version."""
    known = _written(home)
    both = {**known, **codec.layouts()}
    if both != known:
        replace_file(_notes(home), json.dumps(both))


def require_readable(home: Home) -> None:
    """Raise StackFailed where this version can't read what others have written here."""
    found = (codec.why_unreadable(mark, schema) for mark, schema in _written(home).items())
    reasons = [reason for reason in found if reason is not None]
    if reasons:
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise StackFailed(
            f"this version can't read what is in the state and topics of {home.root}:\n{lines}\n"
            "Nothing was stopped or changed: the jobs run on with the code that they have. "
            "Mend the code, or install the version that ran before"
        )
