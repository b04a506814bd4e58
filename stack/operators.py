"""What the commands for operators share: where the servers are, and writing to Kafka."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from schemas import topics
from schemas.codec import decode
from schemas.errors import MalformedRecord, Unavailable
from schemas.records import Command, RunEvent
from sinks.store import FileStore
from stack.reach import reach, variable
from transforms.routing import topic_of

TenantOption = Annotated[str, typer.Option("--tenant", help="Whose run it is.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
ByOption = Annotated[str, typer.Option("--by", help="Your name; kept in the audit trail.")]
NoteOption = Annotated[str, typer.Option("--note", help="Why; kept in the audit trail.")]
WaitOption = Annotated[
    float, typer.Option("--wait", help="Seconds to wait for the coordinator's answer.")
]

REFUSED = 1
UNANSWERED = 3
"""Exit status: the command was written, and the campaigns job has not answered in time."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Where operators' commands find things. Of secrets only the URLs of Redis and ClickHouse."""

    kafka: str
    prefix: str
    redis: str
    clickhouse: str
    store: FileStore

    def topic(self, name: str) -> str:
        """The deployed name of a topic of ``schemas.topics``."""
        return self.prefix + name


def servers(home: Path | None) -> Servers:
    """The servers that the environment or the stack of ``home`` names.

    Raises:
        StackFailed, InvalidInput: a server is not named.
    """
    return Servers(
        variable("FANFARE_KAFKA", home),
        reach(home).get("FANFARE_TOPIC_PREFIX", ""),
        variable("FANFARE_REDIS", home),
        variable("FANFARE_CLICKHOUSE", home),
        FileStore(variable("FANFARE_STORE", home)),
    )


def write(where: Servers, values: Iterable[bytes]) -> None:
    """Write encoded records to their topics, in order. Raises Unavailable: some may be written."""
    from kafka.errors import KafkaError

    from sinks.kafka_client import producer

    try:
        sender = producer(where.kafka)
        try:
            for sent in [sender.send(where.topic(topic_of(one)), one) for one in values]:
                sent.get(timeout=30)
        finally:
            sender.close()
    except KafkaError as error:
        raise Unavailable(f"Kafka at {where.kafka} did not take it: {error}; try again") from error


def readable(value: bytes) -> RunEvent | None:
    """An audit event; None for what is none, which anybody may have written into the topic."""
    try:
        return decode(value, RunEvent)
    except MalformedRecord:
        return None


def answers(where: Servers, command_ids: Collection[str], within: timedelta) -> dict[str, RunEvent]:
    """The coordinator's answers to these commands, as far as they come in time."""
    from sinks.kafka_client import read_from_end

    found: dict[str, RunEvent] = {}
    until = time.monotonic() + within.total_seconds()
    with read_from_end(where.kafka, where.topic(topics.RUNS), back=2000) as poll:
        while len(found) < len(command_ids):
            for value in poll():
                event = readable(value)
                if event is not None and event.command_id in command_ids:
                    found[event.command_id] = event
            if time.monotonic() > until:
                break
    return found


def told(commands: Iterable[Command], answered: dict[str, RunEvent]) -> tuple[str, int]:
    """What the coordinator said of commands, and the exit status that follows."""
    lines: list[str] = []
    status = 0
    for command in commands:
        event = answered.get(command.command_id)
        if event is None:
            lines.append(
                f"{command.run}: the order was written and not answered yet: is the campaigns job "
                "running? It is carried out when the job gets to it."
            )
            status = status or UNANSWERED
        elif event.accepted:
            lines.append(f"{command.run}: ordered again; the run is {event.status.value}")
        else:
            lines.append(f"{command.run}: refused: {event.note}")
            status = REFUSED
    return "\n".join(lines), status
