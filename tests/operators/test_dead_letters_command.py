"""`fanfare dead-letters` on real servers."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.codec import decode, encode
from schemas.pages import bitmap_bytes
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import CommandKind, DeadLetter, Outcomes
from sinks import ledger_upkeep
from stack.cli_dead_letters import app
from tests.operators.place import EMAIL, Mail, Place

OPERATOR = ("--by", "ada", "--note", "the template is mended")


def failed(place: Place, deadline: timedelta = timedelta(hours=1)) -> Mail:
    """A completed run of which one message was refused for good, with its dead letter."""
    place.launch(deadline)
    mails = place.decide()
    mail = mails[0]
    place.deliver({mail: Outcome.FAILED})
    place.tell(*(place.outcome(one, Outcome.ACCEPTED) for one in mails[1:]))
    now = datetime.now(UTC)
    place.put(
        encode(
            DeadLetter(
                "letter-1", place.tenant, place.run, "delivery/request", Reason.PROVIDER_REFUSED,
                "554 refused", f"page 0 of shard {mail.shard}", b"", now, now, EMAIL, mail.shard,
                mail.ordinal // 500, bitmap_bytes(1 << mail.ordinal % 500), 0,
            )
        )
    )  # fmt: skip
    place.eventually("coordinate heard of all", lambda: place.pending() == 0)
    return mail


def listed(place: Place) -> list[dict[str, Any]]:
    done = place.fanfare(app, "list", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_recipients_are_ordered_again_and_the_run_is_opened(place: Place) -> None:
    mail = failed(place)
    (row,) = listed(place)
    assert (row["state"], row["reason"], row["step"], row["count"], row["recipients"]) == (
        "open", "provider_refused", "delivery/request", 1, 1,
    )  # fmt: skip
    assert "letter-1" in place.fanfare(app, "list").stdout
    shown = json.loads(place.fanfare(app, "show", "letter", "--json").stdout)
    assert shown["ordinals"] == [mail.ordinal]
    assert place.memory.run is not None
    assert place.memory.run.status is RunStatus.COMPLETED

    done = place.fanfare(
        app, "replay", "--run", place.run, "--reason", "provider_refused", *OPERATOR
    )
    assert done.exit_code == 0, done.output
    assert "ordered again; the run is running" in done.stdout
    (row,) = listed(place)
    assert row["state"] == "replayed"
    (command,) = place.commands
    assert (command.kind, command.issued_by) == (CommandKind.REORDER, "ada")
    (again,) = place.decide()
    assert (again.shard, again.ordinal, again.generation) == (mail.shard, mail.ordinal, 1)
    place.deliver({again: Outcome.ACCEPTED})
    place.eventually("the run is completed again", lambda: place.pending() == 0)
    assert ledger_upkeep.entries(place.redis, place.ref(mail.shard), [mail.ordinal])[0].accepted

    twice = place.fanfare(app, "replay", "letter-1", *OPERATOR)
    assert twice.exit_code == 1
    assert "are replayed already" in str(twice.exception)
    shown_again = " ".join(place.fanfare(app, "show", "letter-1").stdout.split())
    assert "replayed by ada" in shown_again
    assert "the template is mended" in shown_again


def test_refused_where_the_ledger_is_gone(place: Place) -> None:
    failed(place)
    ledger_upkeep.drop(place.redis, place.tenant, place.run, EMAIL)
    done = place.fanfare(app, "replay", "letter-1", *OPERATOR)
    assert done.exit_code == 1
    assert "refused: ledger" in done.stdout
    assert "is absent" in done.stdout
    assert place.commands == []
    assert [row["state"] for row in listed(place)] == ["open"]


def test_refused_after_the_deadline_in_the_coordinators_words(place: Place) -> None:
    failed(place, deadline=timedelta(seconds=40))
    assert place.memory.run is not None
    place.memory.run = _past(place)
    done = place.fanfare(app, "replay", "letter-1", *OPERATOR)
    assert done.exit_code == 1
    assert "refused: the run's deadline" in done.stdout
    assert [row["state"] for row in listed(place)] == ["open"]


def _past(place: Place) -> Any:
    return replace(place.memory.run, deadline=datetime.now(UTC) - timedelta(seconds=1))


def test_records_are_written_again_or_refused_or_discarded(place: Place) -> None:
    mail = failed(place)
    record = encode(place.outcome(mail, Outcome.FAILED))
    now = datetime.now(UTC)
    for name, original in (("good-record", record), ("cut-record", record[:-3])):
        place.put(
            encode(
                DeadLetter(
                    name, "", "", "coordinate/read", Reason.MALFORMED, "why",
                    "coordinate's topics", original, now, now,
                )
            )
        )  # fmt: skip
    before = len(place.read("fanfare.outcomes"))
    done = place.fanfare(app, "replay", "good-record", "cut-record", *OPERATOR)
    assert done.exit_code == 1, "one of the two is refused"
    assert "1 records were written to their topics again" in done.stdout
    assert "dead letter cut-record would fail again" in done.stdout
    written = place.read("fanfare.outcomes")
    assert len(written) == before + 1
    assert all(decode(value, Outcomes) for value in written)
    done = place.fanfare(app, "discard", "cut-record", *OPERATOR)
    assert done.exit_code == 0, done.output
    states = {row["id"]: row["state"] for row in listed(place)}
    assert states == {"letter-1": "open", "good-record": "replayed", "cut-record": "discarded"}
    still_open = json.loads(place.fanfare(app, "list", "--open", "--json").stdout)
    assert [row["id"] for row in still_open] == ["letter-1"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "say which dead letters"),
        (("some", "--run", "r"), "say which dead letters"),
        (("none-such",), "there is none"),
    ],
)
def test_unclear_wishes_are_refused(place: Place, words: tuple[str, ...], why: str) -> None:
    done = place.fanfare(app, "replay", *words, *OPERATOR)
    assert done.exit_code == 1
    assert why in str(done.exception)
