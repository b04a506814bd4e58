from __future__ import annotations

import email
import email.header
import email.message
import email.policy
import email.utils
import random
import re
from email.message import EmailMessage
from typing import cast

import pytest

from schemas.message import Content, Message, Sender
from transforms.mime import (
    Unsendable,
    assemble,
    build_skeleton,
    checked_headers,
    checked_unsubscribe_url,
    dot_stuffed,
    encode_mailbox,
    encode_text,
    envelope_address,
)

DATE = "Fri, 20 Nov 2026 12:00:00 +0000"
SEND_ID = "11111111-2222-5333-8444-555555555555"
POLICY = email.policy.SMTP


def message(**changes: object) -> Message:
    fields: dict[str, object] = {
        "send_id": SEND_ID, "tenant": "acme", "run": "r1", "leg": "email",
        "to_address": "ann@example.com", "to_name": "Ann",
        "sender": Sender("news@acme.example", "Acme"),
        "content": Content("Hello", "<p>hi</p>", "hi"),
        "unsubscribe_url": "https://u.example/t/abc", "headers": {},
    }  # fmt: skip
    return Message(**{**fields, **changes})  # type: ignore[arg-type]


def write(sent: Message, *, eight_bit: bool = True) -> bytes:
    skeleton = build_skeleton(sent.tenant, sent.run, sent.leg, sent.sender, sent.headers)
    return assemble(skeleton, sent, envelope_address(sent.to_address), DATE, eight_bit=eight_bit)


def read(raw: bytes) -> EmailMessage:
    parsed = email.message_from_bytes(raw, policy=POLICY)
    assert not parsed.defects
    return cast(EmailMessage, parsed)


def lines_of(text: str) -> str:
    """A text as mail carries it: any line end is CRLF."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")


def body_of(part: email.message.Message) -> str:
    raw = cast(bytes, part.get_payload(decode=True)).decode()
    return lines_of(raw)


ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ABC 0123456789",
    "\u00e9\u00e8\u00fc\u00f6\u00e4\u00df\u0142\u0144\u00e7 abc",
    "\u4e2d\u6587\u5b57\u7b26\u6d4b\u8bd5",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 ",
    "\U0001f600\U0001f984\U0001f469\u200d\U0001f680 ok",
    "=?utf-8?b?\"\\,;:<>()[]@'.&%$#!~`^|{}/*-+_",
    "a\u0301 e\u0308 \u00a0\u2003x",
]


def any_text(draw: random.Random, longest: int) -> str:
    """Text of any alphabet, mixed or not, without line ends."""
    alphabet = draw.choice(ALPHABETS)
    if draw.random() < 0.3:
        alphabet += draw.choice(ALPHABETS)
    return "".join(draw.choices(alphabet, k=draw.randint(1, longest)))


def any_body(draw: random.Random) -> str:
    lines = []
    for _ in range(draw.randint(0, 12)):
        kind = draw.random()
        if kind < 0.1:
            lines.append(draw.choice([".", "..", ".x", "", " ", "\t", "From me", "--", "--=_ff_"]))
        elif kind < 0.15:
            lines.append("x" * draw.choice([75, 76, 77, 997, 998, 999, 1500]))
        elif kind < 0.2:
            lines.append(any_text(draw, 1100))
        else:
            lines.append(any_text(draw, 90) + draw.choice(["", " ", "\t", "="]))
    return draw.choice(["\n", "\n", "\r\n", "\r"]).join(lines) + draw.choice(["", "\n", "\r\n"])


def any_message(draw: random.Random) -> Message:
    html = any_body(draw) if draw.random() < 0.8 else None
    text = any_body(draw) if html is None or draw.random() < 0.8 else None
    name = any_text(draw, draw.choice([10, 40, 120])) if draw.random() < 0.8 else None
    return message(
        send_id=f"{draw.getrandbits(32):08x}-1111-5222-8333-{draw.getrandbits(48):012x}",
        to_address=draw.choice(["a@b.example", "first.last+tag@mail.example", "x_y-z@q.w.example"]),
        to_name=name,
        sender=Sender(
            "news@acme.example", any_text(draw, 60), draw.choice([None, "re@acme.example"])
        ),
        content=Content(any_text(draw, draw.choice([20, 60, 300])), html, text),
        unsubscribe_url=draw.choice([None, "https://u.example/t/" + "k" * draw.randint(1, 300)]),
        headers=draw.choice([{}, {"X-Campaign": any_text(draw, 100)}]),
    )


def decoded(header: str) -> str:
    """A header's value, unfolded and with its encoded words read."""
    unfolded = re.sub(r"\r?\n(?=[ \t])", "", header)
    return str(email.header.make_header(email.header.decode_header(unfolded)))


def mailbox(header: str) -> tuple[str, str]:
    name, address = email.utils.parseaddr(re.sub(r"\r?\n(?=[ \t])", "", header))
    return spaced(decoded(name)), address


def spaced(text: str) -> str:
    """As a header can say it: no control characters, single spaces."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())


def modern_parser_agrees(raw: bytes, sent: Message) -> None:
    """The newer parser, ten times slower, on a part of the messages.

    Python 3.11's keeps the white space between encoded words of a name, which RFC 2047, 6.2
    says to ignore; hence names are compared without any.
    """
    parsed = read(raw)
    (to,) = parsed["To"].addresses
    assert to.addr_spec == sent.to_address
    assert "".join(to.display_name.split()) == "".join(spaced(sent.to_name or "").split())
    assert spaced(parsed["Subject"]) == spaced(sent.content.subject)
    assert parsed["Message-ID"] == f"<{sent.send_id}@acme.example>"
    body = parsed.get_body(("html", "plain"))
    assert body is not None and not body.defects


def test_ten_thousand_messages_are_read_back_as_they_were_meant() -> None:
    draw = random.Random(5322)
    encodings: set[str] = set()
    for n in range(10_000):
        sent = any_message(draw)
        eight_bit = n % 2 == 0
        try:
            raw = write(sent, eight_bit=eight_bit)
        except Unsendable as error:
            assert error.reason == "invalid-header"
            assert not all(value.isprintable() for value in sent.headers.values())
            continue
        assert raw.endswith(b"\r\n")
        assert b"\n" not in raw.replace(b"\r\n", b"") and b"\r" not in raw.replace(b"\r\n", b"")
        assert eight_bit or raw.isascii()
        assert max(map(len, raw.split(b"\r\n"))) <= 998
        head, _, _ = raw.partition(b"\r\n\r\n")
        assert head.isascii()
        for line in head.split(b"\r\n"):
            assert len(line) <= 76 or b"=?" not in line
            assert line.strip(), "no header line of white space alone"
        parsed = email.message_from_bytes(raw)
        assert not parsed.defects
        assert mailbox(parsed["To"]) == (spaced(sent.to_name or ""), sent.to_address)
        assert mailbox(parsed["From"]) == (spaced(sent.sender.name), "news@acme.example")
        assert spaced(decoded(parsed["Subject"])) == spaced(sent.content.subject)
        assert parsed["Message-ID"] == f"<{sent.send_id}@acme.example>"
        assert parsed["X-Fanfare-Send-Id"] == sent.send_id
        assert parsed["X-Fanfare-Run"] == "r1"
        assert (parsed["Reply-To"] is None) == (sent.sender.reply_to is None)
        assert parsed.get("List-Unsubscribe") == (
            f"<{sent.unsubscribe_url}>" if sent.unsubscribe_url else None
        )
        assert (parsed.get("List-Unsubscribe-Post") is not None) == bool(sent.unsubscribe_url)
        for name, value in sent.headers.items():
            assert spaced(decoded(parsed[name])) == spaced(value)
        both = sent.content.html is not None and sent.content.text is not None
        parts = cast(list[email.message.Message], parsed.get_payload()) if both else [parsed]
        meant = [("plain", sent.content.text), ("html", sent.content.html)]
        meant = [(kind, body) for kind, body in meant if body is not None]
        assert [p.get_content_subtype() for p in parts] == [kind for kind, _ in meant]
        for part, (_, body) in zip(parts, meant, strict=True):
            assert part.get_content_charset() == "utf-8"
            assert not part.defects
            encodings.add(part["Content-Transfer-Encoding"])
            found, wanted = body_of(part), lines_of(cast(str, body))
            if not both and found.endswith("\r\n") != wanted.endswith("\r\n"):
                found = found.removesuffix("\r\n")  # a message ends with a line end of its own
                wanted = wanted.removesuffix("\r\n")
            assert found == wanted
        if n % 25 == 0:
            modern_parser_agrees(raw, sent)
        stuffed = dot_stuffed(raw)
        assert b"\r\n.\r\n" not in stuffed and not stuffed.startswith(b".\r\n")
        assert (
            b"".join(
                line[1:] if line.startswith(b".") else line for line in stuffed.splitlines(True)
            )
            == raw
        )
    assert encodings == {"7bit", "8bit", "quoted-printable", "base64"}


@pytest.mark.parametrize(
    ("body", "eight_bit", "encoding"),
    [
        ("plain\n", True, "7bit"),
        ("plain\n", False, "7bit"),
        ("na\u00efve caf\u00e9 in a text that is mostly English\n", True, "8bit"),
        ("na\u00efve caf\u00e9 in a text that is mostly English\n", False, "quoted-printable"),
        ("x" * 998 + "\n", True, "7bit"),
        ("x" * 999 + "\n", True, "quoted-printable"),
        ("\u4e2d" * 998, True, "base64"),
        ("\u4e2d\u6587\n", False, "base64"),
        ("nul \0 in it and the rest is plain", True, "base64"),
    ],
)
def test_the_encoding_suits_the_content(body: str, eight_bit: bool, encoding: str) -> None:
    parsed = read(write(message(content=Content("s", None, body)), eight_bit=eight_bit))
    assert parsed["Content-Transfer-Encoding"] == encoding
    assert body_of(parsed).removesuffix("\r\n") == lines_of(body).removesuffix("\r\n")


def test_a_body_cannot_end_its_part_by_quoting_the_boundary() -> None:
    boundary = build_skeleton("acme", "r1", "email", Sender("a@b.example", ""), {}).boundary
    evil = f"x\n--{boundary}--\n\n--{boundary}\nContent-Type: text/html\n\n<b>evil</b>\n"
    for eight_bit in (True, False):
        for extra in ("", "\u00e9"):
            sent = message(content=Content("s", "<p>" + evil + extra, evil + extra))
            parts = list(read(write(sent, eight_bit=eight_bit)).iter_parts())
            assert [p.get_content_type() for p in parts] == ["text/plain", "text/html"]
            assert body_of(parts[0]) == lines_of(evil + extra)


@pytest.mark.parametrize(
    "evil",
    [
        "a\r\nBcc: x@evil.example",
        "a\nBcc: x",
        "a\rBcc: x",
        "a\x00b",
        "a\u2028Bcc: x",
        "a\r\n\r\nbody",
    ],
)
def test_nothing_that_is_personal_adds_a_header(evil: str) -> None:
    sent = message(
        to_name=evil, sender=Sender("a@b.example", evil), content=Content(evil, None, evil)
    )
    parsed = read(write(sent))
    assert parsed["Bcc"] is None
    assert len(parsed["To"].addresses) == len(parsed["From"].addresses) == 1
    expected = {
        "from", "to", "subject", "date", "message-id", "mime-version", "content-type",
        "content-transfer-encoding", "x-fanfare-run", "x-fanfare-send-id", "x-fanfare-tenant",
        "x-fanfare-leg", "list-unsubscribe",
        "list-unsubscribe-post",
    }  # fmt: skip
    assert {name.lower() for name in parsed} == expected


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("a@b.example", "a@b.example"),
        ("first.last+tag@mail.b.example", "first.last+tag@mail.b.example"),
        ("o'hara!#$%&*/=?^_`{|}~-@b.example", "o'hara!#$%&*/=?^_`{|}~-@b.example"),
        ("jose@b\u00fccher.example", "jose@xn--bcher-kva.example"),
        ("jose@stra\u00dfe.example", "jose@xn--strae-oqa.example"),
        ("jos\u00e9@b.example", "jos\u00e9@b.example"),
        ("\u7528\u6237@\u4f8b\u5b50.example", "\u7528\u6237@xn--fsqu00a.example"),
        ("a" * 64 + "@b.example", "a" * 64 + "@b.example"),
    ],
)
def test_addresses_are_written_for_the_wire(address: str, written: str) -> None:
    assert envelope_address(address) == written


@pytest.mark.parametrize(
    "address",
    [
        "", "a", "@", "a@", "@b.example", "a@b", "a@@b.example", "a b@c.example", "a@b c.example",
        ".a@b.example", "a.@b.example", "a..b@c.example", "<a@b.example>", "a@b.example>",
        "a@b.example\r\nRCPT TO:<x@y.example>", "a\n@b.example", "a\0@b.example", "a@b.example\n",
        '"a b"@c.example', "a@[127.0.0.1]", "a@127.0.0.1", "a@-b.example", "a@b-.example",
        "a@b..example", "a@.example", "a@b.example.", "a,b@c.example", "a;b@c.example",
        "a(b)@c.example", "a\\@b.example", "\u2028@b.example",
        "a\u00a0b@c.example", "\ud800@b.example",
        "a" * 65 + "@b.example", "a@" + "b" * 64 + ".example", "a@" + "b." * 126 + "example",
        "a@\u00e9\u2028.example", "\u00e9" * 33 + "@b.example", "a@b.example, c@d.example",
    ],
)  # fmt: skip
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(Unsendable) as caught:
        envelope_address(address)
    assert caught.value.reason == "malformed-address"
    assert not address or len(address) < 3 or address not in str(caught.value)


def test_an_address_that_is_not_ascii_stays_utf8_in_its_header() -> None:
    sent = message(to_address="jos\u00e9@b\u00fccher.example")
    raw = write(sent)
    assert "To: Ann <jos\u00e9@xn--bcher-kva.example>\r\n".encode() in raw
    skeleton = build_skeleton("t", "r", "l", Sender("jos\u00e9@b.example", "J"), {})
    assert skeleton.needs_smtputf8
    assert not build_skeleton("t", "r", "l", Sender("jose@b.example", "J\u00e9"), {}).needs_smtputf8


@pytest.mark.parametrize(
    "url",
    ["http://x.example/t", "https://", "https://x/a b", "https://x/>", "https://x/\r\nBcc: y",
     "https://x/<", "https://x/\u00e9", "javascript:x", "https://x/" + "a" * 900,
     "https://x/\\", ""],
)  # fmt: skip
def test_an_unsubscribe_url_must_be_plain_https(url: str) -> None:
    with pytest.raises(Unsendable, match="https"):
        checked_unsubscribe_url(url)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("From", "x"), ("bcc", "x"), ("Content-Type", "x"), ("content-language", "x"), ("X A", "x"),
        ("X-A:", "x"), ("", "x"), ("X-A\r\nB", "x"), ("X-A", "x\r\nBcc: y"), ("X-A", "\0"),
        ("X-\u00e9", "x"), ("X-A", "x" * 901), ("x-fanfare-ref", "x"),
        ("List-Unsubscribe", "x"), ("DKIM-Signature", "x"),
    ],
)  # fmt: skip
def test_headers_that_would_break_or_replace_ours_are_refused(name: str, value: str) -> None:
    with pytest.raises(Unsendable):
        checked_headers({name: value})


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (None, "a@b.example"), ("", "a@b.example"), ("\r\n", "a@b.example"),
        ("Ann Lee", "Ann Lee <a@b.example>"), ("Acme, Inc.", '"Acme, Inc." <a@b.example>'),
        ('A "B" \\', '"A \\"B\\" \\\\" <a@b.example>'),
        ("Zo\u00eb", "=?utf-8?b?Wm/Dqw==?= <a@b.example>"),
        ("=?x?q?y?=", "=?utf-8?b?PT94P3E/eT89?= <a@b.example>"),
    ],
)  # fmt: skip
def test_names_are_written_so_that_they_stay_names(name: str | None, written: str) -> None:
    assert encode_mailbox(name, "a@b.example", 4) == written


def test_a_plain_subject_stays_readable_and_long_ones_fold() -> None:
    assert encode_text("20% off", 9) == "20% off"
    assert encode_text("word " * 30, 9).count("\r\n ") == 2
    assert "=?" in encode_text("x" * 200, 9)
    assert "=?" in encode_text("Gr\u00fc\u00dfe", 9)


def test_ids_must_be_ids() -> None:
    for changes in (
        {"send_id": "x>\r\nBcc: y"},
        {"reference": "1.2.3\r\nBcc: y"},
        {"reference": "1"},
    ):
        with pytest.raises(Unsendable):
            write(message(**changes))
