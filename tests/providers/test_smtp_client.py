from __future__ import annotations

import asyncio
import base64
import random
from datetime import timedelta

import pytest

from schemas.errors import InvalidInput
from sinks.connections import InDoubt, NotSent
from sinks.smtp_client import (
    Envelope,
    Extensions,
    SmtpClient,
    SmtpOutcome,
    SmtpRefused,
    SmtpTimeouts,
    SmtpTls,
)
from tests.providers.conftest import Run
from tests.providers.servers import (
    Certificates,
    Reader,
    ScriptedSmtp,
    Server,
    Writer,
    eventually,
    forever,
)

DEADLINE = timedelta(seconds=5)
TEXT = b"Subject: hi\r\n\r\nhello\r\n"


def client(server: Server, **options: object) -> SmtpClient:
    options.setdefault("allow_private", True)
    options.setdefault("hostname", "client.example")
    options.setdefault("security", SmtpTls.NONE)
    options.setdefault("connections", 1)
    return SmtpClient("localhost", server.port, **options)  # type: ignore[arg-type]


async def send(
    smtp: SmtpClient,
    to: str = "ann@example.com",
    data: bytes = TEXT,
    deadline: timedelta = DEADLINE,
    *,
    smtputf8: bool = False,
) -> SmtpOutcome:
    return await smtp.send(
        lambda _: Envelope("news@shop.example", to, data, smtputf8=smtputf8), deadline
    )


@pytest.mark.parametrize("pipelining", [True, False])
def test_messages_arrive_one_after_another_on_one_connection(run: Run, pipelining: bool) -> None:
    async def main() -> None:
        script = ScriptedSmtp(extensions=["PIPELINING"] if pipelining else [])
        async with Server(script) as server:
            smtp = client(server)
            for n in range(10):
                outcome = await send(smtp, f"p{n}@example.com")
                assert outcome.accepted
                assert (outcome.reply.code, outcome.reply.enhanced) == (250, "2.0.0")
            assert [d.rcpt for d in script.delivered] == [
                f"RCPT TO:<p{n}@example.com>" for n in range(10)
            ]
            assert {d.data for d in script.delivered} == {TEXT}
            assert server.connections == 1
            # Lines that were there when MAIL was read: the three commands in one write.
            at_mail = script.together[1]
            assert at_mail == (3 if pipelining else 1)
            await smtp.close()

    run(main())


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    ("verb", "reply"),
    [
        ("MAIL", "550 5.7.1 sender unknown"), ("MAIL", "451 4.3.0 later"),
        ("RCPT", "550 5.1.1 no such user"), ("RCPT", "450-4.2.1 busy\r\n450 4.2.1 try later"),
        ("DATA", "554 5.5.0 no"), (".", "554 5.7.1 spam"), (".", "452 4.3.1 full"),
    ],
)  # fmt: skip
def test_one_refused_command_is_the_outcome_and_the_session_goes_on(
    run: Run, pipelining: bool, verb: str, reply: str
) -> None:
    async def main() -> None:
        script = ScriptedSmtp({verb: [reply]}, extensions=["PIPELINING"] if pipelining else [])
        async with Server(script) as server:
            smtp = client(server)
            outcome = await send(smtp, "first@example.com")
            assert not outcome.accepted
            assert outcome.step == {".": "end"}.get(verb, verb.lower())
            assert outcome.reply.code == int(reply[:3])
            assert outcome.reply.enhanced == reply.splitlines()[-1].split(" ")[1]
            for n in range(3):
                assert (await send(smtp, f"next{n}@example.com")).accepted
            assert [d.rcpt for d in script.delivered] == [
                f"RCPT TO:<next{n}@example.com>" for n in range(3)
            ]
            assert server.connections == 1
            await smtp.close()

    run(main())


def test_data_that_is_wanted_after_a_refusal_reaches_nobody(run: Run) -> None:
    """RFC 2920: a server may say 354 though it refused the recipient (or worse, the sender)."""

    async def main() -> None:
        for script in (
            ScriptedSmtp({"RCPT": ["550 5.1.1 no"], "DATA": ["354 go"]}),
            ScriptedSmtp({"MAIL": ["550 5.1.8 no"], "RCPT": ["250 ok"], "DATA": ["354 go"]}),
        ):
            async with Server(script) as server:
                smtp = client(server)
                outcome = await send(smtp)
                assert outcome.reply.code == 550
                assert (await send(smtp, "next@example.com")).accepted
                assert [d.rcpt for d in script.delivered] == ["RCPT TO:<next@example.com>"]
                assert server.connections == 2
                await smtp.close()

    run(main())


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "."])
def test_421_in_mid_session_is_a_known_refusal_and_a_new_connection(run: Run, verb: str) -> None:
    async def main() -> None:
        script = ScriptedSmtp({verb: ["421 4.3.2 shutting down"]})
        async with Server(script) as server:
            smtp = client(server)
            outcome = await send(smtp)
            assert (outcome.reply.code, outcome.accepted) == (421, False)
            assert (await send(smtp)).accepted
            assert server.connections == 2
            assert len(script.delivered) == 1
            await smtp.close()

    run(main())


def test_421_while_idle_costs_nothing(run: Run) -> None:
    async def says_good_bye(reader: Reader, writer: Writer) -> None:
        script = ScriptedSmtp()
        task = asyncio.create_task(script(reader, writer))
        await eventually(lambda: bool(script.delivered))
        await asyncio.sleep(0.05)
        writer.write(b"421 4.4.2 idle too long\r\n")
        writer.close()
        task.cancel()

    async def main() -> None:
        async with Server(says_good_bye) as server:
            smtp = client(server)
            for expected in (1, 2, 3):
                assert (await send(smtp)).accepted
                assert server.connections == expected
                await asyncio.sleep(0.1)
            await smtp.close()

    run(main())


@pytest.mark.parametrize("how", ["drop", "reset"])
@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA"])
def test_a_connection_lost_before_the_dot_was_not_sent(run: Run, how: str, verb: str) -> None:
    async def main() -> None:
        script = ScriptedSmtp({verb: [how]})
        async with Server(script) as server:
            smtp = client(server)
            with pytest.raises(NotSent, match="connection-lost"):
                await send(smtp)
            assert server.connections == 1
            assert (await send(smtp)).accepted
            await smtp.close()

    run(main())


def test_a_refusal_before_the_loss_is_remembered(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({"RCPT": ["550 5.1.1 no such user"], "DATA": ["drop"]})
        async with Server(script) as server:
            smtp = client(server)
            outcome = await send(smtp)
            assert (outcome.step, outcome.reply.code) == ("rcpt", 550)
            await smtp.close()

    run(main())


@pytest.mark.parametrize("how", ["drop", "reset", "hang", "hang-after-taking", "no code"])
def test_what_breaks_after_the_dot_is_in_doubt(run: Run, how: str) -> None:
    async def main() -> None:
        script = ScriptedSmtp({".": [how]})
        async with Server(script) as server:
            smtp = client(server)
            with pytest.raises(InDoubt):
                await send(smtp, deadline=timedelta(seconds=0.5))
            assert server.connections == 1, "a message that left is never sent again"
            assert len(script.delivered) == (how == "hang-after-taking")
            assert (await send(smtp)).accepted
            await smtp.close()

    run(main())


@pytest.mark.parametrize("how", ["hang", "reset"])
def test_a_text_that_did_not_leave_whole_was_not_sent(run: Run, how: str) -> None:
    async def main() -> None:
        script = ScriptedSmtp({"in-data": how}, stop_reading_data=True)
        async with Server(script) as server:
            smtp = client(server)
            big = b"Subject: big\r\n\r\n" + b"x" * 70 + b"\r\n" * 30_000_000
            with pytest.raises(NotSent):
                await send(smtp, data=big, deadline=timedelta(seconds=1))
            assert script.delivered == []
            await smtp.close()

    run(main())


def test_silence_after_the_dot_is_in_doubt_in_time(run: Run) -> None:
    async def main() -> None:
        async with Server(ScriptedSmtp({".": "hang"})) as server:
            smtp = client(server, timeouts=SmtpTimeouts(end_of_data=timedelta(seconds=0.3)))
            began = asyncio.get_running_loop().time()
            with pytest.raises(InDoubt, match="timeout"):
                await send(smtp)
            assert 0.2 < asyncio.get_running_loop().time() - began < 3
            await smtp.close()

    run(main())


@pytest.mark.parametrize("piece", [1, 2, 7])
def test_replies_are_read_however_they_are_cut(run: Run, piece: int) -> None:
    async def main() -> None:
        script = ScriptedSmtp({"RCPT": ["550-5.1.1 nobody\r\n550 5.1.1 here"]}, piece=piece)
        async with Server(script) as server:
            smtp = client(server)
            refused = await send(smtp)
            assert not refused.accepted
            assert [(await send(smtp)).accepted for _ in range(3)] == [True] * 3
            assert server.connections == 1
            await smtp.close()

    run(main())


def test_an_endless_reply_is_cut_off(run: Run) -> None:
    async def main() -> None:
        endless = "\r\n".join(["250-" + "x" * 500] * 300)
        async with Server(ScriptedSmtp({"MAIL": endless})) as server:
            smtp = client(server)
            with pytest.raises(NotSent):
                await send(smtp, deadline=timedelta(seconds=5))
            await smtp.close()

    run(main())


@pytest.mark.parametrize("verb", ["connect", "EHLO", "MAIL", "RCPT", "DATA"])
def test_silence_before_the_dot_is_not_sent_in_time(run: Run, verb: str) -> None:
    async def main() -> None:
        async with Server(ScriptedSmtp({verb: "hang"})) as server:
            quick = timedelta(seconds=0.2)
            smtp = client(server, timeouts=SmtpTimeouts(connect=quick, command=quick))
            with pytest.raises(NotSent, match="timeout"):
                await send(smtp)
            await smtp.close()

    run(main())


@pytest.mark.parametrize(
    ("script", "step", "code"),
    [
        ({"connect": "554 5.7.1 you are on a list"}, "connect", 554),
        ({"connect": "421 4.3.2 too many connections"}, "connect", 421),
        ({"EHLO": "550 5.7.1 no"}, "connect", 550),
    ],
)
def test_a_server_that_wants_no_session_says_so(
    run: Run, script: dict[str, str | list[str]], step: str, code: int
) -> None:
    async def main() -> None:
        async with Server(ScriptedSmtp(script)) as server:
            smtp = client(server)
            for _ in range(2):
                with pytest.raises(SmtpRefused) as caught:
                    await send(smtp)
                assert (caught.value.outcome.step, caught.value.outcome.reply.code) == (step, code)
            await smtp.close()

    run(main())


def test_a_server_without_ehlo_is_greeted_with_helo(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({"EHLO": "502 5.5.1 what?"})
        async with Server(script) as server:
            smtp = client(server)
            assert (await send(smtp)).accepted
            assert script.commands[1] == "HELO client.example"
            await smtp.close()

    run(main())


def test_extensions_are_read_and_used(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp(extensions=["SIZE 1000", "8BITMIME", "smtputf8", "AUTH PLAIN LOGIN"])
        async with Server(script) as server:
            smtp = client(server)
            offered: list[Extensions] = []

            def make(extensions: Extensions) -> Envelope:
                offered.append(extensions)
                return Envelope(
                    "n@shop.example", "jos\u00e9@example.com", "\u00e9\r\n".encode(), True
                )

            assert (await smtp.send(make, DEADLINE)).accepted
            assert offered == [
                Extensions(False, True, True, False, 1000, frozenset({"PLAIN", "LOGIN"}))
            ]
            mail = next(c for c in script.commands if c.startswith("MAIL"))
            assert mail == "MAIL FROM:<n@shop.example> SIZE=4 BODY=8BITMIME SMTPUTF8"
            assert "RCPT TO:<jos\u00e9@example.com>" in script.commands

            def refuse(_: Extensions) -> Envelope:
                raise InvalidInput("not this one")

            for _ in range(3):
                with pytest.raises(InvalidInput):
                    await smtp.send(refuse, DEADLINE)
            assert (await send(smtp)).accepted
            assert server.connections == 1
            await smtp.close()

    run(main())


@pytest.mark.parametrize(
    "address",
    ["a@b.example>\r\nRCPT TO:<evil@x.example", "a b@x.example", "<a@x.example>", "a@", ""],
)
def test_addresses_cannot_carry_commands(run: Run, address: str) -> None:
    async def main() -> None:
        script = ScriptedSmtp()
        async with Server(script) as server:
            smtp = client(server)
            with pytest.raises(InvalidInput):
                await send(smtp, address)
            assert (await send(smtp)).accepted
            assert len(script.delivered) == 1
            await smtp.close()

    run(main())


def test_a_session_is_left_politely_after_its_share(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp()
        async with Server(script) as server:
            smtp = client(server, messages_per_connection=3)
            for _ in range(7):
                assert (await send(smtp)).accepted
            assert server.connections == 3
            await eventually(lambda: script.commands.count("QUIT") == 2)
            await smtp.close()
            await eventually(lambda: script.commands.count("QUIT") == 3)

    run(main())


def test_starttls_protects_what_follows(run: Run, certificates: Certificates) -> None:
    async def main() -> None:
        script = ScriptedSmtp(
            extensions=["PIPELINING", "STARTTLS", "AUTH PLAIN"], tls=certificates.server
        )
        async with Server(script) as server:
            smtp = client(
                server,
                security=SmtpTls.STARTTLS,
                tls=certificates.client,
                credentials=("user", "s\u00e9cret"),
            )
            for _ in range(3):
                assert (await send(smtp, data=TEXT * 1000)).accepted
            token = base64.b64encode("\0user\0s\u00e9cret".encode()).decode()
            assert script.commands[:4] == [
                "EHLO client.example", "STARTTLS", "EHLO client.example", f"AUTH PLAIN {token}",
            ]  # fmt: skip
            assert server.connections == 1
            await smtp.close()
            stranger = client(server, security=SmtpTls.STARTTLS, tls=certificates.stranger)
            with pytest.raises(NotSent, match="certificate-refused"):
                await send(stranger)
            await stranger.close()

    run(main())


@pytest.mark.parametrize("how", ["hang", "drop"])
def test_over_tls_what_breaks_after_the_dot_is_in_doubt(
    run: Run, certificates: Certificates, how: str
) -> None:
    async def main() -> None:
        async with Server(ScriptedSmtp({".": how}), certificates.server) as server:
            smtp = client(server, security=SmtpTls.IMPLICIT, tls=certificates.client)
            with pytest.raises(InDoubt):
                await send(smtp, deadline=timedelta(seconds=0.5))
            await smtp.close()

    run(main())


def test_no_message_leaves_in_the_clear_when_starttls_is_missing_or_forged(
    run: Run, certificates: Certificates
) -> None:
    async def forged(reader: Reader, writer: Writer) -> None:
        writer.write(b"220 hi\r\n")
        await reader.readline()
        writer.write(b"250-x\r\n250 STARTTLS\r\n")
        await reader.readline()
        writer.write(b"220 ready\r\n250 injected before the handshake\r\n")
        await forever()

    async def main() -> None:
        for script in ({"EHLO": "250 plain"}, {"STARTTLS": "454 4.7.0 not now"}):
            scripted = ScriptedSmtp(dict(script), extensions=["STARTTLS"])
            async with Server(scripted) as server:
                smtp = client(server, security=SmtpTls.STARTTLS, tls=certificates.client)
                with pytest.raises((NotSent, SmtpRefused)):
                    await send(smtp)
                assert not any(c.startswith("MAIL") for c in scripted.commands)
                await smtp.close()
        async with Server(forged) as server:
            smtp = client(server, security=SmtpTls.STARTTLS, tls=certificates.client)
            with pytest.raises(NotSent, match="tls-failed"):
                await send(smtp)
            await smtp.close()

    run(main())


def test_login_where_plain_is_not_offered(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({"AUTH": "334 VXNlcm5hbWU6"}, extensions=["AUTH LOGIN"])
        async with Server(script) as server:
            smtp = client(server, credentials=("user", "secret"), insecure_auth=True)
            assert (await send(smtp)).accepted
            assert script.commands[1:4] == [
                "AUTH LOGIN", base64.b64encode(b"user").decode(),
                base64.b64encode(b"secret").decode(),
            ]  # fmt: skip
            await smtp.close()

    run(main())


def test_refused_credentials_are_the_accounts_trouble(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({"AUTH": "535 5.7.8 wrong"}, extensions=["AUTH PLAIN"])
        async with Server(script) as server:
            smtp = client(server, credentials=("user", "secret"), insecure_auth=True)
            with pytest.raises(SmtpRefused) as caught:
                await send(smtp)
            assert caught.value.outcome.step == "auth"
            assert "secret" not in str(caught.value)
            await smtp.close()

    run(main())


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidInput, match="TLS"):
        SmtpClient("x", 25, hostname="h", security=SmtpTls.NONE, credentials=("u", "p"))
    with pytest.raises(InvalidInput, match="host name"):
        SmtpClient("x", 25, hostname="h\r\nMAIL")


def test_many_messages_over_few_sessions_all_arrive_once(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({"RCPT": ["450 4.2.1 busy"] * 7})
        async with Server(script) as server:
            smtp = client(server, connections=5, messages_per_connection=20)
            outcomes = await asyncio.gather(*(send(smtp, f"p{n}@example.com") for n in range(300)))
            taken = [f"RCPT TO:<p{n}@example.com>" for n, o in enumerate(outcomes) if o.accepted]
            assert len(taken) == 293
            assert sorted(d.rcpt for d in script.delivered) == sorted(taken)
            await smtp.close()

    run(main())


def test_cancelling_frees_the_place(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({".": ["hang", "hang"]})
        async with Server(script) as server:
            smtp = client(server)
            for left in (1, 0):
                task = asyncio.create_task(send(smtp))
                await eventually(lambda left=left: len(script.script["."]) == left)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert (await send(smtp)).accepted
            await smtp.close()

    run(main())


# Messages that go out behind another's dot


def to(*names: str) -> list[str]:
    return [f"RCPT TO:<{name}@example.com>" for name in names]


def flying(smtp: SmtpClient, name: str, seconds: float = 5.0) -> asyncio.Task[SmtpOutcome]:
    return asyncio.create_task(
        send(smtp, f"{name}@example.com", deadline=timedelta(seconds=seconds))
    )


def test_who_waits_goes_out_behind_the_dot_before_it_is_answered(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({".": "late"})
        async with Server(script) as server:
            smtp = client(server)
            tasks = [flying(smtp, name) for name in ("one", "two", "three")]
            await eventually(lambda: len(script.delivered) == 1)
            assert not any(task.done() for task in tasks)
            assert all([(await task).accepted for task in tasks])
            assert [d.rcpt for d in script.delivered] == to("one", "two", "three")
            assert {d.data for d in script.delivered} == {TEXT}
            mails = [
                n for n, c in zip(script.together, script.commands, strict=True) if "MAIL" in c
            ]
            assert mails == [3, 3, 3]
            assert server.connections == 1
            await smtp.close()

    run(main())


@pytest.mark.parametrize("over_tls", [False, True])
@pytest.mark.parametrize("how", ["drop", "reset", "hang", "hang-after-taking", "no code"])
def test_who_is_behind_a_message_in_doubt_has_not_left(
    run: Run, certificates: Certificates, how: str, over_tls: bool
) -> None:
    async def main() -> None:
        script = ScriptedSmtp({".": [how]})
        async with Server(script, certificates.server if over_tls else None) as server:
            smtp = client(
                server,
                security=SmtpTls.IMPLICIT if over_tls else SmtpTls.NONE,
                tls=certificates.client,
            )
            first, second, third = (flying(smtp, n, s) for n, s in (("1", 0.5), ("2", 3), ("3", 3)))
            with pytest.raises(InDoubt):
                await first
            with pytest.raises(NotSent):
                await second
            assert (await third).accepted
            assert (await send(smtp)).accepted
            taken = [d.rcpt for d in script.delivered]
            assert taken == to(*(["1"] if how == "hang-after-taking" else []), "3", "ann")
            await smtp.close()

    run(main())


def test_a_session_that_ends_with_an_answer_takes_along_who_is_behind_it(run: Run) -> None:
    async def main() -> None:
        for reply, accepted in (
            ("421 4.3.2 shutting down", False),
            ("250 2.0.0 ok\r\n421 4.3.2 shutting down", True),
        ):
            script = ScriptedSmtp({".": [reply]})
            async with Server(script) as server:
                smtp = client(server)
                first, second, third = (flying(smtp, name) for name in ("1", "2", "3"))
                assert (await first).accepted is accepted
                if accepted:  # The good-bye is read as the answer to its MAIL.
                    assert (await second).reply.code == 421
                else:
                    with pytest.raises(NotSent, match="connection-lost"):
                        await second
                assert (await third).accepted
                assert [d.rcpt for d in script.delivered] == to(*(["1"] if accepted else []), "3")
                await smtp.close()

    run(main())


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "."])
def test_each_is_refused_for_itself(run: Run, verb: str) -> None:
    async def main() -> None:
        fine = {"MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go", ".": "250 ok"}[verb]
        for refused in range(3):
            replies = [*[fine] * refused, "550 5.7.1 no"]
            script = ScriptedSmtp({verb: replies})
            async with Server(script) as server:
                smtp = client(server)
                tasks = [flying(smtp, str(number)) for number in range(4)]
                outcomes = [await task for task in tasks]
                assert [o.accepted for o in outcomes] == [n != refused for n in range(4)]
                assert outcomes[refused].step == {".": "end"}.get(verb, verb.lower())
                expected = to(*(str(n) for n in range(4) if n != refused))
                assert [d.rcpt for d in script.delivered] == expected
                assert server.connections == 1
                await smtp.close()

    run(main())


def test_who_is_behind_has_a_deadline_of_its_own(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({".": ["late"]})
        async with Server(script) as server:
            smtp = client(server)
            first, second, third = (flying(smtp, n, s) for n, s in (("1", 3), ("2", 0.2), ("3", 3)))
            with pytest.raises(NotSent, match="timeout"):
                await second
            assert not first.done()
            assert (await first).accepted
            assert (await third).accepted
            assert [d.rcpt for d in script.delivered] == to("1", "3")
            await smtp.close()

    run(main())


def test_cancelling_who_is_behind_leaves_the_message_before_it_alone(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp({".": ["late"]})
        async with Server(script) as server:
            smtp = client(server)
            first, second, third = (flying(smtp, name) for name in ("1", "2", "3"))
            await eventually(lambda: bool(script.delivered))
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert (await first).accepted
            assert (await third).accepted
            assert [d.rcpt for d in script.delivered] == to("1", "3")
            await smtp.close()

    run(main())


def test_what_can_not_be_written_is_passed_over(run: Run) -> None:
    async def main() -> None:
        script = ScriptedSmtp()
        async with Server(script) as server:
            smtp = client(server)
            first = flying(smtp, "1")
            bad = [flying(smtp, "<") for _ in range(50)]
            last = flying(smtp, "2")
            assert (await first).accepted and (await last).accepted
            for task in bad:
                with pytest.raises(InvalidInput):
                    await task
            assert [d.rcpt for d in script.delivered] == to("1", "2")
            assert server.connections == 1
            await smtp.close()

    run(main())


@pytest.mark.parametrize("why", ["no pipelining", "long text", "last of its session"])
def test_where_nobody_may_be_behind(run: Run, why: str) -> None:
    async def main() -> None:
        script = ScriptedSmtp({".": "late"}, extensions=[] if why[0] == "n" else ["PIPELINING"])
        async with Server(script) as server:
            smtp = client(server, messages_per_connection=1 if why[:4] == "last" else 10)
            data = TEXT * 4_000 if why == "long text" else TEXT
            tasks = [asyncio.create_task(send(smtp, data=data)) for _ in range(2)]
            await eventually(lambda: len(script.delivered) == 1)
            await asyncio.sleep(0.1)
            assert sum("MAIL" in command for command in script.commands) == 1
            assert all([(await task).accepted for task in tasks])
            assert server.connections == (2 if why == "last of its session" else 1)
            await smtp.close()

    run(main())


ACTIONS = {
    "MAIL": ("451 4.3.0 later", "421 4.3.2 bye", "drop", "reset", "late"),
    "RCPT": ("550 5.1.1 nobody", "450 4.2.1 busy", "421 4.3.2 bye", "drop", "reset"),
    "DATA": ("554 5.5.0 no", "drop", "reset", "hang", "late"),
    ".": ("554 5.7.1 spam", "421 4.3.2 bye", "drop", "reset", "hang", "hang-after-taking", "late",
          "no code", "250 2.0.0 ok\r\n421 4.3.2 bye"),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_what_is_told_is_so_whatever_happens(run: Run, seed: int) -> None:
    """No message is taken twice, none that was taken is told to be refused or not sent."""

    async def main() -> None:
        chance = random.Random(seed)
        plan: dict[str, str | list[str]] = {
            verb: [chance.choice(actions) if chance.random() < 0.15 else normal for _ in range(200)]
            for (verb, actions), normal in zip(
                ACTIONS.items(), ("250 ok", "250 ok", "354 go", "250 ok"), strict=True
            )
        }
        script = ScriptedSmtp(plan)
        async with Server(script) as server:
            smtp = client(server, connections=3, messages_per_connection=chance.randint(2, 30))
            names = [str(number) for number in range(60)]
            tasks = {name: flying(smtp, name, chance.uniform(0.2, 1.2)) for name in names}
            for name in chance.sample(names, 5):
                asyncio.get_running_loop().call_later(chance.uniform(0, 0.3), tasks[name].cancel)
            await asyncio.wait(tasks.values())
            taken = [d.rcpt for d in script.delivered]
            assert len(taken) == len(set(taken))
            for name, task in tasks.items():
                arrived = to(name)[0] in taken
                if task.cancelled() or isinstance(task.exception(), InDoubt):
                    continue
                error = task.exception()
                assert error is None or isinstance(error, NotSent), error
                assert arrived == (error is None and task.result().accepted), (name, error)
            script.script.clear()
            assert (await send(smtp, "last@example.com")).accepted
            await smtp.close()

    run(main())
