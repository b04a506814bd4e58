"""The pipelined client: answers belong to their commands, whatever breaks when."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis.exceptions import BusyLoadingError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import TimeoutError as Late

from sinks.redis_pipeline import PipelinedRedis
from tests.ledger.server import RedisServer
from tests.providers.servers import Reader, Server, Writer, make_certificates

SLOWLY = "local n = tonumber(ARGV[1]); for i = 1, n do redis.call('TIME') end; return ARGV[2]"


def client_of(server: RedisServer, seconds: float = 5.0) -> PipelinedRedis:
    return PipelinedRedis(server.url, timedelta(seconds=seconds))


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_each_gets_the_answer_to_its_own_command(run: Any, shared_redis: RedisServer) -> None:
    async def main() -> None:
        client = client_of(shared_redis)
        words = [bytes([number % 256]) * (number * 37 % 9_000) for number in range(2_000)]
        answers = await asyncio.gather(*(client.execute_command("ECHO", w) for w in words))
        assert answers == words
        answer = await client.execute_command("EVAL", "return ARGV", 0, "\u00e9", b"\0\r\n", 7, 0.5)
        assert answer == ["\u00e9".encode(), b"\0\r\n", b"7", b"0.5"]
        assert await client.execute_command("GET", "nobody wrote this") is None
        assert int((await client.execute_command("CLIENT", "LIST")).count(b"id=")) >= 1
        await client.aclose()

    run(main())


def test_an_error_is_its_commands_alone(run: Any, shared_redis: RedisServer) -> None:
    async def main() -> None:
        client = client_of(shared_redis)
        await client.execute_command("DEL", "text")
        calls = []
        for number in range(100):
            calls.append(client.execute_command("ECHO", number))
            calls.append(client.execute_command("NO-SUCH-COMMAND"))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert answers[::2] == [str(number).encode() for number in range(100)]
        assert all(isinstance(answer, ResponseError) for answer in answers[1::2])
        await client.aclose()

    run(main())


def test_who_is_cancelled_shifts_no_answers(run: Any, shared_redis: RedisServer) -> None:
    async def main() -> None:
        client = client_of(shared_redis)
        await client.execute_command("PING")
        tasks = [
            asyncio.create_task(client.execute_command("EVAL", SLOWLY, 0, 20_000, number))
            for number in range(20)
        ]
        await asyncio.sleep(0.005)
        for task in tasks[::2]:
            task.cancel()
        kept = await asyncio.gather(*tasks[1::2])
        assert kept == [str(number).encode() for number in range(1, 20, 2)]
        assert all(task.cancelled() for task in tasks[::2])
        await client.aclose()

    run(main())


def test_a_connection_that_breaks_fails_all_that_wait_and_is_made_again(
    run: Any, own_redis: RedisServer
) -> None:
    async def main() -> None:
        client = client_of(own_redis)
        await client.execute_command("PING")
        own_redis.signal(signal.SIGSTOP)
        calls = [asyncio.create_task(client.execute_command("PING")) for _ in range(50)]
        await asyncio.sleep(0.05)
        own_redis.kill()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, Broken) for answer in answers), answers
        with pytest.raises((Broken, OSError)):
            await client.execute_command("PING")
        own_redis.start()
        assert await client.execute_command("PING") == b"PONG"
        # And while it is idle: nobody is to hear of that.
        own_redis.kill()
        own_redis.start()
        await asyncio.sleep(0.05)
        assert await client.execute_command("PING") == b"PONG"
        await client.aclose()

    run(main())


def test_a_server_that_is_silent_is_given_up_in_time(run: Any, own_redis: RedisServer) -> None:
    async def main() -> None:
        client = client_of(own_redis, 0.4)
        loop = asyncio.get_running_loop()
        await client.execute_command("PING")
        await asyncio.sleep(0.3)  # the watch of the first command ends in the next one's time
        own_redis.signal(signal.SIGSTOP)
        began = loop.time()
        calls = [asyncio.create_task(client.execute_command("PING")) for _ in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, Late) for answer in answers), answers
        assert 0.35 < loop.time() - began < 2
        # Connecting is bounded too: the kernel accepts, the server says nothing.
        with pytest.raises((RedisError, OSError)):
            await client.execute_command("PING")
        assert loop.time() - began < 4
        own_redis.signal(signal.SIGCONT)
        assert await client.execute_command("PING") == b"PONG"
        await client.aclose()

    run(main())


def test_nobody_there(run: Any) -> None:
    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
            client = PipelinedRedis(url, timedelta(seconds=1))
            calls = [client.execute_command("PING") for _ in range(3)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(answer, Broken | OSError) for answer in answers), answers
            await client.aclose()

    run(main())


def test_a_password_is_used_and_a_wrong_one_is_refused(run: Any, own_redis: RedisServer) -> None:
    async def main() -> None:
        plain = client_of(own_redis)
        await plain.execute_command("CONFIG", "SET", "requirepass", "secret")
        await plain.aclose()
        right = PipelinedRedis(own_redis.url.replace("//", "//:secret@"), timedelta(seconds=2))
        assert await right.execute_command("PING") == b"PONG"
        await right.aclose()
        wrong = PipelinedRedis(own_redis.url.replace("//", "//:guess@"), timedelta(seconds=2))
        for _ in range(2):
            with pytest.raises(RedisError) as caught:
                await wrong.execute_command("PING")
            assert "guess" not in str(caught.value)
        await wrong.aclose()

    run(main())


def test_closing_fails_who_waits_and_refuses_who_comes(run: Any, own_redis: RedisServer) -> None:
    async def main() -> None:
        client = client_of(own_redis)
        await client.execute_command("PING")
        own_redis.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(client.execute_command("PING"))
        await asyncio.sleep(0.05)
        await client.aclose()
        await client.aclose()
        with pytest.raises(Broken):
            await waiting
        with pytest.raises(Broken, match="closed"):
            await client.execute_command("PING")
        never = client_of(own_redis)
        await never.aclose()

    run(main())


def _in_front_of(server: RedisServer, piece: int, tls: ssl.SSLContext | None = None) -> Server:
    """A server that hands everything on, answers in pieces of so many bytes."""

    async def serve(reader: Reader, writer: Writer) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", server.port)

        async def ask() -> None:
            while data := await reader.read(65536):
                ours.write(data)

        asking = asyncio.create_task(ask())
        try:
            while data := await theirs.read(65536):
                for start in range(0, len(data), piece):
                    writer.write(data[start : start + piece])
                    await writer.drain()
                    await asyncio.sleep(0)
        finally:
            asking.cancel()
            ours.close()

    return Server(serve, tls)


def test_answers_come_through_tls_and_in_pieces(
    run: Any, shared_redis: RedisServer, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)

    async def main() -> None:
        for tls, piece in ((certificates.server, 7), (None, 1)):
            async with _in_front_of(shared_redis, piece, tls) as front:
                scheme = "redis" if tls is None else "rediss"
                url = f"{scheme}://127.0.0.1:{front.port}/0"
                if tls is not None:
                    url += f"?ssl_ca_certs={tmp_path / 'server.pem'}"
                client = PipelinedRedis(url, timedelta(seconds=5))
                words = [bytes([number]) * (number * 37) for number in range(64)]
                calls = [client.execute_command("ECHO", w) for w in words]
                calls.insert(10, client.execute_command("NO-SUCH-COMMAND"))
                answers = await asyncio.gather(*calls, return_exceptions=True)
                assert isinstance(answers.pop(10), ResponseError)
                assert answers == words
                assert front.connections == 1
                await client.aclose()
        async with _in_front_of(shared_redis, 100, certificates.server) as front:
            stranger = PipelinedRedis(f"rediss://127.0.0.1:{front.port}/0", timedelta(seconds=5))
            with pytest.raises(Broken):
                await stranger.execute_command("PING")
            await stranger.aclose()

    run(main())


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (b"+PONG\r\n+PONG\r\n+PONG\r\n", Broken, "nobody had asked"),
        (b"+PONG\r\n!!!\r\n", Broken, "can't be read"),
        (b"+PONG\r\n-LOADING Redis is loading the dataset in memory\r\n", BusyLoadingError, ""),
        (b"+PONG\r\n-READONLY You can't write against a read only replica.\r\n", ReadOnlyError, ""),
    ],
)
def test_what_can_t_be_an_answer_ends_the_connection(
    run: Any, said: bytes, error: type[Exception], words: str
) -> None:
    """Commands before it are answered, who it concerns is told, and the next one works."""

    async def main() -> None:
        async def serve(reader: Reader, writer: Writer) -> None:
            first = server.connections == 1
            while data := await reader.read(65536):
                setting_up = data.count(b"SETINFO")
                writer.write(b"+OK\r\n" * setting_up)
                pings = data.count(b"PING")
                if pings:
                    writer.write(said if first else b"+PONG\r\n" * pings)

        server = Server(serve)
        async with server:
            client = PipelinedRedis(f"redis://127.0.0.1:{server.port}/0", timedelta(seconds=5))
            pings = [client.execute_command("PING") for _ in range(2)]
            answers = await asyncio.gather(*pings, return_exceptions=True)
            assert answers[0] == b"PONG"
            if words == "nobody had asked":
                assert answers[1] == b"PONG"
            else:
                assert isinstance(answers[1], error) and words in str(answers[1]), answers
            again = 1 if error is ReadOnlyError else 2
            if again == 2:
                assert await client.execute_command("PING") == b"PONG"
            assert server.connections == again
            await client.aclose()

    run(main())


class _Greeter:
    """A server that answers whatever sets a connection up, and counts who is connected."""

    def __init__(self) -> None:
        self.connected = 0

    async def serve(self, reader: Reader, writer: Writer) -> None:
        self.connected += 1
        try:
            while data := await reader.read(65536):
                writer.write(b"+OK\r\n" * data.count(b"SETINFO"))
                writer.write(b"+PONG\r\n" * data.count(b"PING"))
        finally:
            self.connected -= 1


def test_who_is_closed_while_connecting_leaves_no_connection(run: Any) -> None:
    async def main() -> None:
        greeter = _Greeter()
        async with Server(greeter.serve) as server:
            for steps in range(40):
                client = PipelinedRedis(f"redis://127.0.0.1:{server.port}/0", timedelta(seconds=5))
                call = asyncio.create_task(client.execute_command("PING"))
                for _ in range(steps):
                    await asyncio.sleep(0)
                await client.aclose()
                answer = (await asyncio.gather(call, return_exceptions=True))[0]
                assert answer == b"PONG" or isinstance(answer, Broken), (steps, answer)
                late = asyncio.get_running_loop().time() + 5
                while greeter.connected:
                    assert asyncio.get_running_loop().time() < late, f"open after {steps} steps"
                    await asyncio.sleep(0.005)

    run(main())


def _welcomes_and_leaves(listener: socket.socket) -> None:
    """Answers what sets a connection up, and closes in the same breath."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                answered = 0
                while answered < 2 and (data := connection.recv(65536)):
                    asked = data.count(b"SETINFO")
                    connection.sendall(b"+OK\r\n" * asked)
                    answered += asked


def test_a_server_that_leaves_after_the_login_is_noticed_at_once(run: Any) -> None:
    async def main(port: int) -> None:
        for _ in range(400):
            client = PipelinedRedis(f"redis://127.0.0.1:{port}/0", timedelta(seconds=5))
            with pytest.raises(Broken):
                await client.execute_command("PING")
            await client.aclose()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=_welcomes_and_leaves, args=(listener,), daemon=True)
        server.start()
        run(main(listener.getsockname()[1]))
        listener.shutdown(socket.SHUT_RDWR)
    server.join(5)
    assert not server.is_alive()


def test_closing_can_be_cancelled(run: Any, own_redis: RedisServer) -> None:
    async def main() -> None:
        client = client_of(own_redis)
        await client.execute_command("PING")
        closing = asyncio.create_task(client.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    run(main())
