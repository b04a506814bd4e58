"""The chDB engine: one per process and data folder, a handle per request or session.

Rules of chDB 4.4 that decide the shape of this module:

- Handles on one path are cheap (0.2 ms) and run in parallel; one handle runs one thing at a time.
  SET, USE and temporary tables belong to the handle.
- The engine stops when its last handle closes: ``Engine`` keeps one open.
- A second process on the same path is refused by the engine with a message that helps nobody, so
  a lock file is taken first.
- MergeTree's own settings (``fsync_after_insert``) are accepted only from a configuration file.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote
from xml.sax.saxutils import escape

import orjson

from schemas.errors import StackFailed
from stack.clickhouse_http.failures import UNKNOWN_SETTING, QueryFailed
from stack.clickhouse_http.statements import set_names

LOCK_FILE: Final = "fanfare-clickhouse.lock"
CONFIG_FILE: Final = "fanfare-clickhouse.xml"

_SETTING_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")

# The class that chDB's classify_query gives to statements that only read.
READS: Final = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine may take of the machine. Sizes are in bytes."""

    memory: int = 2 * 1024**3
    mark_cache: int = 64 * 1024**2
    background_threads: int = 2


@dataclass(slots=True)
class Handle:
    """A chDB connection with the settings and database that requests put on it.

    Settings from a URL hold for one request. They are taken back lazily, before the next request
    on the handle, so that a client that always sends the same ones costs no SET at all.
    Not for two threads at a time.
    """

    connection: Any
    own_database: str = "default"
    _database: str = "default"
    _applied: dict[str, str] = field(default_factory=dict)
    _before: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def prepare(self, settings: Mapping[str, str], database: str | None, kept: bool) -> None:
        """Put a request's settings and database in force and take the last request's back.

        ``kept`` says that the handle will serve other requests, so that former values must be
        remembered. Raises QueryFailed if a setting or the database is refused; nothing of this
        request's remains applied then that the next ``prepare`` does not take back.
        """
        for name in settings:
            if not _SETTING_NAME.fullmatch(name):
                raise QueryFailed.of(UNKNOWN_SETTING, f"Unknown setting {name!r}")
        stale = [name for name in self._applied if name not in settings]
        if stale:
            self._restore(stale)
        changed = {k: v for k, v in settings.items() if self._applied.get(k) != v}
        if changed:
            if kept:
                self._remember(name for name in changed if name not in self._before)
            self.run("SET " + ", ".join(f"{k} = {literal(v)}" for k, v in changed.items()))
            self._applied.update(changed)
        self._use(database or self.own_database)

    def after_statement(self, verb: bytes, sql: bytes) -> None:
        """Note what a SET or USE statement of the session itself has changed for good."""
        if verb == b"SET":
            for name in set_names(sql):
                self._applied.pop(name, None)
                self._before.pop(name, None)
        elif verb == b"USE":
            result = self.query(b"SELECT currentDatabase()", "TabSeparatedRaw")
            self.own_database = self._database = result.bytes().decode().rstrip("\n")

    def query(self, sql: bytes | str, format_name: str, params: Mapping[str, str] = {}) -> Any:
        """Run a statement to its end and return chDB's result. Raises QueryFailed."""
        try:
            return self.connection.query(sql, format_name, params=dict(params))
        except Exception as error:
            raise QueryFailed.from_engine(error) from error

    def run(self, sql: str) -> None:
        """Run a statement whose result nobody wants. Raises QueryFailed."""
        self.query(sql, "Null")

    def classify(self, sql: bytes) -> tuple[int, int]:
        """Return chDB's class of the statement and the number of statements in the text."""
        found = self.connection._conn.classify_query(sql.decode("utf-8", "replace"))
        return int(found["query_class"]), int(found["statement_count"])

    def close(self) -> None:
        """Close the connection; its temporary tables are gone."""
        self.connection.close()

    def _use(self, database: str) -> None:
        if database != self._database:
            self.run(f"USE {identifier(database)}")
            self._database = database

    def _remember(self, names: Iterable[str]) -> None:
        wanted = ",".join(literal(name) for name in names)
        rows = self.query(
            "SELECT name, value, changed FROM system.settings "
            "WHERE has({names:Array(String)}, name)",
            "JSONEachRow",
            {"names": f"[{wanted}]"},
        )
        for line in rows.bytes().splitlines():
            row = orjson.loads(line)
            self._before[row["name"]] = (row["value"], bool(int(row["changed"])))

    def _restore(self, names: list[str]) -> None:
        parts = []
        for name in names:
            value, changed = self._before.get(name, ("", False))
            # A value that is itself quoted is an expression such as 'auto(2)': kept as it is.
            quoted = len(value) > 1 and value[0] == value[-1] == "'"
            parts.append(
                f"{name} = {(value if quoted else literal(value)) if changed else 'DEFAULT'}"
            )
        self.run("SET " + ", ".join(parts))
        for name in names:
            del self._applied[name]
            self._before.pop(name, None)


def literal(text: str) -> str:
    """Quote a string for SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def identifier(name: str) -> str:
    """Quote an identifier for SQL."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


class Engine:
    """The embedded engine on one data folder, for one process.

    Raises StackFailed from the constructor if another process serves the folder, or the engine
    can't open it.
    """

    def __init__(self, path: Path, *, fsync: bool, limits: Limits) -> None:
        self.path = path.resolve()
        if set(str(self.path)) & set("?&#"):
            raise StackFailed(f"chDB can't open {self.path}: choose a --path without ?, & and #")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        config = self.path / CONFIG_FILE
        config.write_text(_configuration(fsync, limits))
        self._address = (
            f"{self.path}?config-file={quote(str(config))}&implicit_select=0&async_insert=0"
        )
        # chDB takes its time zone from the environment in the moment in which it is loaded.
        os.environ["TZ"] = "UTC"
        import chdb

        self._connect = chdb.connect
        try:
            self._root = self.open()
            version = self._root.query(b"SELECT version(), timezone()", "TabSeparatedRaw")
        except (QueryFailed, RuntimeError) as error:
            self._lock.close()
            raise StackFailed(
                f"chDB can't open {self.path}: {error}. Look at the folder's owner and free "
                "space, or start on an empty folder."
            ) from error
        self.version, self.timezone = version.bytes().decode().strip().split("\t")

    def open(self) -> Handle:
        """Open a handle with default settings."""
        return Handle(self._connect(self._address))

    def close(self) -> None:
        """Close the engine, which flushes it, and release the folder."""
        self._root.close()
        self._lock.close()

    def _take_lock(self) -> IO[str]:
        lock = (self.path / LOCK_FILE).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise StackFailed(
                f"{self.path} is already served by process {holder}: use its address, stop it, "
                "or choose another --path"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock


def _configuration(fsync: bool, limits: Limits) -> str:
    server = {
        "max_server_memory_usage": limits.memory,
        "mark_cache_size": limits.mark_cache,
        "index_mark_cache_size": limits.mark_cache,
        "primary_index_cache_size": limits.mark_cache,
        "compiled_expression_cache_size": 16 * 1024**2,
        "background_pool_size": limits.background_threads,
        "background_schedule_pool_size": limits.background_threads,
    }
    merge_tree = {"fsync_after_insert": int(fsync), "fsync_part_directory": int(fsync)}
    lines = [f"  <{k}>{escape(str(v))}</{k}>" for k, v in server.items()]
    lines.append("  <merge_tree>")
    lines.extend(f"    <{k}>{v}</{k}>" for k, v in merge_tree.items())
    lines.append("  </merge_tree>")
    return "<clickhouse>\n" + "\n".join(lines) + "\n</clickhouse>\n"
