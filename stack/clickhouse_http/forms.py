"""Multipart bodies: form-encoded queries and external tables.

A part without a file name is a request parameter (``query``, ``param_…``); one with a file name is
an external table, described by the parameters ``NAME_structure`` or ``NAME_types`` and
``NAME_format``, as in ClickHouse's HTTP interface ("external data for query processing").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP

from stack.clickhouse_http.failures import BAD_ARGUMENTS, QueryFailed


@dataclass(frozen=True, slots=True)
class Form:
    """A parsed multipart body: plain fields, and files by name."""

    fields: Mapping[str, str]
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class ExternalTable:
    """A table sent with a query: its columns as in CREATE TABLE, its format, its bytes."""

    name: str
    structure: str
    format: str
    data: bytes


def parse_form(content_type: str, body: bytes) -> Form:
    """Parse a multipart/form-data body. Raises QueryFailed (36) if it is none."""
    head = f"Content-Type: {content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode("latin-1")
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    if not message.is_multipart():
        raise QueryFailed.of(BAD_ARGUMENTS, "The body is not the multipart form it says to be")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for part in message.walk():
        name = part.get_param("name", header="content-disposition")
        if part.is_multipart() or not isinstance(name, str):
            continue
        payload = part.get_payload(decode=True)
        data = payload if isinstance(payload, bytes) else b""
        if part.get_filename() is None:
            fields[name] = data.decode("utf-8", "surrogateescape")
        else:
            files[name] = data
    return Form(fields, files)


def external_tables(form: Form, params: dict[str, str]) -> list[ExternalTable]:
    """Take the description of each file out of ``params`` and return the tables.

    Raises QueryFailed (36) if a file has neither structure nor types.
    """
    tables = []
    for name, data in form.files.items():
        structure = params.pop(f"{name}_structure", "")
        types = params.pop(f"{name}_types", "")
        format_name = params.pop(f"{name}_format", "TabSeparated")
        if not structure and not types:
            raise QueryFailed.of(
                BAD_ARGUMENTS,
                f"External table {name} has no columns: pass {name}_structure or {name}_types",
            )
        if not structure:
            structure = ", ".join(f"_{i} {t}" for i, t in enumerate(split_types(types), 1))
        tables.append(ExternalTable(name, structure, format_name, data))
    return tables


def split_types(types: str) -> list[str]:
    """Split a list of types at the commas outside of brackets."""
    found: list[str] = []
    depth, start = 0, 0
    for index, character in enumerate(types):
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            found.append(types[start:index].strip())
            start = index + 1
    return [*found, types[start:].strip()]
