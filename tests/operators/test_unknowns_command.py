"""`fanfare unknowns` on real servers: listed, settled, audited, and again after a break."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from schemas.codec import decode
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import CommandKind, Outcomes, RunEvent
from sinks import ledger_upkeep
from sinks.books import read_books, run_facts
from stack.cli_unknowns import app
from tests.operators.place import Mail, Place, in_one_shard
from transforms.ledger import Held

OPERATOR = ("--by", "ada", "--note", "asked the provider")


def listed(place: Place) -> list[dict[str, Any]]:
    done = place.fanfare(app, place.run, "--tenant", place.tenant, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["unknowns"]


def settle(place: Place, *words: str) -> Any:
    return place.fanfare(
        app, "settle", place.run, "--tenant", place.tenant, "--wait", "20", *OPERATOR, *words
    )


def delivered(place: Place, unknown: int) -> tuple[list[Mail], list[Mail]]:
    """A run of which some messages are unknown; all others are accepted, and not by delivery."""
    place.launch()
    mails = place.decide()
    chosen = in_one_shard(mails, unknown)[:unknown]
    place.deliver(dict.fromkeys(chosen, Outcome.UNKNOWN))
    rest = [mail for mail in mails if mail not in chosen]
    place.tell(*(place.outcome(mail, Outcome.ACCEPTED) for mail in rest))
    place.eventually("coordinate heard of all", lambda: place.pending() == 0)
    return chosen, rest


def test_unknowns_are_listed_and_settled_as_accepted(place: Place) -> None:
    chosen, _ = delivered(place, 2)
    rows = listed(place)
    assert {(row["shard"], row["ordinal"]) for row in rows} == {
        (mail.shard, mail.ordinal) for mail in chosen
    }
    (one,) = [row for row in rows if row["ordinal"] == chosen[0].ordinal]
    recipient = place.recipient(chosen[0])
    assert one["recipient"] == recipient
    assert (one["standing"], one["provider"], one["attempt"]) == ("held", "sendgrid:main", 1)
    assert one["decided"] is not None
    assert recipient in place.fanfare(app, place.run, "--tenant", place.tenant).stdout

    done = settle(place, "--recipient", recipient, "--accepted", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    ref = place.ref(chosen[0].shard)
    assert ledger_upkeep.entries(place.redis, ref, [chosen[0].ordinal])[0].accepted
    (record,) = [
        group
        for value in place.read("fanfare.outcomes")
        for group in decode(value, Outcomes).groups
        if group.reason is Reason.SETTLED_BY_HAND
    ]
    assert (record.outcome, record.provider) == (Outcome.ACCEPTED, "sendgrid:main")
    assert sorted(row["standing"] for row in listed(place)) == ["accepted, not told", "held"]
    # The audit trail is found by SQL, and the run's state is still the coordinator's word.
    ingest_runs(place)
    assert [row["ordinal"] for row in listed(place)] == [chosen[1].ordinal]
    rows_found = place.clickhouse.query(
        "SELECT DISTINCT issued_by, note FROM fanfare_run_events WHERE command_id = {id:String}",
        parameters={"id": told["command_ids"][0]},
    ).result_rows
    assert len(rows_found) == 1
    assert rows_found[0][0] == "ada"
    assert "settled by hand as accepted" in rows_found[0][1]
    assert "asked the provider" in rows_found[0][1]
    facts = run_facts(place.clickhouse, place.tenant, place.run)
    assert (facts.campaign, facts.coordinator.status) == ("spring", "completed")


def ingest_runs(place: Place) -> None:
    """What ingest does with the topics that commands wrote to."""
    place.ingest(*(decode(value, RunEvent) for value in place.read("fanfare.runs")))
    place.ingest(*(decode(value, Outcomes) for value in place.read("fanfare.outcomes")))


def test_a_broken_off_settling_is_listed_and_settled_again(place: Place) -> None:
    chosen, _ = delivered(place, 2)
    for mail, accepted in zip(chosen, (True, False), strict=True):
        held = ledger_upkeep.list_open(place.redis, place.ref(mail.shard))[mail.ordinal]
        assert isinstance(held, Held)
        # The ledger was written; the person's machine went away before anything else was.
        assert ledger_upkeep.settle_by_hand(
            place.redis, place.ref(mail.shard), mail.ordinal, held, accepted
        )
    standings = {row["ordinal"]: row["standing"] for row in listed(place)}
    assert standings == {
        chosen[0].ordinal: "accepted, not told",
        chosen[1].ordinal: "released, not ordered",
    }
    done = settle(place, "--all", "--accepted")
    assert done.exit_code == 0, done.output
    assert "1 stand otherwise" in done.stdout
    done = settle(place, "--all", "--send-again")
    assert done.exit_code == 0, done.output
    ingest_runs(place)
    (order,) = place.orders
    (again,) = place.decide()
    assert (again.ordinal, again.generation) == (chosen[1].ordinal, order.generation)
    assert listed(place) == []
    books = read_books(place.clickhouse, place.tenant, place.run, datetime.now(UTC))
    assert books.as_json()["unknown"] == 1


def test_send_again_orders_under_a_new_generation(place: Place) -> None:
    chosen, _ = delivered(place, 3)
    assert place.memory.run is not None
    assert place.memory.run.status is RunStatus.COMPLETED
    done = settle(place, "--all", "--send-again", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["settled"]) == 3
    assert "the run is running" in told["said"], "a completed run is re-opened"
    (command,) = place.commands
    assert (command.kind, command.issued_by) == (CommandKind.REORDER, "ada")
    assert "asked the provider" in command.note
    again = place.decide()
    assert {(mail.ordinal, mail.generation) for mail in again} == {
        (mail.ordinal, 1) for mail in chosen
    }
    place.deliver(dict.fromkeys(again, Outcome.ACCEPTED))
    place.eventually("the run is completed again", lambda: place.pending() == 0)
    ingest_runs(place)
    assert listed(place) == []
    rows = place.clickhouse.query(
        "SELECT DISTINCT issued_by, accepted, command FROM fanfare_run_events "
        "WHERE command_id = {i:String}",
        parameters={"i": told["command_ids"][0]},
    ).result_rows
    assert rows == [("ada", True, "reorder")]


def test_what_nobody_would_order_again_stays_held(place: Place) -> None:
    place.launch(deadline=timedelta(hours=1))
    mails = place.decide()
    place.deliver({mails[0]: Outcome.UNKNOWN})
    place.command(CommandKind.CANCEL)
    done = settle(place, "--all", "--send-again")
    assert done.exit_code == 1
    assert "the run is cancelled: nothing is ordered again" in str(done.exception)
    (row,) = listed(place)
    assert row["standing"] == "held"
    assert settle(place, "--all", "--accepted").exit_code == 0
    nobody = settle(place, "--recipient", "nobody", "--accepted")
    assert "no unknown outcome of nobody" in str(nobody.exception)
    both = settle(place, "--all", "--accepted", "--send-again")
    assert "say what became of the messages" in str(both.exception)
