"""Is a server really ready? Each probe asks the server itself, as a client would.

A probe returns None when the server is ready and raises when it is not; the message of the
error is shown when the service does not get ready in time. All block for seconds at most.
"""

from __future__ import annotations

import json
import socket
import urllib.request
from typing import Any

from schemas.errors import Unavailable
from stack.layout import HOST

ANSWER_TIMEOUT_S = 5.0


def get(url: str, timeout_s: float = ANSWER_TIMEOUT_S) -> bytes:
    """GET over HTTP; raises OSError (HTTPError, URLError, timeouts) unless 2xx."""
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310 (our own server)
        content: bytes = answer.read()
        return content


def get_json(url: str) -> Any:
    """GET and decode JSON."""
    return json.loads(get(url))


def kafka(port: int) -> None:
    """Metadata of the broker, then the list of topics."""
    from kafka import KafkaAdminClient

    # The client logs and retries a refused connection on and on; look first.
    with socket.create_connection((HOST, port), timeout=1):
        pass
    client = KafkaAdminClient(
        bootstrap_servers=f"{HOST}:{port}", request_timeout_ms=5000, bootstrap_timeout_ms=3000
    )
    try:
        if not client.describe_cluster()["brokers"]:
            raise Unavailable("the broker is not in its own metadata yet")
        client.list_topics()
    finally:
        client.close()


def redis(port: int, password: str) -> None:
    """PING, and that every write is on disk before it is answered."""
    import redis as client_library

    client = client_library.Redis(
        host=HOST, port=port, password=password, socket_timeout=ANSWER_TIMEOUT_S
    )
    try:
        client.ping()
        settings: Any = client.config_get("appendfsync")
        found = settings.get("appendfsync")
        if found != "always":
            raise Unavailable(f"appendfsync is {found}, not always: claims could be lost")
    finally:
        client.close()


def zookeeper(port: int) -> None:
    """The four-letter word srvr, which only a serving server answers with its mode."""
    with socket.create_connection((HOST, port), timeout=ANSWER_TIMEOUT_S) as connection:
        connection.sendall(b"srvr")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    if b"Mode: standalone" not in answer:
        raise Unavailable(f"srvr was answered by {answer[:100]!r}")


def flink_jobmanager(rest_port: int) -> None:
    """The overview, which only an elected leader gives."""
    get_json(f"http://{HOST}:{rest_port}/overview")


def flink_taskmanager(rest_port: int, resource_id: str) -> None:
    """Whether this very TaskManager has registered with the leader."""
    found = get_json(f"http://{HOST}:{rest_port}/taskmanagers")["taskmanagers"]
    if not any(taskmanager["id"] == resource_id for taskmanager in found):
        raise Unavailable(f"{resource_id} is not among the {len(found)} registered TaskManagers")


def clickhouse(port: int, user: str, password: str) -> None:
    """SELECT 1 over HTTP."""
    request = urllib.request.Request(
        f"http://{HOST}:{port}/",
        data=b"SELECT 1",
        headers={"X-ClickHouse-User": user, "X-ClickHouse-Key": password},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:  # noqa: S310
        content = answer.read()
    if content.strip() != b"1":
        raise Unavailable(f"SELECT 1 was answered by {content[:100]!r}")


def health(port: int) -> None:
    """GET /healthz."""
    get(f"http://{HOST}:{port}/healthz")
