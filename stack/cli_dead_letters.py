"""`fanfare dead-letters`: what could not be processed: list, show, replay, discard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas import topics
from schemas.codec import encode
from schemas.errors import InvalidInput, Missing, MissingLedger
from schemas.reasons import Reason
from sinks.dead_letters import (
    Letter,
    NotReplayable,
    Replay,
    State,
    check_ledgers,
    find,
    marked,
    orders,
    read_letters,
    record_again,
    select,
)
from sinks.kafka_client import read_all
from sinks.redis_client import connect as connect_redis
from stack.operators import (
    REFUSED,
    ByOption,
    NoteOption,
    Servers,
    WaitOption,
    answers,
    servers,
    told,
    write,
)
from stack.options import HomeOption, JsonOption

app = typer.Typer(
    no_args_is_help=True, help="Dead letters: what could not be processed, whole, with why."
)

IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="Ids, or how they begin.")
]
RunOption = Annotated[str | None, typer.Option("--run", help="Letters of this run.")]
ReasonOption = Annotated[
    Reason | None, typer.Option("--reason", metavar="REASON", help="Letters with this reason.")
]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", help="Letters of this tenant. (default: of all)")
]


def _letters(where: Servers) -> dict[str, Letter]:
    return read_letters(read_all(where.kafka, where.topic(topics.DEAD_LETTERS)))


@app.command("list")
def list_command(
    run: RunOption = None,
    reason: ReasonOption = None,
    tenant: TenantOption = None,
    only_open: Annotated[
        bool, typer.Option("--open", help="Neither replayed nor discarded yet.")
    ] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List dead letters, oldest first."""
    found = select(
        _letters(servers(home)).values(),
        tenant=tenant,
        run=run,
        reason=reason,
        only_open=only_open,
    )
    if as_json:
        print(json.dumps([one.as_json() for one in found]))
        return
    if not found:
        print("no dead letters")
        return
    table = Table(box=None)
    for name, width in (("id", 8), ("state", 9), ("reason", 12), ("step", 8), ("run", 6)):
        table.add_column(name, min_width=width, overflow="fold")
    table.add_column("original", justify="right")
    table.add_column("first, last (UTC)")
    table.add_column("count", justify="right")
    table.add_column("detail", overflow="ellipsis", no_wrap=True, max_width=60)
    for one in found:
        letter = one.letter
        original = (
            f"{one.recipients:,} recipients" if one.recipients else f"{len(letter.original):,} B"
        )
        table.add_row(
            letter.letter_id[:8],
            one.state.value,
            letter.reason.value,
            letter.step,
            Text(letter.run),
            original,
            f"{letter.first_at:%Y-%m-%d %H:%M:%S}\n{letter.last_at:%Y-%m-%d %H:%M:%S}",
            str(one.count),
            Text(letter.detail),
        )
    Console().print(table)


@app.command()
def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="Its id, or how it begins.")],
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show all of one dead letter: its original bytes or recipients, and what was done with it."""
    (one,) = find(_letters(servers(home)), [letter_id])
    told_of = one.as_json(whole=True)
    if as_json:
        print(json.dumps(told_of))
        return
    table = Table(box=None, show_header=False)
    table.add_column("", style="dim")
    table.add_column("", overflow="fold")
    handled = told_of.pop("handled")
    for name, value in told_of.items():
        if value not in ("", [], {}, None):
            table.add_row(name, Text(str(value)))
    for mark in handled:
        what = f"{mark['handled']} by {mark['by']} at {mark['handled_at']}: {mark['note']}"
        table.add_row("", Text(what))
    Console().print(table)


@app.command()
def replay(
    by: ByOption,
    note: NoteOption,
    ids: IdsArgument = None,
    run: RunOption = None,
    reason: ReasonOption = None,
    tenant: TenantOption = None,
    wait: WaitOption = 30.0,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Replay dead letters: recipients are ordered again, records written to their topic again.

    Recipients are decided, capped and claimed again under a new generation; a completed run is
    re-opened. Refused where the run's ledger is gone or its deadline has passed.
    """
    where = servers(home)
    wanted = _wanted(where, ids, run, reason, tenant, by, note)
    now = datetime.now(UTC)
    lines: list[str] = []
    status = 0
    of_records = [one for one in wanted if not one.is_of_recipients]
    again: list[tuple[Letter, bytes]] = []
    for one in of_records:
        try:
            again.append((one, record_again(one, now)))
        except NotReplayable as error:
            lines.append(str(error))
            status = REFUSED
    if again:
        marks = [encode(marked(one, State.REPLAYED, by, note, now)) for one, _ in again]
        write(where, [value for _, value in again] + marks)
        lines.append(f"{len(again):,} records were written to their topics again")
    replayed = [one.letter.letter_id for one, _ in again]
    for each in orders([one for one in wanted if one.is_of_recipients], by, note, now):
        said, code, done = _order(where, each, by, note, now, wait)
        lines.append(said)
        status = status or code
        replayed += [one.letter.letter_id for one in each.letters if done]
    if as_json:
        print(json.dumps({"replayed": replayed, "wanted": len(wanted), "said": lines}))
    else:
        print("\n".join(lines) or "nothing to replay")
    if status:
        raise typer.Exit(status)


def _order(
    where: Servers, each: Replay, by: str, note: str, now: datetime, wait: float
) -> tuple[str, int, bool]:
    """Order the recipients of letters again; what was said, the exit status, whether it is done."""
    redis = connect_redis(where.redis)
    try:
        check_ledgers(redis, each.command)
    except MissingLedger as error:
        return f"{each.command.run}: refused: {error}", REFUSED, False
    finally:
        redis.close()
    write(where, [encode(each.command)])
    command_id = each.command.command_id
    answered = answers(where, {command_id}, timedelta(seconds=wait))
    said, status = told([each.command], answered)
    if status:
        return said, status, False
    write(
        where,
        [encode(marked(one, State.REPLAYED, by, note, now, command_id)) for one in each.letters],
    )
    return said, 0, True


@app.command()
def discard(
    by: ByOption,
    note: NoteOption,
    ids: IdsArgument = None,
    run: RunOption = None,
    reason: ReasonOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Discard dead letters: they stay in the topic and in the list, marked as done with."""
    where = servers(home)
    wanted = _wanted(where, ids, run, reason, tenant, by, note)
    now = datetime.now(UTC)
    write(where, [encode(marked(one, State.DISCARDED, by, note, now)) for one in wanted])
    if as_json:
        print(json.dumps({"discarded": [one.letter.letter_id for one in wanted]}))
    else:
        print(f"{len(wanted):,} dead letters were discarded")


def _wanted(
    where: Servers,
    ids: Sequence[str] | None,
    run: str | None,
    reason: Reason | None,
    tenant: str | None,
    by: str,
    note: str,
) -> list[Letter]:
    if not by.strip() or not note.strip():
        raise InvalidInput("--by and --note must say who does this and why")
    if bool(ids) == bool(run or reason):
        raise InvalidInput("say which dead letters: ids, or --run and --reason")
    letters = _letters(where)
    if ids:
        found = find(letters, ids)
    else:
        found = select(letters.values(), tenant=tenant, run=run, reason=reason)
    left = [one for one in found if one.state is State.OPEN]
    if found and not left:
        states = ", ".join(sorted({one.state.value for one in found}))
        raise Missing(f"all {len(found)} are {states} already: nothing is left to do")
    if not left:
        raise Missing("there are no such dead letters: see `fanfare dead-letters list`")
    return left
