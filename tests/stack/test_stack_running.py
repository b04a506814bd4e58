"""What a user of the embedded stack relies on, on the real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic

from schemas.errors import StackFailed
from stack import flink_jobs, lifecycle
from stack.layout import (
    PROJECT_ROOT,
    Home,
    State,
    endpoints,
    environment,
    processes,
    read_state,
    secret,
)
from stack.process import identify, wait_gone
from stack.supervisor import leftovers, take_lock
from tests.stack_fixture import eventually, running_stack, wait_restarted

pytestmark = pytest.mark.engine

ONLY = ("kafka", "redis", "flink")
SERVICES = (
    "redis",
    "zookeeper",
    "kafka",
    "flink-jobmanager",
    "flink-taskmanager-1",
    "flink-taskmanager-2",
)
JOB = Path(__file__).with_name("counting_job.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with running_stack(tmp_path_factory.mktemp("home"), ONLY, taskmanagers=2) as where:
        yield where


def fanfare(*arguments: str, home: Home) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stack.cli", *arguments, "--home", str(home.root)],
        capture_output=True,
        text=True,
        cwd=PROJECT_ROOT,
        timeout=120,
        check=False,
    )


def pids(home: Home) -> dict[str, int | None]:
    return {name: info.pid for name, info in processes(home).items()}


def test_up_twice_attaches(home: Home) -> None:
    before = pids(home)
    again = fanfare("up", "--json", "--only", ",".join(ONLY), home=home)
    assert again.returncode == 0, again.stderr
    assert {s["name"] for s in json.loads(again.stdout)["services"]} == set(SERVICES)
    assert pids(home) == before
    assert set(before) == set(SERVICES)


def test_another_choice_is_refused_while_it_runs(home: Home) -> None:
    whole = fanfare("up", home=home)
    assert whole.returncode == 1
    assert "runs without clickhouse" in whole.stderr
    assert "fanfare down" in whole.stderr
    more = fanfare("up", "--only", "flink", "--taskmanagers", "3", home=home)
    assert more.returncode == 1
    assert "2 TaskManagers, not 3" in more.stderr


def test_status_tells_every_service(home: Home) -> None:
    done = fanfare("status", "--json", home=home)
    assert done.returncode == 0, done.stderr
    found = {service["name"]: service for service in json.loads(done.stdout)}
    assert set(found) == set(SERVICES)
    for service in found.values():
        assert service["state"] == "ready"
        assert identify(service["pid"]) is not None
        assert service["rss_mb"] > 1
        assert service["uptime_s"] > 0
        assert Path(service["log"]).is_file()
    assert set(found["kafka"]["ports"]) == {"broker", "controller"}


def test_secrets_are_shown_by_env_alone(home: Home) -> None:
    secrets = [secret(home, name) for name in ("redis-password", "sendgrid-key")]
    shown = fanfare("env", home=home).stdout
    assert f"export FANFARE_KAFKA={endpoints(home).kafka}" in shown
    assert all(hidden in shown for hidden in secrets)
    elsewhere = [
        fanfare("status", home=home).stdout,
        fanfare("up", "--only=redis", home=home).stdout,
    ]
    elsewhere += [log.read_text(errors="replace") for log in home.logs.iterdir()]
    assert not any(hidden in text for hidden in secrets for text in elsewhere)
    assert home.secrets.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in home.secrets.iterdir())


def test_a_stopped_process_is_told(home: Home) -> None:
    pid = processes(home)["redis"].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        found = {s.name: s for s in lifecycle.status(home)}
        assert found["redis"].state == "suspended"
    finally:
        os.kill(pid, signal.SIGCONT)


def test_thread_mode_job_keeps_its_state(home: Home) -> None:
    """Kafka → keyed MapState → Kafka through `submit`, twice in the same JVMs, across a
    savepoint."""
    brokers = endpoints(home).kafka
    admin = KafkaAdminClient(bootstrap_servers=brokers)
    admin.create_topics([NewTopic("values", 2, 1), NewTopic("counts", 2, 1)])
    admin.close()
    producer = KafkaProducer(bootstrap_servers=brokers)
    consumer = KafkaConsumer(
        "counts",
        bootstrap_servers=brokers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    counted: list[tuple[str, int, int]] = []

    def counts_after(total: int) -> None:
        def enough() -> bool:
            for records in consumer.poll(timeout_ms=200).values():
                for record in records:
                    value, count, pid = record.value.decode().split(":")
                    counted.append((value, int(count), int(pid)))
            return len(counted) >= total

        eventually(enough, what=f"{total} counts arrive")

    job = flink_jobs.submit(home, JOB, parallelism=2, args=["values", "counts"])
    flink_jobs.wait_running(home, job)
    for number in range(40):
        producer.send("values", b"v%d" % (number % 8))
    producer.flush()
    counts_after(40)
    jvms = {processes(home)[name].pid for name in flink_jobs.taskmanagers_of(home, job)}
    assert {pid for _, _, pid in counted} <= jvms, "the operator does not run inside the JVM"

    savepoint = flink_jobs.stop_with_savepoint(home, job)
    assert flink_jobs.running_jobs(home) == []
    resumed = flink_jobs.submit(
        home, JOB, parallelism=2, args=["values", "counts"], savepoint=savepoint
    )
    flink_jobs.wait_running(home, resumed)
    producer.send("values", b"v3")
    producer.flush()
    counts_after(41)
    assert counted[-1][:2] == ("v3", 6)
    expected = [(f"v{v}", n) for v in range(8) for n in range(1, 6)] + [("v3", 6)]
    assert sorted((value, count) for value, count, _ in counted) == sorted(expected)
    flink_jobs.cancel(home, resumed)
    producer.close()
    consumer.close()


def test_a_job_that_does_not_start_says_why(home: Home, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('topic name is missing')\n")
    with pytest.raises(StackFailed, match="topic name is missing"):
        flink_jobs.submit(home, broken, parallelism=1)


def test_redis_keeps_what_it_answered_through_a_kill(home: Home) -> None:
    info = processes(home)["redis"]
    client = redis.Redis.from_url(environment(home)["FANFARE_REDIS"])
    client.set("claim", "held")
    assert info.pid is not None
    os.kill(info.pid, signal.SIGKILL)
    wait_restarted(home, "redis", info.pid)
    assert client.get("claim") == b"held"
    client.close()


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_child_is_started_again_on_its_ports(home: Home, service: str) -> None:
    before = processes(home)[service]
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    wait_restarted(home, service, before.pid)
    after = processes(home)[service]
    assert after.ports == before.ports
    assert after.restarts == before.restarts + 1


def test_a_killed_supervisor_leaves_nothing_and_the_next_up_goes_on(home: Home) -> None:
    state = read_state(home)
    assert state is not None
    assert state.supervisor is not None
    children = [i.identity for i in state.services.values() if i.identity is not None]
    assert len(children) == len(SERVICES)
    state.supervisor.send(signal.SIGKILL)
    assert wait_gone([state.supervisor, *children], timedelta(seconds=10)) == []
    assert {s.state for s in lifecycle.status(home)} == {"stopped"}
    # The last threads of a killed process may hold its lock for a moment after it is a zombie.
    lock = take_lock(home, timedelta(seconds=5))
    assert lock is not None
    threading.Timer(0.7, lock.close).start()
    again = lifecycle.up(home, ONLY, taskmanagers=2)
    assert {info.state for info in again.services.values()} == {State.READY}
    assert again.ports == state.ports


def test_down_leaves_no_process(home: Home) -> None:
    """Last in this file: it ends the stack that the others use."""
    children = [i.identity for i in processes(home).values() if i.identity is not None]
    began = time.monotonic()
    done = fanfare("down", home=home)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert not any(child.alive() for child in children)
    assert leftovers(home) == []
    assert "Nothing was running" in fanfare("down", home=home).stdout
    assert fanfare("status", home=home).returncode == 1
