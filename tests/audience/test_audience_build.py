"""From sources to a snapshot, by the real pipeline and store."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from pipelines.audience import AudienceRequest, BuiltAudience, build_audience
from schemas.errors import FanfareError, InvalidProfile, InvalidSegment
from schemas.pages import PAGE_SIZE
from schemas.profile import RejectReason
from schemas.snapshot import HAS_EMAIL, HAS_PHONE, HAS_PUSH_TOKEN, shard_of
from sinks.store import FileStore, Snapshot
from stack.profiles import generate

TENANT = "acme"
PEOPLE = 20_000


def build(root: Path, *sources: Path, **options: Any) -> BuiltAudience:
    return build_audience(AudienceRequest(sources, TENANT, **options), FileStore(root))


def content(root: Path, name: str) -> dict[str, bytes]:
    folder = root / "snapshots" / name
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "build.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def people(snapshot: Snapshot) -> Iterator[tuple[int, int, str, str, dict[str, Any]]]:
    """Shard, ordinal, id, zone and all else of each recipient."""
    for entry in snapshot.manifest.pages:
        index = snapshot.read_index(entry.shard, entry.page)
        body = snapshot.read_body(entry.shard, entry.page)
        assert index.count == body.count == entry.count
        assert index.first_ordinal == body.first_ordinal == entry.first_ordinal
        for i in range(entry.count):
            addresses = (body.email(i), body.phone(i), body.push_token(i))
            flags = (HAS_EMAIL, HAS_PHONE, HAS_PUSH_TOKEN)
            assert index.flags[i] == sum(
                flag for flag, one in zip(flags, addresses, strict=True) if one is not None
            )
            values = body.attributes(i) | {
                "email": body.email(i),
                "phone": body.phone(i),
                "push_token": body.push_token(i),
                "locale": body.locale(i),
                "consents": index.consents(i),
            }
            ordinal = entry.first_ordinal + i
            yield entry.shard, ordinal, index.recipient_ids[i], index.zone_of(i), values


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "people.csv"
    generate(PEOPLE, 7, path)
    return path


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuiltAudience]:
    root = tmp_path_factory.mktemp("store")
    rejects = root / "rejects.csv"
    return root, build(root, source, segment="age >= 18", rejects=rejects)


def test_pages_are_sorted_disjoint_and_complete(built: tuple[Path, BuiltAudience]) -> None:
    root, audience = built
    snapshot = FileStore(root).open_snapshot(audience.snapshot)
    seen: set[str] = set()
    by_shard: dict[int, list[tuple[bytes, bytes]]] = {}
    zones: dict[str, int] = {}
    for shard, ordinal, name, zone, values in people(snapshot):
        assert shard == shard_of(TENANT, name)
        keys = by_shard.setdefault(shard, [])
        assert ordinal == len(keys)
        keys.append((zone.encode(), name.encode()))
        assert name not in seen
        seen.add(name)
        zones[zone] = zones.get(zone, 0) + 1
        assert int(values["age"]) >= 18
    for shard, keys in by_shard.items():
        assert keys == sorted(keys)
        assert snapshot.manifest.shard_size(shard) == len(keys)
        pages = snapshot.manifest.pages_of(shard)
        assert [entry.page for entry in pages] == list(range(len(pages)))
        assert all(entry.count == PAGE_SIZE for entry in pages[:-1])
    assert zones == snapshot.manifest.zones
    assert len(zones) == 31
    assert len(seen) == snapshot.manifest.counts.audience > 0.9 * PEOPLE
    assert snapshot.manifest.counts.balanced
    assert list(snapshot.verify()) == []


def test_every_person_is_as_the_source_has_them(
    source: Path, built: tuple[Path, BuiltAudience]
) -> None:
    root, audience = built
    bad = {int(row["row"]) for row in rejects_of(root / "rejects.csv")}
    latest: dict[str, dict[str, str]] = {}
    with source.open(encoding="utf-8", errors="replace", newline="") as sheet:
        lines = csv.reader(sheet)
        names = next(lines)
        for number, line in enumerate(lines, start=2):
            if number in bad:
                continue
            row = dict(zip(names, line, strict=True))
            old = latest.get(row["recipient_id"])
            if old is None or old["updated_at"] <= row["updated_at"]:
                if old and old["updated_at"] == row["updated_at"]:
                    assert old["age"] == row["age"]
                    row = max(old, row, key=lambda one: one["plan"])
                latest[row["recipient_id"]] = row
    expected = {name: row for name, row in latest.items() if int(row["age"]) >= 18}
    found = {}
    for _, _, name, zone, values in people(FileStore(root).open_snapshot(audience.snapshot)):
        row = expected[name]
        assert zone == row["zone"]
        assert values["consents"] == frozenset(filter(None, row["consents"].split(";")))
        for field, value in values.items():
            if field not in ("consents", "plan"):
                assert value == (row[field] or None), field
        found[name] = values
    assert found.keys() == expected.keys()


def rejects_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as sheet:
        return list(csv.DictReader(sheet))


def test_rejects_have_source_row_reason_and_what_stood_there(
    source: Path, built: tuple[Path, BuiltAudience]
) -> None:
    root, audience = built
    rejects = rejects_of(root / "rejects.csv")
    assert len(rejects) == audience.manifest.counts.rejected == 240
    assert {one["source"] for one in rejects} == {str(source)}
    numbers = [int(one["row"]) for one in rejects]
    assert numbers == sorted(numbers)
    assert {one["reason"] for one in rejects} == {
        reason.value
        for reason in (
            RejectReason.COLUMN_COUNT, RejectReason.UNDECODABLE, RejectReason.MISSING_ID,
            RejectReason.LONG_ID, RejectReason.BAD_EMAIL, RejectReason.BAD_PHONE,
            RejectReason.UNKNOWN_ZONE, RejectReason.BAD_CONSENTS,
        )
    }  # fmt: skip
    lines = source.read_bytes().split(b"\n")
    for one in rejects:
        email = next((part for part in one["raw"].split(",") if "@" in part), None)
        if email:
            assert email.strip('"').encode() in lines[int(one["row"]) - 1]


def test_the_same_profiles_are_the_same_bytes_however_they_come(
    source: Path, built: tuple[Path, BuiltAudience], tmp_path: Path
) -> None:
    root, audience = built
    header, *lines = source.read_bytes().rstrip(b"\n").split(b"\n")
    random.Random(3).shuffle(lines)
    parts = []
    for number in range(3):
        path = tmp_path / f"part-{number}.csv"
        path.write_bytes(b"\n".join([header, *lines[number::3]]))
        parts.append(path)
    again = build(tmp_path / "store", *reversed(parts), segment=" age >= 18 ")
    assert again.snapshot == audience.snapshot
    assert content(tmp_path / "store", again.snapshot) == content(root, audience.snapshot)


def test_building_again_changes_nothing(source: Path, built: tuple[Path, BuiltAudience]) -> None:
    root, audience = built
    folder = root / "snapshots" / audience.snapshot
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert build(root, source, segment="age >= 18").snapshot == audience.snapshot
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list((root / "scratch").iterdir()) == []


def write(path: Path, rows: list[Mapping[str, str]]) -> Path:
    names = sorted({name for row in rows for name in row})
    with path.open("w", encoding="utf-8", newline="") as sheet:
        writer = csv.DictWriter(sheet, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_and_parquet_of_the_same_text_are_the_same_snapshot(tmp_path: Path) -> None:
    rows: list[Mapping[str, str]] = [
        {"recipient_id": f"{number}", "email": f"a{number}@b.de", "name": "Zoë, \"Z\"\nX",
         "consents": "sms:*;email:offers", "updated_at": "2026-01-01T00:00:00Z",
         "zone": "Europe/Berlin" if number % 3 else ""}
        for number in range(700)
    ]  # fmt: skip
    sheet = write(tmp_path / "p.csv", rows)
    table = pacsv.read_csv(
        sheet,
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            column_types={"recipient_id": pa.int64(), "updated_at": pa.timestamp("ms", "UTC")},
            strings_can_be_null=True,
        ),
    )
    listed = pa.array([["sms:*", "email:offers"]] * len(rows))
    at = table.column_names.index("consents")
    pq.write_table(
        table.set_column(at, "consents", listed), tmp_path / "p.parquet", row_group_size=99
    )
    store = tmp_path / "store"
    first = build(store, sheet, default_zone="Asia/Tokyo")
    assert build(store, tmp_path / "p.parquet", default_zone="Asia/Tokyo") == first
    assert first.manifest.zones == {"Asia/Tokyo": 234, "Europe/Berlin": 466}


def test_typed_attributes_stay_typed(tmp_path: Path) -> None:
    table = pa.table(
        {
            "recipient_id": ["a", "b"],
            "age": pa.array([3, None], pa.int16()),
            "vip": [True, None],
            "value": pa.array([0.5, None], pa.float32()),
            "since": pa.array([0, None], pa.date32()),
            "plan": pa.array(["pro", None]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    other = write(tmp_path / "p.csv", [{"recipient_id": "c", "age": "4"}])
    store = tmp_path / "store"
    audience = build(store, tmp_path / "p.parquet", other, segment="age is None or age >= 3")
    found = {name: values for _, _, name, _, values in people(
        FileStore(store).open_snapshot(audience.snapshot))}  # fmt: skip
    kept = {name: {key: value for key, value in values.items() if key in table.column_names}
            for name, values in found.items()}  # fmt: skip
    nothing = dict.fromkeys(["age", "vip", "value", "since", "plan"])
    assert kept == {
        "a": {"age": 3, "vip": True, "value": 0.5, "since": "1970-01-01", "plan": "pro"},
        "b": nothing,
        "c": nothing | {"age": "4"},
    }
    assert audience.manifest.attributes == ("age", "plan", "since", "value", "vip")


OLD, NEW = "2026-01-01", "2026-06-01"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("in", OLD, "x"), ("in", NEW, "y")], "y"),
        ([("in", NEW, "x"), ("in", OLD, "y")], "x"),
        ([("in", "", "x"), ("in", OLD, "y")], "y"),
        ([("in", "", "y"), ("in", "", "x")], "y"),
        ([("out", NEW, "x"), ("in", OLD, "y")], None),
        ([("out", OLD, "x"), ("in", NEW, "y")], "y"),
        ([("out", "", "x"), ("in", "", "y")], None),
        ([("in", OLD, "x")] * 3, "x"),
    ],
)
def test_the_last_row_of_a_person_counts_also_against_the_segment(
    rows: list[tuple[str, str, str]], expected: str | None, tmp_path: Path
) -> None:
    plain: list[Mapping[str, str]] = [
        {"recipient_id": "a", "plan": plan, "updated_at": updated, "tag": tag}
        for plan, updated, tag in rows
    ]
    one = write(tmp_path / "one.csv", plain[:1])
    two = write(tmp_path / "two.csv", plain[1:] or plain)
    store = tmp_path / "store"
    audience = build(store, one, two, segment="plan == 'in'")
    counts = audience.manifest.counts
    assert (counts.duplicates, counts.audience) == (len(rows) - 1, int(expected is not None))
    tags = [
        values["tag"] for *_, values in people(FileStore(store).open_snapshot(audience.snapshot))
    ]
    assert tags == ([expected] if expected else [])


def test_nobody_is_an_audience_too(tmp_path: Path) -> None:
    source = write(tmp_path / "p.csv", [{"recipient_id": "a", "age": "1"}])
    audience = build(tmp_path / "store", source, segment="age > 1")
    assert audience.manifest.counts.not_selected == 1
    assert audience.manifest.pages == ()
    snapshot = FileStore(tmp_path / "store").open_snapshot(audience.snapshot)
    assert list(people(snapshot)) == []


def test_what_can_not_be_built_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "p.csv", [{"recipient_id": "a", "age": "1"}])
    store = tmp_path / "store"
    with pytest.raises(InvalidSegment, match="did you mean age"):
        build(store, source, segment="agee > 1")
    with pytest.raises(InvalidProfile, match="Mars"):
        build(store, source, default_zone="Mars/Base")
    pq.write_table(pa.table({"recipient_id": ["a"], "x": [[1]]}), tmp_path / "p.parquet")
    with pytest.raises(InvalidProfile, match=r"p\.parquet.*'x' is list"):
        build(store, tmp_path / "p.parquet")
    assert not (store / "snapshots").exists()


def test_a_source_that_breaks_off_is_named_with_the_row(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    generate(2000, 1, path)
    data = bytearray(path.read_bytes())
    data[2000:2200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(InvalidProfile, match=r"p\.parquet: can't be read from row 1 on"):
        build(tmp_path / "store", path)
    sheet = tmp_path / "p.csv"
    sheet.write_bytes(b"recipient_id,x\na,1\n" + b"x" * (20 << 20))
    with pytest.raises(InvalidProfile, match=r"p\.csv: a line is longer"):
        build(tmp_path / "store", sheet)
    assert list((tmp_path / "store" / "scratch").iterdir()) == []


def test_a_store_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "p.csv", [{"recipient_id": "a", "age": "1"}])
    (tmp_path / "store").write_text("a file")
    with pytest.raises(FanfareError, match="can't write to the store"):
        build(tmp_path / "store", source)
    with pytest.raises(FanfareError, match="can't write the rejects"):
        build(tmp_path / "other", source, rejects=tmp_path / "store" / "rejects.csv")


def test_parquet_rows_are_numbered_over_row_groups_and_bad_text_refused(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc")],
    )
    table = pa.table({"recipient_id": ["a", "b", "c", "d", None, "f"], "x": pa.chunked_array(
        [bad, pa.array(["d", "e", "f\0"])])})  # fmt: skip
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    rejects = tmp_path / "rejects.csv"
    audience = build(tmp_path / "store", tmp_path / "p.parquet", rejects=rejects)
    assert audience.manifest.counts.audience == 3
    assert [(one["row"], one["reason"]) for one in rejects_of(rejects)] == [
        ("2", RejectReason.UNDECODABLE.value),
        ("5", RejectReason.MISSING_ID.value),
        ("6", RejectReason.UNDECODABLE.value),
    ]
