"""Each fault, seen from the client and from the record."""

from __future__ import annotations

import http.client
import json
import os
import signal
import smtplib
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from tests.simulator.conftest import Provider, mail


def _faults(**faults: Any) -> dict[str, Any]:
    return {"sendgrid": {"faults": faults}}


def _smtp_send(provider: Provider, send_id: str, address: str = "a@example.com") -> None:
    with smtplib.SMTP("127.0.0.1", provider.smtp_port, "x", timeout=2) as client:
        client.sendmail(
            "news@example.com",
            [address],
            f"X-Fanfare-Send-Id: {send_id}\r\nX-Fanfare-Run: run-1\r\n\r\nHello\r\n",
        )


def test_an_error_before_acceptance_is_refused(provider: Provider) -> None:
    provider.configure(**_faults(error_rates={"503": 1.0}))
    status, _, body = provider.send(mail("s"))
    assert status == 503
    assert json.loads(body)["errors"][0]["message"]
    stats = provider.get("/stats?run=run-1")
    assert (stats["accepted"], stats["refused"]) == (0, {"error_503": 1})
    assert provider.get("/faults")["counts"] == {"sendgrid.error_503": 1}


def test_an_ambiguous_error_is_recorded_as_accepted(provider: Provider) -> None:
    provider.configure(**_faults(ambiguous_rate=1.0))
    assert provider.send(mail("s"))[0] == 500
    assert provider.get("/message/s")["acceptances"][0]["fault"] == "ambiguous"
    faults = provider.get("/faults")
    assert faults["unanswered"] == {"ambiguous": ["s"]}
    assert faults["unanswered_unique"] == 1


def test_a_hang_after_acceptance_is_open_until_the_client_leaves(provider: Provider) -> None:
    provider.configure(**_faults(hang_after_rate=1.0))
    errors: list[Exception] = []

    def client() -> None:
        try:
            provider.send(mail("hung"), timeout=1.0)
        except TimeoutError as error:
            errors.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    # Only a request whose body has come has an id.
    opened = provider.wait_for("/open", lambda answer: answer["send_ids"] != [])
    assert opened["send_ids"] == ["hung"]
    assert opened["requests"][0]["state"] == "hung"
    assert provider.get("/stats")["open_requests"] == 1
    thread.join()
    assert len(errors) == 1
    provider.wait_for("/open", lambda answer: answer["count"] == 0)
    assert provider.get("/faults")["unanswered"] == {"hang_after": ["hung"]}
    assert provider.get("/stats")["accepted"] == 1


def test_a_hang_before_acceptance_accepts_nothing(provider: Provider) -> None:
    provider.configure(**_faults(hang_before_rate=1.0))
    with pytest.raises(TimeoutError):
        provider.send(mail("s"), timeout=0.3)
    assert provider.get("/faults")["unanswered"] == {}
    stats = provider.get("/stats")
    assert (stats["accepted"], stats["refused"]) == (0, {"hang_before": 1})


@pytest.mark.parametrize(("when", "accepted"), [("before", 0), ("after", 1)])
def test_a_reset(provider: Provider, when: str, accepted: int) -> None:
    provider.configure(**_faults(**{f"reset_{when}_rate": 1.0}))
    with pytest.raises(ConnectionResetError):
        provider.send(mail("s"))
    assert provider.get("/stats")["accepted"] == accepted
    lists = provider.get("/faults")["unanswered"]
    assert lists == ({"reset_after": ["s"]} if accepted else {})


def test_a_reset_in_the_middle_of_a_body(provider: Provider) -> None:
    provider.configure(**_faults(reset_before_rate=1.0))
    body = json.dumps(mail("s")).encode()
    head = b"POST /v3/mail/send HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", provider.http_port), 5) as connection:
        connection.sendall(head + body[:20])
        provider.wait_for(
            "/open", lambda answer: [one["state"] for one in answer["requests"]] == ["receiving"]
        )
        connection.sendall(body[20:-1])
        with pytest.raises(ConnectionResetError):
            connection.recv(100)


def test_a_slow_answer_dribbles(provider: Provider) -> None:
    provider.configure(**_faults(slow_rate=1.0, slow_chunk_bytes=20, slow_interval_ms=20))
    begun = time.monotonic()
    assert provider.send(mail("s"))[0] == 202
    assert time.monotonic() - begun > 0.1
    assert provider.get("/faults")["unanswered"] == {}


def test_a_client_that_leaves_before_the_answer_is_known(provider: Provider) -> None:
    provider.configure(sendgrid={"latency": {"kind": "fixed", "ms": 5000}})
    with pytest.raises(TimeoutError):
        provider.send(mail("impatient"), timeout=0.2)
    faults = provider.wait_for("/faults", lambda answer: answer["unanswered"])
    assert faults["unanswered"] == {"client_left": ["impatient"]}


def test_a_stopped_provider_knows_who_left_meanwhile(provider: Provider) -> None:
    provider.configure(sendgrid={"latency": {"kind": "fixed", "ms": 300}})
    pid = provider.process.pid

    def leave() -> None:
        with suppress(TimeoutError):
            provider.send(mail("gone"), timeout=0.6)

    impatient = threading.Thread(target=leave)
    impatient.start()
    try:
        provider.wait_for("/open", lambda answer: answer["count"] == 1)
        os.kill(pid, signal.SIGSTOP)
        # Its answer is due when it goes on, and so is the news that nobody waits.
        impatient.join()
    finally:
        os.kill(pid, signal.SIGCONT)
    faults = provider.wait_for("/faults", lambda answer: answer["unanswered"])
    assert faults["unanswered"] == {"client_left": ["gone"]}


@pytest.mark.parametrize(
    ("latency", "least", "most"),
    [
        ({"kind": "fixed", "ms": 60}, 0.055, 5.0),
        ({"kind": "uniform", "min_ms": 40, "max_ms": 80}, 0.035, 5.0),
        ({"kind": "lognormal", "median_ms": 50, "sigma": 0.1}, 0.02, 5.0),
    ],
)
def test_latency(provider: Provider, latency: dict[str, Any], least: float, most: float) -> None:
    provider.configure(sendgrid={"latency": latency}, smtp={"latency": latency})
    for send in (lambda: provider.send(mail("s")), lambda: _smtp_send(provider, "s")):
        begun = time.monotonic()
        send()
        assert least < time.monotonic() - begun < most


def test_rates_strike_in_proportion_and_the_books_balance(provider: Provider) -> None:
    provider.configure(seed=7, **_faults(error_rates={"500": 0.2, "503": 0.1}, ambiguous_rate=0.2))
    connection = http.client.HTTPConnection("127.0.0.1", provider.http_port, timeout=5)
    statuses: dict[int, int] = {}
    for n in range(600):
        connection.request(
            "POST",
            "/v3/mail/send",
            json.dumps(mail(f"s-{n}")),
            {"Authorization": "Bearer k", "Content-Type": "application/json"},
        )
        response = connection.getresponse()
        response.read()
        statuses[response.status] = statuses.get(response.status, 0) + 1
    connection.close()
    stats, faults = provider.get("/stats"), provider.get("/faults")
    assert 200 < statuses[202] < 400
    refused = stats["refused"]
    assert 70 < refused["error_500"] < 170
    assert 30 < refused["error_503"] < 90
    ambiguous = faults["unanswered"]["ambiguous"]
    assert 70 < len(ambiguous) < 170
    assert stats["accepted"] == statuses[202] + len(ambiguous)
    assert statuses[500] == refused["error_500"] + len(ambiguous)
    assert stats["accepted"] + sum(refused.values()) == stats["requests"] == 600


def test_rules_by_address_refuse_for_good(provider: Provider) -> None:
    rules = [{"pattern": "bounce|^x@", "message": "mailbox unavailable"}]
    provider.configure(sendgrid={"rules": rules}, smtp={"rules": rules})
    status, _, body = provider.send(mail("s", "some.bounce@example.com"))
    assert status == 400
    assert json.loads(body)["errors"][0] == {
        "message": "mailbox unavailable",
        "field": "personalizations.0.to.0.email",
        "help": json.loads(body)["errors"][0]["help"],
    }
    assert provider.send(mail("t", "ax@example.com"))[0] == 202
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        _smtp_send(provider, "u", "x@example.com")
    assert refused.value.recipients["x@example.com"] == (550, b"5.1.1 mailbox unavailable")
    assert provider.get("/stats")["refused"] == {"rule": 2}


def test_an_outage_of_each_kind(provider: Provider) -> None:
    provider.configure(sendgrid={"outage": {"active": True}}, smtp={"outage": {"active": True}})
    assert provider.send(mail("s"))[0] == 503
    with pytest.raises(smtplib.SMTPConnectError) as refused:
        _smtp_send(provider, "s")
    assert refused.value.smtp_code == 421
    provider.configure(sendgrid={"outage": {"mode": "reset"}})
    with pytest.raises(ConnectionResetError):
        provider.send(mail("s"))
    provider.configure(sendgrid={"outage": {"mode": "hang"}})
    with pytest.raises(TimeoutError):
        provider.send(mail("s"), timeout=0.2)
    until = int(time.time() * 1000) + 300
    provider.configure(
        sendgrid={"outage": {"active": False, "mode": "error", "until_ms": until}},
        smtp={"outage": {"active": False}},
    )
    assert provider.send(mail("s"))[0] == 503
    time.sleep(max(0.0, until / 1000 - time.time() + 0.01))
    assert provider.send(mail("s"))[0] == 202
    _smtp_send(provider, "t")
    stats = provider.get("/stats")
    assert (stats["accepted"], stats["refused"]) == (2, {"outage": 5})


@pytest.mark.parametrize(
    ("faults", "error", "accepted", "unanswered"),
    [
        ({"faults": {"error_rates": {"554": 1.0}}}, 554, 0, {}),
        ({"rcpt_error_rates": {"450": 1.0}}, 450, 0, {}),
        ({"faults": {"ambiguous_rate": 1.0}}, 451, 1, {"ambiguous": ["s"]}),
        ({"faults": {"hang_before_rate": 1.0}}, TimeoutError, 0, {}),
        ({"faults": {"hang_after_rate": 1.0}}, TimeoutError, 1, {"hang_after": ["s"]}),
        ({"faults": {"reset_before_rate": 1.0}}, ConnectionResetError, 0, {}),
        ({"faults": {"reset_after_rate": 1.0}}, ConnectionResetError, 1, {"reset_after": ["s"]}),
        ({"faults": {"slow_rate": 1.0, "slow_interval_ms": 1}}, None, 1, {}),
    ],
)
def test_faults_of_smtp(
    provider: Provider,
    faults: dict[str, Any],
    error: Any,
    accepted: int,
    unanswered: dict[str, list[str]],
) -> None:
    provider.configure(smtp=faults)
    seen: Any = None
    try:
        _smtp_send(provider, "s")
    except smtplib.SMTPRecipientsRefused as refused:
        seen = next(iter(refused.recipients.values()))[0]
    except smtplib.SMTPResponseException as refused:
        seen = refused.smtp_code
    except smtplib.SMTPServerDisconnected as lost:
        seen = type(lost.__context__)
    except OSError as lost:
        seen = type(lost)
    assert seen == error
    assert provider.get("/stats")["accepted"] == accepted
    assert provider.get("/faults")["unanswered"] == unanswered
    assert sum(provider.get("/faults")["counts"].values()) == 1
