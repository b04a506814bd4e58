"""The README's producer, word for word, against the running jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.audience import AudienceRequest, build_audience
from schemas.errors import Missing
from sinks.books import Books, run_facts
from sinks.clickhouse import connect
from sinks.store import FileStore
from sinks.story import read_story
from stack.cli_books import look, settled
from stack.jobs import start_jobs
from stack.layout import Home, endpoints, environment
from tests.docs.readme import ROOT, blocks, section
from tests.stack_fixture import eventually

PEOPLE = 60


def profiles(path: Path) -> Path:
    """People who all consent but ``person-3``; ``person-4`` has no name."""
    rows = ["recipient_id,email,zone,consents,first_name"]
    for number in range(1, PEOPLE + 1):
        consents = "" if number == 3 else "email:offers"
        first_name = "" if number == 4 else f"Zoë {number}"
        rows.append(
            f"person-{number},reader{number}@example.com,Europe/Berlin,{consents},{first_name}"
        )
    path.write_text("\n".join(rows) + "\n")
    return path


def produce(where: Home, folder: Path, name: str, code: str, *arguments: str) -> None:
    """Run a producer as the README says: in the project's folder, with the servers' variables."""
    script = folder / name
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment(where)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.engine
def test_a_plain_producer_withdraws_consent_and_launches(stack: Home, tmp_path: Path) -> None:
    start_jobs(stack, timeout=timedelta(minutes=3))
    # Names of the test's own, so that it may be run again on a stack that stays up.
    tenant = run = f"readme-{uuid.uuid4().hex[:8]}"
    common, consent, launch = (
        code.replace('"default"', f'"{tenant}"')
        .replace('b"default/', f'b"{tenant}/')
        .replace("hello-from-kafka", run)
        for code in blocks("python", section("Producers"))
    )
    produce(stack, tmp_path, "consent.py", common + consent)
    store = FileStore(stack.store)
    source = profiles(tmp_path / "people.csv")
    snapshot = build_audience(AudienceRequest((source,), tenant), store).snapshot
    produce(stack, tmp_path, "launch.py", common + launch, snapshot)

    found = books_of(stack, run)
    assert found.counts.audience == PEOPLE
    assert found.as_json()["skipped"] == {"consent_withdrawn": 1, "no_consent": 1}
    assert found.as_json()["accepted"] == PEOPLE - 2
    assert found.counts.pending == 0
    assert found.verdict.balanced, found.verdict.errors

    assert class_of(stack, run, "person-2") == ("skipped", "consent_withdrawn")
    assert class_of(stack, run, "person-4")[0] == "accepted"
    seen = provider(stack, run)
    assert (seen["unique"], seen["duplicates"]) == (PEOPLE - 2, 0)


def books_of(where: Home, run: str) -> Books:
    """The books of a run and tenant of one name, once nothing of it is to be expected any more."""
    last: list[Books] = []

    def is_settled() -> bool:
        try:
            last[:] = [look(run, run, where.root)]
        except Missing:
            return False
        return settled(last[0])

    eventually(is_settled, timedelta(minutes=3), "the launched run is settled")
    return last[0]


def class_of(where: Home, run: str, recipient: str) -> tuple[str, str]:
    """Class and reason that a person's story ends with."""
    client = connect(endpoints(where).clickhouse)
    try:
        facts = run_facts(client, run, run)
        snapshot = FileStore(where.store).open_snapshot(facts.snapshot)
        story = read_story(client, run, run, facts, snapshot, recipient)
    finally:
        client.close()
    return story.classes["email"]


def provider(where: Home, run: str) -> dict[str, Any]:
    """What the simulated provider has of the run."""
    url = f"{endpoints(where).simulator}/stats?run={run}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found
