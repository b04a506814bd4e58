"""A shard's spilled profiles to its pages: one row a person, sorted, cut, encoded.

Nothing here depends on the order in which rows come, so neither does a snapshot's content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.pages import PAGE_SIZE
from schemas.profile import (
    CONSENT_SEPARATOR,
    CONSENTS,
    EMAIL,
    LOCALE,
    PHONE,
    PUSH_TOKEN,
    RECIPIENT_ID,
    UPDATED_AT,
    ZONE,
)
from schemas.snapshot import (
    HAS_EMAIL,
    HAS_PHONE,
    HAS_PUSH_TOKEN,
    Block,
    PageEntry,
    body_object,
    container_header,
    encode_block,
    index_object,
)
from transforms.profile import ATTRIBUTE_PREFIX, encode_texts

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PagedShard:
    """A finished shard."""

    file: list[bytes]
    """Parts of the shard's file, in order; none if the shard has no recipients."""
    pages: list[PageEntry]
    zones: dict[str, int]
    duplicates: int
    not_selected: int


def page_shard(
    shard: int, selected: pa.Table, passed: pa.Table, attributes: Sequence[str]
) -> PagedShard:
    """The pages of a shard; each has the columns ``attributes``, in their order.

    ``selected`` has the columns of ``transforms.profile.spilled``, nulls only in attributes that
    a row's source lacks; ``passed`` those of ``PASSED_SCHEMA``: rows outside the segment. Of a
    person's rows the last by ``updated_at`` counts, and it decides whether the person is in the
    segment. Of several at the same time one outside the segment counts before one inside (nobody
    is written to on contradictory data), then the greatest by content.
    """
    selected = selected.combine_chunks()
    winners, duplicates, not_selected = _latest(selected, passed)
    if not len(winners):
        return PagedShard([], [], {}, duplicates, not_selected)
    order = pc.sort_indices(
        selected.select([ZONE, RECIPIENT_ID]).take(pa.array(winners)),
        sort_keys=[(ZONE, "ascending"), (RECIPIENT_ID, "ascending")],
    ).to_numpy()
    rows = selected.take(pa.array(winners[order])).combine_chunks()
    return _cut(shard, rows, attributes, duplicates, not_selected)


def _latest(selected: pa.Table, passed: pa.Table) -> tuple[Positions, int, int]:
    """Rows of ``selected`` that count, how many rows do not, and how many people passed."""
    inside = selected.num_rows
    total = inside + passed.num_rows
    ids = pa.chunked_array(
        [*selected[RECIPIENT_ID].chunks, *passed[RECIPIENT_ID].chunks], pa.string()
    )
    encoded = ids.combine_chunks().dictionary_encode()
    people = len(encoded.dictionary)
    if people == total:
        return np.arange(inside, dtype=np.int64), 0, passed.num_rows
    codes = encoded.indices.to_numpy()
    updated = np.concatenate([selected[UPDATED_AT].to_numpy(), passed[UPDATED_AT].to_numpy()])
    is_passed = np.arange(total) >= inside
    order = np.lexsort((is_passed, updated, codes))
    last = np.flatnonzero(np.append(codes[order][1:] != codes[order][:-1], True))
    winners = order[last]
    # A winner is contested if the row sorted before it is of the same person, time and side.
    rivals = order[np.maximum(last - 1, 0)]
    contested = (
        (last > 0)
        & (codes[rivals] == codes[winners])
        & (updated[rivals] == updated[winners])
        & ~is_passed[winners]
        & ~is_passed[rivals]
    )
    for at in np.flatnonzero(contested).tolist():
        winner = winners[at]
        candidates = []
        for candidate in order[: last[at] + 1][::-1].tolist():
            if (
                codes[candidate] != codes[winner]
                or updated[candidate] != updated[winner]
                or is_passed[candidate]
            ):
                break
            candidates.append(candidate)
        winners[at] = max(candidates, key=lambda row: _content(selected, row))
    winners = winners[winners < inside]
    return winners, total - people, people - len(winners)


def _content(table: pa.Table, row: int) -> tuple[bytes, ...]:
    """A row as bytes that compare alike wherever it came from; absent attributes are null."""
    values = (table[name][row].as_py() for name in sorted(table.column_names))
    return tuple(
        one if isinstance(one, bytes) else b"\0" if one is None else str(one).encode()
        for one in values
    )


@dataclass(frozen=True, slots=True)
class _Column:
    """Encoded values in a row, to be cut by position."""

    offsets: npt.NDArray[Any]
    data: memoryview

    def cut(self, start: int, end: int) -> bytes:
        return bytes(self.data[self.offsets[start] : self.offsets[end]])

    def present(self) -> npt.NDArray[np.bool_]:
        """Which values are not null: null is one byte, all else is more."""
        return np.diff(self.offsets) > 1


def _column(array: pa.Array) -> _Column:
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int32)
    offsets = offsets[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    return _Column(offsets, memoryview(data) if data is not None else memoryview(b""))


def _single(table: pa.Table, name: str) -> pa.Array:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _codes(array: pa.Array) -> tuple[npt.NDArray[Any], list[str]]:
    encoded = array.dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary.to_pylist()


def _cut(
    shard: int, rows: pa.Table, names: Sequence[str], duplicates: int, not_selected: int
) -> PagedShard:
    count = rows.num_rows
    ids = _column(encode_texts(_single(rows, RECIPIENT_ID), None))
    email, phone, push_token, locale = (
        _column(_single(rows, name)) for name in (EMAIL, PHONE, PUSH_TOKEN, LOCALE)
    )
    present = set(rows.column_names)
    attributes = [
        (name, _column(pc.fill_null(_single(rows, ATTRIBUTE_PREFIX + name), b"\0")))
        if ATTRIBUTE_PREFIX + name in present
        else (name, _Column(np.arange(count + 1), memoryview(bytes(count))))
        for name in names
    ]
    flags = (
        email.present() * np.uint8(HAS_EMAIL)
        | phone.present() * np.uint8(HAS_PHONE)
        | push_token.present() * np.uint8(HAS_PUSH_TOKEN)
    ).tobytes()
    zone_codes, zone_names = _codes(_single(rows, ZONE))
    consent_codes, consent_texts = _codes(_single(rows, CONSENTS))
    consent_sets = [text.split(CONSENT_SEPARATOR) if text else [] for text in consent_texts]

    parts = [container_header()]
    position = len(parts[0])
    pages: list[PageEntry] = []

    def add(avro_object: bytes) -> Block:
        nonlocal position
        block = encode_block(avro_object)
        parts.append(block)
        start, position = position, position + len(block)
        return Block(start, len(block), hashlib.sha256(block).hexdigest())

    for page, start in enumerate(range(0, count, PAGE_SIZE)):
        end = min(start + PAGE_SIZE, count)
        distinct, consent_index = np.unique(consent_codes[start:end], return_inverse=True)
        index = add(
            index_object(
                start,
                end - start,
                ids.cut(start, end),
                _runs(zone_codes[start:end], zone_names),
                [consent_sets[code] for code in distinct.tolist()],
                consent_index.astype("<u2").tobytes(),
                flags[start:end],
            )
        )
        body = add(
            body_object(
                start,
                end - start,
                email.cut(start, end),
                phone.cut(start, end),
                push_token.cut(start, end),
                locale.cut(start, end),
                [(name, column.cut(start, end)) for name, column in attributes],
            )
        )
        pages.append(PageEntry(shard, page, start, end - start, index, body))
    amounts = np.bincount(zone_codes, minlength=len(zone_names)).tolist()
    zones = dict(zip(zone_names, amounts, strict=True))
    return PagedShard(parts, pages, zones, duplicates, not_selected)


def _runs(codes: npt.NDArray[Any], names: Sequence[str]) -> list[tuple[str, int]]:
    """Runs of equal codes as (name, length)."""
    ends = np.append(np.flatnonzero(codes[1:] != codes[:-1]) + 1, len(codes))
    lengths = np.diff(ends, prepend=0)
    return [
        (names[codes[end - 1]], length)
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]
