"""The `fanfare` command: a registry. Each command's module is imported when it is called.

To add a command, write it in a module of its own, as a `typer.Typer` called `app`, and add a
line to `COMMANDS`.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command lives (`module:attribute`, a Typer app) and what `--help` says of it."""

    target: str
    help: str


COMMANDS: Mapping[str, Entry] = {
    "up": Entry("stack.commands:up_app", "Start the embedded stack, or attach to it."),
    "down": Entry("stack.commands:down_app", "Stop the embedded stack; no process remains."),
    "status": Entry("stack.commands:status_app", "Show how every server of the stack stands."),
    "env": Entry("stack.commands:env_app", "Print the variables that find the stack's servers."),
    "jobs": Entry("stack.cli_jobs:app", "Have the jobs run on the stack; list them."),
    "audience": Entry("stack.cli_audience:app", "Audience snapshots: build, show, verify."),
    "campaign": Entry("stack.cli_campaign:app", "Campaigns: launch, pause, resume, cancel, rate."),
    "books": Entry("stack.cli_books:app", "A run's books, and one recipient's story."),
    "upgrade": Entry("stack.cli_upgrade:app", "Put new code into the jobs, amid campaigns."),
    "unknowns": Entry("stack.cli_unknowns:app", "Messages that nobody heard of: list, settle."),
    "dead-letters": Entry("stack.cli_dead_letters:app", "What failed: list, replay, discard."),
    "ledger": Entry("stack.cli_ledger:app", "The send ledger of a run: show it, rebuild it."),
    "chaos": Entry("stack.chaos.cli:app", "Kill everything during campaigns; count the cost."),
    "demo": Entry("stack.demo:app", "A campaign of 100,000 people, end to end."),
}


def load(entry: Entry) -> Any:
    """Import a command's module and build the command."""
    module, attribute = entry.target.split(":")
    return typer.main.get_command(getattr(importlib.import_module(module), attribute))


class _Deferred(TyperCommand):
    """Stands for a command in the list; becomes the real one when it is called."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help, short_help=entry.help)
        self._entry = entry

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return load(self._entry).make_context(info_name, args, parent=parent, **extra)


class _Registry(TyperGroup):
    """The commands of `COMMANDS` beside those that Typer knows."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *(n for n in super().list_commands(ctx) if n not in COMMANDS)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = COMMANDS.get(cmd_name)
        return _Deferred(cmd_name, entry) if entry else super().get_command(ctx, cmd_name)


app = typer.Typer(
    name="fanfare",
    cls=_Registry,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Marketing campaigns and notifications as a dataflow.",
)


@app.callback()
def _root() -> None:
    """Marketing campaigns and notifications as a dataflow."""


def main() -> None:
    """The `fanfare` entry point: an error of ours is one message and exit status 1."""
    from schemas.errors import FanfareError

    # The Kafka client warns of its own pauses on a busy machine; its errors come as exceptions.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        app()
    except FanfareError as error:
        print(f"fanfare: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
