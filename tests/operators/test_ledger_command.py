"""`fanfare ledger` on real servers: Redis is lost, and what was sent is not sent again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient

from schemas.errors import Fenced, LedgerRolledBack, MissingLedger
from schemas.reasons import Outcome, RunStatus
from schemas.records import CommandKind
from sinks import ledger_layout, ledger_upkeep, runs
from stack.cli_ledger import app
from tests.operators.place import EMAIL, Mail, Place, in_one_shard
from transforms.ledger import Closed, Held, Owner, Seen, VerdictKind


def ledger(place: Place, *words: str) -> Any:
    return place.fanfare(app, words[0], place.run, "--tenant", place.tenant, *words[1:])


def forget_all(place: Place) -> None:
    """Redis is restored from nothing, and nobody has published the run's status anew yet."""
    place.away = True
    place.redis.flushall()


def half_sent(place: Place) -> tuple[list[Mail], Owner, Seen]:
    """A run with each kind of message in one shard; who wrote the ledger last, and saw what."""
    place.launch()
    mails = in_one_shard(place.decide(), 6)
    place.deliver(
        {
            mails[0]: Outcome.ACCEPTED,
            mails[1]: Outcome.FAILED,
            mails[2]: Outcome.UNKNOWN,
            mails[3]: None,
        }
    )
    # Accepted, and killed before the outcome was emitted.
    place.deliver({mails[4]: Outcome.ACCEPTED}, told=False)
    view = ledger_upkeep.view(place.redis, place.ref(mails[0].shard))
    assert place.owner is not None
    return mails, place.owner, Seen(view.dataset, view.seq)


def test_a_lost_ledger_is_rebuilt_and_nothing_is_sent_twice(place: Place) -> None:
    mails, owner, seen = half_sent(place)
    ref = place.ref(mails[0].shard)
    refused = ledger(place, "rebuild")
    assert refused.exit_code == 1
    assert "is running: pause it first" in str(refused.exception)
    forget_all(place)
    gone = ledger(place, "show")
    assert gone.exit_code == 1
    assert "nothing of the run" in gone.stdout
    with pytest.raises(MissingLedger):
        place.claim_as(owner, seen, mails[5])

    dry = ledger(place, "rebuild", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    with pytest.raises(MissingLedger):
        ledger_upkeep.view(place.redis, ref)
    done = ledger(place, "rebuild", "--by", "ada", "--note", "disk died", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["legs"] == json.loads(dry.stdout)["legs"]
    (leg,) = told["legs"]
    everybody = place.audience.manifest.counts.audience
    assert (leg["accepted"], leg["closed"], leg["held"]) == (1, 1, everybody - 2)
    assert any("pause" in line for line in told["next"])

    entries = ledger_upkeep.entries(place.redis, ref, [mail.ordinal for mail in mails])
    assert entries[0].accepted
    assert isinstance(entries[1].matter, Closed)
    for entry in entries[2:]:
        assert isinstance(entry.matter, Held)
    view = ledger_upkeep.view(place.redis, ref)
    assert view.dataset == seen.dataset
    assert view.seq > seen.seq + 10**12

    # A predecessor that still runs is fenced; its successor goes on with what Flink's state saw.
    with pytest.raises(Fenced):
        place.claim_as(owner, seen, mails[5])
    key = ledger_layout.epoch_key(owner.lane, owner.key)
    successor = Owner(owner.lane, owner.key, int(place.redis.incr(key)))
    place.command(CommandKind.PAUSE)
    place.command(CommandKind.RESUME)
    kinds = [place.claim_as(successor, seen, mail).kind for mail in mails]
    assert kinds == [
        VerdictKind.ACCEPTED,
        VerdictKind.CLOSED,
        VerdictKind.HELD,
        VerdictKind.HELD,
        VerdictKind.HELD,
        VerdictKind.HELD,
    ]
    later = Mail(mails[1].shard, mails[1].ordinal, 1)
    assert place.claim_as(successor, seen, later).kind is VerdictKind.CLAIMED

    shown = json.loads(ledger(place, "show", "--json").stdout)
    assert shown["status"] == "running"
    assert (shown["legs"][0]["rebuilt_by"], shown["gone"]) == ("ada", [])
    table = ledger(place, "show").stdout
    assert f"{shown['legs'][0]['held']:,}" in table
    assert "rebuilt by" in table


def test_a_sound_ledger_is_left_alone_and_a_rolled_back_one_is_not(place: Place) -> None:
    mails, owner, _ = half_sent(place)
    ref = place.ref(mails[0].shard)
    place.command(CommandKind.PAUSE)
    published = runs.read(place.redis, place.tenant, place.run)
    assert published is not None
    assert published.status is RunStatus.PAUSED
    whole = ledger(place, "rebuild")
    assert whole.exit_code == 1
    assert "there is nothing to rebuild" in str(whole.exception)

    keys = ledger_layout.ledger_keys(ref)
    before = {name: place.redis.dump(name) for name in (keys.meta, keys.bits, keys.open)}
    place.command(CommandKind.RESUME)
    place.deliver({mails[5]: None})
    seen = Seen(*_seen(place, mails[5]))
    for name, value in before.items():
        place.redis.restore(name, 0, value, replace=True)
    newest = place.owner
    assert newest is not None
    with pytest.raises(LedgerRolledBack):
        place.claim_as(newest, seen, mails[5])
    place.command(CommandKind.PAUSE)
    forced = ledger(place, "rebuild", "--force")
    assert forced.exit_code == 0, forced.output
    entries = ledger_upkeep.entries(place.redis, ref, [mail.ordinal for mail in mails])
    assert entries[0].accepted
    assert entries[4].accepted, "a bit that Redis still had stays, though no outcome tells it"
    assert isinstance(entries[5].matter, Held)
    with pytest.raises(Fenced):
        place.claim_as(newest, seen, mails[5])
    assert int(place.redis.get(ledger_layout.epoch_key(owner.lane, owner.key))) > 10**9


def _seen(place: Place, mail: Mail) -> tuple[str, int]:
    view = ledger_upkeep.view(place.redis, place.ref(mail.shard))
    return view.dataset, view.seq


def test_an_empty_ledger_made_anew_stays_refused(place: Place) -> None:
    mails, owner, seen = half_sent(place)
    forget_all(place)
    assert place.memory.run is not None
    ledger_upkeep.create(
        place.redis, place.tenant, place.run, EMAIL, place.memory.run.shard_counts, seen.dataset
    )
    with pytest.raises(LedgerRolledBack):
        place.claim_as(owner, seen, mails[5])
    # It lacks what the outcomes tell, so it may be rebuilt without force.
    done = ledger(place, "rebuild")
    assert done.exit_code == 0, done.output
    assert ledger_upkeep.entries(place.redis, place.ref(mails[0].shard), [mails[0].ordinal])[
        0
    ].accepted


def test_epochs_are_raised_once(place: Place) -> None:
    _, owner, _ = half_sent(place)
    forget_all(place)
    key = ledger_layout.epoch_key(owner.lane, owner.key)
    assert ledger(place, "rebuild").exit_code == 0
    first = int(place.redis.get(key))
    assert int(place.redis.incr(key)) == first + 1, "delivery takes the next"
    ledger_upkeep.drop(place.redis, place.tenant, place.run, EMAIL)
    assert ledger(place, "rebuild").exit_code == 0
    assert int(place.redis.get(key)) == first + 1, "and is not fenced by another run's rebuild"


def test_where_the_topics_do_not_reach_back_everybody_is_in_doubt_or_nobody_acts(
    place: Place,
) -> None:
    mails, _, _ = half_sent(place)
    lost = place.prefix + "fanfare.sends.promotional.email"
    admin = KafkaAdminClient(bootstrap_servers=place.at.kafka)
    consumer = KafkaConsumer(bootstrap_servers=place.at.kafka)
    partitions = [TopicPartition(lost, one) for one in consumer.partitions_for_topic(lost)]
    admin.delete_records(consumer.end_offsets(partitions))
    consumer.close()
    admin.close()
    forget_all(place)
    done = ledger(place, "rebuild")
    assert done.exit_code == 1
    assert "no longer reach back to the launch" in str(done.exception)
    with pytest.raises(MissingLedger):
        ledger_upkeep.view(place.redis, place.ref(mails[0].shard))
    done = ledger(place, "rebuild", "--gaps-in-doubt", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    everybody = place.audience.manifest.counts.audience
    assert told["gaps"] == [lost]
    (leg,) = told["legs"]
    assert (leg["accepted"], leg["held"], leg["closed"]) == (1, everybody - 2, 1)
