"""The Kafka topics, their partitions and retention, in one place.

A deployment may prefix them; partitions are the embedded stack's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from schemas.reasons import Channel, Lane

LARGEST_VALUE = 16 * 1024 * 1024
"""Bytes: what Fanfare itself may write, such as a dead letter that holds a whole record."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic: what travels in it and how long it is kept."""

    name: str
    record: str
    partitions: int
    retention: timedelta
    compacted: bool = False
    largest: int = 1 << 20
    """Bytes of a value that the broker takes, compressed or not."""


COMMANDS = "fanfare.commands"
CONSENT = "fanfare.consent"
PAGE_RESULTS = "fanfare.page-results"
OUTCOMES = "fanfare.outcomes"
RUNS = "fanfare.runs"
WEBHOOKS_RAW = "fanfare.webhooks.raw"
DEAD_LETTERS = "fanfare.dead-letters"


def sends_topic(lane: Lane, channel: Channel) -> str:
    """The topic of one lane and channel, so that no channel holds up another."""
    return f"fanfare.sends.{lane.value}.{channel.value}"


TOPICS: tuple[Topic, ...] = (
    Topic(COMMANDS, "Command", 1, timedelta(days=30)),
    Topic(CONSENT, "ConsentChange", 4, timedelta(days=3650)),
    Topic(PAGE_RESULTS, "PageResult", 4, timedelta(days=7)),
    Topic(OUTCOMES, "Outcomes", 4, timedelta(days=30)),
    Topic(RUNS, "RunEvent", 1, timedelta(days=365)),
    Topic(WEBHOOKS_RAW, "RawWebhook", 4, timedelta(days=7)),
    Topic(DEAD_LETTERS, "DeadLetter", 1, timedelta(days=30), largest=LARGEST_VALUE),
    Topic(sends_topic(Lane.PROMOTIONAL, Channel.EMAIL), "Send", 4, timedelta(days=7)),
    Topic(sends_topic(Lane.CRITICAL, Channel.EMAIL), "Send", 4, timedelta(days=1)),
)
