"""The control server, the record on disk, and the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from pathlib import Path

import pytest

from stack.simulator.record import Record
from tests.simulator.conftest import Provider, mail, running


def test_messages_come_in_pages_as_ndjson(provider: Provider) -> None:
    for n in range(25):
        provider.send(mail(f"s-{n}", run="even" if n % 2 == 0 else "odd"))
    seen: list[str] = []
    cursor = "0"
    for _ in range(3):
        text, headers = provider.get(f"/messages?since={cursor}&limit=10")
        rows = [json.loads(line) for line in text.splitlines()]
        assert headers["X-Count"] == str(len(rows))
        seen += [row["send_id"] for row in rows]
        cursor = headers["X-Next-Since"]
    assert seen == [f"s-{n}" for n in range(25)]
    assert set(rows[0]) == {
        "send_id",
        "run",
        "address",
        "accepted_at_ms",
        "provider",
        "provider_message_id",
    }
    assert provider.get(f"/messages?since={cursor}")[0] == ""
    provider.send(mail("later"))
    assert json.loads(provider.get(f"/messages?since={cursor}")[0])["send_id"] == "later"
    assert len(provider.get("/messages?run=odd")[0].splitlines()) == 12


@pytest.mark.parametrize(
    "path",
    [
        "/messages?since=1",
        "/messages?since=x",
        "/messages?since=999999999",
        "/messages?limit=0",
        "/starts?after_ms=soon",
    ],
)
def test_a_bad_query_is_400(provider: Provider, path: str) -> None:
    provider.send(mail("s"))
    status, answer = provider.control("GET", path)
    assert status == 400
    assert path.split("?")[1].split("=")[0] in answer["error"]


def test_unknown_paths_and_messages_are_404(provider: Provider) -> None:
    assert provider.control("GET", "/nothing")[0] == 404
    assert provider.control("DELETE", "/config")[0] == 404
    assert provider.control("GET", "/message/never")[0] == 404


def test_settings_are_shown_changed_and_refused_by_name(provider: Provider) -> None:
    before = provider.get("/config")
    answer = provider.configure(keep_bodies=3, sendgrid={"latency": {"kind": "fixed", "ms": 5}})
    assert answer["keep_bodies"] == 3
    assert answer["sendgrid"]["latency"]["ms"] == 5
    assert answer["smtp"] == before["smtp"]
    for body, field in (
        ({"sendgrid": {"fault": {}}}, "sendgrid.fault"),
        ({"keep_bodies": "3"}, "keep_bodies"),
        ({"webhooks": {"batch_events": 0}}, "webhooks.batch_events"),
    ):
        status, problem = provider.control("PUT", "/config", body)
        assert status == 400
        assert [error["field"] for error in problem["errors"]] == [field]
    assert provider.get("/config") == answer


def test_starts_after_a_time_by_run(provider: Provider) -> None:
    for n in range(3):
        provider.send(mail(f"a-{n}", run="a"))
    middle = provider.get("/starts")["last_start_ms"]
    time.sleep(0.01)
    provider.configure(sendgrid={"latency": {"kind": "fixed", "ms": 300}})
    provider.send(mail("b-0", run="b"))
    answer = provider.get(f"/starts?after_ms={middle}")
    assert (answer["count"], answer["complete"]) == (1, True)
    # The request was answered 300 ms later: what counts is when it began.
    assert provider.get("/message/b-0")["acceptances"][0]["accepted_at_ms"] - middle < 250
    assert provider.get(f"/starts?run=a&after_ms={middle}")["count"] == 0
    assert provider.get(f"/starts?run=b&after_ms={middle}")["count"] == 1
    assert provider.get("/starts?run=a")["count"] == 3
    assert provider.get("/starts?run=none")["count"] == 0
    by_run = provider.get("/starts")["last_start_ms_by_run"]
    assert by_run["a"] == middle < by_run["b"]
    assert sum(provider.get("/starts")["per_second"].values()) == 4


def test_requests_in_latency_are_open(provider: Provider) -> None:
    provider.configure(sendgrid={"latency": {"kind": "fixed", "ms": 400}})
    thread = threading.Thread(target=provider.send, args=(mail("waiting"),))
    thread.start()
    opened = provider.wait_for("/open", lambda answer: answer["count"] == 1)
    assert opened["send_ids"] == ["waiting"]
    assert opened["requests"][0]["state"] == "answering"
    thread.join()
    assert provider.get("/open")["count"] == 0


def test_stats_by_run_and_metrics(provider: Provider) -> None:
    provider.send(mail("a", run="one"))
    provider.send(mail("a", run="one"))
    provider.send(mail("b", run="two"))
    provider.send(mail("c", run="two", subject=""))
    one, two = provider.get("/stats?run=one"), provider.get("/stats?run=two")
    assert (one["accepted"], one["unique"], one["duplicates"], one["requests"]) == (2, 1, 1, 2)
    assert (two["accepted"], two["refused"], two["requests"]) == (1, {"invalid": 1}, 2)
    everything = provider.get("/stats")
    assert set(everything["runs"]) == {"one", "two"}
    assert everything["requests_max_second"] >= 2
    assert 0 < everything["first_accepted_at_ms"] <= everything["last_accepted_at_ms"]
    text = provider.get("/metrics")[0]
    assert "fanfare_simulator_accepted_total 3\n" in text
    assert 'fanfare_simulator_refused_total{reason="invalid"} 1\n' in text


def test_reset_forgets_messages_and_keeps_settings(provider: Provider) -> None:
    provider.configure(keep_bodies=1)
    provider.send(mail("s"))
    assert provider.control("POST", "/reset")[0] == 200
    stats = provider.get("/stats")
    assert (stats["accepted"], stats["requests"], stats["runs"]) == (0, 0, {})
    assert provider.control("GET", "/message/s")[0] == 404
    assert (provider.record_dir / "accepted.jsonl").stat().st_size == 0
    assert provider.get("/config")["keep_bodies"] == 1


def _send_in_vain(provider: Provider) -> None:
    with pytest.raises(ConnectionError):
        provider.send(mail("cut"), timeout=20)


def test_a_restarted_simulator_remembers(tmp_path: Path) -> None:
    send_id = str(uuid.uuid4())
    with running(tmp_path) as provider:
        provider.send(mail(send_id))
        provider.send(mail("twice"))
        provider.configure(sendgrid={"faults": {"ambiguous_rate": 1.0}})
        provider.send(mail("twice"))
        provider.configure(
            sendgrid={
                "faults": {"ambiguous_rate": 0.0},
                "latency": {"kind": "fixed", "ms": 60_000},
            }
        )
        thread = threading.Thread(target=_send_in_vain, args=(provider,))
        thread.start()
        provider.wait_for("/open", lambda answer: answer["count"] == 1)
        before = provider.get("/stats")
        page = provider.get("/messages")[0]
        assert provider.stop() == 0
        thread.join()
    with running(tmp_path) as provider:
        after = provider.get("/stats")
        for name in ("accepted", "unique", "duplicates", "first_accepted_at_ms", "runs"):
            assert after[name] == before[name]
        assert provider.get("/messages")[0] == page
        assert provider.get("/duplicates")["messages"] == [{"send_id": "twice", "accepted": 2}]
        unanswered = provider.get("/faults")["unanswered"]
        assert unanswered == {"ambiguous": ["twice"], "client_left": ["cut"]}
        provider.send(mail(send_id))
        assert provider.get("/stats")["duplicates"] == 2


def test_a_killed_simulator_loses_at_most_what_was_not_flushed(tmp_path: Path) -> None:
    with running(tmp_path) as provider:
        provider.send(mail("s"))
        size = 0
        deadline = time.monotonic() + 5
        while not size and time.monotonic() < deadline:
            size = (tmp_path / "accepted.jsonl").stat().st_size
            time.sleep(0.02)
        os.kill(provider.process.pid, signal.SIGKILL)
        provider.process.wait()
    with (tmp_path / "accepted.jsonl").open("ab") as file:
        file.write(b'{"id":"torn","run":"r"')
    with running(tmp_path) as provider:
        stats = provider.get("/stats")
        assert (stats["unique"], stats["torn_bytes"]) == (1, 22)
        provider.send(mail("t"))
        assert len(provider.get("/messages")[0].splitlines()) == 2


def test_a_corrupt_record_is_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "accepted.jsonl").write_bytes(b"nonsense\n")
    with pytest.raises(RuntimeError, match=r"accepted\.jsonl: no message at byte 0"):
        Provider(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "sendgrid.latencies=1"), "sendgrid.latencies"),
        (("--set", "seed"), "NAME=VALUE"),
        (("--https",), "--tls-cert"),
        (("--sendgrid-key-file", "/nowhere/key"), "/nowhere/key"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        Provider(tmp_path, *arguments)


def test_settings_from_a_file_and_from_arguments(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"seed": 4, "sendgrid": {"latency": {"kind": "fixed", "ms": 3}}}')
    with running(
        tmp_path / "record",
        *("--config", str(file), "--seed", "9"),
        *("--set", "sendgrid.latency.ms=4", "--set", "smtp.latency.kind=fixed"),
    ) as provider:
        config = provider.get("/config")
    assert config["seed"] == 9
    assert config["sendgrid"]["latency"]["ms"] == 4
    assert config["smtp"]["latency"]["kind"] == "fixed"


def test_help_names_every_control_path() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "stack.simulator", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for path in ("/stats", "/starts", "/messages", "/faults", "/webhooks/drain", "--allow-remote"):
        assert path in text


def test_an_idle_simulator_is_idle(provider: Provider) -> None:
    provider.send(mail("s"))
    time.sleep(0.2)
    before = provider.cpu_seconds()
    time.sleep(1.5)
    assert provider.cpu_seconds() - before <= 0.02


def test_memory_of_a_message_is_small(tmp_path: Path) -> None:
    record = Record(tmp_path)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    count = 20_000
    for n in range(count):
        record.accept(
            send_id=str(uuid.UUID(int=n * 7919 + 2**100)),
            run="run-1",
            address=f"{n}@example.com",
            at_ms=1_795_000_000_000 + n,
            provider="sendgrid",
            provider_message_id=f"m{n}",
            arguments={},
            fault=None,
            anonymous=False,
            body=b"x",
            keep_bodies=0,
        )
        if n % 1000 == 0:
            record.flush()
    record.flush()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert record.unique == count
    assert used / count < 200
    record.close()
