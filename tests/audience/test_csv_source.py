"""CSV as people write it: quotes, line ends, bad bytes, and the row numbers of what is refused."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import profile_sources
from pipelines.profile_sources import Rejected, attribute_names, plan, read
from schemas.errors import InvalidProfile
from schemas.profile import RejectReason

Rows = list[tuple[int, list[str | None]]]
BROKEN = RejectReason.BROKEN_QUOTES
COUNT = RejectReason.COLUMN_COUNT


def load(path: Path, content: bytes) -> tuple[Rows, list[Rejected]]:
    """All rows with their numbers, and what was rejected."""
    path.write_bytes(content)
    rows: Rows = []
    rejected: list[Rejected] = []
    (split,) = plan([path])
    for batch in read(split):
        columns = [array.to_pylist() for array in batch.columns.values()]
        rows += zip(batch.rows.tolist(), map(list, zip(*columns, strict=True)), strict=True)
        rejected += batch.rejected
    return rows, sorted(rejected, key=lambda one: one.row)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.csv"


@pytest.fixture(params=[3, 40, 6 << 20], ids=["tiny chunks", "small chunks", "chunks"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(profile_sources, "CHUNK_BYTES", request.param)
    size: int = request.param
    return size


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize(
    ("body", "rows", "rejected"),
    [
        (b"", [], []),
        (b"a,1\nb,2\n", [(2, ["a", "1"]), (3, ["b", "2"])], []),
        (b"a,1\nb,2", [(2, ["a", "1"]), (3, ["b", "2"])], []),
        (b"a,1\r\n\r\nb,\r\n", [(2, ["a", "1"]), (3, ["b", None])], []),
        (b'a,"1\n2"\nb,2\n', [(2, ["a", "1\n2"]), (3, ["b", "2"])], []),
        (b'a,"say ""hi"", you"\n', [(2, ["a", 'say "hi", you'])], []),
        (b'a,5" pipe\nb,6" pipe\n', [(2, ["a", '5" pipe']), (3, ["b", '6" pipe'])], []),
        (b'a,5" pipe\nb,2\n', [(2, ["a", '5" pipe']), (3, ["b", "2"])], []),
        (b"a\nb,2\nc,3,3\n", [(3, ["b", "2"])], [(2, COUNT), (4, COUNT)]),
        (b'a,"1\nb,2\nc,3\n', [(3, ["b", "2"]), (4, ["c", "3"])], [(2, BROKEN)]),
        (b'a,"1\nb,2\nc,"x, y"\nd,4\n',
         [(3, ["b", "2"]), (4, ["c", "x, y"]), (5, ["d", "4"])], [(2, BROKEN)]),
        (b"a,1\nb,\xff\xfe\nc,3\n", [(2, ["a", "1"]), (4, ["c", "3"])],
         [(3, RejectReason.UNDECODABLE)]),
        (b"a,x\0y\nc,3\n", [(3, ["c", "3"])], [(2, RejectReason.UNDECODABLE)]),
        ("ю,日本\n".encode(), [(2, ["ю", "日本"])], []),
    ],
)  # fmt: skip
def test_rows_and_their_numbers(
    path: Path, body: bytes, rows: Rows, rejected: list[tuple[int, RejectReason]]
) -> None:
    for start in (b"recipient_id,x\n", b"\xef\xbb\xbfrecipient_id,x\n", b"\nrecipient_id , x\n"):
        found, refused = load(path, start + body)
        assert found == rows
        assert [(one.row, one.reason) for one in refused] == rejected


def test_a_rejected_row_is_shown(path: Path) -> None:
    _, rejected = load(path, b'recipient_id,x\na,"1\nb,\xff\nc,2\nd,1,2\n')
    assert [one.raw for one in rejected] == ['a,"1', "b,\ufffd", "d,1,2"]


FIELD = st.text(st.sampled_from('ab,"\n\r ü日'), max_size=6)


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)
@given(
    st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=12),
    # With "\n" as line end, minimal quoting would leave a lone "\r" bare.
    st.sampled_from([(csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_MINIMAL, "\r\n")]),
    st.integers(1, 80),
)
def test_what_a_csv_writer_writes_is_read_whatever_the_chunks(
    tmp_path: Path,
    rows: list[tuple[str, str, str]],
    style: tuple[Literal[0, 1], str],
    chunk: int,
) -> None:
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator=style[1], quoting=style[0])
    writer.writerow(["recipient_id", "x", "y"])
    writer.writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_sources, "CHUNK_BYTES", chunk)
        found, rejected = load(tmp_path / "p.csv", sheet.getvalue().encode())
    assert rejected == []
    assert found == [
        (number, [field or None for field in row]) for number, row in enumerate(rows, start=2)
    ]


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)
@given(st.binary(max_size=60) | st.text('ab,"\n\r\0', max_size=60).map(str.encode))
def test_whatever_the_bytes_each_row_is_numbered_once(tmp_path: Path, body: bytes) -> None:
    found, rejected = load(tmp_path / "p.csv", b"recipient_id,x\n" + body)
    numbers = [number for number, _ in found] + [one.row for one in rejected]
    assert sorted(numbers) == list(range(2, len(numbers) + 2))
    assert all(len(row) == 2 for _, row in found)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no header"),
        (b"\n\n", "no header"),
        (b"id,x\n1,2\n", "no column 'recipient_id' among 'id', 'x'"),
        (b"recipient_id,x,x\n", "'x' twice"),
        (b"recipient_id,,x\n", "without a name"),
        ("recipient_id,ü\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_headers_that_cannot_be_used(path: Path, content: bytes, told: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidProfile) as raised:
        plan([path])
    assert told in str(raised.value)
    assert str(path) in str(raised.value)


def test_sources_that_are_not_there_or_not_parquet(tmp_path: Path) -> None:
    with pytest.raises(InvalidProfile, match="No such file"):
        plan([tmp_path / "none.csv"])
    (tmp_path / "p.parquet").write_text("recipient_id\n")
    with pytest.raises(InvalidProfile, match="no readable Parquet"):
        plan([tmp_path / "p.parquet"])


def test_a_file_that_is_no_csv_is_refused_in_bounded_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_sources, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(profile_sources, "MAX_LINE_BYTES", 5000)
    with pytest.raises(InvalidProfile, match="a line is longer than 5000 bytes"):
        load(path, b"recipient_id,x\n" + b"x" * 20_000)


def test_attributes_of_all_sources(tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    paths[0].write_text("recipient_id,email,plan\n")
    paths[1].write_text("age,recipient_id,plan\n")
    assert attribute_names(plan(paths)) == ["age", "plan"]
    paths[1].write_text("recipient_id," + ",".join(f"x{number}" for number in range(257)))
    with pytest.raises(InvalidProfile, match="258 attributes"):
        attribute_names(plan(paths))
