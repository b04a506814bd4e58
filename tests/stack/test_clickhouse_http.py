"""chDB behind ClickHouse's HTTP protocol: the real process, used by ordinary clients."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import clickhouse_connect
import lz4.frame
import pandas
import psutil
import pyarrow
import pytest
import zstandard
from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError
from clickhouse_connect.driver.external import ExternalData

from stack.clickhouse_http.failures import ERROR_NAMES
from stack.clickhouse_http.forms import parse_form, split_types
from stack.clickhouse_http.statements import (
    InlineInsert,
    Unfinished,
    WholeStatement,
    first_word,
    output_format,
    set_names,
    split_insert,
    streams_by_block,
)

ROOT = Path(__file__).parents[2]
READY_SECONDS = 20
ROUND_TRIP_COLUMNS = (
    "id UInt64, name String, score Float64, price Decimal(18, 4), day Date, "
    "at DateTime64(3, 'UTC'), key UUID, channel LowCardinality(String), tags Array(String), "
    "counts Map(String, UInt32), pair Tuple(a Int32, b String), note Nullable(String)"
)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        return self.headers.get("x-clickhouse-exception-code")


@dataclass
class Server:
    path: Path
    process: subprocess.Popen[str]
    port: int
    login: dict[str, str] = field(default_factory=dict)

    def client(self, **options: Any) -> Any:
        return clickhouse_connect.get_client(
            host="127.0.0.1", port=self.port, **{**self.login, **options}
        )

    def http(
        self,
        method: str = "POST",
        body: Any = None,
        headers: dict[str, str] | None = None,
        path: str = "/",
        **params: str,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            target = f"{path}?{urlencode(params)}" if params else path
            connection.request(method, target, body, headers or {})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def sql(self, text: str, **params: str) -> str:
        answer = self.http(body=text.encode(), **params)
        assert answer.status == 200, answer.body
        return answer.body.decode().rstrip("\n")


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stack.clickhouse_http", "--path", str(path), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def serving(path: Path, *arguments: str, **login: str) -> Iterator[Server]:
    process = start(path, "--port", "0", *arguments)
    overdue = threading.Timer(READY_SECONDS, process.kill)
    overdue.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        overdue.cancel()
        assert line.startswith("ready: http://127.0.0.1:"), (line, process.communicate())
        yield Server(path, process, int(line.split()[1].rsplit(":", 1)[1]), dict(login))
    finally:
        overdue.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("clickhouse")) as running:
        yield running


@pytest.fixture(scope="module")
def shared(server: Server) -> Iterator[Any]:
    client = server.client()
    yield client
    client.close()


@pytest.fixture
def table(server: Server) -> Iterator[str]:
    name = f"t_{uuid.uuid4().hex[:8]}"
    server.sql(f"CREATE TABLE {name} (a UInt64, b String) ENGINE = MergeTree ORDER BY a")
    yield name
    server.sql(f"DROP TABLE {name}")


def round_trip_rows(count: int) -> list[list[Any]]:
    at = datetime(2026, 3, 29, 1, 30, 0, 123000, tzinfo=UTC)
    return [
        [
            i,
            f"n{i} Ünïcødé '\"\\\t\n",
            i / 7,
            Decimal(i) / 4,
            date(2026, 1, 1) + timedelta(days=i % 300),
            at + timedelta(milliseconds=i),
            uuid.UUID(int=i),
            ("email", "sms", "push")[i % 3],
            [f"t{i}", ""],
            {"opens": i, "clicks": 0},
            (-i, "x"),
            None if i % 2 else f"note {i}",
        ]
        for i in range(count)
    ]


# --- clients -------------------------------------------------------------------------------------


def test_clients_round_trip_twelve_types(server: Server, shared: Any) -> None:
    assert shared.ping()
    assert shared.server_version.startswith("26.")
    server.sql(f"CREATE TABLE round_trip ({ROUND_TRIP_COLUMNS}) ENGINE = MergeTree ORDER BY id")
    rows = round_trip_rows(1000)
    shared.insert("round_trip", rows)
    result = shared.query("SELECT * FROM round_trip ORDER BY id", query_tz="UTC")
    wanted = [[*row[:10], {"a": row[10][0], "b": row[10][1]}, row[11]] for row in rows]
    found = [list(row) for row in result.result_rows]
    for row in found:
        row[5] = row[5] if row[5].tzinfo else row[5].replace(tzinfo=UTC)
    assert found == wanted
    assert [str(t.name) for t in result.column_types][5] == "DateTime64(3, 'UTC')"


def test_inserts_of_every_kind(server: Server, shared: Any, table: str) -> None:
    names = ["a", "b"]
    shared.insert(table, [[1, "row"]], column_names=names)
    shared.insert(table, [[2, 3], ["c", "d"]], column_names=names, column_oriented=True)
    shared.insert_df(table, pandas.DataFrame({"a": [4, 5], "b": ["df", "df"]}))
    shared.insert_arrow(table, pyarrow.table({"a": pyarrow.array([6], "uint64"), "b": ["arrow"]}))
    csv = gzip.compress(b'7,"gz,ip"\n8,plain\n')
    summary = shared.raw_insert(table, names, csv, fmt="CSV", compression="gzip")
    assert summary.written_rows == 2
    shared.raw_insert(table, names, b'{"a":9,"b":"json"}\n', fmt="JSONEachRow")
    shared.command(f"INSERT INTO {table} VALUES (5 + 5, concat('x', 'y'))")
    shared.raw_insert(table, names, (line for line in [b"11\tg1\n", b"12\tg2\n"]), fmt="TSV")
    assert server.sql(f"SELECT groupArray((a, b)) FROM (SELECT * FROM {table} ORDER BY a)") == (
        "[(1,'row'),(2,'c'),(3,'d'),(4,'df'),(5,'df'),(6,'arrow'),(7,'gz,ip'),(8,'plain'),"
        "(9,'json'),(10,'xy'),(11,'g1'),(12,'g2')]"
    )


@pytest.mark.parametrize("compress", ["lz4", "zstd", "gzip", False])
def test_batches_of_100_000_rows_are_one_part(server: Server, table: str, compress: Any) -> None:
    with server.client(compress=compress) as client:
        rows = 100_000
        summary = client.insert(
            table, [list(range(rows)), ["x" * 20] * rows], ["a", "b"], column_oriented=True
        )
        assert summary.written_rows == rows
        parts = server.sql(f"SELECT count() FROM system.parts WHERE table = '{table}' AND active")
        assert parts == "1"
        assert client.query_np(f"SELECT a FROM {table} ORDER BY a")[-1][0] == rows - 1


def test_parameters_are_bound_by_the_engine(shared: Any) -> None:
    naive = datetime(2026, 1, 2, 3, 4, 5, 678000)  # noqa: DTZ001 a column without a zone
    result = shared.query(
        "SELECT {s:String}, {l:Array(String)}, {d:DateTime64(3)}, {n:Nullable(Int8)}, {u:UUID}",
        parameters={
            "s": "tab\tquote'\\ \nend",
            "l": ["a'b", "c\\", "ü"],
            "d": naive,
            "n": None,
            "u": uuid.UUID(int=5),
        },
    )
    assert result.result_rows == [
        (
            "tab\tquote'\\ \nend",
            ["a'b", "c\\", "ü"],
            naive,
            None,
            uuid.UUID(int=5),
        )
    ]


def test_inserts_take_parameters_too(server: Server, table: str) -> None:
    sql = f"INSERT INTO {table} VALUES ({{a:UInt64}}, {{b:String}})"
    answer = server.http(body=sql, param_a="7", param_b="it's")
    assert (answer.status, server.sql(f"SELECT * FROM {table}")) == (200, "7\tit\\'s")


def test_large_results_are_streamed(server: Server, shared: Any) -> None:
    before = psutil.Process(server.process.pid).memory_info().rss
    peak = before
    rows = 0
    query = "SELECT number, toString(number) FROM numbers(6000000)"
    with shared.query_row_block_stream(query) as stream:
        for block in stream:
            rows += len(block)
            peak = max(peak, psutil.Process(server.process.pid).memory_info().rss)
    assert rows == 6_000_000
    assert peak - before < 200 * 1024**2  # the result is 100 MB encoded


def test_a_stream_may_be_left_early(shared: Any) -> None:
    with shared.query_row_block_stream("SELECT number FROM numbers(20000000)") as stream:
        next(iter(stream))
    assert shared.command("SELECT 7") == 7


def test_a_client_that_goes_away_stops_its_query(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    marker = f"gone_{uuid.uuid4().hex[:6]}"
    query = f"SELECT number AS {marker} FROM system.numbers"  # never ends
    connection.request("POST", "/", query)
    connection.getresponse().read(100_000)
    connection.close()
    left = f"SELECT count() FROM system.processes WHERE query LIKE '%{marker}%system.numbers'"
    deadline = time.monotonic() + 10
    while server.sql(left) != "0":
        assert time.monotonic() < deadline, "the query still runs"
        time.sleep(0.05)


def test_arrow_and_dataframes(shared: Any) -> None:
    query = "SELECT number AS n, toString(number) AS s FROM numbers(200000)"
    assert shared.query_arrow(query).num_rows == 200_000
    assert shared.query_df(query)["n"].sum() == 199_999 * 100_000
    with shared.query_arrow_stream(query) as stream:
        assert sum(batch.num_rows for batch in stream) == 200_000
    assert shared.query("SELECT 1 AS one LIMIT 0").column_names == ("one",)


def test_errors_are_told_before_and_in_the_middle_of_a_body(server: Server, shared: Any) -> None:
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE") as missing:
        shared.query("SELECT * FROM nowhere")
    assert missing.value.code == 60
    failing = "SELECT number, throwIf(number = 2500000) FROM numbers(3000000)"
    with pytest.raises(DatabaseError) as buffered:
        shared.query(failing)
    assert buffered.value.code == 395
    with (
        pytest.raises(StreamFailureError, match="Code: 395"),
        shared.query_row_block_stream(failing) as stream,
    ):
        for _ in stream:
            pass
    with pytest.raises(http.client.IncompleteRead) as raw:
        server.http(body=failing)
    assert b"__exception__" in raw.value.partial[-600:]
    assert shared.command("SELECT 1") == 1


def test_external_data_is_a_table_of_its_query_alone(server: Server, shared: Any) -> None:
    blob = bytes(range(256)) * 50
    data = ExternalData(
        file_name="people.csv", data=b"1,x\n2,y\n", fmt="CSV", structure="a UInt8, b String"
    )
    data.add_file(file_name="blobs.bin", data=blob, fmt="RawBLOB", types="String")
    query = "SELECT a, b, (SELECT hex(MD5(_1)) FROM blobs) FROM people ORDER BY a"
    digest = server.sql("SELECT hex(MD5(unhex('" + blob.hex() + "')))")
    for _ in range(2):
        result = shared.query(query, external_data=data)
        assert result.result_rows == [(1, "x", digest), (2, "y", digest)]
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE"):
        shared.query("SELECT * FROM people")


def test_form_encoded_queries(server: Server) -> None:
    with server.client(form_encode_query_params=True) as client:
        values = list(range(30_000))
        query = "SELECT length({v:Array(UInt32)})"
        assert client.query(query, parameters={"v": values}).first_row[0] == 30_000


def test_async_client(server: Server, table: str) -> None:
    async def use() -> int:
        client = await clickhouse_connect.get_async_client(host="127.0.0.1", port=server.port)
        try:
            await asyncio.gather(
                *(client.insert(table, [[i, f"r{i}"]], ["a", "b"]) for i in range(20))
            )
            found = await asyncio.gather(
                *(client.query(f"SELECT count() FROM {table}") for _ in range(20))
            )
            assert all(result.first_row[0] == 20 for result in found)
            rows = 0
            async with await client.query_row_block_stream(
                "SELECT number FROM numbers(500000)"
            ) as stream:
                async for block in stream:
                    rows += len(block)
            failing = "SELECT number, throwIf(number = 2500000) FROM numbers(3000000)"
            # aiohttp may drop the trailer when the connection breaks; the failure itself is sure.
            with pytest.raises(StreamFailureError):
                async with await client.query_row_block_stream(failing) as stream:
                    async for _ in stream:
                        pass
            return rows
        finally:
            await client.close()

    assert asyncio.run(use()) == 500_000


def test_what_the_books_are_built_of(server: Server, shared: Any) -> None:
    for statement in (
        "CREATE DATABASE books",
        "CREATE TABLE books.results (run UUID, channel LowCardinality(String), ordinal UInt32, "
        "state Enum8('sent' = 1, 'accepted' = 2), at DateTime64(3, 'UTC'), version UInt32) "
        "ENGINE = ReplacingMergeTree(version) PARTITION BY channel ORDER BY (run, ordinal)",
        "CREATE TABLE books.totals (run UUID, people AggregateFunction(groupBitmap, UInt32), "
        "latest AggregateFunction(max, DateTime64(3, 'UTC'))) "
        "ENGINE = AggregatingMergeTree ORDER BY run",
        "CREATE MATERIALIZED VIEW books.feed TO books.totals AS SELECT run, "
        "groupBitmapState(ordinal) AS people, maxState(at) AS latest FROM books.results "
        "GROUP BY run",
    ):
        shared.command(statement)
    run, at, people = uuid.UUID(int=7), datetime(2026, 1, 1, tzinfo=UTC), 20_000
    with server.client(database="books") as client:
        for version, state in ((1, "sent"), (2, "accepted"), (2, "accepted")):
            columns = [
                [run] * people,
                ["email"] * people,
                list(range(people)),
                [state] * people,
                [at + timedelta(milliseconds=version)] * people,
                [version] * people,
            ]
            client.insert(
                "results",
                columns,
                ["run", "channel", "ordinal", "state", "at", "version"],
                column_oriented=True,
            )
        final = "SELECT count(), countIf(state = 'accepted') FROM results FINAL"
        assert client.query(final).first_row == (people, people)
        totals = client.query(
            "SELECT groupBitmapMerge(people), maxMerge(latest) FROM totals", query_tz="UTC"
        ).first_row
        assert totals[0] == people
        assert totals[1].replace(tzinfo=UTC) == at + timedelta(milliseconds=2)
        pending = client.query(
            "SELECT page, ordinal FROM (SELECT arrayJoin([0, 1]) AS page, number AS ordinal "
            "FROM numbers({audience:UInt32})) AS audience "
            "LEFT ANTI JOIN (SELECT ordinal FROM results FINAL) AS done USING ordinal "
            "ORDER BY page, ordinal",
            parameters={"audience": people + 2},
        ).result_rows
        assert pending == [(p, people + i) for p in (0, 1) for i in (0, 1)]
        bits = "SELECT bitmapCardinality(bitmapBuild(groupArray(ordinal))) FROM results"
        assert client.query(bits).first_row == (people,)
        client.command("ALTER TABLE results DELETE WHERE ordinal < 10 SETTINGS mutations_sync = 1")
        client.command("OPTIMIZE TABLE results FINAL")
        assert client.command("SELECT count() FROM results") == people - 10
    shared.command("DROP DATABASE books")


# --- the protocol ---------------------------------------------------------------------------------


def test_plain_http(server: Server, table: str) -> None:
    assert server.http("GET", path="/ping").body == b"Ok.\n"
    assert server.http("GET").body == b"Ok.\n"
    assert server.http("GET", path="/elsewhere").status == 404
    assert server.http("GET", query="SELECT 1, 'x'").body == b"1\tx\n"
    assert server.http(body="1 + 1", query="SELECT").body == b"2\n"
    named = server.http(body="SELECT 1 AS a", default_format="JSON", query_id="my-id")
    assert json.loads(named.body)["data"] == [{"a": 1}]
    assert named.headers["x-clickhouse-query-id"] == "my-id"
    assert named.headers["x-clickhouse-format"] == "JSON"
    assert named.headers["content-type"].startswith("application/json")
    written = server.http(body=iter([b"1,x\n2,", b"y\n"]), query=f"INSERT INTO {table} FORMAT CSV")
    assert json.loads(written.headers["x-clickhouse-summary"])["written_rows"] == "2"
    assert "x-clickhouse-format" not in written.headers
    copied = server.http(body=f"INSERT INTO {table} SELECT a + 2, b FROM {table}")
    assert json.loads(copied.headers["x-clickhouse-summary"])["written_rows"] == "2"
    read = server.http(body=f"SELECT max(a) FROM {table} WHERE b != {{x:String}}", param_x="q")
    assert read.body == b"4\n"
    assert json.loads(read.headers["x-clickhouse-summary"])["read_rows"] == "4"
    head = server.http("HEAD", query="SELECT 1")
    assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize(
    ("sql", "status", "code"),
    [
        ("SELEC 1", 400, "62"),
        ("", 400, "62"),
        ("SELECT 1; SELECT 2", 400, "62"),
        ("SELECT * FROM nowhere", 404, "60"),
        ("SELECT nothing", 404, "47"),
        ("SELECT 1 SETTINGS bogus = 1", 404, "115"),
        ("SELECT 1 FORMAT Bogus", 404, "73"),
        ("SELECT toUInt8('x')", 400, "6"),
        ("INSERT INTO nowhere VALUES (1)", 404, "60"),
        ("SELECT 1 INTO OUTFILE '/tmp/x'", 501, "48"),
        ("CREATE TABLE zero (a UInt8) ENGINE = Bogus", 404, "56"),
    ],
)
def test_error_codes(server: Server, sql: str, status: int, code: str) -> None:
    answer = server.http(body=sql)
    assert (answer.status, answer.code) == (status, code), answer.body
    assert answer.body.startswith(f"Code: {code}. DB::Exception: ".encode())


def test_own_error_codes_are_the_engine_s(server: Server) -> None:
    for code, name in ERROR_NAMES.items():
        assert server.sql(f"SELECT errorCodeToName({code})") == name


def test_statements_beyond_the_limit_are_refused(server: Server) -> None:
    endless = (b"SELECT 1 -- " + b"x" * 1024**2 for _ in range(70))
    answer = server.http(body=endless)
    assert (answer.status, answer.code) == (413, "229")


def test_bad_requests(server: Server, table: str) -> None:
    assert server.http(body="SELECT 1", bogus="1").code == "115"
    assert server.http(body="SELECT 1", database="nowhere").code == "81"
    assert server.http(body="SELECT 1", compress="1").status == 501
    assert server.http(body="SELECT 1", session_id="s", session_timeout="x").code == "374"
    assert server.http(body="SELECT 1", session_id="unknown", session_check="1").code == "372"
    insert = f"INSERT INTO {table} FORMAT CSV"
    for encoding in ("gzip", "lz4", "zstd", "deflate", "rot13"):
        answer = server.http(body=b"1,x\n", headers={"Content-Encoding": encoding}, query=insert)
        assert (answer.status, answer.code) == (400, "117"), (encoding, answer.body)
    cut = lz4.frame.compress(b"1,x\n" * 10_000)[:-20]
    assert server.http(body=cut, headers={"Content-Encoding": "lz4"}, query=insert).status == 400
    assert server.http(body=b"1,x\nbroken\n", query=insert).status == 400
    assert server.sql(f"SELECT count() FROM {table}") == "0"


def test_get_is_readonly(server: Server, table: str) -> None:
    for sql in (f"INSERT INTO {table} VALUES (1, 'x')", f"DROP TABLE {table}", "SYSTEM FLUSH LOGS"):
        assert server.http("GET", query=sql).code == "164"
        assert server.http("GET", query=sql, session_id=uuid.uuid4().hex).code == "164"
        assert server.http(body=sql, readonly="1").code == "164"
    assert server.http("GET", query=f"SELECT count() FROM {table}").body == b"0\n"
    assert server.http("GET", query="SELECT getSetting('max_threads')", max_threads="3").body == (
        b"3\n"
    )


def test_encodings_both_ways(server: Server, table: str) -> None:
    plain = b"".join(b"%d\tx\n" % i for i in range(5000))
    packers = {
        "lz4": (lambda b: lz4.frame.compress(b[:9]) + lz4.frame.compress(b[9:])),
        "zstd": (lambda b: zstandard.compress(b[:9]) + zstandard.compress(b[9:])),
        "gzip": (lambda b: gzip.compress(b[:9]) + gzip.compress(b[9:])),
        "identity": (lambda b: b),
    }
    unpackers = {
        "lz4": lz4.frame.decompress,
        "zstd": lambda b: zstandard.ZstdDecompressor().decompressobj().decompress(b),
        "gzip": gzip.decompress,
        "identity": lambda b: b,
    }
    for encoding, pack in packers.items():
        server.sql(f"TRUNCATE TABLE {table}")
        answer = server.http(
            body=pack(plain),
            headers={"Content-Encoding": encoding},
            query=f"INSERT INTO {table} FORMAT TSV",
        )
        assert answer.status == 200, (encoding, answer.body)
        for wait in ("0", "1"):
            read = server.http(
                body=f"SELECT * FROM {table} ORDER BY a",
                headers={"Accept-Encoding": encoding},
                wait_end_of_query=wait,
            )
            assert read.headers.get("content-encoding", "identity") == encoding
            assert unpackers[encoding](read.body) == plain


def test_large_bodies_and_results_spill_to_disk(server: Server, table: str) -> None:
    line = b"1\t" + b"x" * 998 + b"\n"
    query = f"INSERT INTO {table} FORMAT TSV"
    written = server.http(body=(line * 1000 for _ in range(60)), query=query)
    assert json.loads(written.headers["x-clickhouse-summary"])["written_rows"] == "60000"
    read = server.http(body=f"SELECT * FROM {table}", wait_end_of_query="1")
    assert len(read.body) == 60_000 * len(line)
    assert read.headers["content-length"] == str(60_000 * len(line))


def test_an_upload_that_breaks_off_inserts_nothing(server: Server, table: str) -> None:
    head = f"POST /?{urlencode({'query': f'INSERT INTO {table} FORMAT CSV'})} HTTP/1.1\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"Host: x\r\nContent-Length: 100\r\n\r\n1,x\n2,y\n")
    time.sleep(0.3)
    assert server.sql(f"SELECT count() FROM {table}") == "0"


def test_sessions_keep_temporary_tables_and_settings(server: Server) -> None:
    with server.client() as one, server.client() as other:
        one.command("CREATE TEMPORARY TABLE mine (a UInt8)")
        one.insert("mine", [[1], [2]], column_names=["a"])
        one.command("SET max_block_size = 77")
        assert one.command("SELECT sum(a) FROM mine") == 3
        assert one.command("SELECT getSetting('max_block_size')") == 77
        with pytest.raises(DatabaseError, match="UNKNOWN_TABLE"):
            other.query("SELECT * FROM mine")
        assert other.command("SELECT getSetting('max_block_size')") != 77


def test_url_settings_and_databases_hold_for_one_request(server: Server) -> None:
    server.sql("CREATE DATABASE IF NOT EXISTS elsewhere")
    ask = "SELECT getSetting('max_block_size'), currentDatabase()"
    plain = server.sql(ask)
    for params in ({}, {"session_id": uuid.uuid4().hex}):
        assert server.sql(ask, max_block_size="99", database="elsewhere", **params) == (
            "99\telsewhere"
        )
        assert server.sql(ask, **params) == plain
        assert server.http(body="SELECT 1", max_block_size="x", **params).status == 400
        assert server.sql(ask, **params) == plain
    session = {"session_id": uuid.uuid4().hex}
    server.sql("SET max_block_size = 55", max_block_size="66", **session)
    server.sql("USE elsewhere", **session)
    assert server.sql(ask, max_block_size="77", database="default", **session) == "77\tdefault"
    assert server.sql(ask, **session) == "55\telsewhere"


def test_a_busy_session_is_locked_and_an_idle_one_expires(server: Server) -> None:
    session = {"session_id": uuid.uuid4().hex, "session_timeout": "1"}
    slow = threading.Thread(target=server.sql, args=("SELECT sleep(1)",), kwargs=session)
    slow.start()
    running = "SELECT count() FROM system.processes WHERE query = 'SELECT sleep(1)'"
    while server.sql(running) == "0":
        assert slow.is_alive()
    locked = server.http(body="SELECT 1", **session)
    assert (slow.is_alive(), locked.code) == (True, "373")
    slow.join()
    assert server.sql("SELECT 1", **session) == "1"  # free with the last byte of the answer
    deadline = time.monotonic() + 5
    while server.http(body="SELECT 1", session_check="1", **session).code != "372":
        assert time.monotonic() < deadline
        time.sleep(1.2)


def test_requests_of_one_session_in_a_row_never_collide(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for number in range(300):
        connection.request("POST", "/?session_id=row", f"SELECT {number}")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"%d\n" % number)
    connection.close()


def test_queries_run_in_parallel(server: Server) -> None:
    server.sql("SELECT 1")
    begun = time.monotonic()
    threads = [threading.Thread(target=server.sql, args=("SELECT sleep(1)",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert server.http("GET", path="/ping").status == 200
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun < 3


def test_idle_costs_nothing_and_memory_is_modest(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(2)
    assert sum(process.cpu_times()[:2]) - before < 0.2
    limit = server.sql("SELECT value FROM system.server_settings WHERE name = 'mark_cache_size'")
    assert int(limit) == 64 * 1024**2


# --- the process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    secret = folder / "password"
    secret.write_text("s3crét\n")
    arguments = ("--user", "fanfare", "--password-file", str(secret))
    with serving(folder / "data", *arguments, username="fanfare", password="s3crét") as running:
        yield running


def test_logins(guarded: Server) -> None:
    with guarded.client() as client:
        assert client.command("SELECT 1") == 1
    assert guarded.http("GET", path="/ping").status == 200
    key = "s3crét".encode().decode("latin-1")
    in_headers = {"X-ClickHouse-User": "fanfare", "X-ClickHouse-Key": "s3cr%C3%A9t"}
    assert guarded.http(body="SELECT 1", headers=in_headers).status == 403
    in_headers["X-ClickHouse-Key"] = key
    assert guarded.http(body="SELECT 1", headers=in_headers).body == b"1\n"
    assert guarded.http(body="SELECT 1", user="fanfare", password="s3crét").body == b"1\n"
    for headers in (
        {},
        {"X-ClickHouse-User": "fanfare"},
        {"X-ClickHouse-User": "default", "X-ClickHouse-Key": key},
        {"Authorization": "Basic !!"},
        {"Authorization": "Bearer x"},
    ):
        answer = guarded.http(body="SELECT 1", headers=headers)
        assert (answer.status, answer.code) == (403, "516")
    with pytest.raises(DatabaseError, match="Authentication failed"):
        guarded.client(password="wrong")


def test_a_second_process_on_the_folder_is_refused(guarded: Server) -> None:
    second = start(guarded.path, "--port", "0")
    out, err = second.communicate(timeout=READY_SECONDS)
    assert (second.returncode, out) == (1, "")
    assert f"is already served by process {guarded.process.pid}" in err
    assert len(err.splitlines()) == 1


def test_a_taken_port_is_told(guarded: Server, tmp_path: Path) -> None:
    second = start(tmp_path, "--port", str(guarded.port))
    _, err = second.communicate(timeout=READY_SECONDS)
    assert second.returncode == 1
    assert f"can't listen on 127.0.0.1:{guarded.port}: Address already in use" in err
    assert len(err.splitlines()) == 1


def test_sigterm_finishes_running_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    folder = tmp_path / "with blank, ü + %41"
    with serving(folder) as server:
        assert server.sql("SELECT timezone()") == "UTC"
        server.sql("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a")
        answers: list[Answer] = []
        insert = "INSERT INTO t SELECT sleepEachRow(0.5) + number FROM numbers(3)"
        slow = threading.Thread(target=lambda: answers.append(server.http(body=insert)))
        slow.start()
        running = "SELECT count() FROM system.processes WHERE query LIKE 'INSERT%'"
        deadline = time.monotonic() + 10
        while server.sql(running) == "0":
            assert time.monotonic() < deadline
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert time.monotonic() - begun < 5
        slow.join()
        assert [answer.status for answer in answers] == [200]
    with serving(folder) as server:
        assert server.sql("SELECT count() FROM t") == "3"


def test_sigterm_does_not_wait_for_endless_queries(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        endless = "SELECT count() FROM system.numbers"
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/", endless)
        deadline = time.monotonic() + 10
        while server.sql("SELECT count() FROM system.processes") == "1":
            assert time.monotonic() < deadline
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(8) == 0
        assert time.monotonic() - begun < 5
        connection.close()


def test_acknowledged_batches_survive_kill_9(tmp_path: Path) -> None:
    size = 2000
    acknowledged: list[int] = []
    with serving(tmp_path) as server:
        server.sql("CREATE TABLE t (batch UInt32, n UInt32) ENGINE = MergeTree ORDER BY batch")
        settings = "SELECT name FROM system.merge_tree_settings WHERE changed ORDER BY name"
        assert server.sql(settings) == "fsync_after_insert\nfsync_part_directory"

        def write(batches: range) -> None:
            try:
                for batch in batches:
                    body = b"".join(b"%d\t%d\n" % (batch, n) for n in range(size))
                    query = "INSERT INTO t FORMAT TSV"
                    if server.http(body=body, query=query).status == 200:
                        acknowledged.append(batch)
            except (OSError, http.client.HTTPException):
                return

        writers = [
            threading.Thread(target=write, args=(range(i * 10_000, (i + 1) * 10_000),))
            for i in range(2)
        ]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 20
        while len(acknowledged) < 40:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGKILL)
        for writer in writers:
            writer.join()
    with serving(tmp_path) as server:
        found = server.sql("SELECT batch, count() FROM t GROUP BY batch")
    counts = dict(tuple(map(int, line.split("\t"))) for line in found.splitlines())
    assert set(acknowledged) <= set(counts)
    assert set(counts.values()) == {size}
    assert len(counts) <= len(acknowledged) + len(writers)


# --- rules, without a server ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "statement", "format_name", "data"),
    [
        (b"INSERT INTO t FORMAT CSV\n1,2", b"INSERT INTO t ", "CSV", b"1,2"),
        (b"insert into t(a,b) format TSV \t\r\n1", b"insert into t(a,b) ", "TSV", b"1"),
        (b"INSERT INTO t VALUES (1)", b"INSERT INTO t ", "Values", b" (1)"),
        (b"INSERT INTO db.values VALUES(1)", b"INSERT INTO db.values ", "Values", b"(1)"),
        (b"INSERT INTO `format` FORMAT CSV 1", b"INSERT INTO `format` ", "CSV", b"1"),
        (b"/* FORMAT x */ INSERT t (`values`) -- VALUES\nFORMAT CSV\n\n", None, "CSV", b"\n"),
        (
            b"INSERT INTO t SETTINGS a='FORMAT x', b=1 FORMAT Native\n\x01\x02",
            b"INSERT INTO t SETTINGS a='FORMAT x', b=1 ",
            "Native",
            b"\x01\x02",
        ),
        (
            b"INSERT INTO t FORMAT CSV SETTINGS a=1, b='x'\n1",
            b"INSERT INTO t  SETTINGS a=1, b='x'",
            "CSV",
            b"1",
        ),
        (b"INSERT INTO t", b"INSERT INTO t", "Values", b""),
    ],
)
def test_inserts_are_split_from_their_data(
    text: bytes, statement: bytes | None, format_name: str, data: bytes
) -> None:
    split = split_insert(text, complete=True)
    assert isinstance(split, InlineInsert)
    assert split.format == format_name
    assert text[split.data_offset :] == data
    assert statement is None or split.statement == statement


def test_the_border_does_not_depend_on_how_much_is_seen() -> None:
    text = b"INSERT INTO t (a, `b`) SETTINGS x='y' FORMAT Native\n\x00\x01rest"
    whole = split_insert(text, complete=True)
    seen = [split_insert(text[:n], complete=False) for n in range(len(text) + 1)]
    assert all(isinstance(split, Unfinished) or split == whole for split in seen)
    assert seen[-1] == whole


def test_statements_without_data_are_left_whole() -> None:
    for text in (b"SELECT 1", b"INSERT INTO t SELECT 1", b"WITH 1 AS x SELECT x", b"(SELECT 1)"):
        assert split_insert(text, complete=True) == WholeStatement()


def test_formats_are_found_at_the_end_only() -> None:
    assert output_format(b"SELECT 1 FORMAT JSON") == "JSON"
    assert output_format(b"SELECT 1\n format Native ;\n") == "Native"
    assert output_format(b"SELECT 1 FORMAT CSV SETTINGS max_threads = 1") == "CSV"
    assert output_format(b"SELECT 1 FORMAT JSON -- FORMAT CSV") == "JSON"
    assert output_format(b"SELECT 1 /* FORMAT CSV */") is None
    assert output_format(b"SELECT 'FORMAT CSV'") is None
    assert streams_by_block(b"SELECT 1", "Native")
    assert not streams_by_block(b"SELECT 1", "JSON")
    assert not streams_by_block(b"SELECT a, sum(b) FROM t GROUP BY a WITH TOTALS", "CSV")


def test_words_names_and_types() -> None:
    assert first_word(b" -- x\n/* y */ (select 1)") == b"SELECT"
    assert set_names(b"SET a = 1, `b`=2, c = 'x = y', dd='z'") == {"a", "c", "dd"}
    assert split_types("String, Decimal(9, 2),Array(Tuple(a Int8, b Int8))") == [
        "String",
        "Decimal(9, 2)",
        "Array(Tuple(a Int8, b Int8))",
    ]


def test_forms_keep_every_byte() -> None:
    data = bytes(range(256)) + b"\r\n--x\r\n\r\r\n\n"
    body = (
        b'--XX\r\nContent-Disposition: form-data; name="query"\r\n\r\nSELECT \xc3\xbc\r\n'
        b'--XX\r\nContent-Disposition: form-data; name="f"; filename="f.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--XX--\r\n"
    )
    form = parse_form("multipart/form-data; boundary=XX", body)
    assert form.fields == {"query": "SELECT ü"}
    assert form.files == {"f": data}
