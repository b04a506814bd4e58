"""Where snapshots and content-addressed objects lie: folders of immutable files.

Layout under the root::

    snapshots/<id>/…                see schemas.snapshot
    objects/<kind>/<sha256>         campaign specs, templates
    scratch/…                       of builds under way; whatever is in it may be deleted

What is once there never changes, so readers need no locks, and writing the same again is nothing.
A file appears whole or not at all: written under another name, synced, renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from schemas.errors import Corrupt, CorruptPage, FanfareError, MissingObject, MissingSnapshot
from schemas.ids import ObjectId, SnapshotId
from schemas.snapshot import (
    ID_DIGITS,
    MANIFEST_NAME,
    Block,
    Manifest,
    PageBody,
    PageEntry,
    PageIndex,
    decode_body,
    decode_index,
    shard_file_name,
    snapshot_id,
)

K = TypeVar("K")
V = TypeVar("V")

OPEN_FILES = 64
"""Shard files that a snapshot keeps open."""
OPEN_SNAPSHOTS = 16
"""Snapshots that a store keeps open: one for each campaign that is under way."""
CACHED_PAGES = 64
"""Decoded pages of each kind that a snapshot keeps; about 0.1 MB an index, 0.5 MB a body."""
_HEX = frozenset("0123456789abcdef")


class _Recent(Generic[K, V]):
    """The most recently used values of a bounded number of keys. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``, made if it is not held. Two threads may both make it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            value = self._values.setdefault(key, made)
            self._values.move_to_end(key)
            if len(self._values) > self._size:
                self._values.popitem(last=False)
            return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


class _ShardFile:
    """A shard's file, open for reading at positions; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def __del__(self) -> None:
        # Not before: another thread may be reading when the file leaves the cache.
        if hasattr(self, "_fd"):
            os.close(self._fd)


class Snapshot:
    """A snapshot, read by page. Thread-safe; bounded in open files and decoded pages."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        open_files: int = OPEN_FILES,
        cached_pages: int = CACHED_PAGES,
    ) -> None:
        self.id = SnapshotId(folder.name)
        self.folder = folder
        self.manifest = manifest
        self._files: _Recent[int, _ShardFile] = _Recent(open_files)
        self._indexes: _Recent[tuple[int, int], PageIndex] = _Recent(cached_pages)
        self._bodies: _Recent[tuple[int, int], PageBody] = _Recent(cached_pages)

    def read_index(self, shard: int, page: int) -> PageIndex:
        """What a decision needs of a page.

        Raises ``CorruptPage`` if its bytes are not those of the manifest, or it has no such page.
        """
        return self._indexes.get((shard, page), lambda: self._load_index(shard, page))

    def read_body(self, shard: int, page: int) -> PageBody:
        """What delivery needs of a page. Raises like ``read_index``."""
        return self._bodies.get((shard, page), lambda: self._load_body(shard, page))

    def verify(self) -> Iterator[CorruptPage]:
        """Every damage of the snapshot: pages that can't be read or are not what was written."""
        for entry in self.manifest.pages:
            for load in (self._load_index, self._load_body):
                try:
                    page = load(entry.shard, entry.page)
                    if (page.first_ordinal, page.count) != (entry.first_ordinal, entry.count):
                        raise self._corrupt(entry, "does not hold the ordinals of the manifest")
                except CorruptPage as error:
                    yield error

    def _load_index(self, shard: int, page: int) -> PageIndex:
        entry = self._entry(shard, page)
        return decode_index(self._read(entry, entry.index))

    def _load_body(self, shard: int, page: int) -> PageBody:
        entry = self._entry(shard, page)
        return decode_body(self._read(entry, entry.body))

    def _entry(self, shard: int, page: int) -> PageEntry:
        if 0 <= shard < self.manifest.shards:
            pages = self.manifest.pages_of(shard)
            if 0 <= page < len(pages):
                return pages[page]
        raise CorruptPage(
            f"snapshot {self.id} has no page {page} in shard {shard}: the order was made for "
            "another snapshot"
        )

    def _read(self, entry: PageEntry, block: Block) -> bytes:
        path = self.folder / shard_file_name(entry.shard)
        try:
            data = self._files.get(entry.shard, lambda: _ShardFile(path)).read(
                block.offset, block.length
            )
        except FileNotFoundError:
            raise MissingSnapshot(
                f"page {entry.page} of shard {entry.shard}: {path} is gone; restore it from a "
                "copy, or build the audience again (the same sources give the same snapshot)"
            ) from None
        except OSError as error:
            raise self._corrupt(entry, f"can't be read ({error.strerror})") from error
        if len(data) != block.length:
            raise self._corrupt(
                entry, f"is cut short: {len(data)} of {block.length} bytes at {block.offset}"
            )
        if hashlib.sha256(data).hexdigest() != block.sha256:
            raise self._corrupt(
                entry, f"has another SHA-256 than its manifest (bytes from {block.offset})"
            )
        return data

    def _corrupt(self, entry: PageEntry, what: str) -> CorruptPage:
        return CorruptPage(
            f"page {entry.page} of shard {entry.shard} in "
            f"{self.folder / shard_file_name(entry.shard)} {what}. Restore the file from a copy, "
            f"or delete {self.folder} and build the audience again: the same sources give the "
            "same snapshot"
        )


class FileStore:
    """Snapshots and objects under one folder, shared by all who run, plan and deliver."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._opened: _Recent[str, Snapshot] = _Recent(OPEN_SNAPSHOTS)

    def put_object(self, kind: str, content: bytes) -> ObjectId:
        """Keep ``content``; its name is its SHA-256. Durable on return; again is nothing."""
        name = ObjectId(hashlib.sha256(content).hexdigest())
        path = self._object_path(kind, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, content)
        return name

    def get_object(self, kind: str, name: str) -> bytes:
        """The object of that name. Raises ``MissingObject``, or ``Corrupt`` if it was damaged."""
        path = self._object_path(kind, name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise MissingObject(
                f"no {kind} {name} in {path.parent}: the store was moved or cleaned, or this "
                "process was given another one than the one which launched"
            ) from None
        if hashlib.sha256(content).hexdigest() != name:
            raise Corrupt(f"{path} is not what was written (its SHA-256 differs): restore it")
        return content

    def open_snapshot(self, name: str) -> Snapshot:
        """A snapshot by its id: one object for all who ask while it is in use.

        Raises ``MissingSnapshot``, or ``Corrupt`` for its manifest.
        """
        return self._opened.get(name, lambda: self._open(name))

    def _open(self, name: str) -> Snapshot:
        folder = self.root / "snapshots" / name
        path = folder / MANIFEST_NAME
        sound = len(name) == ID_DIGITS and _HEX.issuperset(name)
        try:
            content = path.read_bytes() if sound else None
        except (FileNotFoundError, NotADirectoryError):
            content = None
        if content is None:
            raise MissingSnapshot(
                f"no audience snapshot {name!r}: looked for {path}. Build it with "
                f"`fanfare audience build FILE… --store {self.root}`"
            )
        if snapshot_id(content) != name:
            raise Corrupt(
                f"{path} is not the manifest of {name} (its SHA-256 differs): restore it, or "
                f"delete {folder} and build the audience again"
            )
        try:
            manifest = Manifest.from_bytes(content)
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{path} can't be read as a manifest: {error}") from error
        return Snapshot(folder, manifest)

    def snapshots(self) -> list[SnapshotId]:
        """The ids of all snapshots, sorted."""
        folders = (self.root / "snapshots").glob(f"*/{MANIFEST_NAME}")
        return sorted(SnapshotId(path.parent.name) for path in folders)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder beside the snapshots, deleted on leaving."""
        parent = self.root / "scratch"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="build-", dir=parent))
        except OSError as error:
            raise FanfareError(
                f"can't write to the store {self.root}: {error.strerror}; give another with --store"
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish_snapshot(self, folder: Path) -> SnapshotId:
        """Give a finished folder (manifest, synced shard files) its name.

        Durable on return. If the snapshot exists already, nothing changes and ``folder`` is left
        to its owner.
        """
        name = snapshot_id((folder / MANIFEST_NAME).read_bytes())
        target = self.root / "snapshots" / name
        if target.exists():
            return name
        target.parent.mkdir(parents=True, exist_ok=True)
        for inner in folder.iterdir():
            sync(inner)
        sync(folder)
        try:
            folder.rename(target)
        except OSError:
            # Another build of the same audience was first; its bytes are these.
            if not target.exists():
                raise
        sync(target.parent)
        return name

    def _object_path(self, kind: str, name: str) -> Path:
        if len(name) != 64 or not _HEX.issuperset(name):
            raise MissingObject(f"{name!r} names no {kind}: expected 64 hex digits")
        return self.root / "objects" / kind / name


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a loss of power."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    fd, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)
