"""What a rendered message costs before it is sent: ``python -m bench.rendering``.

Microseconds of CPU for a 3 KB template with 10 variables, one condition and 3 links; the same in
plain Jinja2 without our limits; MIME in its encodings, beside the standard library; tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from email.message import EmailMessage

import jinja2

from schemas.message import Content, Message, Sender
from transforms.mime import assemble, build_skeleton, dot_stuffed, envelope_address
from transforms.rendering import TemplateSource, compile_template, render
from transforms.unsubscribe import make_token, read_token

SECONDS = 1.0
PARAGRAPH = "<p>Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod</p>\n"
HTML = (
    "<html><body><h1>Dear {{ first_name }} {{ last_name }}</h1>\n"
    + PARAGRAPH * 17
    + "{% if points > 100 %}<b>{{ points }} points in {{ city }}</b>{% endif %}\n"
    + "<a href='https://x.example/1?c={{ code }}'>{{ offer }}</a>\n"
    + PARAGRAPH * 17
    + "<a href='{{ link }}'>{{ company }}</a> {{ expires }}\n"
    + "<a href='{{ unsubscribe_url }}'>Unsubscribe</a></body></html>\n"
)
SUBJECT = "{{ first_name }}, {{ offer }}"
PERSON: dict[str, object] = {
    "first_name": "Zo\u00eb",
    "last_name": "O'Hara",
    "points": 1250,
    "city": "K\u00f6ln",
    "code": "A1B2C3",
    "offer": "20% off & more",
    "link": "https://x.example/2?a=1&b=2",
    "company": "Acme",
    "expires": "2026-12-01",
    "unsubscribe_url": "https://u.acme.example/t/abcdefghijklmnopqrstuvwxyz",
}
DATE = "Fri, 20 Nov 2026 12:00:00 +0000"


def _measure(work: Callable[[], object]) -> float:
    """CPU µs a call."""
    work()
    count = 0
    began = time.process_time()
    while (spent := time.process_time() - began) < SECONDS:
        for _ in range(100):
            work()
        count += 100
    return spent / count * 1e6


def _message(html: str) -> Message:
    return Message(
        send_id="11111111-2222-5333-8444-555555555555",
        tenant="acme",
        run="spring-1",
        leg="email",
        to_address="ann@example.com",
        to_name="Zo\u00eb \u00c5ngstr\u00f6m",
        sender=Sender("news@acme.example", "Acme"),
        content=Content("Zo\u00eb, 20% off", html, "Dear Zo\u00eb\n"),
        unsubscribe_url=str(PERSON["unsubscribe_url"]),
    )


def run() -> dict[str, float]:
    """Measure everything; {name: µs}."""
    compiled = compile_template(TemplateSource(SUBJECT, HTML))
    plain = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    plain_html, plain_subject = plain.from_string(HTML), plain.from_string(SUBJECT)
    html = render(compiled, PERSON).html or ""
    message, long_line = _message(html), _message(html.replace("\n", ""))
    chinese = _message("\u4e2d\u6587" * 500)
    skeleton = build_skeleton("acme", "spring-1", "email", message.sender, {})
    secret = b"s" * 32
    token = make_token(secret, "acme", "recipient-1", "offers", "email")

    def mime(sent: Message, *, eight_bit: bool) -> bytes:
        address = envelope_address(sent.to_address)
        return dot_stuffed(assemble(skeleton, sent, address, DATE, eight_bit=eight_bit))

    def standard_library() -> bytes:
        mail = EmailMessage()
        mail["From"], mail["To"] = "Acme <news@acme.example>", "Zo\u00eb <ann@example.com>"
        mail["Subject"], mail["Message-ID"] = "Zo\u00eb, 20% off", "<1@acme.example>"
        mail.set_content("Dear Zo\u00eb\n")
        mail.add_alternative(html, subtype="html")
        return mail.as_bytes()

    work: dict[str, Callable[[], object]] = {
        "render, metered": lambda: render(compiled, PERSON),
        "render, metered, with a clock": lambda: render(compiled, PERSON, clock=time.monotonic),
        "render, plain Jinja2": lambda: (
            plain_subject.render(PERSON),
            plain_html.render(PERSON),
        ),
        "MIME, 8bit": lambda: mime(message, eight_bit=True),
        "MIME, quoted-printable": lambda: mime(message, eight_bit=False),
        "MIME, long line": lambda: mime(long_line, eight_bit=True),
        "MIME, base64": lambda: mime(chinese, eight_bit=False),
        "MIME, standard library": standard_library,
        "make an unsubscribe token": lambda: make_token(secret, "acme", "r-1", "offers", "email"),
        "read an unsubscribe token": lambda: read_token(secret, token),
    }
    figures: dict[str, float] = {}
    for name, one in work.items():
        figures[name] = round(_measure(one), 1)
        print(f"{name:32} {figures[name]:8.1f} µs", file=sys.stderr, flush=True)
    print(f"message of {len(html)} characters", file=sys.stderr)
    return figures


if __name__ == "__main__":
    print(json.dumps(run()))
