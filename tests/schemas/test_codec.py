"""The codec: round trips, old writers, golden bytes, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import typing
from dataclasses import MISSING, fields, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import codec, recipient_bytes
from schemas.errors import Corrupt, IncompatibleState, MalformedRecord, UnknownSchema
from schemas.ids import LegId, RunId, Tenant
from schemas.records import ConsentStatus, Outcomes, PageOrder
from schemas.state import ConsentEntry, PageState, RecipientState, Reservation, RunState
from tests.schemas import samples

RECORDS = codec.record_classes()
AVRO = Path(codec.__file__).parent / "avro"
HOW_TO_CHANGE = (
    "A layout that was ever written stays readable. To change one: copy its present .avsc to "
    "schemas/avro/old/<Record>-<n>.avsc, change the .avsc and the class (a new field needs a "
    "default in the .avsc), then run `python -m tests.schemas.samples` and commit the new golden "
    "bytes beside the old."
)


def named(kind: type) -> str:
    return kind.__name__


@pytest.mark.parametrize("kind", RECORDS, ids=named)
def test_every_record_comes_back_as_it_was(kind: type) -> None:
    @given(samples.record(kind))
    @settings(max_examples=60, deadline=None)
    def comes_back(record: object) -> None:
        data = codec.encode(record)
        assert codec.decode(data, kind) == record
        assert codec.name_of(data) == kind.__name__
        assert codec.encode(codec.decode(data, kind)) == data

    comes_back()


@pytest.mark.parametrize("kind", RECORDS, ids=named)
def test_schema_and_class_have_the_same_fields(kind: type) -> None:
    schema = codec.schema_of(kind)
    assert [one["name"] for one in schema["fields"]] == [one.name for one in fields(kind)]
    defaults = {one["name"]: one["default"] for one in schema["fields"] if "default" in one}
    for one in fields(kind):
        optional = samples.optional(typing.get_type_hints(kind)[one.name]) is not None
        if one.default is not MISSING:
            assert one.name in defaults, f"{one.name} has a default in the class alone"
        if optional:
            assert defaults.get(one.name, ...) is None


@pytest.mark.parametrize("kind", RECORDS, ids=named)
def test_the_current_layout_has_golden_bytes(kind: type) -> None:
    path = samples.golden_path(kind)
    assert path.exists(), f"the layout of {kind.__name__} is new. {HOW_TO_CHANGE}"
    golden = bytes.fromhex(path.read_text())
    record = samples.fixed_record(kind)
    assert codec.encode(record) == golden
    assert codec.decode(golden, kind) == record


def bodies_that_do_not_load(golden: Path, avro: Path) -> list[str]:
    """Golden bytes that the schemas in a folder can't read, each with the remedy."""
    schemas = codec._Schemas(avro)
    wrong = []
    for path in sorted(golden.glob("*.hex")):
        data = bytes.fromhex(path.read_text())
        name = path.stem.rpartition("-")[0]
        known = schemas.writers.get(data[2:10])
        if known is None or known[0] != name:
            wrong.append(f"{path.name}: its writer's schema is gone. {HOW_TO_CHANGE}")
            continue
        if name not in schemas.current:
            continue
        body = io.BytesIO(data[10:])
        try:
            fastavro.schemaless_reader(body, known[1], schemas.current[name])
        except Exception as error:
            wrong.append(f"{path.name}: {error}. {HOW_TO_CHANGE}")
    return wrong


def test_everything_that_was_ever_written_still_loads() -> None:
    assert bodies_that_do_not_load(samples.GOLDEN, AVRO) == []
    kinds = {kind.__name__: kind for kind in RECORDS}
    loaded = 0
    for path in samples.GOLDEN.glob("*.hex"):
        kind = kinds.get(path.stem.rpartition("-")[0])
        if kind is not None:
            codec.decode(bytes.fromhex(path.read_text()), kind)
            loaded += 1
    assert loaded >= len(RECORDS)


def test_every_old_schema_has_golden_bytes() -> None:
    marks = {bytes.fromhex(one.read_text())[2:10] for one in samples.GOLDEN.glob("*.hex")}
    old = sorted((AVRO / "old").glob("*.avsc"))
    assert old
    for path in old:
        name, _, mark = codec._load(path)
        assert mark in marks, f"{path.name} ({name}) has no golden bytes. {HOW_TO_CHANGE}"
        assert path.stem.rpartition("-")[0] == name


@pytest.mark.parametrize("keeps_old", [True, False])
@pytest.mark.parametrize("has_default", [True, False])
def test_a_changed_schema_is_noticed(tmp_path: Path, keeps_old: bool, has_default: bool) -> None:
    """What the test above is worth: it fails unless the old schema stays and the new one fits."""
    folder = tmp_path / "avro"
    shutil.copytree(AVRO, folder)
    path = folder / "PageOrder.avsc"
    if keeps_old:
        shutil.copy(path, folder / "old" / "PageOrder-before.avsc")
    schema = json.loads(path.read_text())
    added = {"name": "urgent", "type": "boolean"}
    schema["fields"].append(added | {"default": False} if has_default else added)
    path.write_text(json.dumps(schema))
    wrong = bodies_that_do_not_load(samples.GOLDEN, folder)
    assert bool(wrong) is not (keeps_old and has_default)
    assert all(one.startswith("PageOrder-") for one in wrong)


def test_state_of_the_first_layout_loads() -> None:
    """Bytes as the first layout wrote them: its reservations knew no refund."""
    (path,) = (
        one
        for one in samples.GOLDEN.glob("RecipientState-*.hex")
        if one != samples.golden_path(RecipientState)
    )
    data = bytes.fromhex(path.read_text())
    expected = RecipientState(
        tenant=Tenant("acme"),
        consents=(
            ConsentEntry(
                "email", "*", ConsentStatus.WITHDRAWN, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
            ),
        ),
        reservations=(
            Reservation(
                run=RunId("winter-1"),
                leg=LegId("email"),
                generation=2,
                at=datetime(2026, 1, 3, tzinfo=UTC),
                channel="email",
                category="promo",
                settled=True,
                refunded=False,
            ),
        ),
    )
    assert codec.decode(data, RecipientState) == expected
    assert recipient_bytes.to_state(recipient_bytes.read(data)) == expected
    rewritten = recipient_bytes.write(recipient_bytes.read(data))
    assert rewritten == codec.encode(expected)
    assert rewritten[:10] != data[:10]


@given(samples.record(RecipientState))
@settings(max_examples=300, deadline=None)
def test_the_fast_way_to_state_bytes_is_the_codecs(state: RecipientState) -> None:
    data = codec.encode(state)
    memory = recipient_bytes.read(data)
    assert recipient_bytes.to_state(memory) == state
    assert recipient_bytes.from_state(state) == memory
    assert recipient_bytes.write(memory) == data
    assert recipient_bytes.write(recipient_bytes.from_state(state)) == data


@pytest.mark.parametrize("size", [0, 62, 63, 64, 65, 200, 9_000])
def test_the_fast_way_reads_long_names_and_many_entries(size: int) -> None:
    """Lengths and counts take one byte below 64, then more."""
    at = datetime(2026, 1, 3, tzinfo=UTC)
    name = "n" * size
    word = ConsentEntry("email", name, ConsentStatus.GRANTED, at)
    held = Reservation(RunId("r"), LegId("email"), 1, at, "email", name, True, False)
    few = min(size, 200)
    for state in (
        RecipientState(Tenant(name), (), ()),
        RecipientState(Tenant("acme"), (word,), (held,)),
        RecipientState(Tenant("acme"), (word,) * few, (held,) * few),
    ):
        data = codec.encode(state)
        assert recipient_bytes.to_state(recipient_bytes.read(data)) == state
        assert recipient_bytes.write(recipient_bytes.read(data)) == data


@given(samples.record(RecipientState), st.data())
@settings(max_examples=200, deadline=None)
def test_the_fast_way_refuses_what_is_cut_or_longer(
    state: RecipientState, data: st.DataObject
) -> None:
    whole = codec.encode(state)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for broken in (whole[:cut], whole + b"\0"):
        with pytest.raises(MalformedRecord):
            recipient_bytes.read(broken)


@given(st.binary(max_size=60))
def test_what_is_no_record_is_refused_as_such(data: bytes) -> None:
    for kind in (RecipientState, Outcomes):
        with pytest.raises(MalformedRecord):
            codec.decode(data, kind)
        with pytest.raises(MalformedRecord):
            codec.decode(codec.header_of(kind) + data + b"\xff", kind)
    with pytest.raises(MalformedRecord):
        recipient_bytes.read(codec.header_of(RecipientState) + data + b"\xff")


@pytest.mark.parametrize("kind", [RecipientState, RunState, PageState], ids=named)
def test_state_of_a_layout_that_nobody_knows_is_no_record_to_skip(kind: type) -> None:
    data = codec.encode(samples.fixed_record(kind))
    newer = data[:2] + b"\1" * 8 + data[10:]
    with pytest.raises(
        IncompatibleState, match=r"newer layout.*0101.*Install.*savepoint"
    ) as caught:
        codec.decode_state(newer, kind)
    assert not isinstance(caught.value, MalformedRecord | Corrupt)
    if kind is RecipientState:
        with pytest.raises(IncompatibleState, match="newer layout"):
            recipient_bytes.read(newer)
    assert codec.decode_state(data, kind) == codec.decode(data, kind)


def test_messages_say_what_was_wrong() -> None:
    order = codec.encode(samples.fixed_record(PageOrder))
    with pytest.raises(UnknownSchema, match="belongs to PageOrder"):
        codec.decode(order, Outcomes)
    with pytest.raises(UnknownSchema, match="no known schema has"):
        codec.decode(order[:2] + b"\1" * 8 + order[10:], PageOrder)
    with pytest.raises(MalformedRecord, match="3 bytes follow the PageOrder"):
        codec.decode(order + b"abc", PageOrder)
    with pytest.raises(MalformedRecord, match="C3 01"):
        codec.decode(b"{}", PageOrder)
    assert codec.name_of(b"{}") is None
    assert codec.name_of(order[:2] + b"\1" * 8) is None


def test_times_are_milliseconds_of_utc() -> None:
    moment = datetime(2026, 3, 10, 13, 0, 0, 999, tzinfo=timezone(timedelta(hours=1)))
    assert codec.from_millis(codec.to_millis(moment)) == datetime(2026, 3, 10, 12, tzinfo=UTC)
    before = datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    assert codec.to_millis(before) == -1


def test_a_long_without_end_is_refused_at_once() -> None:
    head = codec.encode(samples.fixed_record(PageOrder))[: codec.HEADER_BYTES]
    with pytest.raises(MalformedRecord, match="10 bytes"):
        codec.leading_strings(head + b"\xff" * 1_000_000, 1)


@pytest.mark.parametrize("index", [-1, 500, 1 << 40])
def test_outcomes_of_nobody_are_no_outcomes(index: int) -> None:
    sound = samples.fixed_record(Outcomes)
    group = replace(sound.groups[0], indexes=(0, index))
    with pytest.raises(MalformedRecord, match="0 to 499"):
        replace(sound, groups=(group,)).require_sound()
    assert replace(sound, groups=(replace(group, indexes=(0, 499)),)).require_sound()
