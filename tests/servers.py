"""Real servers for tests that need one or two of them and not the whole stack."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def clickhouse_server(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """ClickHouse's HTTP endpoint in a process of its own, and its URL; ended on the way out."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "stack.clickhouse_http"),
            *("--port", str(port), "--path", str(folder), "--no-fsync"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://(\S+?):(\d+)", line)
        assert found, f"the endpoint said {line!r}"
        yield process, f"http://default@{found[1]}:{found[2]}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
