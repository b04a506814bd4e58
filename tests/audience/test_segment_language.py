"""Segments: what expressions mean, and how wrong ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import InvalidSegment
from transforms.segment import check_names, compile_segment


def selects(text: str, **values: Any) -> bool:
    segment = compile_segment(text)
    return segment.selects(tuple(values.get(name) for name in segment.names))


CONSENTS = frozenset({"email:offers", "sms:*"})


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("", {}, True),
        ("age >= 18", {"age": 18}, True),
        ("age >= 18", {"age": "18"}, True),
        ("age >= 18", {"age": "9"}, False),
        ("age >= 18", {"age": " 18.5 "}, True),
        ("age >= 18", {"age": "many"}, False),
        ("age >= 18", {}, False),
        ("not age >= 18", {}, True),
        ("age != 18", {}, False),
        ("age is None", {}, True),
        ("age is not None", {"age": 0}, True),
        ("18 <= age < 30", {"age": "29"}, True),
        ("18 <= age < 30", {"age": "30"}, False),
        ("age > -1", {"age": 0}, True),
        ("country in ('DE', 'AT')", {"country": "AT"}, True),
        ("country not in ('DE', 'AT')", {"country": "AT"}, False),
        ("country not in ('DE', 'AT')", {}, False),
        ("age in (1, 2)", {"age": "2"}, True),
        ("'email:offers' in consents", {"consents": CONSENTS}, True),
        ("'email:news' in consents", {"consents": CONSENTS}, False),
        ("len(consents) == 2", {"consents": CONSENTS}, True),
        ("'son' in name", {"name": "Samson"}, True),
        ("lower(plan) == 'pro'", {"plan": "PRO"}, True),
        ("lower(plan) == 'pro'", {"plan": 3}, False),
        ("startswith(city, 'São')", {"city": "São Paulo"}, True),
        ("endswith(email, '.org')", {"email": "a@b.org"}, True),
        ("domain(email) == 'b.org'", {"email": "a@B.org"}, True),
        ("contains(city, 'ã')", {"city": "São"}, True),
        ("value / orders > 50", {"value": "120", "orders": 2}, True),
        ("value / orders > 50", {"value": "120", "orders": 0}, False),
        ("value / orders > 50", {"value": "120"}, False),
        ("(a + b) * 2 - 1 == 9 and 7 // 2 == 3 and 7 % 2 == 1", {"a": 2, "b": 3}, True),
        ("vip", {"vip": True}, True),
        ("vip", {"vip": "true"}, True),
        ("vip", {"vip": "False"}, False),
        ("vip == False", {"vip": "no"}, True),
        ("vip or age > 3", {"age": 4}, True),
        ("number(a) < number(b)", {"a": "9", "b": "10"}, True),
        ("a < b", {"a": "9", "b": "10"}, False),
        ("number(number) == 1", {"number": "1"}, True),
        ("name > 3", {"name": "nan"}, False),
    ],
)
def test_meaning(text: str, values: dict[str, Any], expected: bool) -> None:
    assert selects(text, **values) is expected


@settings(deadline=None)
@given(st.integers(-1000, 1000), st.integers(-1000, 1000), st.sampled_from(["<", "<=", "==", "!="]))
def test_text_of_csv_means_what_numbers_of_parquet_mean(value: int, limit: int, sign: str) -> None:
    text = f"x {sign} {limit}"
    assert selects(text, x=value) is selects(text, x=str(value)) is selects(text, x=float(value))


@pytest.mark.parametrize(
    ("text", "column", "told"),
    [
        ("age >=", 1, "invalid syntax"),
        ("age >= 18 and foo(age)", 15, "no such function"),
        ("__import__('os')", 1, "no such function"),
        ("a.b", 1, "Attribute"),
        ("ñ == 1 and a.b", 12, "Attribute"),
        ("a[0]", 1, "Subscript"),
        ("[x for x in y]", 1, "ListComp"),
        ("lambda: 1", 1, "Lambda"),
        ("2 ** 99", 1, "Pow"),
        ("a is 3", 6, "None only"),
        ("a in (1, b)", 10, "no literal"),
        ("a in (1, None)", 10, "no literal"),
        ("lower(a, b)", 1, "lower(text)"),
        ("(a := 3)", 2, "NamedExpr"),
        ("b'x' == a", 1, "Constant"),
        ("1+" * 300 + "1", 1, "nested deeper"),
        ("(" * 250 + "1" + ")" * 250, 201, "parentheses"),
    ],
)
def test_what_is_refused_names_the_column(text: str, column: int, told: str) -> None:
    with pytest.raises(InvalidSegment) as raised:
        compile_segment(text)
    assert f"column {column} " in str(raised.value)
    assert told in str(raised.value)
    assert "expected" in str(raised.value)


def test_too_long_is_refused() -> None:
    with pytest.raises(InvalidSegment, match="characters"):
        compile_segment("a == 1 or " * 1000 + "b")


def test_a_name_that_no_source_has_is_refused_with_a_hint() -> None:
    segment = compile_segment("country == 'DE' and agee > 1")
    with pytest.raises(InvalidSegment, match=r"column 21 .*'agee'; did you mean age\?"):
        check_names(segment, {"age", "country"})
    check_names(segment, {"agee", "country"})
