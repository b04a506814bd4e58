"""How many request slots are in use, as others see it, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from pipelines.audience import BuiltAudience
from schemas.errors import Unavailable
from schemas.pages import PAGE_SIZE
from sinks.permits import Permits
from sinks.providers.fake import FakeProvider
from sinks.slots import SlotBoard, in_use
from sinks.store import FileStore
from tests.delivery.test_engine_trouble import Running
from tests.delivery.world import BIG, MAIN, MemoryServer, Operator, Shop, accepted


def test_all_accounts_and_engines_of_a_process_count(tmp_path: Path) -> None:
    first, second = SlotBoard(tmp_path), SlotBoard(tmp_path)
    permits = [Permits(10, watch=board.cell()) for board in (first, first, second)]
    for count, each in enumerate(permits, 2):
        each.free -= count
        each.give(0)
    assert in_use(tmp_path, os.getpid()) == 2 + 3 + 4
    assert in_use(tmp_path, 1) == 0
    permits[2].give(4)
    second.close()
    first.close()
    assert in_use(tmp_path, os.getpid()) == 5, "what is in use stays to be counted"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_process_leaves_its_count_until_the_next_one(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from sinks.slots import SlotBoard\n"
        "SlotBoard(pathlib.Path(sys.argv[1])).cell()(7); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert in_use(tmp_path, child.pid) == 7
    SlotBoard(tmp_path).close()
    assert in_use(tmp_path, child.pid) == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="FANFARE_SLOTS"):
        SlotBoard(tmp_path / "file" / "slots")


def test_a_slot_is_in_use_until_the_ledger_has_the_answer(
    people: tuple[FileStore, BuiltAudience], operator: Operator, running: Running, tmp_path: Path
) -> None:
    server = MemoryServer()
    one = Shop(*people, server, "slots")
    provider = FakeProvider(latency=timedelta(milliseconds=50))
    running(one.engine((MAIN, provider, 16), slots=tmp_path))
    operator.submit(one.send(BIG, range(PAGE_SIZE)))
    operator.until(lambda: len(provider.attempts) > 16)
    server.memory.down = True
    calls = server.memory.calls
    # Longer than the provider takes: all that left is answered, and the ledger has not heard of it.
    operator.until(lambda: server.memory.calls > calls + 5)
    assert 0 < len(one.matters(BIG)) <= in_use(tmp_path, os.getpid()) <= 16
    server.memory.down = False
    operator.finish()
    assert operator.tally() == accepted(PAGE_SIZE)
    operator.until(lambda: in_use(tmp_path, os.getpid()) == 0)
    # A lost ledger must not keep others from being sent to.
    server.drop(one.run)
    other = Shop(*people, server, "slots-other")
    operator.submit(other.send(BIG, range(40)))
    operator.until(lambda: operator.tally() == accepted(PAGE_SIZE + 40))


def test_a_ledger_that_is_lost_in_mid_request_frees_its_slots(
    people: tuple[FileStore, BuiltAudience], operator: Operator, running: Running, tmp_path: Path
) -> None:
    server = MemoryServer()
    lost, sound = Shop(*people, server, "slots-lost"), Shop(*people, server, "slots-sound")
    provider = FakeProvider(latency=timedelta(milliseconds=100))
    running(
        lost.engine((MAIN, provider, 8), slots=tmp_path, stop_timeout=timedelta(milliseconds=200))
    )
    operator.submit(lost.send(BIG, range(PAGE_SIZE)))
    operator.until(lambda: len(provider.attempts) >= 8)
    server.drop(lost.run)
    operator.until(lambda: in_use(tmp_path, os.getpid()) == 0)
    operator.submit(sound.send(BIG, range(100)))
    operator.until(lambda: sum(operator.tally().values()) >= 100)
