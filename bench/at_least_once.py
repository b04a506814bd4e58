"""The campaigns job without exactly once: only what that costs is measured with it.

Checkpoints don't align and what the sink writes is visible at once, outside of transactions; a
failure would repeat decisions. Nothing but ``make bench SECTION=variants`` starts it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pyflink.datastream.connectors.kafka import KafkaSink

import jobs.campaigns
from jobs.environment import environment
from sinks import kafka

_sink = kafka.sink


def _at_least_once(servers: str, router: Callable[[bytes], str], **_: object) -> KafkaSink:
    return _sink(servers, router, transactions=None)


if __name__ == "__main__":
    vars(jobs.campaigns)["environment"] = partial(environment, exactly_once=False)
    vars(kafka)["sink"] = _at_least_once
    jobs.campaigns.main()
