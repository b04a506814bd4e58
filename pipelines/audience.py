"""The audience pipeline: sources of profiles to an immutable snapshot. Apache Beam, batch.

    sources ▶ splits ▶ read, check, select, spill ▶ each shard: last row a person, page ▶ manifest

No step holds the audience. Reading goes by batches of columns; what is valid is spilled, sorted by
shard, and each shard is then finished by itself: memory is a batch and a shard for each worker.
Beam's elements are splits and shards, since an element a person would cost more than the work.

The same profiles, segment, tenant and default zone give the same bytes, whatever the number of
workers and in whatever order, files and names the sources come.
"""

from __future__ import annotations

import csv
import json
import os
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.profile_sources import Batch, Rejected, Split, attribute_names, plan, read
from pipelines.spill import read_shard, write_spill
from schemas import errors
from schemas.errors import FanfareError, InvalidProfile
from schemas.ids import SnapshotId
from schemas.pages import SHARDS
from schemas.profile import KNOWN_COLUMNS
from schemas.snapshot import (
    BUILD_NAME,
    MANIFEST_NAME,
    Counts,
    Manifest,
    PageEntry,
    shard_file_name,
)
from transforms.paging import PagedShard, page_shard
from transforms.profile import check, select, shards_of
from transforms.segment import Segment, check_names, compile_segment

REJECTS_HEADER = ("source", "row", "reason", "raw")

Listener = Callable[[str, int], None]
"""Told of progress from worker threads: the phase ('read' or 'page') and how many rows more."""
_listeners: dict[str, Listener] = {}
_RESERVE = "reserve"
_RESERVE_BYTES = 1 << 16


class SnapshotStore(Protocol):
    """Where snapshots lie; ``sinks.store.FileStore`` is one."""

    def scratch(self) -> AbstractContextManager[Path]:
        """A new folder on the snapshots' file system, deleted on leaving."""

    def publish_snapshot(self, folder: Path) -> SnapshotId:
        """Give a finished folder its name; nothing if the snapshot exists."""


@dataclass(frozen=True, slots=True)
class AudienceRequest:
    """What to build."""

    sources: tuple[Path, ...]
    tenant: str
    segment: str = ""
    default_zone: str = ""
    """Zone of profiles without one; empty leaves it unknown."""
    rejects: Path | None = None
    """Where refused rows go, as CSV with ``REJECTS_HEADER``; absent drops them, counted."""


@dataclass(frozen=True, slots=True)
class BuiltAudience:
    """A snapshot that is in the store."""

    snapshot: SnapshotId
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Job:
    """What every step knows; pickled with it."""

    folder: str
    tenant: str
    segment: str
    default_zone: str
    attributes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Spilled:
    read: int
    rejected: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Finished:
    shard: int
    pages: tuple[PageEntry, ...]
    zones: dict[str, int]
    duplicates: int
    not_selected: int


def build_audience(
    request: AudienceRequest, store: SnapshotStore, listener: Listener | None = None
) -> BuiltAudience:
    """Build a snapshot, publish it, and return it with its manifest.

    Raises ``InvalidProfile`` for a source that can't be read, ``InvalidSegment`` for the
    expression; rows that are no profiles are counted and go to the rejects file.
    """
    segment = compile_segment(request.segment)
    zones = zoneinfo.available_timezones()
    if request.default_zone and request.default_zone not in zones:
        raise InvalidProfile(
            f"default zone {request.default_zone!r} is no IANA time zone, such as Europe/Berlin"
        )
    splits = plan(request.sources)
    attributes = attribute_names(splits)
    check_names(segment, {*attributes, *KNOWN_COLUMNS})
    with store.scratch() as scratch:
        folder = scratch / "snapshot"
        for name in (scratch / "spill", scratch / "rejects", folder / "shards"):
            name.mkdir(parents=True)
        job = _Job(
            str(scratch), request.tenant, segment.text, request.default_zone, tuple(attributes)
        )
        (scratch / _RESERVE).write_bytes(bytes(_RESERVE_BYTES))
        if listener:
            _listeners[job.folder] = listener
        try:
            _run(job, splits)
        finally:
            _listeners.pop(job.folder, None)
        _raise_failure(job)
        manifest = Manifest.from_bytes((folder / MANIFEST_NAME).read_bytes())
        _write_build(folder / BUILD_NAME, request)
        if request.rejects:
            _write_rejects(request.rejects, scratch / "rejects")
        return BuiltAudience(store.publish_snapshot(folder), manifest)


def _run(job: _Job, splits: Sequence[Split]) -> None:
    """The dataflow."""
    options = PipelineOptions(
        [
            "--runner=DirectRunner",
            # One worker: several in one process now and then garble each other's bundles
            # ("Invalid PaneInfoEncoding", Beam 2.61), and threads gain nothing here.
            "--direct_running_mode=in_memory",
            "--direct_num_workers=1",
        ]
    )
    with beam.Pipeline(options=options) as pipeline:
        spilled = (
            pipeline
            | "Splits" >> beam.Create(list(splits))
            | "Spread splits" >> beam.Reshuffle()
            | "Check, select, spill" >> beam.ParDo(_Spill(job))
        )
        finished = (
            pipeline
            | "Shards" >> beam.Create(list(range(SHARDS)))
            | "Spread shards" >> beam.Reshuffle()
            | "Page" >> beam.ParDo(_Page(job), beam.pvalue.AsList(spilled))
            | "Gather" >> beam.combiners.ToList()
        )
        finished | "Manifest" >> beam.Map(_write_manifest, beam.pvalue.AsList(spilled), job)


def _tell(job: _Job, phase: str, rows: int) -> None:
    listener = _listeners.get(job.folder)
    if listener:
        listener(phase, rows)


@contextmanager
def _failing(job: _Job) -> Iterator[None]:
    """Writes a step's first error down, and ends the step without it.

    Beam would print its own stack and tell of the error as text. The steps after do nothing then,
    and ``build_audience`` raises the error.
    """
    try:
        yield
    except FanfareError as error:
        _fail(job, error)
    except OSError as error:
        _fail(job, FanfareError(
            f"can't write to {job.folder}: {error.strerror or error}; free space, or give a store "
            "on another disk"
        ))  # fmt: skip


def _fail(job: _Job, error: FanfareError) -> None:
    # A full disk has room again for what is to be told of it.
    (Path(job.folder) / _RESERVE).unlink(missing_ok=True)
    with suppress(FileExistsError), _failure_file(job).open("x", encoding="utf-8") as file:
        json.dump({"error": type(error).__name__, "message": str(error)}, file)


def _failure_file(job: _Job) -> Path:
    return Path(job.folder) / "failure.json"


def _raise_failure(job: _Job) -> None:
    path = _failure_file(job)
    if path.exists():
        told = json.loads(path.read_text(encoding="utf-8"))
        kind: type[FanfareError] = getattr(errors, told["error"])
        raise kind(told["message"])


class _Spill(beam.DoFn):  # type: ignore[misc]
    """A split to spill files and a file of rejects. Run again, it writes the same files."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def setup(self) -> None:
        self._segment = compile_segment(self._job.segment)
        self._zones = zoneinfo.available_timezones()

    def process(self, split: Split) -> Iterator[_Spilled]:
        if _failure_file(self._job).exists():
            return
        with _failing(self._job):
            yield self._spill_all(split)

    def _spill_all(self, split: Split) -> _Spilled:
        folder = Path(self._job.folder)
        seen = rejected = 0
        files: list[str] = []
        path = folder / "rejects" / f"{split.key}.csv"
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as sheet:
            writer = csv.writer(sheet, lineterminator="\n")
            for batch in read(split):
                spill = folder / "spill" / f"{split.key}-{len(files):06d}"
                refused = self._spill(batch, spill, self._segment)
                files.append(str(spill))
                writer.writerows(
                    (split.path, one.row, one.reason.value, one.raw) for one in refused
                )
                rows = len(batch.rows) + len(batch.rejected)
                seen += rows
                rejected += len(refused)
                _tell(self._job, "read", rows)
        return _Spilled(seen, rejected, tuple(files))

    def _spill(self, batch: Batch, path: Path, segment: Segment) -> list[Rejected]:
        """Spill a batch; the rejected rows of it, by row number."""
        profiles, rejects = check(
            batch.columns, len(batch.rows), self._zones, self._job.default_zone
        )
        shards = shards_of(self._job.tenant, profiles.recipient_ids)
        write_spill(path, profiles, shards, select(segment, profiles))
        positions = rejects.positions.tolist()
        refused = [
            Rejected(int(batch.rows[position]), reason, raw)
            for position, reason, raw in zip(
                positions, rejects.reasons, batch.raw(positions), strict=True
            )
        ]
        return sorted([*batch.rejected, *refused], key=lambda one: one.row)


class _Page(beam.DoFn):  # type: ignore[misc]
    """A shard's spills to its file of pages. Run again, it writes the same file."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def process(self, shard: int, spilled: list[_Spilled]) -> Iterator[_Finished]:
        if _failure_file(self._job).exists():
            return
        with _failing(self._job):
            yield self._page(shard, spilled)

    def _page(self, shard: int, spilled: list[_Spilled]) -> _Finished:
        files = sorted(file for one in spilled for file in one.files)
        selected, passed = read_shard(files, shard)
        if selected is None:
            done = PagedShard([], [], {}, 0, 0)
        else:
            done = page_shard(shard, selected, passed, self._job.attributes)
        if done.file:
            path = Path(self._job.folder) / "snapshot" / shard_file_name(shard)
            with path.open("wb") as file:
                file.writelines(done.file)
                file.flush()
                os.fsync(file.fileno())
        _tell(self._job, "page", sum(done.zones.values()) + done.duplicates + done.not_selected)
        return _Finished(shard, tuple(done.pages), done.zones, done.duplicates, done.not_selected)


def _write_manifest(finished: list[_Finished], spilled: list[_Spilled], job: _Job) -> None:
    """The manifest of all shards, into the snapshot's folder; none if a step failed."""
    if _failure_file(job).exists():
        return
    with _failing(job):
        _write_manifest_of(finished, spilled, job)


def _write_manifest_of(finished: list[_Finished], spilled: list[_Spilled], job: _Job) -> None:
    finished = sorted(finished, key=lambda one: one.shard)
    zones: dict[str, int] = {}
    for one in finished:
        for zone, count in one.zones.items():
            zones[zone] = zones.get(zone, 0) + count
    counts = Counts(
        read=sum(one.read for one in spilled),
        rejected=sum(one.rejected for one in spilled),
        duplicates=sum(one.duplicates for one in finished),
        not_selected=sum(one.not_selected for one in finished),
        audience=sum(zones.values()),
    )
    if not counts.balanced:
        raise FanfareError(f"the audience's books do not balance: {counts}; report this")
    manifest = Manifest(
        tenant=job.tenant,
        segment=job.segment,
        default_zone=job.default_zone,
        counts=counts,
        attributes=job.attributes,
        zones=dict(sorted(zones.items())),
        pages=tuple(page for one in finished for page in one.pages),
    )
    with (Path(job.folder) / "snapshot" / MANIFEST_NAME).open("wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())


def _write_build(path: Path, request: AudienceRequest) -> None:
    """Where the snapshot came from: for people, no part of its identity."""
    told: dict[str, Any] = {
        "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": [
            {"path": str(source.absolute()), "bytes": source.stat().st_size}
            for source in request.sources
        ],
    }
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _write_rejects(path: Path, folder: Path) -> None:
    """All rejects in one CSV file, by source and row; replaced whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(REJECTS_HEADER)
            for part in sorted(folder.iterdir()):
                with part.open(encoding="utf-8", newline="") as lines:
                    file.writelines(lines)
    except OSError as error:
        raise FanfareError(f"can't write the rejects to {path}: {error.strerror}") from error
