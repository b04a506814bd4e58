from __future__ import annotations

import asyncio
import socket
import threading
import time
from datetime import timedelta

import pytest

from schemas.errors import InvalidInput
from sinks.connections import InDoubt, NotSent, is_global
from sinks.http1 import HttpAnswer, HttpClient, HttpTimeouts
from tests.providers.conftest import Run
from tests.providers.servers import (
    LINGER_RESET,
    Certificates,
    Reader,
    Server,
    Writer,
    eventually,
    forever,
    http_answer,
    read_request,
    reset,
)

DEADLINE = timedelta(seconds=5)
OK = http_answer("202 Accepted", X_Message_Id="m1")


def client(server: Server, **options: object) -> HttpClient:
    options.setdefault("allow_private", True)
    scheme = "https" if "tls" in options else "http"
    return HttpClient(f"{scheme}://localhost:{server.port}/api", **options)  # type: ignore[arg-type]


async def post(http: HttpClient, body: bytes = b"{}", deadline: timedelta = DEADLINE) -> HttpAnswer:
    return await http.request(http.prepare("POST", "/send", {"X-Key": "k"}), body, deadline)


def saying(*parts: bytes, then: str = "keep", pause: float = 0.0):  # type: ignore[no-untyped-def]
    """A handler that answers every request with the same bytes, part by part."""

    async def handler(reader: Reader, writer: Writer) -> None:
        while True:
            await read_request(reader)
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            if then == "close":
                return
            if then == "reset":
                reset(writer)
                return
            if then == "hang":
                await forever()
            if then == "half-close":
                writer.write_eof()
                await forever()

    return handler


def test_a_connection_is_kept_and_the_request_is_what_was_asked(run: Run) -> None:
    seen = []

    async def handler(reader: Reader, writer: Writer) -> None:
        while True:
            seen.append(await read_request(reader))
            writer.write(OK)

    async def main() -> None:
        async with Server(handler) as server:
            http = client(server, connections=4)
            for n in range(20):
                answer = await post(http, b"x" * n)
                assert (answer.status, answer.complete, answer.body) == (202, True, b"")
                assert answer.header("x-message-id") == "m1"
                assert answer.header("absent") is None
            assert server.connections == 1
            assert seen[3].line == "POST /api/send HTTP/1.1"
            assert seen[3].headers["host"] == f"localhost:{server.port}"
            assert seen[3].headers["x-key"] == "k"
            assert [len(r.body) for r in seen] == list(range(20))
            await http.close()

    run(main())


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: t\r\n\r\n"
)


@pytest.mark.parametrize(
    "parts",
    [(CHUNKED,), tuple(bytes([byte]) for byte in CHUNKED), (CHUNKED[:60], CHUNKED[60:])],
    ids=["whole", "byte by byte", "in two"],
)
def test_chunked_answers_arrive_however_they_are_cut(run: Run, parts: tuple[bytes, ...]) -> None:
    async def main() -> None:
        async with Server(saying(*parts)) as server:
            http = client(server)
            for _ in range(2):
                answer = await post(http)
                assert (answer.status, answer.body, answer.complete) == (200, b"hello world", True)
            assert server.connections == 1
            await http.close()

    run(main())


def test_an_answer_that_ends_with_the_connection_is_complete(run: Run) -> None:
    async def main() -> None:
        head = b"HTTP/1.1 200 OK\r\n\r\n"
        async with Server(saying(head, b"all ", b"of it", then="close")) as server:
            http = client(server)
            for _ in range(2):
                answer = await post(http)
                assert (answer.body, answer.complete) == (b"all of it", True)
            assert server.connections == 2
            await http.close()

    run(main())


def test_connection_close_is_obeyed(run: Run) -> None:
    async def main() -> None:
        async with Server(saying(http_answer("202 Accepted", Connection="close"))) as server:
            http = client(server)
            for _ in range(3):
                assert (await post(http)).status == 202
            assert server.connections == 3
            await http.close()

    run(main())


def test_interim_answers_are_skipped(run: Run) -> None:
    async def main() -> None:
        interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        async with Server(saying(interim, OK)) as server:
            http = client(server)
            for _ in range(3):
                answer = await post(http)
                assert answer.status == 202 and answer.header("link") is None
            assert server.connections == 1
            await http.close()

    run(main())


@pytest.mark.parametrize("then", ["close", "reset", "half-close"])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 20"], ids=["silent", "in the status line"])
def test_no_answer_after_the_request_left_is_in_doubt(run: Run, then: str, said: bytes) -> None:
    async def main() -> None:
        async with Server(saying(said, then=then)) as server:
            http = client(server)
            with pytest.raises(InDoubt) as caught:
                await post(http)
            assert caught.value.reason == "connection-lost"
            assert server.connections == 1, "a request that left is never sent again"
            await http.close()

    run(main())


@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_known_status_with_half_a_body_is_an_answer(run: Run, then: str) -> None:
    async def main() -> None:
        said = b"HTTP/1.1 202 Accepted\r\nX-Message-Id: m9\r\nContent-Length: 50\r\n\r\nhalf"
        async with Server(saying(said, then=then, pause=0.05)) as server:
            http = client(server)
            answer = await post(http)
            assert (answer.status, answer.complete) == (202, False)
            assert answer.header("X-Message-ID") == "m9"
            await http.close()

    run(main())


def test_deadline_and_first_byte_timeout_are_in_doubt_in_time(run: Run) -> None:
    async def main() -> None:
        async with Server(saying(then="hang")) as server:
            for options, deadline in (
                ({}, timedelta(seconds=0.2)),
                ({"timeouts": HttpTimeouts(first_byte=timedelta(seconds=0.2))}, DEADLINE),
            ):
                http = client(server, **options)
                began = time.monotonic()
                with pytest.raises(InDoubt, match="timeout"):
                    await post(http, deadline=deadline)
                assert 0.15 < time.monotonic() - began < 2
                await http.close()

    run(main())


def test_a_slow_body_is_cut_off_at_the_deadline_with_its_status(run: Run) -> None:
    async def main() -> None:
        said = b"HTTP/1.1 503 Busy\r\nContent-Length: 99\r\n\r\n"
        async with Server(saying(said, *[b"."] * 90, then="hang", pause=0.02)) as server:
            http = client(server)
            answer = await post(http, deadline=timedelta(seconds=0.3))
            assert (answer.status, answer.complete) == (503, False)
            await http.close()

    run(main())


def test_a_later_request_with_an_earlier_deadline_is_on_time(run: Run) -> None:
    """The timer that a first request left behind must not delay a second one's."""

    async def main() -> None:
        answered = False

        async def handler(reader: Reader, writer: Writer) -> None:
            nonlocal answered
            while True:
                await read_request(reader)
                if not answered:
                    answered = True
                    writer.write(OK)

        async with Server(handler) as server:
            http = client(server)
            await post(http, deadline=timedelta(seconds=60))
            began = time.monotonic()
            with pytest.raises(InDoubt):
                await post(http, deadline=timedelta(seconds=0.1))
            assert time.monotonic() - began < 2
            await http.close()

    run(main())


def test_what_could_not_be_written_whole_was_not_sent(run: Run) -> None:
    async def never_reads(reader: Reader, writer: Writer) -> None:
        await forever()

    async def main() -> None:
        async with Server(never_reads) as server:
            http = client(server, timeouts=HttpTimeouts(write=timedelta(seconds=0.2)))
            with pytest.raises(NotSent, match="timeout"):
                await post(http, b"x" * 60_000_000)
            await http.close()

    run(main())


def test_a_reset_in_mid_request_means_not_sent(run: Run) -> None:
    async def resets(reader: Reader, writer: Writer) -> None:
        await reader.readexactly(1000)
        reset(writer)

    async def main() -> None:
        async with Server(resets) as server:
            http = client(server)
            with pytest.raises(NotSent, match="connection-lost"):
                await post(http, b"x" * 100_000_000)
            await http.close()

    run(main())


def test_an_early_refusal_is_heard_while_the_body_is_still_leaving(run: Run) -> None:
    async def refuses(reader: Reader, writer: Writer) -> None:
        await reader.readexactly(1000)
        writer.write(http_answer("413 Too Large", b"too much"))
        await writer.drain()
        await forever()

    async def main() -> None:
        async with Server(refuses) as server:
            http = client(server)
            for expected in (1, 2):
                answer = await post(http, b"x" * 60_000_000)
                assert (answer.status, answer.body) == (413, b"too much")
                assert server.connections == expected, "the half-sent request's wire is not kept"
            await http.close()

    run(main())


def test_a_server_that_closed_an_idle_connection_costs_no_doubt(run: Run) -> None:
    """Even when the loop has had no chance to notice: the socket itself is looked at."""
    listener = socket.create_server(("127.0.0.1", 0))
    closed = threading.Event()
    served = []

    def serve() -> None:
        for how in ("fin", "rst", "keep"):
            connection, _ = listener.accept()
            received = b""
            while not received.endswith(b"\r\n\r\n{}"):
                received += connection.recv(65536)
            served.append(how)
            connection.sendall(OK)
            if how == "keep":
                closed.wait(5)
                connection.close()
                return
            time.sleep(0.05)
            if how == "rst":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            connection.close()
            closed.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    async def main() -> None:
        http = HttpClient(
            f"http://127.0.0.1:{listener.getsockname()[1]}", allow_private=True, connections=1
        )
        for _ in range(3):
            assert (await post(http)).status == 202
            if len(served) < 3:
                assert closed.wait(5)  # blocks the loop on purpose
                closed.clear()
                time.sleep(0.02)  # noqa: ASYNC251
        assert served == ["fin", "rst", "keep"]
        closed.set()
        await http.close()

    run(main())
    thread.join(5)
    listener.close()


def test_an_answer_nobody_asked_for_is_never_given_to_the_next_request(run: Run) -> None:
    async def main() -> None:
        forged = http_answer("202 Accepted", X_Message_Id="forged")
        count = 0

        async def handler(reader: Reader, writer: Writer) -> None:
            nonlocal count
            while True:
                await read_request(reader)
                count += 1
                writer.write(http_answer("202 Accepted", X_Message_Id=f"m{count}") + forged)

        async with Server(handler) as server:
            http = client(server, connections=1)
            for n in range(1, 6):
                assert (await post(http)).header("x-message-id") == f"m{n}"
            assert server.connections == 5
            await http.close()

    run(main())


@pytest.mark.parametrize(
    "said",
    [
        b"SMTP ready\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_a_malformed_answer_is_never_acceptance(run: Run, said: bytes) -> None:
    async def main() -> None:
        async with Server(saying(said, then="hang")) as server:
            http = client(server)
            try:
                answer = await post(http, deadline=timedelta(seconds=1))
            except InDoubt as error:
                assert error.reason == "malformed-answer"
            else:
                assert answer.status == 101
            await http.close()

    run(main())


@pytest.mark.parametrize(
    "said",
    [
        http_answer("200 OK", b"x" * 500_000),
        b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"y" * 500_000 + b"\r\n\r\n",
    ],
    ids=["body", "head"],
)
def test_an_endless_answer_is_cut_off(run: Run, said: bytes) -> None:
    async def main() -> None:
        async with Server(saying(said, then="hang")) as server:
            http = client(server, max_answer_bytes=10_000)
            try:
                answer = await post(http)
            except InDoubt as error:
                assert error.reason in ("answer-too-large", "malformed-answer")
            else:
                assert not answer.complete
                assert len(answer.body) < 400_000
            await http.close()

    run(main())


def test_nobody_listening_is_not_sent(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def main() -> None:
        http = HttpClient(f"http://127.0.0.1:{port}", allow_private=True)
        for _ in range(3):
            with pytest.raises(NotSent, match="connect-failed"):
                await post(http)
        unknown = HttpClient("http://no-such-host.invalid", allow_private=True)
        with pytest.raises(NotSent, match="name-not-found"):
            await post(unknown)
        await http.close()

    run(main())


def test_tls_is_verified(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        async with Server(saying(OK), certificates.server) as server:
            http = client(server, tls=certificates.client, connections=2)
            answers = await asyncio.gather(*(post(http, b"x" * 5000) for _ in range(20)))
            assert {a.status for a in answers} == {202}
            assert server.connections == 2
            await http.close()
            stranger = client(server, tls=certificates.stranger)
            with pytest.raises(NotSent, match="certificate-refused"):
                await post(stranger)
            wrong_name = HttpClient(
                f"https://localhost.localdomain:{server.port}",
                tls=certificates.client,
                allow_private=True,
            )
            wrong_name._endpoint._addresses = ["127.0.0.1"]
            wrong_name._endpoint._resolved_at = asyncio.get_running_loop().time()
            with pytest.raises(NotSent, match="certificate-refused"):
                await post(wrong_name)

    run(main())


@pytest.mark.parametrize("then", ["close", "reset", "hang"])
def test_over_tls_no_answer_is_in_doubt(run: Run, certificates: Certificates, then: str) -> None:
    async def main() -> None:
        async with Server(saying(then=then), certificates.server) as server:
            http = client(server, tls=certificates.client)
            with pytest.raises(InDoubt):
                await post(http, deadline=timedelta(seconds=1))
            await http.close()

    run(main())


def test_a_handshake_that_hangs_is_not_sent(run: Run, certificates: Certificates) -> None:
    async def silent(reader: Reader, writer: Writer) -> None:
        await forever()

    async def main() -> None:
        async with Server(silent) as server:
            http = client(
                server,
                tls=certificates.client,
                timeouts=HttpTimeouts(connect=timedelta(seconds=0.2)),
            )
            with pytest.raises(NotSent, match="connect-timeout"):
                await post(http)
            await http.close()

    run(main())


def test_private_addresses_are_refused_unless_allowed(run: Run) -> None:
    async def main() -> None:
        async with Server(saying(OK)) as server:
            for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]"):
                http = HttpClient(f"http://{host}:{server.port}")
                with pytest.raises(NotSent, match="address-not-allowed"):
                    await post(http)
            assert server.connections == 0

    run(main())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("10.0.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("::", False), ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False),
        ("::ffff:10.0.0.1", False), ("::ffff:93.184.216.34", True),
        ("64:ff9b::a00:1", False), ("64:ff9b::5db8:d822", True), ("2002:a00:1::", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_global(address) is public


def test_requests_that_would_break_the_protocol_are_refused() -> None:
    http = HttpClient("http://localhost")
    for name, value in (
        ("X-A", "b\r\nX-Evil: 1"), ("X-A", "b\n"), ("X-A\r\nX", "b"), ("X A", "b"), ("X-A", "b\0"),
        ("X-A", "caf\u00e9"), ("Host", "x"), ("Content-Length", "3"),
        ("Transfer-Encoding", "chunked"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            http.prepare("POST", "/", {name: value})
    for target in ("x", "/a b", "/a\r\nX: y", "/\u00e9"):
        with pytest.raises(InvalidInput):
            http.prepare("POST", target, {})
    with pytest.raises(InvalidInput):
        http.prepare("GET /", "/", {})
    for url in ("ftp://x", "http://", "http://u:p@x", "http://x?y", "http://x:99999", "x"):
        with pytest.raises(InvalidInput):
            HttpClient(url)


def test_who_waits_is_served_in_turn_and_deadlines_cover_the_wait(run: Run) -> None:
    async def slow(reader: Reader, writer: Writer) -> None:
        while True:
            await read_request(reader)
            await asyncio.sleep(0.03)
            writer.write(OK)

    async def main() -> None:
        async with Server(slow) as server:
            http = client(server, connections=1)
            order: list[int] = []

            async def one(n: int, deadline: timedelta) -> None:
                await post(http, deadline=deadline)
                order.append(n)

            late = asyncio.create_task(one(-1, DEADLINE))
            await asyncio.sleep(0)
            tasks = [asyncio.create_task(one(n, DEADLINE)) for n in range(8)]
            hasty = asyncio.create_task(one(99, timedelta(seconds=0.06)))
            await asyncio.sleep(0.01)
            tasks[2].cancel()
            with pytest.raises(NotSent, match="queue-timeout"):
                await hasty
            await asyncio.gather(late, *tasks, return_exceptions=True)
            assert order == [-1, 0, 1, 3, 4, 5, 6, 7]
            assert server.connections == 1
            await http.close()

    run(main())


def test_cancelling_frees_the_place_and_never_the_wire(run: Run) -> None:
    async def main() -> None:
        silent = True

        async def handler(reader: Reader, writer: Writer) -> None:
            while True:
                await read_request(reader)
                if silent:
                    await forever()
                writer.write(OK)

        async with Server(handler) as server:
            http = client(server, connections=2)
            for _ in range(5):
                tasks = [asyncio.create_task(post(http)) for _ in range(6)]
                await asyncio.sleep(0.02)
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(r, asyncio.CancelledError) for r in results)
            silent = False
            answers = await asyncio.gather(*(post(http) for _ in range(6)))
            assert {a.status for a in answers} == {202}
            await http.close()

    run(main())


def test_close_ends_requests_and_refuses_new_ones(run: Run) -> None:
    async def main() -> None:
        async with Server(saying(then="hang")) as server:
            http = client(server, connections=1)
            flying = asyncio.create_task(post(http))
            waiting = asyncio.create_task(post(http))
            await eventually(lambda: server.connections == 1)
            await asyncio.sleep(0.05)
            await http.close()
            await http.close()
            with pytest.raises(InDoubt):
                await flying
            for coroutine in (waiting, post(http)):
                with pytest.raises(NotSent, match="closed"):
                    await coroutine

    run(main())


def test_many_requests_over_few_connections_each_get_their_own_answer(run: Run) -> None:
    async def echo(reader: Reader, writer: Writer) -> None:
        while True:
            request = await read_request(reader)
            writer.write(http_answer("200 OK", request.body))

    async def main() -> None:
        async with Server(echo) as server:
            http = client(server, connections=7)
            answers = await asyncio.gather(*(post(http, str(n).encode()) for n in range(500)))
            assert [a.body for a in answers] == [str(n).encode() for n in range(500)]
            assert server.connections == 7
            await http.close()

    run(main())
