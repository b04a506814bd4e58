"""Sources of profiles: CSV and Parquet files as batches of columns with row numbers.

A **row number** counts from 1: in CSV over records (the header is 1, blank lines do not count), in
Parquet over rows.

CSV is read in chunks of whole records by Arrow's parser. Where a chunk has quotes that Arrow would
misread (one that is never closed swallows what follows), Python's parser reads it record by record:
it gives up the line with the broken quote and goes on with the next.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from schemas.errors import InvalidProfile
from schemas.profile import KNOWN_COLUMNS, MAX_ATTRIBUTES, RECIPIENT_ID, RejectReason
from transforms.profile import attribute_type, known_type

CHUNK_BYTES = 6 << 20
BATCH_ROWS = 1 << 16
MAX_RAW = 2000
"""Characters of a rejected row that are kept."""
MAX_LINE_BYTES = 16 << 20
_MAX_CUTS = 1000
_AROUND_QUOTES = np.isin(np.arange(256), np.frombuffer(b'",\r\n', dtype=np.uint8))
UNREADABLE = "\ufffe"
"""Stands for a byte that could not be read, until its row is rejected: a noncharacter, which no
text that is meant for others has (Unicode 16, 23.7)."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Split:
    """A part of a source that is read by itself: a CSV file, or a row group of a Parquet file."""

    path: str
    key: str
    """Sorts splits as their sources were given."""
    columns: tuple[str, ...]
    row_groups: tuple[int, ...] | None
    """None for CSV."""
    first_row: int
    """Row number of the first row."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is no profile."""

    row: int
    reason: RejectReason
    raw: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a split, as columns, and those that could not even be put in columns."""

    columns: dict[str, pa.Array]
    rows: npt.NDArray[np.int64]
    """Row number of each row."""
    rejected: list[Rejected]

    def raw(self, positions: Sequence[int]) -> list[str]:
        """Rows as CSV, for the rejects file."""
        wanted = pa.array(positions, pa.int64())
        columns = [array.take(wanted).to_pylist() for array in self.columns.values()]
        return [
            _shown(as_csv([_plain(value) for value in row])) for row in zip(*columns, strict=True)
        ]


def _plain(value: object) -> object:
    return ";".join(map(str, value)) if isinstance(value, list) else value


def _shown(text: str) -> str:
    return text[:MAX_RAW].replace(UNREADABLE, "\ufffd")


def as_csv(values: Sequence[object]) -> str:
    """Values as one line of CSV without its end."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def plan(paths: Sequence[Path]) -> list[Split]:
    """The splits of sources, their headers checked. Raises ``InvalidProfile``."""
    splits: list[Split] = []
    for at, path in enumerate(paths):
        try:
            parquet = path.suffix.lower() in (".parquet", ".pq")
            splits += _plan_parquet(at, path) if parquet else [_plan_csv(at, path)]
        except OSError as error:
            raise InvalidProfile(f"{path}: can't be read: {error.strerror or error}") from error
    return splits


def attribute_names(splits: Collection[Split]) -> list[str]:
    """Names of all attributes of the sources, sorted."""
    names = {name for split in splits for name in split.columns} - set(KNOWN_COLUMNS)
    if len(names) > MAX_ATTRIBUTES:
        raise InvalidProfile(
            f"the sources have {len(names)} attributes; at most {MAX_ATTRIBUTES} are kept: leave "
            "out what no template or segment reads"
        )
    return sorted(names)


def read(split: Split) -> Iterator[Batch]:
    """The batches of a split, in order. Raises ``InvalidProfile`` where it can't go on."""
    row = split.first_row
    try:
        for batch in _read_csv(split) if split.row_groups is None else _read_parquet(split):
            yield batch
            row += len(batch.rows) + len(batch.rejected)
    except (OSError, pa.ArrowException) as error:
        raise InvalidProfile(f"{split.path}: can't be read from row {row} on: {error}") from error


def _check_header(path: Path, names: Sequence[str]) -> None:
    if RECIPIENT_ID not in names:
        raise InvalidProfile(
            f"{path}: no column {RECIPIENT_ID!r} among {', '.join(map(repr, names[:20]))}: name "
            "the column that identifies a person so"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        raise InvalidProfile(
            f"{path}: the header has "
            + (f"{twice[0]!r} twice" if twice else "a column without a name")
            + "; expected distinct names"
        )


def _plan_csv(at: int, path: Path) -> Split:
    with path.open("rb") as file:
        head = file.read(1 << 20).removeprefix(_BOM)
    try:
        lines = io.StringIO(_cut_lines(head).decode(), newline="")
    except UnicodeDecodeError as error:
        raise InvalidProfile(
            f"{path}: the header is not UTF-8 ({error.reason} at byte {error.start}): save the "
            "file as UTF-8"
        ) from None
    names = [name.strip() for name in next((row for row in csv.reader(lines) if row), [])]
    if not names:
        raise InvalidProfile(f"{path}: no header; expected column names in the first line")
    _check_header(path, names)
    return Split(str(path), f"{at:06d}", tuple(names), None, 2)


def _cut_lines(head: bytes) -> bytes:
    """The beginning of a file that certainly decodes: its first lines."""
    end = -1
    for _ in range(20):
        found = head.find(b"\n", end + 1)
        if found < 0:
            break
        end = found
        if head.count(b'"', 0, end) % 2 == 0 and head[: end + 1].strip():
            return head[: end + 1]
    return head


def _plan_parquet(at: int, path: Path) -> list[Split]:
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            _check_header(path, schema.names)
            for column in schema:
                check = known_type if column.name in KNOWN_COLUMNS else attribute_type
                try:
                    check(column.name, column.type)
                except InvalidProfile as error:
                    raise InvalidProfile(f"{path}: {error}") from None
            splits, first = [], 1
            groups: list[int] = []
            rows = 0
            for group in range(metadata.num_row_groups):
                groups.append(group)
                rows += metadata.row_group(group).num_rows
                # Small groups are read together: every batch costs each shard a look at it.
                if rows >= BATCH_ROWS or group + 1 == metadata.num_row_groups:
                    key = f"{at:06d}-{groups[0]:06d}"
                    splits.append(Split(str(path), key, tuple(schema.names), tuple(groups), first))
                    first, groups, rows = first + rows, [], 0
            return splits
    except pa.ArrowInvalid as error:
        raise InvalidProfile(f"{path}: is no readable Parquet file: {error}") from error


def _read_parquet(split: Split) -> Iterator[Batch]:
    row = split.first_row
    with pq.ParquetFile(split.path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=split.row_groups):
            rows = np.arange(row, row + batch.num_rows, dtype=np.int64)
            row += batch.num_rows
            try:
                batch.validate(full=True)
                columns = _typed(batch)
            except pa.ArrowInvalid:
                yield from _one_by_one(batch, rows)
            else:
                yield Batch(columns, rows, [])


def _typed(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """Columns as ``transforms.profile`` takes them."""
    columns = {}
    for column, array in zip(batch.schema, batch.columns, strict=True):
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if column.name not in KNOWN_COLUMNS:
            array = array.cast(attribute_type(column.name, array.type))
        elif not (pa.types.is_nested(array.type) or pa.types.is_temporal(array.type)):
            array = array.cast(pa.string())
        columns[column.name] = array
    return columns


def _one_by_one(batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> Iterator[Batch]:
    """A batch with text that is not UTF-8: those rows rejected, the others as one batch."""
    good, rejected = [], []
    for position in range(batch.num_rows):
        row = pa.RecordBatch.from_arrays(
            [array.take(pa.array([position])) for array in batch.columns], schema=batch.schema
        )
        try:
            row.validate(full=True)
            good.append(position)
        except pa.ArrowInvalid:
            values = [_lossy(array) for array in row.columns]
            raw = _shown(as_csv(values))
            rejected.append(Rejected(int(rows[position]), RejectReason.UNDECODABLE, raw))
    kept = batch.take(pa.array(good, pa.int64()))
    yield Batch(_typed(kept), rows[good], rejected)


def _lossy(array: pa.Array) -> object:
    try:
        return _plain(array[0].as_py())
    except UnicodeDecodeError:
        return bytes(array[0].as_buffer()).decode(errors="backslashreplace")


def _read_csv(split: Split) -> Iterator[Batch]:
    with Path(split.path).open("rb") as file:
        reader = _CsvReader(file, split)
        yield from reader.batches()


class _CsvReader:
    """Reads a CSV file from one record boundary to the next."""

    def __init__(self, file: io.BufferedReader, split: Split) -> None:
        self._file = file
        self._split = split
        self._row = 1
        self._rest = b""
        self._ended = False

    def batches(self) -> Iterator[Batch]:
        self._fill()
        self._rest = self._rest.removeprefix(_BOM)
        self._fill()
        header = True
        while self._rest:
            cut = self._cut()
            batch = self._parse(self._rest[:cut]) if cut else None
            if batch is None:
                batch = self._parse_by_record(cut)
            else:
                self._rest = self._rest[cut:]
            if header and len(batch.rows):
                batch = Batch(
                    {name: array[1:] for name, array in batch.columns.items()},
                    batch.rows[1:],
                    batch.rejected,
                )
                header = False
            yield batch
            self._fill()

    def _fill(self) -> None:
        while not self._ended and len(self._rest) < CHUNK_BYTES:
            self._rest += self._more()

    def _cut(self) -> int:
        """Length of the longest chunk of whole records; 0 if quotes leave none."""
        rest = self._rest
        quotes = rest.count(b'"')
        if self._ended and quotes % 2 == 0:
            return 0 if quotes and _has_stray_quote(rest, len(rest)) else len(rest)
        end = len(rest)
        for _ in range(_MAX_CUTS):
            newline = rest.rfind(b"\n", 0, end)
            if newline < 0:
                return 0
            quotes -= rest.count(b'"', newline, end)
            if quotes % 2 == 0:
                return 0 if quotes and _has_stray_quote(rest, newline) else newline + 1
            end = newline
        return 0

    def _parse(self, chunk: bytes) -> Batch | None:
        """A chunk of whole records by Arrow's parser; None if its quotes are broken."""
        invalid: list[tuple[int, str]] = []

        def skip(row: pacsv.InvalidRow) -> str:
            invalid.append((row.number, row.text))
            return "skip"

        names = self._split.columns
        text = _decodable(chunk)
        try:
            table = pacsv.read_csv(
                pa.BufferReader(text),
                read_options=pacsv.ReadOptions(
                    column_names=names, use_threads=False, block_size=len(text) + 1
                ),
                parse_options=pacsv.ParseOptions(
                    newlines_in_values=b'"' in text, invalid_row_handler=skip
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=True,
                    null_values=[""],
                    quoted_strings_can_be_null=True,
                ),
            ).combine_chunks()
        except pa.ArrowInvalid:
            return None
        if any("\n" in text for _, text in invalid):
            return None
        count = table.num_rows + len(invalid)
        rows = np.arange(self._row, self._row + count, dtype=np.int64)
        rejected = [
            Rejected(self._row + number - 1, RejectReason.COLUMN_COUNT, _shown(text))
            for number, text in invalid
        ]
        self._row += count
        batch = Batch(
            {
                name: column.chunk(0) if column.num_chunks else pa.array([], pa.string())
                for name, column in zip(names, table.columns, strict=True)
            },
            np.delete(rows, np.array([number - 1 for number, _ in invalid], dtype=np.int64)),
            rejected,
        )
        return batch if text is chunk else _set_apart(batch)

    def _parse_by_record(self, length: int) -> Batch:
        """At least ``length`` bytes (a chunk's worth if 0) by Python's parser."""
        wanted = length or min(len(self._rest), CHUNK_BYTES)
        lines = _Lines(self._split.path, self._rest, self._more)
        names = self._split.columns
        records: list[list[str]] = []
        rows: list[int] = []
        rejected: list[Rejected] = []
        parser = csv.reader(lines)
        while lines.read_bytes < wanted:
            lines.begin()
            reason = None
            try:
                record = next(parser)
            except StopIteration:
                break
            except csv.Error:
                record, reason = [], RejectReason.BROKEN_QUOTES
            if reason is None and not record:
                continue
            if reason is None:
                reason = self._fault(record, lines)
            if reason is None:
                records.append(record)
                rows.append(self._row)
            else:
                if reason is RejectReason.BROKEN_QUOTES:
                    lines.give_back()
                    parser = csv.reader(lines)
                raw = _shown(lines.taken[0].rstrip("\r\n"))
                rejected.append(Rejected(self._row, reason, raw))
            self._row += 1
        self._rest = lines.rest()
        columns = list(zip(*records, strict=True)) if records else [()] * len(names)
        return _set_apart(
            Batch(
                {
                    name: pa.array([value or None for value in column], pa.string())
                    for name, column in zip(names, columns, strict=True)
                },
                np.array(rows, dtype=np.int64),
                rejected,
            )
        )

    def _fault(self, record: list[str], lines: _Lines) -> RejectReason | None:
        wrong = len(record) != len(self._split.columns)
        swallowed = wrong and len(lines.taken) > 1
        if swallowed or (lines.ended and _is_open("".join(lines.taken))):
            return RejectReason.BROKEN_QUOTES
        return RejectReason.COLUMN_COUNT if wrong else None

    def _more(self) -> bytes:
        more = b"" if self._ended else self._file.read(CHUNK_BYTES)
        self._ended = not more
        return more


def _has_stray_quote(chunk: bytes, end: int) -> bool:
    """Whether some quote stands between two ordinary characters, as in ``5" pipe``.

    Such a quote is text, so that counting quotes does not tell what is within them.
    """
    data = np.frombuffer(chunk, dtype=np.uint8)
    quotes = np.flatnonzero(data[1 : end - 1] == ord('"')) + 1
    return not (_AROUND_QUOTES[data[quotes - 1]] | _AROUND_QUOTES[data[quotes + 1]]).all()


def _is_open(record: str) -> bool:
    """Whether a record ends within quotes."""
    if record.count('"') % 2 == 0:
        return False
    try:
        list(csv.reader(io.StringIO(record, newline=""), strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


class _Lines:
    """Lines of a file for a parser, which can be given back but for the first of a record."""

    def __init__(self, path: str, buffered: bytes, more: Callable[[], bytes]) -> None:
        self._path = path
        self._stream = io.BytesIO(buffered)
        self._more = more
        self._returned: deque[bytes] = deque()
        self._taken: list[bytes] = []
        self.taken: list[str] = []
        self.read_bytes = 0
        self.ended = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if not self._returned:
            # A lone carriage return ends a line too, as it does for Arrow.
            self._returned.extend(self._next_line().splitlines(keepends=True))
        if not self._returned:
            self.ended = True
            raise StopIteration
        line = self._returned.popleft()
        self.read_bytes += len(line)
        self._taken.append(line)
        text = _decodable(line).decode()
        self.taken.append(text)
        return text

    def _next_line(self) -> bytes:
        line = self._stream.readline()
        while not line.endswith(b"\n"):
            more = self._more()
            if not more:
                break
            if len(line) > MAX_LINE_BYTES:
                raise InvalidProfile(
                    f"{self._path}: a line is longer than {MAX_LINE_BYTES} bytes: is this a CSV "
                    "file?"
                )
            self._stream = io.BytesIO(line + more)
            line = self._stream.readline()
        return line

    def begin(self) -> None:
        """A new record begins."""
        self._taken.clear()
        self.taken.clear()

    def give_back(self) -> None:
        """Read all but the first line of the record again."""
        back = self._taken[1:]
        self._returned.extendleft(reversed(back))
        self.read_bytes -= sum(map(len, back))
        del self._taken[1:]
        self.ended = False

    def rest(self) -> bytes:
        """What is buffered and not read, or given back and not read again."""
        return b"".join(self._returned) + self._stream.read()


def _mark(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return UNREADABLE * (error.end - error.start), error.end


codecs.register_error("fanfare-mark", _mark)


def _decodable(chunk: bytes) -> bytes:
    """``chunk`` with ``UNREADABLE`` for each byte that is not UTF-8, and for NUL.

    NUL because Arrow's parser finds wrong column counts in rows that have it (seen in 16.1).
    """
    try:
        chunk.decode()
    except UnicodeDecodeError:
        chunk = chunk.decode(errors="fanfare-mark").encode()
    return chunk.replace(b"\0", UNREADABLE.encode()) if b"\0" in chunk else chunk


def _set_apart(batch: Batch) -> Batch:
    """A batch with its rows that have ``UNREADABLE`` rejected."""
    bad = np.zeros(len(batch.rows), dtype=np.bool_)
    for array in batch.columns.values():
        marked = pc.fill_null(pc.match_substring(array, UNREADABLE), False)
        bad |= marked.to_numpy(zero_copy_only=False)
    positions = np.flatnonzero(bad).tolist()
    rejected = [
        Rejected(int(batch.rows[at]), RejectReason.UNDECODABLE, raw)
        for at, raw in zip(positions, batch.raw(positions), strict=True)
    ]
    kept = pa.array(~bad)
    return Batch(
        {name: array.filter(kept) for name, array in batch.columns.items()},
        batch.rows[~bad],
        [*batch.rejected, *rejected],
    )
