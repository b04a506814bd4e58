"""From a template and one person's attributes to a subject, HTML and text.

Templates are a tenant's: trusted to say what they like, not to take the machine. Jinja's sandbox
keeps them from Python; it does not bound their work ('the sandbox alone is no solution for
perfect security', Jinja's sandbox documentation), so this module does, in four ways:

- what is not on a list of allowed syntax, filters and methods does not compile or run;
- every loop, macro, filter, string and list operation is charged to a `Meter` that stops it,
  whether or not it prints anything;
- values that could hide exponential size (containers in containers) can't be made or printed;
- a clock, if one is given, is read every `_STEPS_A_LOOK` steps that the meter is charged.

Counting is deterministic: the same template and attributes pass or fail alike on every replay.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import wraps
from itertools import islice
from types import TracebackType
from typing import Any, NoReturn, cast

import orjson
from jinja2 import StrictUndefined, TemplateError, Undefined, UndefinedError, nodes, pass_context
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from schemas.errors import Corrupt, InvalidTemplate, RenderingFailed
from schemas.message import Content

Clock = Callable[[], float]
"""A monotonic clock in seconds."""

_PARTS = ("subject", "html", "text")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one template may be and do; one rendering of all its parts shares one budget.

    `steps`: one for each loop iteration, macro call and filter call, one for each item that a
    filter goes through, and one for each 256 characters of a string worked on.
    `output_chars`: characters printed or built on the way, static text in loops included.
    """

    source_chars: int = 262_144
    output_chars: int = 1_048_576
    subject_chars: int = 500
    steps: int = 50_000
    items: int = 1_000
    wall: dt.timedelta = dt.timedelta(milliseconds=100)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """What a tenant wrote. At least one of `html` and `text` is present."""

    subject: str
    html: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class CompiledTemplate:
    """A template that is ready to render; immutable and safe to share between threads.

    `variables` are all names that the template looks up, guarded by a default or not.
    """

    template_id: str
    variables: frozenset[str]
    limits: Limits
    subject: Template
    html: Template | None
    text: Template | None


def canonical_bytes(source: TemplateSource) -> bytes:
    """The bytes that name a template: JSON, keys sorted, UTF-8, no spaces.

    Raises:
        InvalidTemplate: the source holds characters that are no Unicode text.
    """
    try:
        return orjson.dumps({"html": source.html, "subject": source.subject, "text": source.text})
    except TypeError:
        raise InvalidTemplate("a template must be valid Unicode: it holds a surrogate") from None


def template_id(source: TemplateSource) -> str:
    """SHA-256 of the canonical bytes, in hex."""
    return hashlib.sha256(canonical_bytes(source)).hexdigest()


def parse_source(content: bytes) -> TemplateSource:
    """Read canonical bytes back.

    Raises:
        InvalidTemplate: the bytes are no template record.
    """
    try:
        record = orjson.loads(content)
        subject, html, text = record["subject"], record["html"], record["text"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise InvalidTemplate("a template record must be JSON with subject, html, text") from None
    if not isinstance(subject, str) or not all(
        v is None or isinstance(v, str) for v in (html, text)
    ):
        raise InvalidTemplate("subject, html and text of a template must be strings")
    return TemplateSource(subject, html, text)


def explain_variables(source: TemplateSource) -> set[str]:
    """The variables that a template looks up, so that a launch can be refused without them.

    Raises:
        InvalidTemplate: as `compile_template`.
    """
    return set(compile_template(source).variables)


def compile_template(source: TemplateSource, limits: Limits = DEFAULT_LIMITS) -> CompiledTemplate:
    """Check and compile all parts of a template (milliseconds; do it once and keep it).

    Raises:
        InvalidTemplate: naming part, line and reason.
    """
    if source.html is None and source.text is None:
        raise InvalidTemplate("a template needs an html or a text part, or both")
    identity = template_id(source)
    variables: set[str] = set()
    subject = _compile_part("subject", source.subject, limits, variables)
    html = None if source.html is None else _compile_part("html", source.html, limits, variables)
    text = None if source.text is None else _compile_part("text", source.text, limits, variables)
    return CompiledTemplate(identity, frozenset(variables), limits, subject, html, text)


def render(
    compiled: CompiledTemplate, variables: Mapping[str, Any], *, clock: Clock | None = None
) -> Content:
    """Render all parts for one person.

    Args:
        variables: plain data (text, numbers, booleans, dates, lists and dicts of those). A
            top-level variable that is None counts as not set.
        clock: monotonic seconds; when given, rendering is stopped after `Limits.wall`.

    Raises:
        RenderingFailed: naming part, line, and the variable that is not set or the limit that
            was passed. Attribute values never appear in it.
    """
    limits = compiled.limits
    meter = Meter(limits, clock)
    values: dict[str, Any] = {**_GLOBALS, **variables}
    if None in values.values():
        values = {name: value for name, value in values.items() if value is not None}
    subject = _render_part("subject", compiled.subject, values, meter)
    html = _render_part("html", compiled.html, values, meter) if compiled.html else None
    text = _render_part("text", compiled.text, values, meter) if compiled.text else None
    subject = clean_header_text(subject)
    if not subject:
        raise RenderingFailed("subject: renders to nothing")
    if len(subject) > limits.subject_chars:
        raise RenderingFailed(f"subject: longer than {limits.subject_chars} characters")
    return Content(subject, html, text)


def clean_header_text(text: str) -> str:
    """One line for a header: runs of white space become a space, control characters go."""
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()
    return " ".join(_CONTROLS.sub(" ", text).split())


class TemplateCache:
    """The most recently used compiled templates, by id. Not for concurrent use."""

    def __init__(self, capacity: int = 256, limits: Limits = DEFAULT_LIMITS) -> None:
        self._capacity = capacity
        self._limits = limits
        self._compiled: OrderedDict[str, CompiledTemplate] = OrderedDict()

    def get(self, identity: str) -> CompiledTemplate | None:
        """The compiled template, or None when it must be fetched and added."""
        found = self._compiled.get(identity)
        if found is not None:
            self._compiled.move_to_end(identity)
        return found

    def add(self, identity: str, content: bytes) -> CompiledTemplate:
        """Compile and keep the template whose canonical bytes are `content`.

        Raises:
            Corrupt: the bytes are not those that `identity` names.
            InvalidTemplate: they are, but no usable template.
        """
        if hashlib.sha256(content).hexdigest() != identity:
            raise Corrupt(f"template {identity}: the stored bytes have another SHA-256")
        compiled = compile_template(parse_source(content), self._limits)
        self._compiled[identity] = compiled
        while len(self._compiled) > self._capacity:
            self._compiled.popitem(last=False)
        return compiled

    def __len__(self) -> int:
        return len(self._compiled)


class Meter:
    """The budget of one rendering."""

    __slots__ = ("_clock", "_look_at", "_until", "limits", "room", "steps")

    def __init__(self, limits: Limits, clock: Clock | None) -> None:
        self.limits = limits
        self.steps = limits.steps
        self.room = limits.output_chars
        self._clock = clock
        self._until: float | None = None
        self._look_at = limits.steps - _STEPS_A_LOOK if clock is not None else -1

    def work(self, steps: int) -> None:
        """Charge steps, and look at the clock when enough of them are charged since."""
        self.steps -= steps
        if self.steps < 0:
            raise _Refused(f"does more than {self.limits.steps} steps (loops, filters, macros)")
        if self.steps < self._look_at:
            self._look()

    def _look(self) -> None:
        """The first look starts the time: a short rendering never pays for the clock."""
        if self._clock is None:
            return
        self._look_at = self.steps - _STEPS_A_LOOK
        now = self._clock()
        if self._until is None:
            self._until = now + self.limits.wall.total_seconds()
        elif now > self._until:
            raise _Refused(f"takes longer than {self.limits.wall.total_seconds() * 1000:g} ms")

    def output(self, chars: int) -> None:
        """Charge characters that are printed or built."""
        self.room -= chars
        if self.room < 0:
            raise _Refused(f"makes more than {self.limits.output_chars} characters")


class _Refused(Exception):
    """A limit was passed, or a value used in a way that is not allowed; the text is public."""


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PRINTABLE = (str, int, float, bool, Decimal, dt.date, dt.datetime, dt.time)
_STRING_STEP_CHARS = 256
_STEPS_A_LOOK = 64
"""A processor clock costs as much as a dozen steps; so many take well under a millisecond."""


class _RenderContext(Context):
    meter: Meter

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = cast(_RenderContext, super().derived(locals))
        context.meter = self.meter
        return context


class _StrictUndefined(StrictUndefined):
    """Names a variable, which the template's author wrote, but never a key, which may be data."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        if self._undefined_exception is not UndefinedError:
            return "uses an attribute or method that is not allowed"
        if self._undefined_hint is None and isinstance(self._undefined_name, str):
            if self._undefined_obj is _MISSING:
                return f"variable '{self._undefined_name}' is not set"
            return f"a {type(self._undefined_obj).__name__} lacks an attribute or element"
        return "a value is not set"


_MISSING = StrictUndefined()._undefined_obj


def _require_printable(value: Any) -> None:
    if isinstance(value, Undefined):
        str(value)  # raises, unless it is what `{{ x if y }}` leaves when y is false
        return
    if value is None:
        raise _Refused("prints or joins a value that is null: give it a default")
    if not isinstance(value, _PRINTABLE):
        raise _Refused(f"prints or joins a {type(value).__name__}: only text, numbers and dates")


@pass_context
def _finalize(context: _RenderContext, value: Any) -> Any:
    kind = value.__class__
    if kind is str or kind is Markup:
        context.meter.output(len(value))
    elif kind is not int:
        _require_printable(value)
        context.meter.output(32)
    return value


_SAFE_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset({
        "upper", "lower", "title", "capitalize", "casefold", "swapcase", "strip", "lstrip",
        "rstrip", "startswith", "endswith", "removeprefix", "removesuffix", "split", "rsplit",
        "splitlines", "partition", "rpartition", "find", "rfind", "index", "count", "isdigit",
        "isalpha", "isalnum", "isnumeric", "isupper", "islower", "isspace", "istitle",
    })),
    (dict, frozenset({"items", "keys", "values", "get"})),
    (list, frozenset({"index", "count"})),
    (dt.datetime, frozenset({"isoformat", "date", "time", "weekday", "isoweekday"})),
    (dt.date, frozenset({"isoformat", "weekday", "isoweekday"})),
    (Cycler, frozenset({"next", "reset"})),
)  # fmt: skip


def _is_loop(obj: Any) -> bool:
    return type(obj).__name__ == "LoopContext" and type(obj).__module__ == "jinja2.runtime"


def _length(value: Any) -> int:
    try:
        return len(value)
    except TypeError:
        return 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal)


class _Environment(ImmutableSandboxedEnvironment):
    context_class = _RenderContext
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, autoescape: bool) -> None:
        super().__init__(
            undefined=_StrictUndefined,
            autoescape=autoescape,
            finalize=_finalize,
            keep_trailing_newline=True,
            cache_size=0,
            auto_reload=False,
        )
        self.globals.clear()
        self.filters = dict(_FILTERS)
        self._join = markup_join if autoescape else str_join

    def wrap_str_format(self, value: Any) -> None:
        """Format strings are no allowed methods; see `is_safe_attribute`."""
        return

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if not callable(value) or isinstance(value, Macro | Joiner | Cycler | Undefined):
            return True
        if _is_loop(obj):
            return attr in ("cycle", "changed")
        return any(isinstance(obj, kind) and attr in names for kind, names in _SAFE_METHODS)

    def call(  # type: ignore[override]
        self, context: _RenderContext, function: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        owner = getattr(function, "__self__", None)
        if owner is not self:
            weight = _length(owner) if isinstance(owner, str) else 0
            context.meter.work(1 + weight // _STRING_STEP_CHARS)
        return super().call(context, function, *args, **kwargs)

    def call_binop(  # type: ignore[override]
        self, context: _RenderContext, operator: str, left: Any, right: Any
    ) -> Any:
        for value in (left, right):
            if isinstance(value, Undefined):
                str(value)
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                context.meter.output(len(left) + len(right))
            elif isinstance(left, list) and isinstance(right, list):
                _require_items(context.meter, len(left) + len(right))
        elif not (_is_number(left) and _is_number(right)):
            raise _Refused(f"uses '{operator}' on something that is no number")
        elif operator == "**":
            if abs(right) > 64 or abs(left) > 1_000_000:
                raise _Refused("raises a number to a power that is too large")
        elif (
            operator == "*"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() + right.bit_length() > 512
        ):
            raise _Refused("multiplies numbers that are too large")
        return super().call_binop(context, operator, left, right)

    def metered(self, context: _RenderContext, items: Iterable[Any], chars: int) -> Iterator[Any]:
        """The items of a loop, each charged before the loop's body sees it."""
        meter = context.meter
        for item in items:
            meter.work(1)
            meter.output(chars)
            yield item

    def enter(self, context: _RenderContext, chars: int) -> None:
        """Charge a macro's call."""
        context.meter.work(1)
        context.meter.output(chars)

    def joined(self, context: _RenderContext, *values: Any) -> str:
        """The `~` operator."""
        for value in values:
            _require_printable(value)
            context.meter.output(len(value) if isinstance(value, str) else 32)
        return self._join(values)

    def scalar(self, value: Any) -> Any:
        """An element of a literal: containers in containers could be of exponential size."""
        if isinstance(value, Undefined):
            str(value)
        if value is not None and not isinstance(value, _PRINTABLE):
            raise _Refused(f"puts a {type(value).__name__} into a list, tuple or dict literal")
        return value


def _require_items(meter: Meter, count: int) -> None:
    if count > meter.limits.items:
        raise _Refused(f"makes a sequence of more than {meter.limits.items} items")
    meter.work(count)


# Filters whose result can be far larger than their input say how large, before they run.
def _replaced_chars(value: Any, old: Any = "", new: Any = "", count: Any = None) -> int:
    text, old, new = str(value), str(old), str(new)
    return len(text) + text.count(old) * len(new) * (6 if isinstance(value, Markup) else 1)


def _centered_chars(value: Any, width: int = 80) -> int:
    return max(_length(value), width)


def _joined_chars(value: Any, d: Any = "", attribute: Any = None) -> int:
    for item in value:
        if attribute is None:
            _require_printable(item)
    separators = (_length(value) + 1) * len(str(d))
    return separators + sum(_length(v) if isinstance(v, str) else 32 for v in value)


def _escaped_chars(value: Any) -> int:
    return 6 * _length(value)


def _encoded_chars(value: Any) -> int:
    if not isinstance(value, str):
        _require_printable(value)
    return 9 * _length(value)


_GROWTH: dict[str, Callable[..., int]] = {
    "replace": _replaced_chars,
    "center": _centered_chars,
    "join": _joined_chars,
    "escape": _escaped_chars,
    "e": _escaped_chars,
    "forceescape": _escaped_chars,
    "urlencode": _encoded_chars,
}
_TEXT_FILTERS = frozenset({
    "capitalize", "center", "e", "escape", "forceescape", "lower", "replace", "string",
    "title", "trim", "truncate", "upper", "urlencode", "wordcount",
})  # fmt: skip
_VALUE_FILTERS = frozenset({"abs", "d", "default", "float", "int", "round"})
_LIST_FILTERS = frozenset({
    "count", "dictsort", "first", "items", "join", "last", "length", "list", "map", "max",
    "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "sum", "unique",
})  # fmt: skip


_SIZE_FILTERS = frozenset({"count", "first", "last", "length"})


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not -15 <= precision <= 15:
        raise _Refused("rounds to more than 15 digits")
    return FILTERS["round"](value, precision, method)


def _sum(iterable: Iterable[Any], start: Any = 0) -> Any:
    total = start
    for item in (start, *iterable):
        if not _is_number(item):
            raise _Refused("sums something that is no number")
        total = total + item
    return total - start


def _metered_filter(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = {"sum": _sum, "round": _round}.get(name, FILTERS[name])
    inner = getattr(function, "jinja_pass_arg", None)
    growth = _GROWTH.get(name)
    passed = None if inner is None else inner.name

    @wraps(function)
    def metered(context: _RenderContext, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context.meter
        meter.work(1 + (len(value) // _STRING_STEP_CHARS if isinstance(value, str) else 0))
        if name in _TEXT_FILTERS:
            _require_printable(value)
        if name in _LIST_FILTERS and name not in _SIZE_FILTERS:
            if not isinstance(value, Undefined) and not hasattr(value, "__len__"):
                value = list(islice(value, meter.limits.items + 1))
            _require_items(meter, _length(value))
        if growth is not None:
            meter.output(growth(value, *args, **kwargs))
        if passed == "context":
            return function(context, value, *args, **kwargs)
        if passed == "eval_context":
            return function(context.eval_ctx, value, *args, **kwargs)
        if passed == "environment":
            return function(context.environment, value, *args, **kwargs)
        return function(value, *args, **kwargs)

    return pass_context(metered)


_FILTERS = {name: _metered_filter(name) for name in _TEXT_FILTERS | _VALUE_FILTERS | _LIST_FILTERS}


@pass_context
def _range(context: _RenderContext, *bounds: int) -> list[int]:
    numbers = range(*bounds)
    _require_items(context.meter, len(numbers) if len(bounds) < 4 else 0)
    return list(numbers)


_GLOBALS: dict[str, Any] = {
    "range": _range,
    "namespace": Namespace,
    "cycler": Cycler,
    "joiner": Joiner,
}

_ALLOWED_NODES: tuple[type[nodes.Node], ...] = (
    nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock,
    nodes.FilterBlock, nodes.With, nodes.Assign, nodes.AssignBlock, nodes.Name, nodes.NSRef,
    nodes.Const, nodes.TemplateData, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair,
    nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem,
    nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.BinExpr,
    nodes.UnaryExpr,
)  # fmt: skip
_STATEMENTS: dict[type[nodes.Node], str] = {
    nodes.Include: "include", nodes.Import: "import", nodes.FromImport: "from … import",
    nodes.Extends: "extends", nodes.Block: "block", nodes.Scope: "autoescape",
}  # fmt: skip
_FORBIDDEN_NAMES = frozenset({"self", "super", "varargs", "kwargs"})


def _check(part: str, node: nodes.Node) -> None:
    def refuse(reason: str) -> NoReturn:
        raise InvalidTemplate(f"{part} line {node.lineno or 1}: {reason}")

    if not isinstance(node, _ALLOWED_NODES):
        refuse(f"'{_STATEMENTS.get(type(node), type(node).__name__)}' is not allowed")
    if isinstance(node, nodes.For) and node.recursive:
        refuse("a recursive loop is not allowed")
    if isinstance(node, nodes.Call | nodes.Filter | nodes.Test) and (
        node.dyn_args is not None or node.dyn_kwargs is not None
    ):
        refuse("'*' and '**' arguments are not allowed")
    if isinstance(node, nodes.Name) and (
        node.name in _FORBIDDEN_NAMES or node.name.startswith("_")
    ):
        refuse(f"the name '{node.name}' is not allowed")
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        refuse(f"there is no filter '{node.name}'; allowed are {', '.join(sorted(_FILTERS))}")
    if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        refuse(f"the attribute '{node.attr}' is not allowed")
    for child in node.iter_child_nodes():
        _check(part, child)


def _static_chars(body: Iterable[nodes.Node]) -> int:
    return sum(
        len(data.data)
        for node in body
        for data in ([node] if isinstance(node, nodes.TemplateData) else
                     node.find_all(nodes.TemplateData))
    )  # fmt: skip


class _Metering(NodeTransformer):
    """Rewrites what loops, recurses, concatenates or nests into calls that are charged."""

    @staticmethod
    def _call(name: str, line: int, *args: nodes.Expr) -> nodes.Call:
        return nodes.Call(
            nodes.EnvironmentAttribute(name, lineno=line), list(args), [], None, None, lineno=line
        )

    def visit_For(self, node: nodes.For) -> nodes.For:
        chars = _static_chars(node.body)
        self.generic_visit(node)
        line = node.lineno
        node.iter = self._call(
            "metered", line, nodes.ContextReference(lineno=line), node.iter,  # type: ignore[arg-type]
            nodes.Const(chars, lineno=line),
        )  # fmt: skip
        return node

    def _visit_callable(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        line = node.lineno
        chars = _static_chars(node.body)
        self.generic_visit(node)
        charge = self._call(
            "enter", line, nodes.ContextReference(lineno=line), nodes.Const(chars, lineno=line)
        )
        node.body.insert(0, nodes.ExprStmt(charge, lineno=line))
        return node

    visit_Macro = _visit_callable
    visit_CallBlock = _visit_callable

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        line = node.lineno
        return self._call("joined", line, nodes.ContextReference(lineno=line), *node.nodes)

    def _scalars(self, items: list[nodes.Expr]) -> list[nodes.Expr]:
        return [
            item if isinstance(item, nodes.Const) else self._call("scalar", item.lineno, item)
            for item in items
        ]

    def visit_List(self, node: nodes.List) -> nodes.List:
        self.generic_visit(node)
        node.items = self._scalars(node.items)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Tuple:
        self.generic_visit(node)
        if node.ctx == "load":
            node.items = self._scalars(node.items)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.value = self._scalars([node.value])[0]
        return node


_HTML = _Environment(autoescape=True)
_PLAIN = _Environment(autoescape=False)


def _compile_part(part: str, source: str, limits: Limits, variables: set[str]) -> Template:
    environment = _HTML if part == "html" else _PLAIN
    if len(source) > limits.source_chars:
        raise InvalidTemplate(
            f"{part}: the source has {len(source)} characters, {limits.source_chars} are allowed"
        )
    try:
        tree = environment.parse(source)
        _check(part, tree)
        variables |= find_undeclared_variables(tree) - _GLOBALS.keys()
        tree = _Metering().visit(tree)
        tree.set_environment(environment)
        code = environment.compile(tree, name=part, filename=_filename(part))
        return Template.from_code(environment, code, {})
    except TemplateError as error:
        line = getattr(error, "lineno", None) or 1
        raise InvalidTemplate(f"{part} line {line}: {error.message}") from None
    except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise InvalidTemplate(
            f"{part}: nested too deeply, or a number too large ({type(error).__name__})"
        ) from None


def _filename(part: str) -> str:
    return f"<template {part}>"


def _render_part(part: str, template: Template, values: dict[str, Any], meter: Meter) -> str:
    context = _RenderContext(template.environment, values, part, {})
    context.meter = meter
    try:
        text = "".join(template.root_render_func(context))
    except (UndefinedError, SecurityError, _Refused) as error:
        reason = str(error)
        line = _failed_line(part, template, error.__traceback__)
    except Exception as error:  # whatever a template does is its failure, not the job's
        reason = f"fails with {type(error).__name__}"
        line = _failed_line(part, template, error.__traceback__)
    else:
        if len(text) > meter.limits.output_chars:
            raise RenderingFailed(f"{part}: makes more than {meter.limits.output_chars} characters")
        return text
    raise RenderingFailed(f"{part} line {line}: {reason}")


def _failed_line(part: str, template: Template, trace: TracebackType | None) -> int:
    filename = _filename(part)
    line = 1
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == filename:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line
