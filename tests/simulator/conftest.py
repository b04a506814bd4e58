"""A provider simulator of one's own, over real sockets."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Provider:
    """A running simulator and questions to its control server."""

    def __init__(self, record_dir: Path, *arguments: str) -> None:
        self.record_dir = record_dir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stack.simulator", "--record-dir", str(record_dir), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.stderr.read())
        ready = json.loads(line)
        self.http_port: int = ready["http_port"]
        self.smtp_port: int = ready["smtp_port"]
        self.control_port: int = ready["control_port"]

    def control(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.control_port, timeout=20)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            raw = response.read()
            if response.getheader("Content-Type") == "application/json":
                return response.status, json.loads(raw)
            return response.status, (raw.decode(), dict(response.getheaders()))
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, answer = self.control("GET", path)
        assert status == 200, answer
        return answer

    def configure(self, **changes: Any) -> Any:
        status, answer = self.control("PUT", "/config", changes)
        assert status == 200, answer
        return answer

    def send(
        self, mail: object, key: str = "SG.key", timeout: float = 5.0
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout)
        try:
            body = mail if isinstance(mail, bytes) else json.dumps(mail).encode()
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            connection.request("POST", "/v3/mail/send", body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def wait_for(self, path: str, condition: Callable[[Any], bool], seconds: float = 8.0) -> Any:
        deadline = time.monotonic() + seconds
        while not condition(answer := self.get(path)):
            assert time.monotonic() < deadline, f"{path} still answers {answer}"
            time.sleep(0.02)
        return answer

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(10)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mail(send_id: str, address: str = "", run: str = "run-1", **changes: Any) -> dict[str, Any]:
    """A mail that SendGrid accepts."""
    return {
        "personalizations": [
            {
                "to": [{"email": address or f"{send_id}@example.com"}],
                "custom_args": {"ff_send_id": send_id, "ff_run": run, "ff_leg": "email"},
            }
        ],
        "from": {"email": "news@example.com", "name": "News"},
        "subject": "Grüße",
        "content": [{"type": "text/plain", "value": "Hello"}],
        **changes,
    }


@contextmanager
def running(record_dir: Path, *arguments: str) -> Iterator[Provider]:
    provider = Provider(record_dir, *arguments)
    try:
        yield provider
    finally:
        provider.stop()


@pytest.fixture(scope="session")
def shared_provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    with running(tmp_path_factory.mktemp("record")) as provider:
        yield provider


@pytest.fixture
def provider(shared_provider: Provider) -> Iterator[Provider]:
    """An empty simulator with default settings."""
    before = shared_provider.get("/config")
    status, _ = shared_provider.control("POST", "/reset")
    assert status == 200
    yield shared_provider
    shared_provider.configure(**before)


class Receiver:
    """A webhook endpoint that keeps every post and answers what it is told to."""

    def __init__(self) -> None:
        self.posts: list[tuple[dict[str, str], bytes, float]] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.statuses.pop(0) if receiver.statuses else 204
                receiver.posts.append(
                    ({k.lower(): v for k, v in self.headers.items()}, body, time.monotonic())
                )
                self.send_response(status)
                self.send_header("Content-Length", "0")
                if status in (301, 302):
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/webhooks/sendgrid"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def events(self) -> list[dict[str, Any]]:
        return [event for _, body, _ in self.posts for event in json.loads(body)]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()
