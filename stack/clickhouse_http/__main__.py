"""The process: ``python -m stack.clickhouse_http --host H --port P --path DIR``.

Prints one line with its address when it is ready. On SIGTERM and SIGINT it stops accepting,
finishes what runs (up to 3.5 s), closes the engine and exits with 0 within 5 s. Exits with 1 and
one line on standard error if the port or the folder is taken.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import uvicorn

from schemas.errors import InvalidInput, StackFailed
from stack.clickhouse_http.endpoint import Endpoint, Login
from stack.clickhouse_http.engine import Engine, Limits

_FINISH_SECONDS: Final = 3
_CLOSE_SECONDS: Final = 1.0
_KEEP_ALIVE_SECONDS: Final = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    try:
        login = _login(options.user, options.password_file)
        listener = _listen(options.host, options.port)
        limits = Limits(memory=options.memory_mb * 1024**2)
        engine = Engine(options.path, fsync=options.fsync, limits=limits)
    except (StackFailed, InvalidInput) as error:
        print(f"clickhouse_http: {error}", file=sys.stderr)
        return 1
    endpoint = Endpoint(engine, login, threads=options.threads)
    server = uvicorn.Server(
        uvicorn.Config(
            endpoint,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_FINISH_SECONDS,
        )
    )
    # uvicorn raises the signal again when it has shut down: without this it would kill us there.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    print(f"ready: http://{host}:{port} serves {engine.path} (ClickHouse {engine.version})")
    sys.stdout.flush()
    server.run(sockets=[listener])
    return _stop(endpoint, engine)


def _stop(endpoint: Endpoint, engine: Engine) -> int:
    def close() -> None:
        endpoint.close()
        engine.close()

    # A query that outlived the grace period can't be interrupted, and closing would wait for it.
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(_CLOSE_SECONDS)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop uvicorn's complaint about bodies that are broken off on purpose (see _Reply.fail)."""
    return "without completing response" not in record.getMessage()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("stack.clickhouse_http", description="chDB over HTTP")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8123, help="0 takes a free one")
    parser.add_argument("--path", type=Path, required=True, help="data folder")
    parser.add_argument("--user", default="default", help="the one user name")
    parser.add_argument("--password-file", type=Path, help="first line is the user's password")
    parser.add_argument("--threads", type=int, default=8, help="queries that run at once")
    parser.add_argument("--memory-mb", type=int, default=2048, help="the engine's memory limit")
    parser.add_argument(
        "--fsync",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sync each insert to disk before it is acknowledged",
    )
    return parser


def _login(user: str, password_file: Path | None) -> Login:
    if password_file is None:
        return Login(user)
    try:
        password = password_file.read_text().split("\n", 1)[0].rstrip("\r")
    except OSError as error:
        raise InvalidInput(f"can't read the password file: {error}") from error
    if not password:
        raise InvalidInput(f"the first line of {password_file} is empty: write a password there")
    return Login(user, password)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise StackFailed(
            f"can't listen on {host}:{port}: {error.strerror}. Choose another --port, or 0 for a "
            "free one"
        ) from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
