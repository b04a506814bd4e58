"""Segment expressions: who of the profiles is in the audience.

The language is a small part of Python's expressions, over fields and attributes of a profile::

    age >= 18 and country in ("DE", "AT") and "email:offers" in consents
    lower(plan) == "pro" or lifetime_value / orders > 50
    startswith(city, "San ") and not is_employee and last_order is not None

Rules, where they differ from Python's:

- What a profile lacks is null (``None``). A comparison, ``in`` or function with null is false or
  null, arithmetic with null is null, and null counts as false. ``is None`` tells it apart.
- CSV has only text. Beside a number, text is taken as a number, and is null where it is none;
  beside ``True`` or ``False``, and where a truth is needed, the texts of ``_FALSE_TEXTS`` are
  false and others true. So the same expression means the same over CSV and Parquet.
- Numbers and text that is no number do not compare: the comparison is false.
- Division by zero is null.

Expressions are parsed with ``ast``, never evaluated by Python: nodes that are not listed here are
refused with their column.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.errors import InvalidSegment

Value = Any
"""None, bool, int, float, str or a frozenset of str."""
Row = Sequence[Value]
Evaluate = Callable[[Row], Value]

MAX_LENGTH = 4096
MAX_DEPTH = 50
_FALSE_TEXTS = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Segment:
    """A compiled expression."""

    text: str
    names: tuple[str, ...]
    """Fields and attributes that it reads, sorted."""
    selects: Callable[[Row], bool]
    """Whether a profile is in; takes the values of ``names`` in their order."""


def compile_segment(text: str) -> Segment:
    """The segment of an expression; an empty one selects everybody. Raises ``InvalidSegment``."""
    stripped = text.strip()
    if not stripped:
        return Segment("", (), lambda row: True)
    if len(stripped) > MAX_LENGTH:
        raise InvalidSegment(
            f"the segment has {len(stripped)} characters; at most {MAX_LENGTH} are allowed: "
            "mark the people in the source with an attribute and select by that"
        )
    try:
        tree = ast.parse(stripped, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        offset = getattr(error, "offset", None) or 1
        raise InvalidSegment(
            f"{_place(stripped, offset - 1)}: {getattr(error, 'msg', None) or error}; expected an "
            'expression such as age >= 18 and country in ("DE", "AT")'
        ) from None
    names = tuple(sorted({node.id for node in _read_names(tree)}))
    evaluate = _Compiler(stripped, {name: at for at, name in enumerate(names)}).compile(tree.body)
    return Segment(stripped, names, lambda row: _truth(evaluate(row)))


def check_names(segment: Segment, known: Collection[str]) -> None:
    """Refuse a segment that reads what no source has: a typing error, not an empty audience."""
    for name in segment.names:
        if name not in known:
            tree = ast.parse(segment.text, mode="eval")
            column = min(
                _column(segment.text, node) for node in _read_names(tree) if node.id == name
            )
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidSegment(
                f"{_place(segment.text, column)}: no source has a column {name!r}{hint} "
                f"Columns: {', '.join(sorted(known))}"
            )


def _read_names(tree: ast.AST) -> Iterator[ast.Name]:
    """The names that stand for values, not for functions."""
    nodes = list(ast.walk(tree))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return (node for node in nodes if isinstance(node, ast.Name) and id(node) not in called)


def _column(text: str, node: ast.expr) -> int:
    """Where a node begins, in characters; ``ast`` counts bytes."""
    return len(text.encode()[: node.col_offset].decode())


def _place(text: str, column: int) -> str:
    return f"segment, column {column + 1} (at {text[column : column + 20]!r})"


def _number(value: Value) -> int | float | None:
    """A value as a number, or None."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
        try:
            number = float(value)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    return None


def _truth(value: Value) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in _FALSE_TEXTS
    return bool(value)


def _alike(left: Value, right: Value) -> tuple[Value, Value]:
    """Both values as the same kind; (None, None) where that can't be."""
    if left is None or right is None:
        return None, None
    if isinstance(left, str) and isinstance(right, str):
        return left, right
    if isinstance(left, frozenset) or isinstance(right, frozenset):
        return (left, right) if type(left) is type(right) else (None, None)
    if isinstance(left, bool) or isinstance(right, bool):
        return _truth(left), _truth(right)
    left, right = _number(left), _number(right)
    return (None, None) if left is None or right is None else (left, right)


def _is_in(item: Value, container: Value) -> bool:
    if item is None or container is None:
        return False
    if isinstance(container, tuple):
        return any(_equal(item, one) for one in container)
    if isinstance(container, frozenset):
        return item in container
    return isinstance(container, str) and isinstance(item, str) and item in container


def _equal(left: Value, right: Value) -> bool:
    left, right = _alike(left, right)
    return left is not None and bool(left == right)


def _comparison(compare: Callable[[Any, Any], Any]) -> Callable[[Value, Value], bool]:
    def compared(left: Value, right: Value) -> bool:
        left, right = _alike(left, right)
        return left is not None and bool(compare(left, right))

    return compared


def _arithmetic(operate: Callable[[Any, Any], Any]) -> Callable[[Value, Value], Value]:
    def operated(left: Value, right: Value) -> Value:
        left, right = _number(left), _number(right)
        if left is None or right is None:
            return None
        try:
            return operate(left, right)
        except (ZeroDivisionError, OverflowError):
            return None

    return operated


_COMPARISONS: dict[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Eq: _equal,
    ast.NotEq: _comparison(operator.ne),
    ast.Lt: _comparison(operator.lt),
    ast.LtE: _comparison(operator.le),
    ast.Gt: _comparison(operator.gt),
    ast.GtE: _comparison(operator.ge),
    ast.In: _is_in,
    ast.NotIn: lambda item, container: (
        item is not None and container is not None and not _is_in(item, container)
    ),
    ast.Is: lambda left, right: left is None and right is None,
    ast.IsNot: lambda left, right: not (left is None and right is None),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: _arithmetic(operator.add),
    ast.Sub: _arithmetic(operator.sub),
    ast.Mult: _arithmetic(operator.mul),
    ast.Div: _arithmetic(operator.truediv),
    ast.FloorDiv: _arithmetic(operator.floordiv),
    ast.Mod: _arithmetic(operator.mod),
}


def _text_function(function: Callable[..., Value]) -> Callable[..., Value]:
    def applied(*arguments: Value) -> Value:
        if not all(isinstance(one, str) for one in arguments):
            return None
        return function(*arguments)

    return applied


def _length(value: Value) -> int | None:
    return len(value) if isinstance(value, str | frozenset) else None


def _domain(address: str) -> str:
    return address.rpartition("@")[2].lower()


_FUNCTIONS: dict[str, tuple[Callable[..., Value], int, str]] = {
    "lower": (_text_function(str.lower), 1, "lower(text)"),
    "upper": (_text_function(str.upper), 1, "upper(text)"),
    "strip": (_text_function(str.strip), 1, "strip(text)"),
    "startswith": (_text_function(str.startswith), 2, "startswith(text, beginning)"),
    "endswith": (_text_function(str.endswith), 2, "endswith(text, end)"),
    "contains": (lambda whole, part: _is_in(part, whole), 2, "contains(text, part)"),
    "domain": (_text_function(_domain), 1, "domain(email)"),
    "len": (_length, 1, "len(text)"),
    "number": (_number, 1, "number(text)"),
}
FUNCTIONS = {name: usage for name, (_, _, usage) in _FUNCTIONS.items()}
"""Names of the functions, with their usage."""


class _Compiler:
    """Turns nodes into closures over a row."""

    def __init__(self, text: str, positions: dict[str, int]) -> None:
        self._text = text
        self._positions = positions
        self._depth = 0

    def compile(self, node: ast.expr) -> Evaluate:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(node, f"nested deeper than {MAX_DEPTH}", "a simpler expression")
        try:
            return self._compile(node)
        finally:
            self._depth -= 1

    def _compile(self, node: ast.expr) -> Evaluate:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as constant):
                return lambda row: constant
            case ast.Name(id=name) if name in self._positions:
                return operator.itemgetter(self._positions[name])
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
                return self._literals(node, items)
            case ast.BoolOp(op=ast.And(), values=values):
                parts = [self.compile(value) for value in values]
                return lambda row: all(_truth(part(row)) for part in parts)
            case ast.BoolOp(values=values):
                parts = [self.compile(value) for value in values]
                return lambda row: any(_truth(part(row)) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                operand = self.compile(inner)
                return lambda row: not _truth(operand(row))
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                operand = self.compile(inner)
                subtract = _ARITHMETIC[ast.Sub]
                return lambda row: subtract(0, operand(row))
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(node, left, op, right)
            case ast.Compare():
                return self._compare(node)
            case ast.Call():
                return self._call(node)
        raise self._refused(
            node,
            f"{type(node).__name__} can't be used in a segment",
            "names, literals, comparisons, in, and, or, not, arithmetic or "
            + ", ".join(FUNCTIONS.values()),
        )

    def _literals(self, node: ast.expr, items: list[ast.expr]) -> Evaluate:
        values: list[Value] = []
        for item in items:
            try:
                value = ast.literal_eval(item)
            except (ValueError, TypeError, SyntaxError):
                value = item
            if not isinstance(value, bool | int | float | str):
                raise self._refused(item, "no literal", "numbers and text in a list")
            values.append(value)
        constant = tuple(values)
        return lambda row: constant

    def _binary(
        self, node: ast.expr, left: ast.expr, op: ast.operator, right: ast.expr
    ) -> Evaluate:
        operate = _ARITHMETIC.get(type(op))
        if operate is None:
            raise self._refused(node, f"no operator {type(op).__name__}", "one of + - * / // %")
        first, second = self.compile(left), self.compile(right)
        return lambda row: operate(first(row), second(row))

    def _compare(self, node: ast.Compare) -> Evaluate:
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.Is | ast.IsNot) and not (
                isinstance(comparator, ast.Constant) and comparator.value is None
            ):
                raise self._refused(comparator, "'is' compares with None only", "== or 'is None'")
        if len(node.ops) == 1:
            compare = _COMPARISONS[type(node.ops[0])]
            left, right = self.compile(node.left), self.compile(node.comparators[0])
            return lambda row: compare(left(row), right(row))
        operands = [self.compile(one) for one in (node.left, *node.comparators)]
        compares = [_COMPARISONS[type(op)] for op in node.ops]
        steps = list(zip(operands[:-1], compares, operands[1:], strict=True))
        return lambda row: all(compare(a(row), b(row)) for a, compare, b in steps)

    def _call(self, node: ast.Call) -> Evaluate:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS:
            raise self._refused(node, "no such function", "one of " + ", ".join(FUNCTIONS.values()))
        function, arity, usage = _FUNCTIONS[name]
        if len(node.args) != arity or node.keywords:
            raise self._refused(node, f"{len(node.args)} arguments", usage)
        arguments = [self.compile(one) for one in node.args]
        if arity == 1:
            (only,) = arguments
            return lambda row: function(only(row))
        first, second = arguments
        return lambda row: function(first(row), second(row))

    def _refused(self, node: ast.expr, what: str, expected: str) -> InvalidSegment:
        return InvalidSegment(
            f"{_place(self._text, _column(self._text, node))}: {what}; expected {expected}"
        )
