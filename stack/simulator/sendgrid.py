"""SendGrid's v3 ``POST /v3/mail/send``: the checks, answers and limits of the real one.

Messages and limits follow https://www.twilio.com/docs/sendgrid/api-reference/mail-send and its
page of errors. Our id travels in ``personalizations[].custom_args.ff_send_id`` (with ``ff_run``
and ``ff_leg``), which SendGrid flattens into the events.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

from stack.simulator.connection import now_ms
from stack.simulator.faults import UNANSWERED, Allowance, Fault, FaultKind
from stack.simulator.http_wire import Head, HttpConnection, response

if TYPE_CHECKING:
    from stack.simulator.provider import Simulator

PATH = "/v3/mail/send"
MAX_PERSONALIZATIONS = 1000
MAX_RECIPIENTS = 1000
MAX_CUSTOM_ARGS_BYTES = 10_000

_HELP = "http://sendgrid.com/docs/API_Reference/Web_API_v3/Mail/errors.html#"
_ADDRESS = re.compile(r"[^\s@<>\",;:\\]+@[^\s@<>\",;:\\]+")
_RESERVED_HEADERS = frozenset(
    {
        "x-sg-id",
        "x-sg-eid",
        "received",
        "dkim-signature",
        "content-type",
        "content-transfer-encoding",
        "to",
        "from",
        "subject",
        "reply-to",
        "cc",
        "bcc",
    }
)

Problem = dict[str, str | None]


def _problem(message: str, field: str | None = None, anchor: str | None = None) -> Problem:
    return {
        "message": message,
        "field": field,
        "help": None if anchor is None else _HELP + anchor,
    }


def _is_address(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(email := value.get("email"), str)
        and _ADDRESS.fullmatch(email) is not None
    )


def validate(mail: object) -> list[Problem]:
    """What the real one would object to; empty if the mail would be accepted."""
    if not isinstance(mail, dict):
        return [_problem("Bad Request")]
    problems: list[Problem] = []
    personalizations = mail.get("personalizations")
    if not isinstance(personalizations, list) or not personalizations:
        problems.append(
            _problem(
                "The personalizations field is required and must have at least one"
                " personalization.",
                "personalizations",
                "-Personalizations-Errors",
            )
        )
        personalizations = []
    elif len(personalizations) > MAX_PERSONALIZATIONS:
        problems.append(
            _problem(
                f"The personalizations field can have at most {MAX_PERSONALIZATIONS}"
                " personalizations.",
                "personalizations",
                "-Personalizations-Errors",
            )
        )
        personalizations = []
    common = mail.get("custom_args")
    _check_arguments(common, None, "custom_args", problems)
    seen: set[str] = set()
    subjects = True
    for index, person in enumerate(personalizations):
        if not isinstance(person, dict):
            problems.append(_problem("Bad Request", f"personalizations.{index}"))
            continue
        _check_recipients(person, index, seen, problems)
        own = person.get("custom_args")
        if own is not None:
            _check_arguments(own, common, f"personalizations.{index}.custom_args", problems)
        if headers := person.get("headers"):
            _check_headers(headers, f"personalizations.{index}.headers", problems)
        if not (isinstance(subject := person.get("subject"), str) and subject):
            subjects = False
    if len(seen) > MAX_RECIPIENTS:
        problems.append(
            _problem(
                f"The total number of recipients must be at most {MAX_RECIPIENTS}.",
                "personalizations",
                "message.recipient-errors",
            )
        )
    if headers := mail.get("headers"):
        _check_headers(headers, "headers", problems)
    sender = mail.get("from")
    if not isinstance(sender, dict) or not sender.get("email"):
        problems.append(
            _problem(
                "The from object must be provided for every email send. It is an object that"
                " requires the email parameter, but may also contain a name parameter.  e.g."
                ' {"email" : "example@example.com"}  or {"email" : "example@example.com",'
                ' "name" : "Example Recipient"}.',
                "from.email",
                "message.from",
            )
        )
    elif not _is_address(sender):
        problems.append(
            _problem(
                "The from email does not contain a valid address.", "from.email", "message.from"
            )
        )
    template = mail.get("template_id")
    subject = mail.get("subject")
    if not (isinstance(subject, str) and subject) and not template and not subjects:
        problems.append(
            _problem(
                "The subject is required. You can get around this requirement if you use a"
                " template with a subject defined or if every personalization has a subject"
                " defined.",
                "subject",
                "message.subject",
            )
        )
    _check_content(mail.get("content"), template, problems)
    return problems


def _check_recipients(
    person: dict[str, Any], index: int, seen: set[str], problems: list[Problem]
) -> None:
    recipients = person.get("to")
    if not isinstance(recipients, list) or not recipients:
        problems.append(
            _problem(
                "The to array is required for all personalization objects, and must have at"
                " least one email object with a valid email address.",
                f"personalizations.{index}.to",
                "message.personalizations.to",
            )
        )
        return
    for kind in ("to", "cc", "bcc"):
        people = person.get(kind)
        if people is None:
            continue
        if not isinstance(people, list):
            problems.append(_problem("Bad Request", f"personalizations.{index}.{kind}"))
            continue
        for position, recipient in enumerate(people):
            if not _is_address(recipient):
                problems.append(
                    _problem(
                        "Does not contain a valid address.",
                        f"personalizations.{index}.{kind}.{position}.email",
                        "message.recipient-errors",
                    )
                )
                continue
            email = recipient["email"].lower()
            if email in seen:
                problems.append(
                    _problem(
                        "Each unique email address in the personalizations array should only be"
                        f" included once. You have included [{recipient['email']}] more than"
                        " once.",
                        f"personalizations.{index}.{kind}",
                        "message.recipient-errors",
                    )
                )
            seen.add(email)


def _check_arguments(own: object, common: object, field: str, problems: list[Problem]) -> None:
    if own is None:
        return
    if not isinstance(own, dict) or not all(isinstance(value, str) for value in own.values()):
        problems.append(
            _problem(
                "The custom_args must be an object whose values are strings.",
                field,
                "message.custom_args",
            )
        )
        return
    merged = {**common, **own} if isinstance(common, dict) else own
    # A character takes at most six bytes in JSON: most mails need no serialising.
    most = sum(len(key) + len(value) + 6 for key, value in merged.items()) * 6
    if most > MAX_CUSTOM_ARGS_BYTES and len(orjson.dumps(merged)) > MAX_CUSTOM_ARGS_BYTES:
        problems.append(
            _problem(
                f"The overall size of the custom_args must be at most {MAX_CUSTOM_ARGS_BYTES}"
                " bytes.",
                field,
                "message.custom_args",
            )
        )


def _check_headers(headers: object, field: str, problems: list[Problem]) -> None:
    if not isinstance(headers, dict) or not all(isinstance(v, str) for v in headers.values()):
        problems.append(
            _problem(
                "The headers must be an object whose values are strings.", field, "message.headers"
            )
        )
        return
    for name in headers:
        if name.lower() in _RESERVED_HEADERS:
            problems.append(
                _problem(
                    f"The header {name} is reserved and can't be set.",
                    f"{field}.{name}",
                    "message.headers",
                )
            )


def _check_content(content: object, template: object, problems: list[Problem]) -> None:
    if not content:
        if not template:
            problems.append(
                _problem(
                    "Unless a valid template_id is provided, the content parameter is required."
                    " There must be at least one defined content block. We typically suggest"
                    " both text/plain and text/html blocks are included, but only one block is"
                    " required.",
                    "content",
                    "message.content",
                )
            )
        return
    if not isinstance(content, list):
        problems.append(_problem("Bad Request", "content", "message.content"))
        return
    kinds: list[str] = []
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(kind := block.get("type"), str):
            problems.append(
                _problem(
                    "The content type must be a string at least one character in length.",
                    f"content.{index}.type",
                    "message.content.type",
                )
            )
            continue
        kinds.append(kind)
        if not isinstance(value := block.get("value"), str) or not value:
            problems.append(
                _problem(
                    "The content value must be a string at least one character in length.",
                    f"content.{index}.value",
                    "message.content.value",
                )
            )
    if "text/plain" in kinds[1:] or "text/html" in kinds[2:]:
        problems.append(
            _problem(
                "If present, text/plain and text/html may only be provided once, text/plain"
                " first, followed by text/html, followed by any other content.",
                "content",
                "message.content",
            )
        )


def _run_of(mail: object) -> str:
    """The run of a mail that may be malformed; of its first personalization."""
    if not isinstance(mail, dict):
        return ""
    people = mail.get("personalizations")
    for holder in (people[0] if isinstance(people, list) and people else None, mail):
        args = holder.get("custom_args") if isinstance(holder, dict) else None
        if isinstance(args, dict) and isinstance(run := args.get("ff_run"), str):
            return run
    return ""


def _limit_headers(allowance: Allowance) -> bytes:
    return b"\r\nX-RateLimit-Limit: %d\r\nX-RateLimit-Remaining: %d\r\nX-RateLimit-Reset: %d" % (
        allowance.limit,
        allowance.remaining,
        allowance.reset_s,
    )


class SendGridConnection(HttpConnection):
    """One client's connection to the HTTP provider."""

    provider = "sendgrid"

    def __init__(self, simulator: Simulator) -> None:
        super().__init__(simulator, simulator.config.sendgrid.max_body_bytes)
        self._simulator = simulator
        self._fault: Fault | None = None

    def on_head(self, head: Head) -> None:
        """Draw the request's fault."""
        self._max_body_bytes = self._simulator.config.sendgrid.max_body_bytes
        self._fault = self._simulator.sendgrid_faults.draw(self._simulator.rng)

    def on_part(self, have: int, length: int) -> None:
        """Reset in the middle of the body, if that is the request's fault."""
        fault = self._fault
        if fault is not None and fault.kind is FaultKind.RESET_BEFORE and 2 * have >= length:
            self._simulator.starts.add("", self.started_ms)
            self._strike_before(fault, "")

    def refused(self, status: int) -> None:
        """Count what was refused before it was whole."""
        simulator = self._simulator
        simulator.starts.add("", self.started_ms)
        simulator.refuse("", "too_large" if status == 413 else "malformed")

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a request that never became whole."""
        if self.started_ms and self._buffer and not self.busy and not self.closing:
            self._simulator.starts.add("", self.started_ms)
            self._simulator.refuse("", "incomplete")
        super().connection_lost(exc)

    def _errors(self, run: str, reason: str, status: int, problems: list[Problem]) -> None:
        self._simulator.refuse(run, reason)
        self.answer(response(status, orjson.dumps({"errors": problems})))

    def on_request(self, head: Head, body: bytes, started_ms: int) -> None:
        """Check a request as the real one does, strike with its fault, or accept it."""
        simulator = self._simulator
        fault, self._fault = self._fault, None
        try:
            mail = orjson.loads(body)
        except orjson.JSONDecodeError:
            mail = None
        run = _run_of(mail)
        simulator.starts.add(run, started_ms)
        settings = simulator.config.sendgrid
        if simulator.sendgrid_outage and simulator.outage(settings.outage, run, self):
            return
        if head.target.partition("?")[0] != PATH:
            self._errors(run, "not_found", 404, [_problem("not found")])
            return
        if head.method != "POST":
            self._errors(run, "method", 405, [_problem("method not allowed")])
            return
        key = simulator.sendgrid_key(head.authorization)
        if key is None:
            message = "The provided authorization grant is invalid, expired, or revoked"
            self._errors(run, "unauthorized", 401, [_problem(message)])
            return
        if not head.content_type.startswith("application/json"):
            message = "Content-Type should be application/json."
            self._errors(run, "content_type", 415, [_problem(message)])
            return
        limit = simulator.limiter.take(settings.rate_limit, key, now_ms())
        if limit is not None and not limit.allowed:
            simulator.refuse(run, "rate_limited")
            headers = _limit_headers(limit)
            if settings.rate_limit.retry_after:
                headers += b"\r\nRetry-After: %d" % max(1, limit.reset_s - now_ms() // 1000)
            body = orjson.dumps({"errors": [_problem("too many requests")]})
            self.answer(response(429, body, headers))
            return
        if problems := validate(mail):
            self._errors(run, "invalid", 400, problems)
            return
        rules = simulator.sendgrid_rules
        if rules:
            for index, person in enumerate(mail["personalizations"]):
                rule = rules.match(person["to"][0]["email"])
                if rule is not None and rule.action == "reject":
                    field = f"personalizations.{index}.to.0.email"
                    problem = _problem(rule.message, field, "message.recipient-errors")
                    self._errors(run, "rule", 400, [problem])
                    return
        if fault is not None and self._strike_before(fault, run):
            return
        message_id = simulator.next_message_id()
        ids = self._accept(mail, message_id, body, fault)
        headers = b"\r\nX-Message-Id: " + message_id.encode()
        if limit is not None:
            headers += _limit_headers(limit)
        answer = response(202, b"", headers)
        latency = simulator.sendgrid_latency
        if fault is None and latency is None:
            self.answer(answer)
            return
        self.open_ids = ids
        simulator.finish(self, fault, answer, settings.faults, latency, _status_answer)

    def _strike_before(self, fault: Fault, run: str) -> bool:
        """Strike with a fault that comes before acceptance; False if it comes after."""
        simulator = self._simulator
        match fault.kind:
            case FaultKind.ERROR:
                simulator.struck(fault, self.provider)
                simulator.refuse(run, f"error_{fault.status}")
                latency = simulator.sendgrid_latency
                answer = _status_answer(fault.status)
                if latency is None:
                    self.answer(answer)
                else:
                    self.answer_later(answer, latency(simulator.rng))
            case FaultKind.HANG_BEFORE:
                simulator.struck(fault, self.provider)
                simulator.refuse(run, "hang_before")
                self.hang()
            case FaultKind.RESET_BEFORE:
                simulator.struck(fault, self.provider)
                simulator.refuse(run, "reset_before")
                self.reset()
            case _:
                return False
        return True

    def _accept(
        self, mail: dict[str, Any], message_id: str, body: bytes, fault: Fault | None
    ) -> list[str]:
        simulator = self._simulator
        accepted_ms = now_ms()
        label = fault.kind.value if fault is not None and fault.kind in UNANSWERED else None
        common = mail.get("custom_args")
        people = mail["personalizations"]
        ids: list[str] = []
        for index, person in enumerate(people):
            arguments = person.get("custom_args") or {}
            if common:
                arguments = {**common, **arguments}
            ids.append(
                simulator.accept(
                    send_id=arguments.get("ff_send_id", ""),
                    run=arguments.get("ff_run", ""),
                    address=person["to"][0]["email"],
                    at_ms=accepted_ms,
                    provider=self.provider,
                    message_id=message_id,
                    index=index,
                    arguments=arguments,
                    fault=label,
                    body=body,
                    smtp_id=f"<{message_id}@geopod-ismtpd-sim>",
                )
            )
        return ids


def _status_answer(status: int) -> bytes:
    return response(status, orjson.dumps({"errors": [_problem(f"simulated status {status}")]}))
