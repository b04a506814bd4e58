"""SendGrid's wire format: answers, errors, limits, framing."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.simulator.conftest import Provider, mail, running


def _errors(answer: tuple[int, dict[str, str], bytes]) -> list[dict[str, Any]]:
    errors: list[dict[str, Any]] = json.loads(answer[2])["errors"]
    assert all(set(error) == {"message", "field", "help"} for error in errors)
    return errors


def test_an_accepted_mail_is_202_with_a_message_id_and_is_recorded(provider: Provider) -> None:
    before = int(time.time() * 1000)
    status, headers, body = provider.send(mail("s-1"))
    assert (status, body) == (202, b"")
    assert len(headers["X-Message-Id"]) == 22
    found = provider.get("/message/s-1")
    assert found["accepted"] == 1
    row = found["acceptances"][0]
    assert row["provider_message_id"] == headers["X-Message-Id"]
    assert (row["run"], row["address"], row["provider"]) == (
        "run-1",
        "s-1@example.com",
        "sendgrid",
    )
    assert before <= row["accepted_at_ms"] <= int(time.time() * 1000)
    assert row["arguments"] == {"ff_send_id": "s-1", "ff_run": "run-1", "ff_leg": "email"}


def test_a_repeated_id_is_accepted_and_counted_as_a_duplicate(provider: Provider) -> None:
    for send_id in ("a", "b", "a", "a"):
        assert provider.send(mail(send_id))[0] == 202
    stats = provider.get("/stats")
    assert (stats["accepted"], stats["unique"], stats["duplicates"]) == (4, 2, 2)
    assert provider.get("/duplicates") == {
        "count": 2,
        "messages": [{"send_id": "a", "accepted": 3}],
    }
    assert len(provider.get("/message/a")["acceptances"]) == 3


def test_a_thousand_personalizations_are_a_thousand_messages(provider: Provider) -> None:
    people = [mail(f"p-{n}")["personalizations"][0] for n in range(1000)]
    assert provider.send(mail("x", personalizations=people))[0] == 202
    assert provider.get("/stats")["unique"] == 1000
    people.append(mail("p-1000")["personalizations"][0])
    answer = provider.send(mail("x", personalizations=people))
    assert answer[0] == 400
    assert _errors(answer)[0]["field"] == "personalizations"
    assert provider.get("/stats")["unique"] == 1000


def test_top_level_custom_args_are_overridden_by_a_personalization(provider: Provider) -> None:
    body = mail("own", custom_args={"ff_send_id": "common", "campaign": "spring"})
    assert provider.send(body)[0] == 202
    arguments = provider.get("/message/own")["acceptances"][0]["arguments"]
    assert arguments["campaign"] == "spring"


def _without(name: str) -> dict[str, Any]:
    body = mail("bad")
    del body[name]
    return body


def _person(**changes: Any) -> dict[str, Any]:
    body = mail("bad")
    body["personalizations"][0].update(changes)
    return body


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", None),
        (b"[]", None),
        (_without("personalizations"), "personalizations"),
        (mail("bad", personalizations=[]), "personalizations"),
        (_without("from"), "from.email"),
        ({**mail("bad"), "from": {"email": "nobody"}}, "from.email"),
        (_without("subject"), "subject"),
        (mail("bad", subject=""), "subject"),
        (_without("content"), "content"),
        (mail("bad", content=[{"type": "text/plain", "value": ""}]), "content.0.value"),
        (mail("bad", content=[{"value": "x"}]), "content.0.type"),
        (
            mail(
                "bad",
                content=[
                    {"type": "text/html", "value": "x"},
                    {"type": "text/plain", "value": "x"},
                ],
            ),
            "content",
        ),
        (_person(to=[]), "personalizations.0.to"),
        (_person(to=[{"email": "no address"}]), "personalizations.0.to.0.email"),
        (_person(to=[{"name": "nobody"}]), "personalizations.0.to.0.email"),
        (_person(cc=[{"email": "BAD@example.com"}]), "personalizations.0.cc"),
        (_person(custom_args={"ff_send_id": 7}), "personalizations.0.custom_args"),
        (_person(custom_args={"a": "é" * 5001}), "personalizations.0.custom_args"),
        (mail("bad", headers={"Subject": "x"}), "headers.Subject"),
        (mail("bad", headers={"X-A": 1}), "headers"),
    ],
)
def test_what_sendgrid_refuses_is_400_with_its_errors(
    provider: Provider, body: object, field: str | None
) -> None:
    answer = provider.send(body)
    assert answer[0] == 400
    assert field in [error["field"] for error in _errors(answer)]
    stats = provider.get("/stats")
    assert stats["accepted"] == 0
    assert stats["refused"] == {"invalid": 1}


def test_custom_args_may_take_ten_thousand_bytes(provider: Provider) -> None:
    room = 10_000 - len(json.dumps({"a": ""}, separators=(",", ":")))
    assert provider.send(_person(custom_args={"a": "x" * room}))[0] == 202
    assert provider.send(_person(custom_args={"a": "x" * (room + 1)}))[0] == 400


def test_an_address_may_appear_once_in_the_whole_request(provider: Provider) -> None:
    people = [mail(f"d-{n}", "same@example.com")["personalizations"][0] for n in range(2)]
    answer = provider.send(mail("x", personalizations=people))
    assert answer[0] == 400
    assert "more than once" in _errors(answer)[0]["message"]


def test_subjects_of_all_personalizations_stand_for_the_common_one(provider: Provider) -> None:
    body = _person(subject="Own")
    del body["subject"]
    assert provider.send(body)[0] == 202


def test_only_the_keys_of_the_file_are_accepted(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("SG.one\nSG.two\n")
    with running(tmp_path / "record", "--sendgrid-key-file", str(keys)) as provider:
        assert provider.send(mail("s"), "SG.two")[0] == 202
        answer = provider.send(mail("s"), "SG.three")
        assert answer[0] == 401
        assert "authorization grant is invalid" in _errors(answer)[0]["message"]
        connection = http.client.HTTPConnection("127.0.0.1", provider.http_port, timeout=5)
        connection.request("POST", "/v3/mail/send", b"{}", {"Content-Type": "application/json"})
        assert connection.getresponse().status == 401
        connection.close()
        assert provider.get("/stats")["refused"] == {"unauthorized": 2}


def test_other_paths_methods_and_types_are_refused(provider: Provider) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", provider.http_port, timeout=5)
    for method, path, kind, status in (
        ("POST", "/v3/mail/sent", "application/json", 404),
        ("GET", "/v3/mail/send", "application/json", 405),
        ("POST", "/v3/mail/send", "text/plain", 415),
    ):
        connection.request(method, path, b"{}", {"Authorization": "Bearer x", "Content-Type": kind})
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (status, True)
    connection.close()


def test_a_body_over_the_limit_is_413(provider: Provider) -> None:
    assert provider.get("/config")["sendgrid"]["max_body_bytes"] == 30 * 1024 * 1024
    provider.configure(sendgrid={"max_body_bytes": 5000})
    assert provider.send(mail("s", content=[{"type": "a/b", "value": "x" * 4000}]))[0] == 202
    assert provider.send(mail("s", content=[{"type": "a/b", "value": "x" * 6000}]))[0] == 413
    # The answer arrives although the client is still sending.
    assert provider.send(mail("s", content=[{"type": "a/b", "value": "x" * 8_000_000}]))[0] == 413
    assert provider.get("/stats")["refused"] == {"too_large": 2}


def _wait_for_early_second(room: float = 0.5) -> None:
    while time.time() % 1.0 > 1.0 - room:
        time.sleep(0.01)


def test_more_than_the_limit_of_a_second_is_429_with_its_headers(provider: Provider) -> None:
    provider.configure(sendgrid={"rate_limit": {"per_second": 3, "retry_after": True}})
    _wait_for_early_second()
    second = int(time.time())
    answers = [provider.send(mail(f"s-{n}")) for n in range(5)]
    assert [status for status, _, _ in answers] == [202, 202, 202, 429, 429]
    assert [headers["X-RateLimit-Remaining"] for _, headers, _ in answers] == list("21000")
    refused = answers[3][1]
    assert refused["X-RateLimit-Limit"] == "3"
    assert refused["X-RateLimit-Reset"] == str(second + 1)
    assert refused["Retry-After"] == "1"
    assert _errors(answers[3])[0]["message"] == "too many requests"
    assert provider.get("/stats")["refused"] == {"rate_limited": 2}
    time.sleep(max(0.0, second + 1.01 - time.time()))
    assert provider.send(mail("s-4"))[0] == 202


def test_the_limit_of_a_minute_and_of_each_key(provider: Provider) -> None:
    while time.time() % 60 > 58:
        time.sleep(0.1)
    provider.configure(sendgrid={"rate_limit": {"per_minute": 2}})
    assert [provider.send(mail("s"), "k1")[0] for _ in range(3)] == [202, 202, 429]
    status, headers, _ = provider.send(mail("s"), "k2")
    assert (status, headers["X-RateLimit-Remaining"]) == (202, "1")
    assert "Retry-After" not in headers
    assert int(headers["X-RateLimit-Reset"]) % 60 == 0


def _raw(provider: Provider, *pieces: bytes, pause: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", provider.http_port), 5) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def _request(body: bytes, extra: bytes = b"") -> bytes:
    return (
        b"POST /v3/mail/send HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
        b"Content-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
        % (extra, len(body), body)
    )


def test_pipelined_requests_are_answered_in_order(provider: Provider) -> None:
    provider.configure(sendgrid={"latency": {"kind": "fixed", "ms": 20}})
    good = [json.dumps(mail(f"s-{n}")).encode() for n in range(3)]
    answer = _raw(
        provider,
        b"".join([_request(good[0]), _request(b"{}"), *map(_request, good[1:])]),
        pause=0.4,
    )
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", answer)
    assert statuses == [b"202", b"400", b"202", b"202"]


def test_a_request_in_single_bytes_and_a_chunked_one(provider: Provider) -> None:
    body = json.dumps(mail("slow")).encode()
    whole = _request(body)
    assert b" 202 " in _raw(provider, *(whole[n : n + 40] for n in range(0, len(whole), 40)))
    head = _request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    body = json.dumps(mail("chunked")).encode()
    pieces = [body[n : n + 50] for n in range(0, len(body), 50)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    assert b" 202 " in _raw(provider, head, chunks[:99], chunks[99:] + b"0\r\n\r\n", pause=0.02)
    assert provider.get("/stats")["unique"] == 2


def test_expect_100_and_connection_close(provider: Provider) -> None:
    body = json.dumps(mail("patient")).encode()
    whole = _request(body, b"Expect: 100-continue\r\nConnection: close\r\n")
    at = whole.index(b"\r\n\r\n") + 4
    with socket.create_connection(("127.0.0.1", provider.http_port), 5) as connection:
        connection.sendall(whole[:at])
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(whole[at:])
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"NONSENSE\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nX: " + b"x" * 70_000, b"431"),
    ],
)
def test_what_cannot_be_framed_is_refused_and_closed(
    provider: Provider, raw: bytes, status: bytes
) -> None:
    assert _raw(provider, raw).split(b" ")[1] == status
    assert provider.send(mail("after"))[0] == 202
