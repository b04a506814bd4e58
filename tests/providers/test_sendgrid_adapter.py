from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from schemas.errors import InvalidInput
from schemas.message import Content, Sender, Verdict
from sinks.providers.sendgrid import SendGrid
from tests.providers.conftest import Run
from tests.providers.harnesses import SendGridHarness, message
from tests.providers.servers import http_answer

DEADLINE = timedelta(seconds=5)
NOW = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


def test_the_body_is_the_documented_one(run: Run) -> None:
    async def main() -> None:
        async with SendGridHarness(None) as harness:
            sent = message(
                4,
                to_name='Jos\u00e9 "Pepe"\r\nBcc: x@evil.example',
                headers={"X-Campaign": "spring"},
                reference="12.345.6",
                content=Content("Hi \u2028there", "<p>\u00e9</p>", "t\u00e9xt\n"),
            )
            await harness.provider.send(sent, DEADLINE)
            assert isinstance(harness, SendGridHarness)
            assert harness.bodies == [
                {
                    "personalizations": [
                        {
                            "to": [
                                {
                                    "email": "person4@example.com",
                                    "name": 'Jos\u00e9 "Pepe" Bcc: x@evil.example',
                                }
                            ],
                            "custom_args": {
                                "ff_send_id": sent.send_id,
                                "ff_ref": "12.345.6",
                                "ff_tenant": "acme",
                                "ff_run": "spring-1",
                                "ff_leg": "email",
                            },
                        }
                    ],
                    "from": {"email": "news@acme.example", "name": "Acme"},
                    "reply_to": {"email": "help@acme.example"},
                    "subject": "Hi \u2028there",
                    "content": [
                        {"type": "text/plain", "value": "t\u00e9xt\n"},
                        {"type": "text/html", "value": "<p>\u00e9</p>"},
                    ],
                    "headers": {
                        "X-Fanfare-Run": "spring-1",
                        "X-Campaign": "spring",
                        "List-Unsubscribe": f"<{sent.unsubscribe_url}>",
                        "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
                    },
                }
            ]
            bare = message(
                5,
                to_name=None,
                unsubscribe_url=None,
                sender=Sender("a@b.example", ""),
                content=Content("s", None, "t"),
            )
            await harness.provider.send(bare, DEADLINE)
            body = harness.bodies[1]
            assert body["headers"] == {"X-Fanfare-Run": "spring-1"}
            assert body["personalizations"][0]["to"] == [{"email": "person5@example.com"}]  # type: ignore[index]
            assert "reply_to" not in body
            assert body["content"] == [{"type": "text/plain", "value": "t"}]

    run(main())


def answered(status: str, body: bytes = b"", **headers: str) -> bytes:
    return http_answer(status, body, **headers)


def problem(field: str | None, text: str = "no") -> bytes:
    return json.dumps({"errors": [{"message": text, "field": field, "help": None}]}).encode()


@pytest.mark.parametrize(
    ("said", "verdict", "reason"),
    [
        (answered("200 OK"), Verdict.ACCOUNT, "sandbox-mode"),
        (answered("204 None"), Verdict.IN_DOUBT, "unknown-answer"),
        (answered("302 Found", Location="http://x"), Verdict.ACCOUNT, "wrong-endpoint"),
        (answered("400 Bad", problem("personalizations.0.to.0.email")),
         Verdict.ADDRESS_DEAD, "address-refused"),
        (answered("400 Bad", problem("personalizations.0.to")),
         Verdict.ADDRESS_DEAD, "address-refused"),
        (answered("400 Bad", problem("personalizations.0.custom_args")),
         Verdict.REFUSED, "payload-refused"),
        (answered("400 Bad", problem("from.email")), Verdict.REFUSED, "payload-refused"),
        (answered("400 Bad", problem(None)), Verdict.REFUSED, "payload-refused"),
        (answered("400 Bad", b"<html>"), Verdict.REFUSED, "payload-refused"),
        (answered("400 Bad", b'{"errors": 3}'), Verdict.REFUSED, "payload-refused"),
        (answered("400 Bad", b'["errors"]'), Verdict.REFUSED, "payload-refused"),
        (answered("401 Un"), Verdict.ACCOUNT, "credentials-or-sender-refused"),
        (answered("403 No"), Verdict.ACCOUNT, "credentials-or-sender-refused"),
        (answered("404 No"), Verdict.ACCOUNT, "wrong-endpoint"),
        (answered("405 No"), Verdict.ACCOUNT, "wrong-endpoint"),
        (answered("408 Slow"), Verdict.RETRYABLE, "request-timeout"),
        (answered("413 Big"), Verdict.REFUSED, "payload-too-large"),
        (answered("500 Oops"), Verdict.IN_DOUBT, "server-error"),
        (answered("502 Oops"), Verdict.IN_DOUBT, "server-error"),
        (answered("503 Oops"), Verdict.IN_DOUBT, "server-error"),
        (answered("504 Oops"), Verdict.IN_DOUBT, "server-error"),
    ],
)  # fmt: skip
def test_every_status_has_its_verdict(run: Run, said: bytes, verdict: Verdict, reason: str) -> None:
    async def main() -> None:
        async with SendGridHarness(None) as harness:
            assert isinstance(harness, SendGridHarness)
            harness.answer = said
            answer = await harness.provider.send(message(), DEADLINE)
            assert (answer.verdict, answer.reason) == (verdict, reason)

    run(main())


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"Retry_After": "7"}, timedelta(seconds=7)),
        ({"Retry_After": "Fri, 20 Nov 2026 12:00:09 GMT"}, timedelta(seconds=9)),
        ({"X_RateLimit_Reset": str(int(NOW.timestamp()) + 30)}, timedelta(seconds=30)),
        ({"X_RateLimit_Reset": str(int(NOW.timestamp()) - 30)}, timedelta(milliseconds=100)),
        ({"Retry_After": "99999999999999"}, timedelta(hours=1)),
        ({"Retry_After": "soon"}, timedelta(seconds=1)),
        ({}, timedelta(seconds=1)),
    ],
)
def test_a_throttled_answer_says_how_long(
    run: Run, headers: dict[str, str], pause: timedelta
) -> None:
    async def main() -> None:
        async with SendGridHarness(None) as harness:
            assert isinstance(harness, SendGridHarness)
            harness.answer = http_answer("429 Too Many", **headers)
            provider = SendGrid(
                "key",
                base_url=f"http://127.0.0.1:{harness.server.port}",
                allow_private=True,
                clock=lambda: NOW,
            )
            provider._request = harness.provider._request  # type: ignore[attr-defined]
            answer = await provider.send(message(), DEADLINE)
            assert (answer.verdict, answer.retry_after) == (Verdict.THROTTLED, pause)
            await provider.close()

    run(main())


def test_an_accepting_status_counts_even_when_the_body_breaks_off(run: Run) -> None:
    async def main() -> None:
        async with SendGridHarness(None) as harness:
            assert isinstance(harness, SendGridHarness)
            harness.answer = (
                b"HTTP/1.1 202 Accepted\r\nX-Message-Id: sg-7\r\nContent-Length: 9\r\n\r\nbr"
            )
            answer = await harness.provider.send(message(), timedelta(seconds=0.3))
            assert (answer.verdict, answer.provider_message_id) == (Verdict.ACCEPTED, "sg-7")

    run(main())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"to_address": "a@b.example\r\nX: y"}, "malformed-address"),
        ({"to_address": "nobody"}, "malformed-address"),
        ({"unsubscribe_url": "http://plain.example/t"}, "invalid-unsubscribe-url"),
        ({"unsubscribe_url": "https://x/>\r\nBcc: a"}, "invalid-unsubscribe-url"),
        ({"headers": {"Bcc": "a@b.example"}}, "invalid-header"),
        ({"headers": {"X-SG-ID": "1"}}, "invalid-header"),
        ({"headers": {"X-A": "b\r\nBcc: c"}}, "invalid-header"),
        ({"content": Content("s", None, "\ud800")}, "invalid-text"),
        ({"leg": "x" * 11_000}, "custom-args-too-large"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(
    run: Run, changes: dict[str, object], reason: str
) -> None:
    async def main() -> None:
        async with SendGridHarness(None) as harness:
            answer = await harness.provider.send(message(**changes), DEADLINE)  # type: ignore[arg-type]
            assert (answer.verdict, answer.reason) == (Verdict.REFUSED, reason)
            assert harness.arrived == []

    run(main())


def test_an_impossible_key_is_refused() -> None:
    for key in ("", "a\r\nb", "k\u00e9y"):
        with pytest.raises(InvalidInput):
            SendGrid(key)
