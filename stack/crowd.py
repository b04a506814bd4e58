"""An audience made up for a trial, and everything known of its people, by id and by place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.audience import AudienceRequest, build_audience
from schemas.ids import LegId, Tenant, send_id
from sinks.store import FileStore, Snapshot
from stack.profiles import generate

TENANT = "default"
"""The tenant whose webhooks the stack's receiver takes."""
LEG = LegId("email")


@dataclass(frozen=True, slots=True)
class One:
    """A recipient of a snapshot."""

    id: str
    shard: int
    ordinal: int
    zone: str
    consents: frozenset[str]
    email: str | None
    attributes: dict[str, Any]

    @property
    def consenting(self) -> bool:
        """Whether they have an address and had agreed to offers by e-mail."""
        return bool(self.email and self.consents & {"email:offers", "email:*"})

    def message(self, run: str) -> str:
        """The id of the message that a run owes them."""
        return send_id(TENANT, run, LEG, self.id)


class Crowd:
    """An audience, and its people by id."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.name = str(snapshot.id)
        self.people: dict[str, One] = {}
        for entry in snapshot.manifest.pages:
            index = snapshot.read_index(entry.shard, entry.page)
            body = snapshot.read_body(entry.shard, entry.page)
            for i, recipient in enumerate(index.recipient_ids):
                self.people[recipient] = One(
                    recipient,
                    entry.shard,
                    entry.first_ordinal + i,
                    index.zone_of(i),
                    index.consents(i),
                    body.email(i),
                    body.attributes(i),
                )

    def __iter__(self) -> Iterator[One]:
        return iter(self.people.values())

    def __len__(self) -> int:
        return len(self.people)

    def consenting(self) -> list[One]:
        """Who has an address and agreed to offers by e-mail when the audience was built."""
        return [one for one in self if one.consenting]


def build_crowds(
    store: FileStore, folder: Path, people: int, first: int, *segments: str | None
) -> list[Crowd]:
    """Audiences of the same new people, one for each segment; ``first`` numbers the first one."""
    path = folder / f"profiles-{first}.csv"
    generate(people, seed=first % 1000, out=path, first=first)
    found = []
    for segment in segments or (None,):
        request = AudienceRequest((path,), Tenant(TENANT), segment or "")
        found.append(Crowd(store.open_snapshot(build_audience(request, store).snapshot)))
    return found
