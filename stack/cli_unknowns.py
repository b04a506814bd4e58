"""`fanfare unknowns`: the messages of whom nobody knows whether they were sent; settling them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from schemas.errors import InvalidInput
from schemas.ids import RunId, SnapshotId, Tenant
from schemas.reasons import RunStatus
from sinks import runs
from sinks.books import RunFacts, run_facts
from sinks.clickhouse import connect
from sinks.redis_client import Client as Redis
from sinks.redis_client import connect as connect_redis
from sinks.unknowns import (
    ByHand,
    Standing,
    Unknown,
    chosen,
    list_unknowns,
    refusal_to_send_again,
    settle_accepted,
    settle_send_again,
)
from stack.operators import (
    REFUSED,
    ByOption,
    NoteOption,
    RunArgument,
    Servers,
    TenantOption,
    WaitOption,
    answers,
    servers,
    told,
    write,
)
from stack.options import HomeOption, JsonOption


class _ListUnlessNamed(TyperGroup):
    """`unknowns RUN` is `unknowns list RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ListUnlessNamed,
    no_args_is_help=True,
    help="Messages whose request left and whose answer never came: list them, settle them.",
)


@dataclass(frozen=True, slots=True)
class _Found:
    """The unknowns of a run, and what settling them needs."""

    tenant: Tenant
    run: RunId
    facts: RunFacts
    unknowns: tuple[Unknown, ...]


def _find(where: Servers, redis: Redis, tenant: str, run: str) -> _Found:
    client = connect(where.clickhouse)
    try:
        facts = run_facts(client, tenant, run)
        if not facts.snapshot:
            raise InvalidInput(f"run {run!r} names no snapshot: it was refused at launch")
        snapshot = where.store.open_snapshot(facts.snapshot)
        found = list_unknowns(redis, client, Tenant(tenant), RunId(run), facts, snapshot)
    finally:
        client.close()
    return _Found(Tenant(tenant), RunId(run), facts, tuple(found))


@app.command("list")
def list_command(
    run: RunArgument,
    tenant: TenantOption = "default",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List the unknown outcomes of a run. `fanfare unknowns RUN` does the same."""
    where = servers(home)
    redis = connect_redis(where.redis)
    try:
        found = _find(where, redis, tenant, run)
    finally:
        redis.close()
    if as_json:
        rows = [one.as_json() for one in found.unknowns]
        print(json.dumps({"tenant": tenant, "run": run, "unknowns": rows}))
        return
    if not found.unknowns:
        print(f"{run}: no unknown outcomes")
        return
    table = Table(box=None)
    for name in ("recipient", "leg", "place", "standing", "provider", "attempt", "decided (UTC)"):
        table.add_column(name)
    table.add_column("unknown since (UTC)")
    for one in found.unknowns:
        table.add_row(
            Text(one.recipient),
            one.leg,
            f"{one.shard}.{one.ordinal}.{one.generation}",
            one.standing.value,
            one.provider,
            str(one.attempt),
            "" if one.decided is None else f"{one.decided:%Y-%m-%d %H:%M:%S}",
            f"{one.since:%Y-%m-%d %H:%M:%S}",
        )
    Console().print(table)


@app.command()
def settle(
    run: RunArgument,
    by: ByOption,
    note: NoteOption,
    recipient: Annotated[
        list[str] | None,
        typer.Option("--recipient", metavar="ID", help="Whose message; may be repeated."),
    ] = None,
    everybody: Annotated[bool, typer.Option("--all", help="All unknowns of the run.")] = False,
    accepted: Annotated[
        bool, typer.Option("--accepted", help="The provider took it: nothing is sent again.")
    ] = False,
    send_again: Annotated[
        bool, typer.Option("--send-again", help="The provider did not take it: send it again.")
    ] = False,
    tenant: TenantOption = "default",
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Settle unknown outcomes, after the provider's own records were looked at.

    Sent again may be sent twice: that is why a person decides it.
    """
    if accepted == send_again:
        raise InvalidInput("say what became of the messages: --accepted or --send-again")
    if everybody == bool(recipient):
        raise InvalidInput("say which messages: --recipient ID (may be repeated) or --all")
    if not by.strip() or not note.strip():
        raise InvalidInput("--by and --note must say who settles and why")
    where = servers(home)
    redis = connect_redis(where.redis)
    try:
        found = _find(where, redis, tenant, run)
        hand = ByHand(by, note, datetime.now(UTC))
        wanted = chosen(found.unknowns, recipient or ())
        if send_again:
            _refuse_if_over(redis, found)
            fits = _of(wanted, Standing.HELD, Standing.RELEASED_NOT_ORDERED)
            done = settle_send_again(redis, found.tenant, found.run, fits, hand)
        else:
            fits = _of(wanted, Standing.HELD, Standing.ACCEPTED_NOT_TOLD)
            done = settle_accepted(
                redis,
                found.tenant,
                found.run,
                SnapshotId(found.facts.snapshot),
                RunStatus(found.facts.coordinator.status),
                fits,
                hand,
            )
    finally:
        redis.close()
    write(where, done.records())
    said, status = f"{run}: {len(done.settled):,} settled as accepted", 0
    if done.commands:
        ids = {command.command_id for command in done.commands}
        said, status = told(done.commands, answers(where, ids, timedelta(seconds=wait)))
    others = len(wanted) - len(fits) + len(done.changed)
    if as_json:
        settled = [one.as_json() for one in done.settled]
        commands = [command.command_id for command in done.commands]
        audit = [event.command_id for event in done.audit]
        print(
            json.dumps(
                {
                    "settled": settled,
                    "others": others,
                    "command_ids": commands + audit,
                    "said": said,
                }
            )
        )
    else:
        print(said)
        if others:
            print(f"{others:,} stand otherwise by now and were left: see `fanfare unknowns {run}`")
    if status or (others and not done.settled):
        raise typer.Exit(status or REFUSED)


def _of(unknowns: Sequence[Unknown], *standings: Standing) -> list[Unknown]:
    return [one for one in unknowns if one.standing in standings]


def _refuse_if_over(redis: Redis, found: _Found) -> None:
    """Before the ledger lets a message go that nobody would order again."""
    published = runs.read(redis, found.tenant, found.run)
    status = None if published is None else published.status
    deadline = datetime.max.replace(tzinfo=UTC) if published is None else published.deadline
    problem = refusal_to_send_again(status, deadline, datetime.now(UTC))
    if problem:
        raise InvalidInput(f"{found.run}: {problem}; its unknowns stay held")
