"""Spill files: a batch of profiles on disk, sorted by shard, each shard readable by itself.

A file is 514 offsets (int64, little-endian), then 513 sections: the Arrow schema of selected rows,
256 record batches of selected rows, 256 of rows outside the segment. A section may be empty.
Scratch only: read by the build that wrote it, then deleted.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.pages import SHARDS
from transforms.profile import PASSED_SCHEMA, Profiles, spilled, take

_SECTIONS = 1 + 2 * SHARDS
_HEADER_BYTES = 8 * (_SECTIONS + 1)


def write_spill(
    path: Path,
    profiles: Profiles,
    shards: npt.NDArray[np.uint8],
    selected: npt.NDArray[np.bool_],
) -> None:
    """Spill a batch; ``shards`` and ``selected`` have one value a profile."""
    inside, inside_shards = _in_order(profiles, shards, selected)
    outside, outside_shards = _in_order(profiles, shards, ~selected)
    rows = spilled(inside)
    passed = pa.record_batch([outside.recipient_ids, outside.updated_at_us], schema=PASSED_SCHEMA)
    sections = [
        rows.schema.serialize(),
        *_by_shard(rows, inside_shards),
        *_by_shard(passed, outside_shards),
    ]
    offsets = np.cumsum([_HEADER_BYTES, *map(len, sections)], dtype="<i8")
    with path.open("wb") as file:
        file.write(offsets.tobytes())
        file.writelines(sections)


def _in_order(
    profiles: Profiles, shards: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]
) -> tuple[Profiles, npt.NDArray[np.uint8]]:
    positions = np.flatnonzero(mask)
    positions = positions[np.argsort(shards[positions], kind="stable")]
    return take(profiles, pa.array(positions)), shards[positions]


def _by_shard(rows: pa.RecordBatch, shards: npt.NDArray[np.uint8]) -> list[pa.Buffer]:
    bounds = np.searchsorted(shards, np.arange(SHARDS + 1)).tolist()
    return [
        rows.slice(start, end - start).serialize() if end > start else pa.py_buffer(b"")
        for start, end in itertools.pairwise(bounds)
    ]


def read_shard(files: Sequence[str], shard: int) -> tuple[pa.Table | None, pa.Table]:
    """The selected rows of a shard in all files (None without files), and the passed ones."""
    selected: list[pa.Table] = []
    passed: list[pa.RecordBatch] = []
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            offsets = np.frombuffer(os.pread(fd, _HEADER_BYTES, 0), dtype="<i8").tolist()
            schema = pa.ipc.read_schema(pa.py_buffer(_section(fd, offsets, 0)))
            rows = _section(fd, offsets, 1 + shard)
            batches = [pa.ipc.read_record_batch(pa.py_buffer(rows), schema)] if rows else []
            selected.append(pa.Table.from_batches(batches, schema))
            if outside := _section(fd, offsets, 1 + SHARDS + shard):
                passed.append(pa.ipc.read_record_batch(pa.py_buffer(outside), PASSED_SCHEMA))
        finally:
            os.close(fd)
    together = pa.concat_tables(selected, promote_options="default") if selected else None
    return together, pa.Table.from_batches(passed, PASSED_SCHEMA)


def _section(fd: int, offsets: Sequence[int], number: int) -> bytes:
    return os.pread(fd, offsets[number + 1] - offsets[number], offsets[number])
