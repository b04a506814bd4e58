"""Profiles by the column: what is refused and why, how values are cleaned and encoded."""

from __future__ import annotations

import io
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import InvalidProfile
from schemas.profile import RejectReason
from schemas.snapshot import shard_of
from transforms.profile import (
    NEVER_UPDATED,
    Profiles,
    attribute_type,
    canonical_consents,
    check,
    encode_texts,
    encode_values,
    known_type,
    select,
    shards_of,
)
from transforms.segment import compile_segment

ZONES = {"Europe/Berlin", "Asia/Tokyo"}
UNION = ["null", "boolean", "long", "double", "string"]


def checked(
    rows: list[dict[str, Any]], default_zone: str = ""
) -> tuple[Profiles, list[RejectReason | None]]:
    names = {"recipient_id"} | {name for row in rows for name in row}
    columns = {
        name: pa.array([row.get(name) for row in rows], pa.string()) for name in sorted(names)
    }
    profiles, rejects = check(columns, len(rows), ZONES, default_zone)
    reasons: list[RejectReason | None] = [None] * len(rows)
    for position, reason in zip(rejects.positions.tolist(), rejects.reasons, strict=True):
        reasons[position] = reason
    return profiles, reasons


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, RejectReason.MISSING_ID),
        ({"recipient_id": "  "}, RejectReason.MISSING_ID),
        ({"recipient_id": "é" * 129}, RejectReason.LONG_ID),
        ({"recipient_id": "é" * 128}, None),
        ({"recipient_id": "a\tb"}, RejectReason.CONTROL_IN_ID),
        ({"recipient_id": "a\0b"}, RejectReason.UNDECODABLE),
        ({"recipient_id": "a", "x": "\0"}, RejectReason.UNDECODABLE),
        ({"recipient_id": "a", "x": "x" * 8193}, RejectReason.LONG_FIELD),
        ({"recipient_id": "a", "push_token": "x" * 4097}, RejectReason.LONG_FIELD),
        ({"recipient_id": "a", "zone": "Europe/Köln"}, RejectReason.UNKNOWN_ZONE),
        ({"recipient_id": "a", "zone": " Europe/Berlin "}, None),
        ({"recipient_id": "a", "phone": "+4915112345678"}, None),
        ({"recipient_id": "a", "phone": "015112345678"}, RejectReason.BAD_PHONE),
        ({"recipient_id": "a", "consents": "email:offers; sms:*;"}, None),
        ({"recipient_id": "a", "consents": "email"}, RejectReason.BAD_CONSENTS),
        ({"recipient_id": "a", "consents": "fax:offers"}, RejectReason.BAD_CONSENTS),
        ({"recipient_id": "a", "consents": "email:a b"}, RejectReason.BAD_CONSENTS),
        ({"recipient_id": "a", "updated_at": "yesterday"}, RejectReason.BAD_UPDATED_AT),
        ({"recipient_id": "a", "updated_at": "2026-02-30"}, RejectReason.BAD_UPDATED_AT),
    ],
)
def test_reasons(row: dict[str, Any], reason: RejectReason | None) -> None:
    good = {"recipient_id": "good", "zone": "Asia/Tokyo"}
    profiles, reasons = checked([good, row, good])
    assert reasons == [None, reason, None]
    assert profiles.count == (2 if reason else 3)


@pytest.mark.parametrize(
    "email",
    [
        "a@b.de",
        "o'neil+x@sub.example.com",
        "用户@例子.广告",
        "a.b-c_d=e!#$@x-y.museum",
        "x" * 64 + "@b.de",
    ],
)
def test_addresses_that_are_sound(email: str) -> None:
    assert checked([{"recipient_id": "a", "email": f" {email} "}])[0].addresses["email"][
        0
    ].as_py() == (email)


@pytest.mark.parametrize(
    "email",
    ["a", "a@", "@b.de", "a@b", "a@b..de", "a@.de", "a@b.de.", "a b@c.de", "a@b@c.de", "a,b@c.de",
     "<a@b.de>", "a@b.de\nBcc: c@d.de", "x" * 65 + "@b.de", "a@" + "b" * 255 + ".de"],
)  # fmt: skip
def test_addresses_that_are_not(email: str) -> None:
    assert checked([{"recipient_id": "a", "email": email}])[1] == [RejectReason.BAD_EMAIL]


def test_what_is_absent_stays_absent_and_the_default_zone_fills_in() -> None:
    profiles, reasons = checked([{"recipient_id": "a", "email": " "}], "Europe/Berlin")
    assert reasons == [None]
    assert profiles.zones.to_pylist() == ["Europe/Berlin"]
    assert profiles.addresses["email"].to_pylist() == [None]
    assert profiles.consents.to_pylist() == [""]
    assert profiles.updated_at_us.to_pylist() == [NEVER_UPDATED]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02", 86400),
        ("1970-01-01T00:00:01", 1),
        ("1970-01-01 00:00:01", 1),
        ("1970-01-01T00:00:01Z", 1),
        ("1970-01-01T01:00:01+01:00", 1),
        ("1970-01-01T01:00:01.5+0100", 1.5),
    ],
)
@pytest.mark.parametrize("beside", ["1970-01-01", "1970-01-01T00:00:00Z", None, "20260101T000000"])
def test_times_whatever_stands_beside_them(text: str, seconds: float, beside: str | None) -> None:
    rows = [{"recipient_id": "a", "updated_at": one} for one in (text, beside)]
    profiles, reasons = checked(rows)
    assert reasons == [None, None]
    assert profiles.updated_at_us[0].as_py() == seconds * 1_000_000


def test_consents_are_sorted_and_distinct() -> None:
    assert canonical_consents("sms:*;email:b;; email:a;sms:*") == "email:a;email:b;sms:*"
    assert canonical_consents("") == ""
    assert canonical_consents("email:*x") is None


@settings(deadline=None)
@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)))
def test_texts_are_encoded_as_avro_does(values: list[str | None]) -> None:
    encoded = encode_texts(pa.array(values, pa.string()), 4).to_pylist()
    assert [read(one) for one in encoded] == values


@pytest.mark.parametrize(
    "array",
    [
        pa.array([True, False, None]),
        pa.array([0, -1, 2**63 - 1, -(2**63), None, 64]),
        pa.array([0.0, -0.5, 1e300, None]),
        pa.array([None, None], pa.float64()),
        pa.array([], pa.int64()),
    ],
)
def test_values_are_encoded_as_avro_does(array: pa.Array) -> None:
    found = [read(one) for one in encode_values(array).to_pylist()]
    assert found == array.to_pylist()
    assert [type(one) for one in found] == [type(one) for one in array.to_pylist()]


def read(data: bytes) -> Any:
    stream = io.BytesIO(data)
    value = fastavro.schemaless_reader(stream, UNION, None)
    assert not stream.read()
    return value


@settings(deadline=None)
@given(st.text(max_size=9), st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_shards_by_the_column_are_shards_one_by_one(tenant: str, ids: list[str]) -> None:
    assert shards_of(tenant, pa.array(ids, pa.string())).tolist() == [
        shard_of(tenant, one) for one in ids
    ]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "1", "2", "x"]),
            st.sampled_from([None, "DE", "AT"]),
            st.sampled_from(["", "email:a", "email:a;sms:*"]),
        ),
        max_size=50,
    )
)
def test_selecting_by_the_column_is_selecting_one_by_one(
    rows: list[tuple[str | None, str | None, str]],
) -> None:
    segment = compile_segment("age > 1 and country == 'DE' or 'sms:*' in consents")
    profiles, _ = checked(
        [
            {"recipient_id": str(at), "age": age, "country": country, "consents": consents}
            for at, (age, country, consents) in enumerate(rows)
        ]
    )
    assert segment.names == ("age", "consents", "country")
    expected = [
        segment.selects((age, frozenset(consents.split(";")) - {""}, country))
        for age, country, consents in rows
    ]
    assert select(segment, profiles).tolist() == expected


def test_numbers_that_are_none_are_absent_and_infinite_ones_refused() -> None:
    columns = {
        "recipient_id": pa.array(["a", "b", "c"]),
        "value": pa.array([float("nan"), float("inf"), 1.0]),
    }
    profiles, rejects = check(columns, 3, ZONES, "")
    assert rejects.reasons == [RejectReason.BAD_ATTRIBUTE]
    assert profiles.attributes["value"].to_pylist() == [None, 1.0]
    assert np.array_equal(rejects.positions, [1])


def test_columns_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(InvalidProfile, match="'tags' is list"):
        attribute_type("tags", pa.list_(pa.string()))
    with pytest.raises(InvalidProfile, match="'recipient_id' is double"):
        known_type("recipient_id", pa.float64())
    with pytest.raises(InvalidProfile, match="'updated_at' is int64"):
        known_type("updated_at", pa.int64())
    known_type("consents", pa.list_(pa.string()))
    known_type("recipient_id", pa.int32())
