"""The store: what is damaged is never read as sound, and what is missing is said."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from pipelines.audience import AudienceRequest, build_audience
from schemas.errors import Corrupt, CorruptPage, MissingObject, MissingSnapshot
from schemas.snapshot import shard_file_name
from sinks.store import FileStore, Snapshot
from stack.profiles import generate


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one snapshot; not to be changed."""
    folder = tmp_path_factory.mktemp("sound")
    generate(3000, 1, folder / "p.csv")
    build_audience(AudienceRequest((folder / "p.csv",), "acme"), FileStore(folder / "store"))
    return folder / "store"


@pytest.fixture
def snapshot(sound: Path, tmp_path: Path) -> Snapshot:
    shutil.copytree(sound, tmp_path / "store")
    store = FileStore(tmp_path / "store")
    return store.open_snapshot(store.snapshots()[0])


def test_a_damaged_page_is_refused_and_its_neighbours_are_not(snapshot: Snapshot) -> None:
    entry = snapshot.manifest.pages[0]
    path = snapshot.folder / shard_file_name(entry.shard)
    data = bytearray(path.read_bytes())
    data[entry.index.offset + entry.index.length // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptPage) as raised:
        snapshot.read_index(entry.shard, entry.page)
    told = str(raised.value)
    assert f"page {entry.page} of shard {entry.shard} in {path}" in told
    assert "SHA-256" in told
    assert "build the audience again" in told
    assert snapshot.read_body(entry.shard, entry.page).count == entry.count
    assert len(list(snapshot.verify())) == 1


def test_a_file_cut_short_and_one_that_is_gone(snapshot: Snapshot) -> None:
    entry, other = snapshot.manifest.pages[:2]
    path = snapshot.folder / shard_file_name(entry.shard)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptPage, match="cut short"):
        snapshot.read_body(entry.shard, entry.page)
    (snapshot.folder / shard_file_name(other.shard)).unlink()
    with pytest.raises(MissingSnapshot, match="is gone"):
        snapshot.read_index(other.shard, other.page)


@pytest.mark.parametrize(("shard", "page"), [(0, 99), (0, -1), (256, 0), (-1, 0)])
def test_a_page_that_the_snapshot_does_not_have(snapshot: Snapshot, shard: int, page: int) -> None:
    with pytest.raises(CorruptPage, match="has no page"):
        snapshot.read_index(shard, page)


def test_a_manifest_that_was_changed(snapshot: Snapshot, tmp_path: Path) -> None:
    path = snapshot.folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"tenant":"acme"', b'"tenant":"evil"'))
    with pytest.raises(Corrupt, match=r"manifest\.json is not the manifest"):
        FileStore(tmp_path / "store").open_snapshot(snapshot.id)


@pytest.mark.parametrize("name", ["0" * 32, "", "..", "../../etc", "ABC"])
def test_a_missing_snapshot_says_where_it_looked_and_how_to_build_it(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(MissingSnapshot) as raised:
        FileStore(tmp_path).open_snapshot(name)
    assert str(tmp_path) in str(raised.value)
    assert "fanfare audience build" in str(raised.value)


def test_reading_is_bounded_and_thread_safe(snapshot: Snapshot) -> None:
    small = Snapshot(snapshot.folder, snapshot.manifest, open_files=3, cached_pages=2)
    expected = {
        (entry.shard, entry.page): snapshot.read_index(entry.shard, entry.page).recipient_ids
        for entry in snapshot.manifest.pages
    }
    wrong: list[object] = []

    def read_all() -> None:
        try:
            for (shard, page), ids in expected.items():
                if small.read_index(shard, page).recipient_ids != ids:
                    wrong.append((shard, page))
                small.read_body(shard, page)
        except Exception as error:
            wrong.append(error)

    before = open_files()
    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert open_files() <= before + 3


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_page_read_twice_is_decoded_once(snapshot: Snapshot) -> None:
    entry = snapshot.manifest.pages[0]
    first = snapshot.read_index(entry.shard, entry.page)
    assert snapshot.read_index(entry.shard, entry.page) is first


def test_objects_are_named_by_their_content(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    name = store.put_object("templates", b"hello")
    assert name == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert store.put_object("templates", b"hello") == name
    assert store.get_object("templates", name) == b"hello"
    assert [path.name for path in (tmp_path / "objects" / "templates").iterdir()] == [name]
    with pytest.raises(MissingObject, match="no specs"):
        store.get_object("specs", name)
    with pytest.raises(MissingObject, match="64 hex digits"):
        store.get_object("templates", "../../secret")
    (tmp_path / "objects" / "templates" / name).write_bytes(b"hellp")
    with pytest.raises(Corrupt, match="not what was written"):
        store.get_object("templates", name)
