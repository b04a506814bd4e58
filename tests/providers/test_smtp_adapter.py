from __future__ import annotations

import email
import email.policy
from datetime import timedelta

import pytest

from schemas.message import Verdict
from sinks.providers import scrub
from sinks.providers.smtp import Smtp, classify
from sinks.smtp_client import SmtpOutcome, SmtpReply, SmtpTls
from tests.providers.conftest import Run
from tests.providers.harnesses import message
from tests.providers.servers import ScriptedSmtp, Server

DEADLINE = timedelta(seconds=5)


def adapter(server: Server) -> Smtp:
    return Smtp(
        "127.0.0.1",
        server.port,
        hostname="client.example",
        security=SmtpTls.NONE,
        connections=2,
        allow_private=True,
    )


def test_the_message_on_the_wire_is_the_one_that_was_meant(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp()
        async with Server(script) as server:
            smtp = adapter(server)
            sent = message(
                4, headers={"X-Campaign": "spring"}, to_name="Jos\u00e9", reference="12.345.6"
            )
            answer = await smtp.send(sent, DEADLINE)
            assert (answer.verdict, answer.provider_message_id) == (Verdict.ACCEPTED, "Q123")
            (delivered,) = script.delivered
            assert delivered.mail.startswith("MAIL FROM:<news@acme.example>")
            assert delivered.rcpt == "RCPT TO:<person4@example.com>"
            read = email.message_from_bytes(delivered.data, policy=email.policy.default)
            assert read["Subject"] == "Hello"
            assert read["To"].addresses[0].display_name == "Jos\u00e9"
            assert read["Reply-To"].addresses[0].addr_spec == "help@acme.example"
            assert read["Message-ID"] == f"<{sent.send_id}@acme.example>"
            assert read["X-Fanfare-Send-Id"] == sent.send_id
            assert read["X-Fanfare-Ref"] == "12.345.6"
            assert read["X-Fanfare-Tenant"] == "acme"
            assert read["X-Fanfare-Leg"] == "email"
            assert read["X-Fanfare-Run"] == "spring-1"
            assert read["X-Campaign"] == "spring"
            assert read["List-Unsubscribe"] == f"<{sent.unsubscribe_url}>"
            assert read["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
            assert read["Date"].datetime.utcoffset() == timedelta(0)
            assert [p.get_content_type() for p in read.iter_parts()] == ["text/plain", "text/html"]
            await smtp.close()

    run(main())


def test_an_address_that_is_not_ascii_needs_a_server_that_takes_it(run: Run) -> None:
    async def main() -> None:
        sent = message(to_address="jos\u00e9@b\u00fccher.example")
        script = ScriptedSmtp(extensions=["SMTPUTF8", "8BITMIME"])
        async with Server(script) as server:
            smtp = adapter(server)
            assert (await smtp.send(sent, DEADLINE)).verdict is Verdict.ACCEPTED
            assert script.delivered[0].rcpt == "RCPT TO:<jos\u00e9@xn--bcher-kva.example>"
            assert script.delivered[0].mail.endswith("SMTPUTF8")
            await smtp.close()
        script = ScriptedSmtp(extensions=["8BITMIME"])
        async with Server(script) as server:
            smtp = adapter(server)
            answer = await smtp.send(sent, DEADLINE)
            assert (answer.verdict, answer.reason) == (Verdict.REFUSED, "smtputf8-not-offered")
            assert "jos" not in answer.detail
            ascii_local = message(to_address="jose@b\u00fccher.example")
            assert (await smtp.send(ascii_local, DEADLINE)).verdict is Verdict.ACCEPTED
            await smtp.close()

    run(main())


def test_a_message_larger_than_the_server_takes_is_refused_here(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp(extensions=["SIZE 300"])
        async with Server(script) as server:
            smtp = adapter(server)
            answer = await smtp.send(message(), DEADLINE)
            assert (answer.verdict, answer.reason) == (Verdict.REFUSED, "message-too-large")
            assert script.delivered == []
            await smtp.close()

    run(main())


@pytest.mark.parametrize(
    ("step", "code", "enhanced", "verdict"),
    [
        ("connect", 421, "4.3.2", Verdict.THROTTLED), ("connect", 554, None, Verdict.ACCOUNT),
        ("auth", 535, "5.7.8", Verdict.ACCOUNT), ("auth", 454, "4.7.0", Verdict.THROTTLED),
        ("mail", 530, "5.7.0", Verdict.ACCOUNT), ("mail", 550, "5.7.1", Verdict.ACCOUNT),
        ("mail", 553, None, Verdict.ACCOUNT), ("mail", 552, "5.3.4", Verdict.REFUSED),
        ("mail", 451, None, Verdict.THROTTLED), ("mail", 421, "4.1.0", Verdict.THROTTLED),
        ("rcpt", 450, None, Verdict.THROTTLED), ("rcpt", 450, "4.2.1", Verdict.RETRYABLE),
        ("rcpt", 452, "4.2.2", Verdict.RETRYABLE), ("rcpt", 452, None, Verdict.RETRYABLE),
        ("rcpt", 550, None, Verdict.ADDRESS_DEAD), ("rcpt", 551, None, Verdict.ADDRESS_DEAD),
        ("rcpt", 553, None, Verdict.ADDRESS_DEAD), ("rcpt", 550, "5.1.1", Verdict.ADDRESS_DEAD),
        ("rcpt", 554, "5.1.10", Verdict.ADDRESS_DEAD), ("rcpt", 550, "5.2.1", Verdict.ADDRESS_DEAD),
        ("rcpt", 550, "5.7.1", Verdict.REFUSED), ("rcpt", 552, "5.2.2", Verdict.REFUSED),
        ("rcpt", 550, "5.1.8", Verdict.ACCOUNT), ("rcpt", 501, None, Verdict.REFUSED),
        ("data", 554, None, Verdict.REFUSED), ("data", 451, None, Verdict.THROTTLED),
        ("end", 552, None, Verdict.REFUSED), ("end", 554, "5.7.1", Verdict.REFUSED),
        ("end", 550, "5.7.1", Verdict.REFUSED), ("end", 550, None, Verdict.REFUSED),
        ("end", 550, "5.1.1", Verdict.ADDRESS_DEAD), ("end", 451, "4.7.1", Verdict.THROTTLED),
        ("end", 354, None, Verdict.RETRYABLE), ("rset", 500, None, Verdict.RETRYABLE),
    ],
)  # fmt: skip
def test_what_a_refusal_means(step: str, code: int, enhanced: str | None, verdict: Verdict) -> None:
    assert classify(SmtpOutcome(step, SmtpReply(code, enhanced, "text")))[0] is verdict


def test_scrubbed_text_is_one_short_line_without_people_and_keys() -> None:
    text = scrub(
        "Dear\r\nJosé <jose.garcia+x@mail.example>, key SG.abc.def and bearer abcdef\x00 "
        + "A" * 60
        + " token for ÜMIT x@y "
        + "word " * 100,
        "José",
        "ümit",
    )
    assert len(text) <= 200
    assert text.startswith("Dear … <<address>>, key … and … … token for … <address> word word")
    assert "\n" not in text and text.isprintable()
