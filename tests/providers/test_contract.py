"""What every provider keeps, the fake as well as the real ones, with and without TLS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta

import pytest

from schemas.message import Content, Verdict
from tests.providers.conftest import Run
from tests.providers.harnesses import API_KEY, HARNESSES, PASSWORD, Does, Harness, message
from tests.providers.servers import Certificates, eventually

DEADLINE = timedelta(seconds=5)
Make = Callable[[], Harness]


@pytest.fixture(params=list(HARNESSES))
def make(request: pytest.FixtureRequest, certificates: Certificates) -> Make:
    return lambda: HARNESSES[request.param](certificates)


def test_an_accepted_message_arrives_once_under_our_id(run: Run, make: Make) -> None:
    async def main() -> None:
        async with make() as harness:
            for n in range(5):
                answer = await harness.provider.send(message(n), DEADLINE)
                assert answer.verdict is Verdict.ACCEPTED
                assert answer.provider_message_id
                assert answer.retry_after is None
            assert harness.taken == [message(n).send_id for n in range(5)]
            assert harness.arrived == harness.taken
            assert harness.provider.name and harness.provider.connections == 3

    run(main())


@pytest.mark.parametrize(
    ("does", "verdict"),
    [
        (Does.THROTTLE, Verdict.THROTTLED),
        (Does.REFUSE, Verdict.REFUSED),
        (Does.DEAD, Verdict.ADDRESS_DEAD),
        (Does.ACCOUNT, Verdict.ACCOUNT),
        (Does.DROP, Verdict.IN_DOUBT),
    ],
)
def test_each_answer_has_its_verdict_and_the_next_message_goes_through(
    run: Run, make: Make, does: Does, verdict: Verdict
) -> None:
    async def main() -> None:
        async with make() as harness:
            harness.does = does
            answer = await harness.provider.send(message(1), DEADLINE)
            assert answer.verdict is verdict
            assert answer.reason == answer.reason.lower().replace(" ", "-") != ""
            assert answer.provider_message_id is None
            assert harness.taken == []
            assert len(harness.arrived) <= 1, "one attempt, whatever the answer"
            if verdict is Verdict.THROTTLED:
                assert answer.retry_after is not None
                assert timedelta(0) < answer.retry_after <= timedelta(hours=1)
            harness.does = Does.ACCEPT
            answer = await harness.provider.send(message(2), DEADLINE)
            assert answer.verdict is Verdict.ACCEPTED
            assert harness.taken == [message(2).send_id]

    run(main())


@pytest.mark.parametrize("does", [Does.THROTTLE, Does.REFUSE, Does.DEAD, Does.ACCOUNT, Does.DROP])
def test_details_name_nobody_and_give_nothing_away(run: Run, make: Make, does: Does) -> None:
    async def main() -> None:
        async with make() as harness:
            harness.does = does
            sent = message(7)
            answer = await harness.provider.send(sent, DEADLINE)
            told = f"{answer.reason} {answer.detail}"
            assert len(answer.detail) <= 200
            for private in (sent.to_address, "person7", sent.to_name, API_KEY, PASSWORD, "opaque"):
                assert str(private) not in told

    run(main())


def test_silence_is_in_doubt_when_the_deadline_comes(run: Run, make: Make) -> None:
    async def main() -> None:
        async with make() as harness:
            harness.does = Does.HANG
            began = time.monotonic()
            answer = await harness.provider.send(message(1), timedelta(seconds=0.4))
            assert answer.verdict is Verdict.IN_DOUBT
            assert 0.3 < time.monotonic() - began < 3
            assert len(harness.arrived) == 1

    run(main())


def test_nobody_there_is_retryable(run: Run, make: Make) -> None:
    async def main() -> None:
        async with make() as harness:
            provider = await harness.unreachable()
            answer = await provider.send(message(1), DEADLINE)
            assert answer.verdict is Verdict.RETRYABLE
            assert harness.arrived == []
            await provider.close()

    run(main())


def test_who_finds_no_connection_before_the_deadline_did_not_leave(run: Run, make: Make) -> None:
    async def main() -> None:
        async with make() as harness:
            harness.does = Does.HANG
            flying = [
                asyncio.create_task(harness.provider.send(message(n), timedelta(seconds=2)))
                for n in range(3)
            ]
            await eventually(lambda: len(harness.arrived) == 3)
            answer = await harness.provider.send(message(9), timedelta(seconds=0.2))
            assert answer.verdict is Verdict.RETRYABLE
            assert message(9).send_id not in harness.arrived
            assert {a.verdict for a in await asyncio.gather(*flying)} == {Verdict.IN_DOUBT}

    run(main())


def test_many_at_once_are_each_taken_once(run: Run, make: Make) -> None:
    async def main() -> None:
        async with make() as harness:
            answers = await asyncio.gather(
                *(harness.provider.send(message(n), DEADLINE) for n in range(100))
            )
            assert {a.verdict for a in answers} == {Verdict.ACCEPTED}
            assert sorted(harness.taken) == [message(n).send_id for n in range(100)]

    run(main())


def test_a_cancelled_attempt_leaves_the_provider_usable(run: Run, make: Make) -> None:
    async def main() -> None:
        async with make() as harness:
            for _ in range(2):
                harness.does = Does.HANG
                before = len(harness.arrived)
                tasks = [
                    asyncio.create_task(harness.provider.send(message(n), DEADLINE))
                    for n in range(6)
                ]
                await eventually(lambda: len(harness.arrived) == before + 3)  # noqa: B023
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(r, asyncio.CancelledError) for r in results)
            harness.does = Does.ACCEPT
            answers = await asyncio.gather(
                *(harness.provider.send(message(50 + n), DEADLINE) for n in range(6))
            )
            assert {a.verdict for a in answers} == {Verdict.ACCEPTED}

    run(main())


def test_close_answers_what_is_in_flight_and_can_be_called_twice(run: Run, make: Make) -> None:
    async def main() -> None:
        async with make() as harness:
            harness.does = Does.HANG
            flying = asyncio.create_task(harness.provider.send(message(1), DEADLINE))
            await eventually(lambda: len(harness.arrived) == 1)
            await asyncio.sleep(0.05)
            await harness.provider.close()
            assert (await flying).verdict is Verdict.IN_DOUBT
            await harness.provider.close()
            answer = await harness.provider.send(message(2), DEADLINE)
            assert answer.verdict is Verdict.RETRYABLE
            assert message(2).send_id not in harness.arrived

    run(main())


@pytest.mark.parametrize(
    "content",
    [
        Content("Gr\u00fc\u00dfe \U0001f984", "<p>\u00e9\u4e2d\U0001f984</p>\r\n.\r\n", None),
        Content("s" * 400, None, ".\n..\n" + "x" * 3000),
        Content('tabs\tand \\ "quotes"', "<p>" + "y" * 200_000 + "</p>", "t"),
    ],
    ids=["emoji", "long lines and dots", "large"],
)
def test_every_text_goes_through(run: Run, make: Make, content: Content) -> None:
    async def main() -> None:
        async with make() as harness:
            answer = await harness.provider.send(message(3, content=content), DEADLINE)
            assert answer.verdict is Verdict.ACCEPTED
            assert harness.taken == [message(3).send_id]

    run(main())
