"""The record of accepted messages: a file of JSON lines and a small index in memory.

Each accepted message is one line; a line with ``note`` tells later that the answer to it never
left. In memory a message costs its 16-byte id and the offset of its first line (about 150 bytes
with the dictionary's share); only duplicates cost more. Lines are buffered: :meth:`flush` writes
them, and a line torn by a kill is cut off when the file is opened again.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import orjson

from schemas.errors import Corrupt

Key: TypeAlias = bytes | str


def key_of(send_id: str) -> Key:
    """The compact form of an id: 16 bytes if it is a UUID in its usual form, else itself."""
    if len(send_id) == 36:
        try:
            key = bytes.fromhex(send_id.replace("-", ""))
        except ValueError:
            return send_id
        if len(key) == 16 and str(UUID(bytes=key)) == send_id:
            return key
    return send_id


def id_of(key: Key) -> str:
    """The id again."""
    return str(UUID(bytes=key)) if isinstance(key, bytes) else key


@dataclass(slots=True)
class RunCounts:
    """Accepted messages of one run."""

    accepted: int = 0
    unique: int = 0
    first_ms: int = 0
    last_ms: int = 0

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {
            "accepted": self.accepted,
            "unique": self.unique,
            "duplicates": self.accepted - self.unique,
            "first_accepted_at_ms": self.first_ms,
            "last_accepted_at_ms": self.last_ms,
        }


class Record:
    """What the provider has accepted. One process writes a folder at a time.

    Reopening it restores counts, duplicates and unanswered ids; raw bodies are kept in memory
    only.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "accepted.jsonl"
        self._file = self.path.open("a+b", buffering=0)
        self._buffer: list[bytes] = []
        self._offset = 0
        self.torn_bytes = 0
        self.bodies: OrderedDict[int, bytes] = OrderedDict()
        self._clear()
        self._load()

    def _clear(self) -> None:
        self._first: dict[Key, int] = {}
        self._more: dict[Key, list[int]] = {}
        self.accepted = 0
        self.without_id = 0
        self.runs: dict[str, RunCounts] = {}
        self.total = RunCounts()
        self.per_second: dict[int, int] = {}
        self.unanswered: dict[str, Counter[Key]] = {}

    def _load(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    self.torn_bytes = len(line)
                    break
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise Corrupt(
                        f"{self.path}: no message at byte {self._offset}: {error};"
                        " move the file away to start afresh"
                    ) from error
                if "note" in row:
                    self._note(key_of(row["id"]), row["note"])
                else:
                    self._index(row["id"], row["run"], row["at"], row.get("anonymous", False))
                    if fault := row.get("fault"):
                        self._note(key_of(row["id"]), fault)
                self._offset += len(line)
        if self._offset != size:
            os.ftruncate(self._file.fileno(), self._offset)

    def _index(self, send_id: str, run: str, at_ms: int, anonymous: bool) -> bool:
        key = key_of(send_id)
        counts = self.runs.get(run)
        if counts is None:
            counts = self.runs[run] = RunCounts(first_ms=at_ms)
        total = self.total
        if not total.accepted:
            total.first_ms = at_ms
        self.accepted += 1
        total.accepted += 1
        counts.accepted += 1
        total.last_ms = counts.last_ms = at_ms
        second = at_ms // 1000
        self.per_second[second] = self.per_second.get(second, 0) + 1
        self.without_id += anonymous
        if key in self._first:
            self._more.setdefault(key, []).append(self._offset)
            return False
        self._first[key] = self._offset
        total.unique += 1
        counts.unique += 1
        return True

    def _note(self, key: Key, fault: str) -> None:
        self.unanswered.setdefault(fault, Counter())[key] += 1

    def accept(
        self,
        *,
        send_id: str,
        run: str,
        address: str,
        at_ms: int,
        provider: str,
        provider_message_id: str,
        arguments: dict[str, Any],
        fault: str | None,
        anonymous: bool,
        body: bytes | None,
        keep_bodies: int,
    ) -> int:
        """Record a message; returns how often its id had been accepted before."""
        row: dict[str, Any] = {
            "id": send_id,
            "run": run,
            "to": address,
            "at": at_ms,
            "p": provider,
            "m": provider_message_id,
            "args": arguments,
        }
        if fault is not None:
            row["fault"] = fault
            self._note(key_of(send_id), fault)
        if anonymous:
            row["anonymous"] = True
        fresh = self._index(send_id, run, at_ms, anonymous)
        if body is not None and keep_bodies:
            self.bodies[self._offset] = body
            while len(self.bodies) > keep_bodies:
                self.bodies.popitem(last=False)
        line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        self._buffer.append(line)
        self._offset += len(line)
        return 0 if fresh else len(self._more[key_of(send_id)])

    def note_unanswered(self, send_id: str, fault: str) -> None:
        """Remember that the answer to an accepted message was lost, and how."""
        self._note(key_of(send_id), fault)
        line = orjson.dumps({"note": fault, "id": send_id}, option=orjson.OPT_APPEND_NEWLINE)
        self._buffer.append(line)
        self._offset += len(line)

    @property
    def dirty(self) -> bool:
        """Whether lines wait for :meth:`flush`."""
        return bool(self._buffer)

    def flush(self) -> None:
        """Write what is buffered to the file. Raises OSError when the disk refuses."""
        if not self._buffer:
            return
        data = memoryview(b"".join(self._buffer))
        self._buffer.clear()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            # Kept, so that the next flush fails too instead of leaving a hole.
            self._buffer.insert(0, bytes(data))
            raise

    def close(self) -> None:
        """Flush, sync and close."""
        self.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def reset(self) -> None:
        """Forget everything, on disk too."""
        self._buffer.clear()
        os.ftruncate(self._file.fileno(), 0)
        self._offset = 0
        self.bodies.clear()
        self._clear()

    @property
    def unique(self) -> int:
        """Different ids accepted."""
        return len(self._first)

    @property
    def duplicates(self) -> int:
        """Acceptances beyond the first of their id."""
        return self.accepted - len(self._first)

    def read(self, since: int, limit: int, run: str | None) -> tuple[list[dict[str, Any]], int]:
        """Up to ``limit`` accepted messages from cursor ``since``, and the cursor after them.

        A cursor is 0 or one that an earlier call returned; anything else raises ValueError.
        """
        self.flush()
        rows: list[dict[str, Any]] = []
        with self.path.open("rb") as lines:
            if since:
                lines.seek(since - 1)
                if since > self._offset or lines.read(1) != b"\n":
                    raise ValueError(f"since={since} is not a cursor given by this simulator")
            cursor = since
            for line in lines:
                if len(rows) >= limit:
                    break
                cursor += len(line)
                row = orjson.loads(line)
                if "note" not in row and (run is None or row["run"] == run):
                    rows.append(_public(row))
        return rows, cursor

    def find(self, send_id: str) -> list[dict[str, Any]]:
        """Each acceptance of an id, oldest first; empty if there is none."""
        key = key_of(send_id)
        if key not in self._first:
            return []
        self.flush()
        found = []
        with self.path.open("rb") as lines:
            for offset in (self._first[key], *self._more.get(key, ())):
                lines.seek(offset)
                row = orjson.loads(lines.readline())
                public = _public(row)
                public["arguments"] = row["args"]
                public["fault"] = row.get("fault")
                if offset in self.bodies:
                    public["body"] = self.bodies[offset].decode("utf-8", "replace")
                found.append(public)
        return found

    def count(self, send_id: str) -> int:
        """How often an id was accepted."""
        key = key_of(send_id)
        return 0 if key not in self._first else 1 + len(self._more.get(key, ()))

    def repeated(self) -> Iterator[tuple[str, int]]:
        """Ids accepted more than once, with the number of acceptances."""
        for key, offsets in self._more.items():
            yield id_of(key), 1 + len(offsets)


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "send_id": row["id"],
        "run": row["run"],
        "address": row["to"],
        "accepted_at_ms": row["at"],
        "provider": row["p"],
        "provider_message_id": row["m"],
    }
