"""Which topic a record goes to, and which key it is worked on under, read from its first fields."""

from __future__ import annotations

from collections.abc import Callable

from schemas import topics
from schemas.codec import leading_strings, long_after_strings, name_of
from schemas.errors import MalformedRecord, UnknownSchema
from schemas.ids import run_key
from schemas.pages import SHARDS
from schemas.reasons import Channel, Lane
from schemas.snapshot import shard_of

_TOPICS = {
    "PageResult": topics.PAGE_RESULTS,
    "Outcomes": topics.OUTCOMES,
    "RunEvent": topics.RUNS,
    "ConsentChange": topics.CONSENT,
    "DeadLetter": topics.DEAD_LETTERS,
    "Command": topics.COMMANDS,
    "RawWebhook": topics.WEBHOOKS_RAW,
}


def topic_of(data: bytes) -> str:
    """The topic of ``schemas.topics`` that an encoded record belongs in.

    Raises:
        UnknownSchema: bytes that are no record of ours.
    """
    name = name_of(data)
    if name == "Send":
        lane, channel = leading_strings(data, 5)[3:]
        return topics.sends_topic(Lane(lane), Channel(channel))
    topic = _TOPICS.get(name or "")
    if topic is None:
        raise UnknownSchema(f"no topic is known for a value beginning {data[:10].hex(' ')!r}")
    return topic


def run_key_of(data: bytes) -> str:
    """The key of the run that a command, page result or outcomes record is about.

    What is not ours has the empty key; the operator there puts it among the dead letters.
    """
    try:
        if name_of(data) == "Command":
            _, tenant, run = leading_strings(data, 3)
        else:
            tenant, run = leading_strings(data, 2)
    except MalformedRecord:
        return ""
    return run_key(tenant, run)


_STRINGS_BEFORE_SHARD = {"PageOrder": 5, "Outcomes": 4, "Send": 7, "PageResult": 4}


def shard_number(data: bytes) -> int:
    """The shard that a page order, outcomes, send or consent change is worked on in.

    What is not ours is worked on in shard 0; the operator there puts it among the dead letters.
    """
    name = name_of(data)
    try:
        if name == "ConsentChange":
            _, tenant, recipient = leading_strings(data, 3)
            return shard_of(tenant, recipient)
        strings = _STRINGS_BEFORE_SHARD.get(name or "")
        if strings is None:
            return 0
        shard = long_after_strings(data, strings)
    except MalformedRecord:
        return 0
    return shard if 0 <= shard < SHARDS else 0


class TopicRouter:
    """Names the deployed topic of a record; a value, so that Flink can ship it."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __call__(self, data: bytes) -> str:
        """The deployed topic of an encoded record."""
        return self._prefix + topic_of(data)


Router = Callable[[bytes], str]
