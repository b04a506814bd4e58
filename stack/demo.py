"""`fanfare demo`: a campaign of 100,000 people through the whole stack, and its books."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from ruamel.yaml import YAML

from schemas import topics
from schemas.codec import decode
from schemas.errors import MalformedRecord, StackFailed
from schemas.pages import bitmap_from
from schemas.records import CommandKind, PageResult, RunEvent
from schemas.tables import StepKind
from sinks.books import Books
from sinks.kafka_client import read_from_end
from sinks.store import FileStore
from stack.layout import Home, endpoints
from stack.layout import home as home_at
from stack.options import HomeOption
from stack.simulator.client import Control

app = typer.Typer(add_completion=False, help="A campaign through the whole stack, end to end.")

TENANT = "default"
SEGMENT = "age >= 18"
ZONE = "Europe/Berlin"
"""Whoever has the clock of this zone is asked to wait for the end of the quiet hours."""
SHORTEST_QUIET = timedelta(seconds=15)
_LOOK_EVERY_S = 10.0
"""How often it is asked whether the jobs live: a campaign without them would be waited for."""
_TELL_EVERY_S = 5.0
"""Where there is no terminal, progress is a line now and then."""
EXAMPLE = Path(__file__).with_name("example_campaign.yaml")


@dataclass(slots=True)
class Clock:
    """How long each phase took."""

    console: Console
    began: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done within, and tell it."""
        began = time.monotonic()
        yield
        took = self.phases[name] = time.monotonic() - began
        self.console.print(f"[dim]{took:6.1f} s[/]  {name}", highlight=False, soft_wrap=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began


@app.command()
def demo(
    people: Annotated[int, typer.Option(min=1000, help="How many profiles to generate.")] = 100_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line alone.")] = False,
    home: HomeOption = None,
) -> None:
    """Start the stack, make an audience, run a campaign to its end, print the books.

    The last line is JSON. Exit status 1 if the books do not balance, a duplicate was seen, or
    somebody is left over. The stack stays up until `fanfare down`.
    """
    console = Console(stderr=as_json, quiet=as_json)
    where = home_at(home)
    clock = Clock(console)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # The audience needs no server: it is built while the servers start.
        audience = pool.submit(_audience, where, people)
        _start(where, clock, console)
        with clock.phase("profiles and audience, beside the above"):
            snapshot, profiles = audience.result()
    if not as_json:
        _tell_audience(where, snapshot, profiles, console)
    run = f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    _launch(where, run, snapshot, clock)
    simulator = Control(endpoints(where).simulator)
    with clock.phase("campaign, from launch to the last outcome"):
        _follow(where, run, simulator, console)
    with clock.phase("webhooks"):
        simulator.drain_webhooks()
    with clock.phase("ClickHouse catching up"):
        books = _books(where, run)
    provider = simulator.stats(run)
    line = _line(books, provider, clock.seconds)
    arrived = line["accepted"] <= line["provider"]["unique"] <= line["accepted"] + line["unknown"]
    if not as_json:
        _tell_books(where, run, books, console)
    print(json.dumps(line), flush=True)
    if not arrived:
        console.print("The provider has not what the books say was accepted.", style="red")
    whole = line["balanced"] and line["pending"] == 0
    good = whole and arrived and line["provider"]["duplicates"] == 0
    raise typer.Exit(0 if good else 1)


def _start(home: Home, clock: Clock, console: Console) -> None:
    from stack import lifecycle
    from stack.jobs import start_jobs

    with clock.phase("servers started"):
        lifecycle.up(home)
    with clock.phase("topics, tables and three jobs"):
        start_jobs(home)
    console.print(f"         Flink's web page: {endpoints(home).flink}", highlight=False)


def _audience(home: Home, people: int) -> tuple[str, Path]:
    """Generate profiles, a crowd of its own each time, and build their snapshot."""
    from pipelines.audience import AudienceRequest, build_audience
    from stack.profiles import generate

    folder = home.root / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    earlier = len(list(folder.glob("profiles-*.csv")))
    profiles = folder / f"profiles-{earlier + 1}.csv"
    generate(people, seed=earlier + 1, out=profiles, first=earlier * people)
    request = AudienceRequest(
        (profiles,), TENANT, SEGMENT, rejects=profiles.with_name(f"rejects-{earlier + 1}.csv")
    )
    home.store.mkdir(parents=True, exist_ok=True)
    return build_audience(request, FileStore(home.store)).snapshot, profiles


def _tell_audience(home: Home, snapshot: str, profiles: Path, console: Console) -> None:
    counts = FileStore(home.store).open_snapshot(snapshot).manifest.counts
    console.print(
        f"         {counts.read:,} rows of {profiles.name}: {counts.rejected:,} rejected, "
        f"{counts.duplicates:,} duplicates, {counts.not_selected:,} not in '{SEGMENT}'; "
        f"audience {counts.audience:,}",
        highlight=False,
        soft_wrap=True,
    )


def quiet_hours_now(now: datetime) -> str:
    """Quiet hours in which ``ZONE`` is now, and which end there within about a minute."""
    local = now.astimezone(ZoneInfo(ZONE))
    ends = (local + SHORTEST_QUIET).replace(second=0, microsecond=0) + timedelta(minutes=1)
    begins = local - timedelta(minutes=20)
    return f"{begins:%H:%M}-{ends:%H:%M}"


def campaign_file(folder: Path, now: datetime) -> Path:
    """The example campaign, with quiet hours that a demonstration can wait for."""
    yaml = YAML()
    campaign = yaml.load(EXAMPLE.read_text())
    campaign["tenant"] = TENANT
    campaign["quiet_hours"] = quiet_hours_now(now)
    campaign["deadline"] = "+2h"
    path = folder / "campaign.yaml"
    with path.open("w") as out:
        yaml.dump(campaign, out)
    return path


def _launch(home: Home, run: str, snapshot: str, clock: Clock) -> None:
    from stack.cli_campaign import await_answer, new_command, read_campaign, send_command

    servers = endpoints(home).kafka
    with clock.phase("launch"):
        file = campaign_file(home.root / "demo", datetime.now(UTC))
        spec = read_campaign(file, run, TENANT, snapshot)
        command = new_command(CommandKind.LAUNCH, TENANT, run, launch=spec)
        send_command(servers, command)
        event = await_answer(servers, command.command_id, timedelta(seconds=60))
    if event is None:
        raise StackFailed("the launch was not answered in 60 s; see `fanfare jobs list`")
    if not event.accepted:
        raise StackFailed(f"the launch was refused: {event.note}")


def _follow(home: Home, run: str, simulator: Control, console: Console) -> None:
    """Show the run until it ends. Raises StackFailed where a job has ended meanwhile."""
    from stack.jobs import require_running
    from stack.operators import readable

    columns = (
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"),
    )
    latest: RunEvent | None = None
    skipped = 0
    told, looked = 0.0, time.monotonic()
    kafka = endpoints(home).kafka
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        read_from_end(kafka, topics.RUNS, back=200) as events,
        read_from_end(kafka, topics.PAGE_RESULTS, back=2000) as results,
    ):
        task = progress.add_task("", total=1, note="waiting for the first answer")
        while latest is None or not latest.status.terminal:
            for value in events():
                event = readable(value)
                if event is not None and event.run == run and event.tenant == TENANT:
                    latest = event
            skipped += sum(_skipped(value, run) for value in results())
            if time.monotonic() - looked > _LOOK_EVERY_S:
                looked = time.monotonic()
                require_running(home)
            if latest is None:
                continue
            note = _note(latest, skipped, simulator.ask("/stats"))
            settled = latest.audience - latest.pending
            progress.update(task, total=latest.audience, completed=settled, note=note)
            if not console.is_terminal and time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                console.print(f"         {note}", highlight=False, soft_wrap=True)
            time.sleep(0.2)


def _skipped(value: bytes, run: str) -> int:
    """How many recipients of the run a page result skips."""
    try:
        result = decode(value, PageResult)
    except MalformedRecord:  # anybody may have written it; the jobs count it
        return 0
    if result.run != run or result.tenant != TENANT:
        return 0
    return sum(bitmap_from(one.ordinals).bit_count() for one in result.skips if not one.expired)


def _note(event: RunEvent, skipped: int, stats: dict[str, Any]) -> str:
    of_run = stats.get("runs", {}).get(event.run, {})
    accepted = int(of_run.get("accepted", 0))
    rate = int(stats.get("accepted_last_second", 0))
    left = f"{(event.pending - event.deferred) / rate:.0f} s" if rate else "-"
    return (
        f"{rate:,}/s, accepted {accepted:,}, open {event.open:,}, skipped {skipped:,}, "
        f"deferred {event.deferred:,}, ETA {left}"
    )


def _books(home: Home, run: str) -> Books:
    """The books once ClickHouse has all that Kafka had."""
    from stack.cli_books import look, settled

    until = time.monotonic() + 60
    while True:
        found = look(run, TENANT, home.root)
        if settled(found) or time.monotonic() > until:
            return found
        time.sleep(0.3)


def _tell_books(home: Home, run: str, books: Books, console: Console) -> None:
    from stack.cli_books import shown

    console.print()
    console.print(shown(books))
    console.print()
    found = endpoints(home).shown()
    console.print(
        f"Flink {found['flink']}   ClickHouse {found['clickhouse']}\n"
        f"One person's story: fanfare books {run} --recipient ID   Stop the stack: make down",
        highlight=False,
        soft_wrap=True,
    )


def _line(books: Books, provider: dict[str, Any], seconds: float) -> dict[str, Any]:
    counts = books.counts
    return {
        "campaign": books.run,
        "audience": counts.audience,
        "accepted": counts.of(StepKind.ACCEPTED),
        "skipped": counts.reasons(StepKind.SKIPPED),
        "failed": counts.of(StepKind.FAILED),
        "expired": counts.of(StepKind.EXPIRED),
        "cancelled": counts.of(StepKind.CANCELLED),
        "unknown": counts.of(StepKind.UNKNOWN),
        "pending": counts.pending,
        "delivered": books.delivered,
        "balanced": books.verdict.balanced,
        "provider": {
            "unique": int(provider.get("unique", 0)),
            "duplicates": int(provider.get("duplicates", 0)),
        },
        "seconds": round(seconds, 1),
    }
