"""Pages, ordinals and bitmaps.

A page holds at most ``PAGE_SIZE`` recipients of one shard; every page but a shard's last is full,
so page ``p`` begins at ordinal ``p * PAGE_SIZE``. Records carry sets of recipients as bitmaps of a
page: bit ``i`` is ordinal ``p * PAGE_SIZE + i``. In memory a bitmap is an ``int``; in records it is
little-endian bytes without trailing zeroes.
"""

from __future__ import annotations

from collections.abc import Iterable

PAGE_SIZE = 500
SHARDS = 256
DELIVERY_KEYS = 64
"""Delivery keys: shard mod this, fixed for ever, so that each ledger has one writer."""


def bitmap_bytes(bits: int) -> bytes:
    """The bytes of a bitmap, shortest form."""
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def bitmap_from(data: bytes) -> int:
    """The bitmap of ``data``."""
    return int.from_bytes(data, "little")


def bitmap_of(indexes: Iterable[int]) -> int:
    """The bitmap with exactly these page-relative indexes."""
    bits = 0
    for index in indexes:
        bits |= 1 << index
    return bits


_BYTE_BITS = tuple(tuple(i for i in range(8) if byte >> i & 1) for byte in range(256))


def indexes_of(bits: int) -> list[int]:
    """The page-relative indexes in a bitmap, ascending."""
    found: list[int] = []
    for position, byte in enumerate(bitmap_bytes(bits)):
        if byte:
            base = position * 8
            found += [base + bit for bit in _BYTE_BITS[byte]]
    return found


def delivery_key(shard: int) -> int:
    """The delivery key of a campaign's sends to a shard."""
    return shard % DELIVERY_KEYS


def full_bitmap(count: int) -> int:
    """The bitmap of the first ``count`` indexes."""
    return (1 << count) - 1


_MASK = 0xFFFFFFFF
_ROW_HASH = 62


def _rotate(code: int, by: int) -> int:
    return ((code << by) | (code >> (32 - by))) & _MASK


def key_group(key: int, groups: int) -> int:
    """The key group that Flink gives PyFlink's integer key.

    PyFlink keys by a Row of one field, whose hash is 62 + the integer (``RowUtils``), and Flink
    spreads hashes by Murmur3 (``MathUtils.murmurHash``). A test compares with Flink itself.
    """
    code = (_ROW_HASH + key) & _MASK
    code = code * 0xCC9E2D51 & _MASK
    code = _rotate(code, 15) * 0x1B873593 & _MASK
    code = (_rotate(code, 13) * 5 + 0xE6546B64) & _MASK
    code ^= 4
    code = (code ^ code >> 16) * 0x85EBCA6B & _MASK
    code = (code ^ code >> 13) * 0xC2B2AE35 & _MASK
    code ^= code >> 16
    signed = code - (1 << 32) if code >> 31 else code
    return abs(signed) % groups


def _keys(groups: int) -> tuple[int, ...]:
    found: dict[int, int] = {}
    key = 0
    while len(found) < groups:
        found.setdefault(key_group(key, groups), key)
        key += 1
    return tuple(found[group] for group in range(groups))


SHARD_KEYS = _keys(SHARDS)
"""The Flink key of each shard: its key group *is* the shard. 256 consecutive integers would fill
only 160 of 256 key groups."""
DELIVERY_FLINK_KEYS = _keys(DELIVERY_KEYS)
"""The Flink key of each delivery key, likewise, in a job of that maximum parallelism."""
