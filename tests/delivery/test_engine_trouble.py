"""Bad data and servers that fail: nobody is forgotten, nobody is written to twice."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.audience import BuiltAudience
from schemas.errors import Fenced
from schemas.ids import RecipientId
from schemas.message import Answer, Message, Verdict
from schemas.pages import PAGE_SIZE, SHARDS, bitmap_bytes, bitmap_of
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from schemas.snapshot import shard_file_name
from sinks import delivery_pages
from sinks.engine import DeliveryEngine
from sinks.providers.fake import FakeProvider, accept
from sinks.redis_client import command
from sinks.store import FileStore
from tests.delivery.world import (
    BIG,
    MAIN,
    OTHER_KEY,
    QUICK,
    SAME_KEY,
    MemoryServer,
    Operator,
    RealServer,
    Shop,
    accepted,
)
from tests.ledger.server import RedisServer
from transforms.ledger import Held

MakeShop = Callable[..., Shop]
Running = Callable[[DeliveryEngine], DeliveryEngine]


# Bad data


def test_a_template_that_fails_on_one_person(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    unlucky = one.recipients(OTHER_KEY)[3].replace("p", "N")
    subject = "{% if first_name == '" + unlucky + "' %}{{ nothing }}{% endif %}Hello"
    one = shop(leg={"subject": subject})
    running(one.engine((MAIN, FakeProvider(), 8)))
    operator.submit(one.send())
    operator.finish()
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 29,
        (Outcome.FAILED, Reason.RENDERING_FAILED): 1,
    }
    (letter,) = operator.letters
    assert letter.step == "delivery/render"
    assert "nothing" in letter.detail
    assert letter.ordinals == bitmap_bytes(bitmap_of([3]))


def test_in_a_large_batch_everybody_gets_what_is_theirs(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    """A batch is rendered in steps, while the ledger is asked or after it has answered."""
    one, provider = shop(), FakeProvider()
    unlucky = [one.recipients(BIG)[index].replace("p", "N") for index in (15, 16, 40)]
    failing = " or ".join(f"first_name == '{name}'" for name in unlucky)
    one = shop(leg={"subject": "{% if " + failing + " %}{{ nothing }}{% endif %}{{ first_name }}"})
    running(one.engine((MAIN, provider, 256)))
    operator.submit(one.send(BIG, range(200)))
    operator.finish()
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 197,
        (Outcome.FAILED, Reason.RENDERING_FAILED): 3,
    }
    for each in provider.attempts:
        name = each.content.subject
        assert each.to_address == name.replace("N", "p") + "@mail.example"
        assert each.content.html == f"<p>{name}</p>"
    told = operator.by_ordinal(BIG)
    failed = {at for at, groups in told.items() if groups[0].outcome is Outcome.FAILED}
    assert failed == {15, 16, 40}


@pytest.mark.parametrize(
    ("leg", "spec", "reason"),
    [
        ({"subject": "{% for %}"}, {}, Reason.RENDERING_FAILED),
        ({"routes": ()}, {}, Reason.NO_ROUTE),
        ({}, {"spec": "0" * 64}, Reason.NO_ROUTE),
        ({}, {"snapshot": "0" * 32}, Reason.MISSING_SNAPSHOT),
    ],
)
def test_what_makes_a_whole_run_undeliverable(
    shop: MakeShop,
    operator: Operator,
    running: Running,
    leg: dict[str, Any],
    spec: dict[str, Any],
    reason: Reason,
) -> None:
    one, provider = shop(leg=leg), FakeProvider()
    running(one.engine((MAIN, provider, 8)))
    operator.submit(one.send(**spec))
    operator.finish()
    assert operator.tally() == {(Outcome.FAILED, reason): 30}
    assert not provider.attempts
    assert {letter.reason for letter in operator.letters} == {reason}
    assert all(letter.detail for letter in operator.letters)


def damage(one: Shop, folder: Path) -> None:
    """Give a shop a store of its own in which the page of ``OTHER_KEY`` has a bit turned."""
    shutil.copytree(one.store.root, folder / "store")
    one.store = FileStore(folder / "store")
    path = one.store.root / "snapshots" / one.built.snapshot / shard_file_name(OTHER_KEY)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


def test_a_page_that_was_damaged(
    shop: MakeShop, operator: Operator, running: Running, tmp_path: Path
) -> None:
    one = shop()
    damage(one, tmp_path)
    running(one.engine((MAIN, FakeProvider(), 8)))
    operator.submit(one.send(), one.send(SAME_KEY))
    operator.finish()
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 30,
        (Outcome.FAILED, Reason.CORRUPT_PAGE): 30,
    }


@pytest.mark.parametrize(("page", "indexes"), [(0, range(25, 45)), (3, range(20))])
def test_recipients_that_the_snapshot_does_not_have(
    shop: MakeShop, operator: Operator, running: Running, page: int, indexes: range
) -> None:
    one = shop()
    running(one.engine((MAIN, FakeProvider(), 8)))
    operator.submit(one.send(indexes=indexes, page=page), one.send(SAME_KEY))
    operator.finish()
    sound = 5 if page == 0 else 0
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 30 + sound,
        (Outcome.FAILED, Reason.CORRUPT_PAGE): 20 - sound,
    }


def test_a_damaged_page_that_its_ledger_does_not_have_either(
    shop: MakeShop, operator: Operator, running: Running, tmp_path: Path
) -> None:
    """The order was made for another snapshot, whose page can't be read: that is final."""
    one = shop()
    damage(one, tmp_path)
    assert len(one.recipients(OTHER_KEY)) == 30, "the page's index can be read"
    one.server.drop(one.run)
    one.server.create(one.run, [20] * SHARDS)
    running(one.engine((MAIN, FakeProvider(), 64)))
    operator.submit(one.send())
    operator.finish()
    assert operator.tally() == {(Outcome.FAILED, Reason.CORRUPT_PAGE): 30}


# Ledgers


def test_an_absent_ledger_is_refused_holds_nothing_up_and_can_be_mended(
    shop: MakeShop, operator: Operator, running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    gone, sound, provider = shop(), shop(), FakeProvider()
    gone.server.drop(gone.run)
    engine = running(gone.engine((MAIN, provider, 4)))
    operator.submit(gone.send(BIG, range(PAGE_SIZE)))
    operator.until(lambda: engine.counts()["ledger_refusals"] > 0)
    operator.submit(sound.send(BIG, range(PAGE_SIZE)))
    operator.until(lambda: len(operator.sends) == 1)
    assert operator.tally() == accepted(500)
    assert {each.run for each in provider.attempts} == {sound.run}
    assert f"{gone.run}/email/{BIG} is absent" in caplog.text
    gone.server.create(gone.run, [gone.built.manifest.shard_size(at) for at in range(256)])
    operator.finish()
    assert operator.tally() == accepted(1000)


def test_a_ledger_that_went_back_is_refused(
    shop: MakeShop, operator: Operator, running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    one, provider = shop(), FakeProvider()
    running(one.engine((MAIN, provider, 4)))
    operator.submit(one.send(indexes=range(10)))
    operator.finish()
    operator.collect()
    one.server.drop(one.run)
    one.server.create(one.run, [one.built.manifest.shard_size(at) for at in range(256)])
    operator.submit(one.send(indexes=range(10, 20)))
    operator.until(lambda: "Redis lost writes" in caplog.text)
    assert len(provider.attempts) == 10
    assert len(operator.sends) == 1


def test_what_was_seen_of_a_ledger_is_known_to_the_next_process(
    shop: MakeShop, operator: Operator, running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    one, provider = shop(), FakeProvider()
    first = running(one.engine((MAIN, provider, 4)))
    operator.submit(one.send(indexes=range(10)))
    operator.finish()
    operator.collect()
    first.stop()
    one.server.drop(one.run)
    one.server.create(one.run, [one.built.manifest.shard_size(at) for at in range(256)])
    running(one.engine((MAIN, provider, 4)))
    operator.submit(one.send(indexes=range(10), generation=2))
    operator.until(lambda: "Redis lost writes" in caplog.text)
    assert len(provider.attempts) == 10


def test_a_lost_answer_is_neither_a_loss_nor_a_duplicate(
    people: tuple[FileStore, BuiltAudience], operator: Operator, running: Running
) -> None:
    server = MemoryServer()
    one = Shop(*people, server, "lost-answers")
    provider = FakeProvider(latency=timedelta(milliseconds=1))
    running(one.engine((MAIN, provider, 16)))
    operator.submit(one.send(BIG, range(PAGE_SIZE)), one.send(SAME_KEY))
    for _ in range(6):
        server.memory.lost_answers = 3
        seen = len(operator.groups)
        operator.until(lambda seen=seen: len(operator.groups) > seen or not operator.sends)  # type: ignore[misc]
    operator.finish()
    assert operator.tally() == accepted(530)
    assert len(provider.attempts) == 530


def test_memory_down_for_a_while_gives_permits_back(
    people: tuple[FileStore, BuiltAudience], operator: Operator, running: Running
) -> None:
    server = MemoryServer()
    one = Shop(*people, server, "down")
    provider = FakeProvider(latency=timedelta(milliseconds=5))
    running(one.engine((MAIN, provider, 16)))
    operator.submit(one.send(BIG, range(PAGE_SIZE)), one.send(SAME_KEY))
    operator.until(lambda: len(provider.attempts) > 60)
    server.memory.down = True
    calls = server.memory.calls
    operator.until(lambda: server.memory.calls > calls + 5)
    sent, since = len(provider.attempts), time.monotonic()
    operator.until(lambda: time.monotonic() - since > 1)
    assert len(provider.attempts) == sent
    assert server.memory.calls - calls < 100, "it asks now and then, not all the time"
    server.memory.down = False
    operator.finish()
    assert operator.tally() == accepted(530)
    assert len(provider.attempts) == 530


def test_redis_killed_and_started_again(
    people: tuple[FileStore, BuiltAudience],
    own_redis: RedisServer,
    operator: Operator,
    running: Running,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Shop(*people, RealServer(own_redis.url), "restarted")
    provider = FakeProvider(latency=timedelta(milliseconds=5))
    running(one.engine((MAIN, provider, 8)))
    operator.submit(one.send(BIG, range(PAGE_SIZE)), one.send(SAME_KEY))
    operator.until(lambda: len(provider.attempts) > 60)
    own_redis.kill()
    operator.until(lambda: "trying until it does" in caplog.text)
    own_redis.start()
    operator.finish()
    assert operator.tally() == accepted(530)
    assert len(provider.attempts) == len({each.send_id for each in provider.attempts}) == 530


def test_redis_started_again_from_nothing_sends_nothing_more(
    people: tuple[FileStore, BuiltAudience],
    own_redis: RedisServer,
    operator: Operator,
    running: Running,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Shop(*people, RealServer(own_redis.url), "emptied")
    provider = FakeProvider(latency=timedelta(milliseconds=5))
    running(one.engine((MAIN, provider, 8), stop_timeout=timedelta(seconds=1)))
    operator.submit(one.send(BIG, range(PAGE_SIZE)))
    operator.until(lambda: len(provider.attempts) > 60)
    own_redis.restore(None)
    one.version = 10
    one.publish(RunStatus.RUNNING)
    sent = len(provider.attempts)
    operator.until(lambda: "is absent" in caplog.text)
    assert len(provider.attempts) <= sent + 8, "at most what was claimed"


# Processes


def hanging_after(count: int) -> Callable[[Message], Answer | None]:
    """Accepts so many, then never answers."""
    taken = 0

    def script(message: Message) -> Answer | None:
        nonlocal taken
        taken += 1
        return accept(message) if taken <= count else None

    return script


def test_stop_lets_requests_finish_and_a_successor_sends_the_rest_once(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    first = FakeProvider(latency=timedelta(milliseconds=100))
    second = FakeProvider()
    engine = running(one.engine((MAIN, first, 16)))
    operator.submit(one.send(BIG, range(PAGE_SIZE)), one.send(SAME_KEY))
    operator.until(lambda: len(first.attempts) > 40)
    engine.stop()
    sent = len(first.attempts)
    assert one.server.accepted(one.ledger(BIG)) + one.server.accepted(one.ledger(SAME_KEY)) == sent
    assert not one.matters(BIG) and not one.matters(SAME_KEY), "no claim is left"
    running(one.engine((MAIN, second, 16)))
    operator.finish()
    assert {outcome for outcome, _ in operator.tally()} == {Outcome.ACCEPTED}
    sent_ids = [each.send_id for each in first.attempts + second.attempts]
    assert len(sent_ids) == len(set(sent_ids)) == 530


def test_what_hangs_at_a_stop_is_unknown_to_the_successor(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    first, second = FakeProvider(hanging_after(20)), FakeProvider()
    engine = running(one.engine((MAIN, first, 5), stop_timeout=timedelta(milliseconds=300)))
    operator.submit(one.send())
    operator.until(lambda: len(first.attempts) == 25)
    operator.until(lambda: sum(operator.tally().values()) == 20)
    engine.stop()
    running(one.engine((MAIN, second, 16)))
    operator.finish()
    tally = operator.tally()
    assert sum(tally[Outcome.UNKNOWN, each] for each in Reason) == 5
    assert len(second.attempts) == 5
    assert not {each.send_id for each in first.attempts} & {
        each.send_id for each in second.attempts
    }


def test_a_predecessor_that_still_runs_is_fenced_and_says_so(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    slow, quick = FakeProvider(latency=timedelta(milliseconds=100)), FakeProvider()
    predecessor = one.engine((MAIN, slow, 2))
    running(predecessor)
    operator.submit(one.send(BIG, range(200)))
    operator.until(lambda: len(slow.attempts) > 10)
    successor = Operator()
    successor.sends = dict(operator.sends)
    engine = one.engine((MAIN, quick, 16))
    successor.start(engine)
    try:
        successor.finish()
        with pytest.raises(Fenced, match="another process owns it"):
            operator.until(lambda: False)
        assert predecessor.counts()["fenced"] == 1
    finally:
        engine.stop()
    sent = [each.send_id for each in slow.attempts + quick.attempts]
    assert len(sent) == len(set(sent)) == 200
    told = successor.by_ordinal(BIG)
    assert sorted(told) == list(range(200))
    unknown = sum(each[0].outcome is Outcome.UNKNOWN for each in told.values())
    assert unknown <= 2, "what the predecessor had in flight"


KILLED = """
import sys, time
from datetime import timedelta
from pathlib import Path
from schemas.ids import SnapshotId
from sinks.providers.fake import FakeProvider, accept
from sinks.store import FileStore
from tests.delivery.world import BIG, MAIN, Operator, RealServer, Shop

url, root, run, count = sys.argv[1:5]
class Told:
    def __call__(self, message):
        print(message.send_id, flush=True)
        self.taken = getattr(self, "taken", 0) + 1
        return accept(message) if self.taken <= int(count) else None
store = FileStore(root)
snapshot = store.open_snapshot(store.snapshots()[0])
class Built:
    snapshot, manifest = snapshot.id, snapshot.manifest
one = Shop(store, Built, RealServer(url), run)
operator = Operator()
operator.start(one.engine((MAIN, FakeProvider(Told()), 12)))
operator.submit(one.send(BIG, range(100)))
while True:
    operator.collect()
    time.sleep(0.02)
"""


def test_a_killed_process_leaves_unknown_only_what_was_in_flight(
    people: tuple[FileStore, BuiltAudience],
    delivery_redis: RedisServer,
    operator: Operator,
    running: Running,
) -> None:
    server = RealServer(delivery_redis.url)
    command(server.client, "FLUSHALL")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, delivery_redis.url, str(people[0].root), "killed", "30"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(42)]
        one = Shop(*people, server, "killed")
        limit = time.monotonic() + 20
        while server.accepted(one.ledger(BIG)) < 30:
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert len(set(seen)) == 42
    provider = FakeProvider()
    running(one.engine((MAIN, provider, 16)))
    operator.submit(one.send(BIG, range(100)))
    operator.finish()
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.LEDGER_ACCEPTED): 30,
        (Outcome.UNKNOWN, Reason.CLAIM_IN_DOUBT): 12,
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 58,
    }
    assert not {each.send_id for each in provider.attempts} & set(seen)
    assert len(provider.attempts) == 58
    assert {type(each) for each in one.matters(BIG).values()} == {Held}


def test_a_killed_critical_process_repeats_what_was_in_flight_and_flags_it(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    hanging, provider = FakeProvider(hanging_after(0)), FakeProvider()
    engine = running(
        one.engine((MAIN, hanging, 5), lane=Lane.CRITICAL, stop_timeout=timedelta(milliseconds=100))
    )
    operator.submit(one.send(indexes=range(8), lane=Lane.CRITICAL))
    operator.until(lambda: len(hanging.attempts) == 5)
    engine.stop()
    running(one.engine((MAIN, provider, 8), lane=Lane.CRITICAL))
    operator.finish()
    assert operator.tally() == accepted(8)
    flagged = [
        index
        for index, (group,) in operator.by_ordinal().items()
        if group.detail.startswith("repeated: ")
    ]
    assert len(flagged) == 5


# Of the engine itself


def test_a_defect_ends_the_loop_and_the_operator_hears_of_it(
    shop: MakeShop, operator: Operator
) -> None:
    one = shop()

    def script(message: Message) -> Answer:
        raise ZeroDivisionError("a defect of an adapter")

    engine = one.engine((MAIN, FakeProvider(script), 8))
    operator.start(engine)
    operator.submit(one.send())
    with pytest.raises(RuntimeError, match="loop ended") as raised:
        operator.until(lambda: False)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    engine.stop()
    with pytest.raises(RuntimeError, match="loop ended"):
        operator.collect()


def test_a_defect_in_rendering_leaves_no_claim_and_loses_no_answer(
    shop: MakeShop, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = shop()
    first = FakeProvider(latency=timedelta(milliseconds=100))
    render, bad = delivery_pages.message_to, one.recipients(BIG)[100]

    def broken(context: Any, recipient: str, *rest: Any) -> Message:
        if recipient == bad:
            raise ZeroDivisionError("a defect of rendering")
        return render(context, RecipientId(recipient), *rest)

    monkeypatch.setattr(delivery_pages, "message_to", broken)
    engine = one.engine((MAIN, first, 256))
    operator.start(engine)
    operator.submit(one.send(BIG, range(200)))
    with pytest.raises(RuntimeError, match="loop ended") as raised:
        operator.until(lambda: False)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    engine.stop()
    assert not one.matters(BIG), "what was claimed is settled or released"
    assert one.server.accepted(one.ledger(BIG)) == len(first.accepted)
    monkeypatch.setattr(delivery_pages, "message_to", render)
    second = FakeProvider()
    successor = one.engine((MAIN, second, 64))
    operator.start(successor)
    operator.finish()
    successor.stop()
    sent = [each.send_id for each in first.accepted + second.accepted]
    assert len(sent) == len(set(sent)) == 200


def test_what_keeps_the_loop_from_starting_is_raised(shop: MakeShop) -> None:
    class Unopened(FakeProvider):
        async def open(self) -> None:
            raise ZeroDivisionError("no such server")

    engine = shop().engine((MAIN, Unopened(), 8))
    with pytest.raises(RuntimeError) as raised:
        engine.start()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_nothing_of_finished_runs_is_kept(
    shop: MakeShop, operator: Operator, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinks.delivery_loop.LINE_KEPT_S", 0.0)
    monkeypatch.setattr("sinks.delivery_loop._TIDY_S", 0.05)
    runs = [shop() for _ in range(3)]
    engine = running(runs[0].engine((MAIN, FakeProvider(), 8)))
    for one in runs:
        operator.submit(one.send(), one.send(SAME_KEY))
    operator.finish()
    loop = engine._delivery
    assert loop is not None

    def empty() -> bool:
        keys = [loop._keys[at] for at in loop._keys]
        return (
            not loop._lines
            and not loop._tasks
            and not any(each.desks or each.owed or each.outbox or each.under_way for each in keys)
        )

    operator.until(empty)
    assert all(each.permits.taken == 0 for each in loop._accounts.values())
    operator.submit(replace(runs[0].send(indexes=range(3)), generation=2))
    operator.finish()
    assert operator.tally()[Outcome.ACCEPTED, Reason.LEDGER_ACCEPTED] == 3


def test_permits_are_all_given_back_whatever_happens(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    draws = iter(range(10_000))

    def script(message: Message) -> Answer | None:
        at = next(draws) % 7
        kinds = [*Verdict]
        if kinds[at] is Verdict.ACCEPTED:
            return accept(message)
        return Answer(kinds[at], "drawn", retry_after=timedelta(milliseconds=10))

    engine = running(one.engine((MAIN, FakeProvider(script), 6), retry=QUICK))
    operator.submit(one.send())
    operator.finish(60)
    assert sum(operator.tally().values()) == 30
    loop = engine._delivery
    assert loop is not None
    operator.until(lambda: all(each.permits.taken == 0 for each in loop._accounts.values()))
    assert all(each.under_way == 0 for each in loop._keys.values())
