"""What RocksDB says of itself where decide keeps its people."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.world import World
from tests.stack_fixture import eventually


def _of_people(flink: Path) -> list[str]:
    """The options that RocksDB logged for the people of each living instance."""
    logs = (path.read_text() for path in flink.glob("tmp/**/db/LOG"))
    return [log.split("Options for column family [people]")[1] for log in logs if "[people]" in log]


def test_an_index_of_millions_of_people_is_never_read_as_one_piece(world: World) -> None:
    eventually(
        lambda: any("Options.compression[0]" in told for told in _of_people(world.home.flink)),
        what="decide has opened its state",
    )
    for options in _of_people(world.home.flink):
        told = options.split("Options for column family")[0]
        for wanted in (
            r"^\s*index_type: 2$",  # two levels
            r"^\s*partition_filters: 1$",
            r"^\s*filter_policy: bloomfilter$",
            r"Options\.compression\[0\]: LZ4$",
        ):
            assert re.search(wanted, told, re.MULTILINE), (wanted, told)
