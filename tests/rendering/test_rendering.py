from __future__ import annotations

import hashlib
import html as html_module
import time
from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import Corrupt, InvalidTemplate, RenderingFailed
from transforms.rendering import (
    Limits,
    TemplateCache,
    TemplateSource,
    canonical_bytes,
    clean_header_text,
    compile_template,
    explain_variables,
    parse_source,
    render,
    template_id,
)

PERSON = {
    "first_name": "Zo\u00eb", "city": "K\u00f6ln", "points": 1250, "vip": True, "rate": 1.5,
    "born": date(1990, 5, 1), "nothing": None, "secret": "PERSONAL",
    "items": [3, 1, 2], "numbers": list(range(500)), "long": "x" * 1000,
    "address": {"city": "Bonn", "tags": ["a", "b"]}, "unsubscribe_url": "https://u.example/t/1",
}  # fmt: skip


def text_of(template: str, limits: Limits | None = None, **variables: object) -> str | None:
    compiled = compile_template(TemplateSource("s", None, template), limits or Limits())
    return render(compiled, {**PERSON, **variables}, clock=time.monotonic).text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Dear {{ first_name }}", "Dear Zo\u00eb"),
        ("{{ nothing|default('friend') }}", "friend"),
        ("{{ absent|default('friend') }}", "friend"),
        ("{% if nothing is defined %}a{% else %}b{% endif %}", "b"),
        ("{% if vip and points > 1000 %}gold{% else %}-{% endif %}", "gold"),
        ("{{ first_name|upper }} {{ city.lower() }}", "ZO\u00cb k\u00f6ln"),
        ("{{ address.city }} {{ address['tags'][0] }} {{ address.tags|join('+') }}", "Bonn a a+b"),
        ("{% for i in items|sort %}{{ loop.index }}:{{ i }}{{ ',' if not loop.last }}{% endfor %}",
         "1:1,2:2,3:3"),
        ("{% for i in range(3) %}{{ loop.cycle('a', 'b') }}{{ loop.length }}{% endfor %}",
         "a3b3a3"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"),
        ("{% for i in items if i > 1 %}{{ i }}{% else %}none{% endfor %}", "32"),
        ("{{ items|map('string')|join }} {{ numbers|sum }} {{ items|length }}", "312 124750 3"),
        ("{{ items|select('odd')|list|length }} {{ 'x' in 'xyz' }}", "2 True"),
        ("{{ points * 2 + 1 }} {{ rate ** 2 }} {{ 7 % 4 }} {{ (2 / 3)|round(2) }}",
         "2501 2.25 3 0.67"),
        ("{{ first_name ~ '-' ~ points }}", "Zo\u00eb-1250"),
        ("{{ born.year }} {{ born }}", "1990 1990-05-01"),
        ("{% set n = namespace(t=0) %}{% for i in items %}{% set n.t = n.t + i %}{% endfor %}"
         "{{ n.t }}", "6"),
        ("{% macro b(u) %}[{{ u }}|{{ caller() }}]{% endmacro %}{% call b('x') %}Go{% endcall %}",
         "[x|Go]"),
        ("{% filter upper %}a{{ city }}{% endfilter %}", "AK\u00d6LN"),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}", "ab"),
        ("{% for x in [1, 2] %}{{ range(2)|sum }}{% endfor %}", "11"),
        ("{{ 'a-b'.split('-')|last }} {{ long|truncate(10) }}", "b xxxxxxx..."),
        ("{% with a = 1 %}{{ a }}{% endwith %}", "1"),
        ("line\n", "line\n"),
    ],
)  # fmt: skip
def test_what_marketers_write_works(template: str, expected: str) -> None:
    assert text_of(template) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a\n{{ absent }}", "text line 2: variable 'absent' is not set"),
        ("{{ nothing }}", "variable 'nothing' is not set"),
        ("{% if absent %}{% endif %}", "variable 'absent' is not set"),
        ("{% for x in absent %}{% endfor %}", "variable 'absent' is not set"),
        ("{{ absent ~ 'x' }}", "variable 'absent' is not set"),
        ("{{ absent|upper }}", "variable 'absent' is not set"),
        ("{{ absent * 2 }}", "variable 'absent' is not set"),
        ("{{ [absent]|first }}", "variable 'absent' is not set"),
        ("{{ address.street }}", "lacks an attribute"),
        ("\n\n{{ address[secret] }}", "text line 3: a dict lacks"),
        ("{{ items }}", "prints or joins a list"),
        ("{{ address }}", "prints or joins a dict"),
        ("{{ secret + 1 }}", "TypeError"),
        ("{{ secret|int / 0 }}", "ZeroDivisionError"),
        ("{% for x in 5 %}{% endfor %}", "TypeError"),
    ],
)
def test_what_fails_says_where_and_never_who(template: str, said: str) -> None:
    with pytest.raises(RenderingFailed) as caught:
        text_of(template)
    assert said in str(caught.value)
    assert "PERSONAL" not in str(caught.value)


BOMBS = [
    "{% set x %}{% for a in range(1000) %}" + "static " * 1000 + "{% endfor %}{% endset %}",
    "{% macro m() %}" + "static " * 1000 + "{% endmacro %}"
    "{% for a in range(1000) %}{% set x = m() %}{% endfor %}",
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(26) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "{% set n = namespace(x=(1,), y=(1,)) %}{% for i in range(26) %}{% set n.x = (n.x, n.x) %}"
    "{% set n.y = (n.y, n.y) %}{% endfor %}{{ n.x == n.y }}",
    "{% set n = namespace(x={}, y={}) %}{% for i in range(26) %}{% set n.x = {1: n.x, 2: n.x} %}"
    "{% set n.y = {1: n.y, 2: n.y} %}{% endfor %}{{ n.x == n.y }}",
    "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in numbers %}{% for b in numbers %}{% for c in numbers %}{% set x = a %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(1000) %}{% for b in range(1000) %}" + "static " * 1000
    + "{% endfor %}{% endfor %}",
    "{% set x %}{% for a in range(1000) %}{% for b in numbers %}{{ long }}{% endfor %}{% endfor %}"
    "{% endset %}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}" + "static " * 5000 + "{% if n %}{% set x = m(n - 1) ~ m(n - 1) %}{% endif %}"
    "{% endmacro %}{{ m(30) }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = {'a': n.x} %}{% endfor %}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = (n.x, [n.x]) %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x=long) %}{% for i in range(60) %}"
    "{% set n.x = n.x|replace('x', long) %}{% endfor %}",
    "{% set n = namespace(x=long) %}{% for i in range(60) %}{% set n.x = n.x|urlencode|urlencode %}"
    "{% set n.x = n.x|replace('x', '<<<') %}{% endfor %}",
    "{% for i in range(1000) %}{% set x = numbers|sort|map('string')|join(long) %}{% endfor %}",
    "{% for i in range(1000) %}{% for j in range(900) %}{% set x = long.upper() %}{% endfor %}"
    "{% endfor %}",
    "{{ 'a' * 1000000000 }}", "{{ [1] * 1000000000 }}", "{{ 1000000000 * 'a' }}",
    "{{ 9 ** 9 ** 9 }}", "{{ '%1000000000d' % 3 }}", "{{ 2 ** 100000000 }}",
    "{{ '{:>1000000000}'.format(1) }}", "{{ '{0}'.format_map({}) }}",
    "{{ long.ljust(1000000000) }}", "{{ long.zfill(1000000000) }}", "{{ long.center(10 ** 9) }}",
    "{{ long.replace('x', long) }}", "{{ long.join(['a', 'b']) }}",
    "{{ '\\t'.expandtabs(10 ** 9) }}",
    "{{ long|center(1000000000) }}", "{{ long|replace('', long) }}", "{{ 1|round(999999999) }}",
    "{{ 1.5|round(-999999999, 'ceil') }}", "{{ range(10 ** 9)|list }}", "{{ range(0, 9**9, 1) }}",
    "{{ (5).to_bytes(1000000000) }}", "{{ long.encode() }}", "{{ address.clear() }}",
    "{{ items.append(1) }}", "{{ items.sort() }}", "{{ [numbers, numbers]|sum(start=[]) }}",
    "{{ ''['__cl' ~ 'ass__'] }}", "{{ address['__init__'] }}", "{{ (items|map)('x') }}",
    "{{ [1, 2]|map(attribute='__class__')|list|first }}", "{{ range.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}", "{{ cycler }}", "{{ long.__class__.__mro__ }}",
    "{{ lipsum(n=1000) }}", "{{ dict(a=1) }}", "{{ self }}", "{{ varargs }}", "{{ _private }}",
    "{% macro m() %}{{ varargs }}{% endmacro %}{{ m(1) }}", "{{ range(*items) }}",
    "{% include 'x' %}", "{% import 'x' as y %}", "{% from 'x' import y %}", "{% extends 'x' %}",
    "{% block a %}{% endblock %}", "{% autoescape false %}x{% endautoescape %}",
    "{% for x in items recursive %}{{ loop([x]) }}{% endfor %}",
    "{{ long|safe }}", "{{ items|pprint }}", "{{ long|indent(1000000) }}", "{{ '%s'|format(1) }}",
    "{{ items|batch(1000000000, 'x')|list }}", "{{ long|wordwrap(1) }}", "{{ items|random }}",
    "{{ long|xmlattr }}", "{{ long|tojson }}", "{{ long|attr('upper') }}", "{{ long|striptags }}",
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ " + "1+" * 20_000 + "1 }}",
    "{{ " + "-" * 20_000 + "1 }}", "{{ 1" + "0" * 50_000 + " }}",
    "{{ x" + "|upper" * 20_000 + " }}",
    "{% if vip %}" * 400 + "{% endif %}" * 400, "{% if %}", "{{ a b }}", "{% for %}",
    "{{", "{% nope %}",
    "{# " + "x" * 300_000 + " #}",
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:60])
def test_no_template_takes_the_machine(bomb: str) -> None:
    began = time.process_time()
    with pytest.raises((InvalidTemplate, RenderingFailed)) as caught:
        text_of(bomb)
    assert time.process_time() - began < 2
    assert str(caught.value).startswith("text")
    assert "PERSONAL" not in str(caught.value)


COUNTED = [bomb for bomb in BOMBS if "{% for" in bomb or "{% macro" in bomb]


@pytest.mark.parametrize("bomb", COUNTED, ids=lambda bomb: bomb[:60])
def test_counting_alone_stops_a_bomb(bomb: str) -> None:
    """Without a clock, so that a replay on another machine fails in the same place."""
    said = set()
    for _ in range(2):
        with pytest.raises((InvalidTemplate, RenderingFailed)) as caught:
            render(compile_template(TemplateSource("s", None, bomb)), PERSON)
        said.add(str(caught.value))
    assert len(said) == 1 and "ms" not in said.pop().split()


def test_the_clock_stops_what_counting_would_allow() -> None:
    ticks = iter(range(1000))
    compiled = compile_template(
        TemplateSource("s", None, "{% for x in range(900) %}{% endfor %}"),
        Limits(wall=timedelta(seconds=5)),
    )
    assert render(compiled, {}).text == ""
    with pytest.raises(RenderingFailed, match="takes longer than 5000 ms"):
        render(compiled, {}, clock=lambda: float(next(ticks)))
    assert next(ticks) < 20


def test_a_short_rendering_never_reads_the_clock() -> None:
    looks: list[float] = []
    compiled = compile_template(TemplateSource("s", None, "{% for x in range(20) %}{% endfor %}"))
    assert render(compiled, {}, clock=lambda: looks.append(0.0) or 0.0).text == ""
    assert not looks


def test_each_limit_can_be_reached_and_not_passed() -> None:
    def loop(count: int) -> str:
        return "{% for x in range(" + str(count) + ") %}{% endfor %}"

    steps = Limits(steps=2 * 100 + 1)  # range and the loop are charged by item, range's call once
    assert text_of(loop(100), steps) == ""
    with pytest.raises(RenderingFailed, match="201 steps"):
        text_of(loop(101), steps)
    size = Limits(output_chars=1001)
    assert text_of("{{ long }}", size) == "x" * 1000
    with pytest.raises(RenderingFailed, match="1001 characters"):
        text_of("{{ long }}.." + "{# #}", Limits(output_chars=1001))
    with pytest.raises(RenderingFailed, match="10 items"):
        text_of("{{ range(11) }}", Limits(items=10))
    with pytest.raises(InvalidTemplate, match="10 are allowed"):
        text_of("x" * 11, Limits(source_chars=10))
    with pytest.raises(RenderingFailed, match="subject: longer than 5"):
        render(
            compile_template(TemplateSource("{{ a }}", None, "t"), Limits(subject_chars=5)),
            {"a": "x" * 6},
        )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (TemplateSource("s", "<p>\n{% if %}", None), "html line 2"),
        (TemplateSource("{{ a b }}", None, "t"), "subject line 1"),
        (TemplateSource("s", None, "a\n\n{{ x|nope }}"), "text line 3: there is no filter 'nope'"),
        (TemplateSource("s", None, "{% include 'x' %}"), "text line 1: 'include' is not allowed"),
        (TemplateSource("s"), "an html or a text part"),
        (TemplateSource("s", "\ud800"), "surrogate"),
    ],
)
def test_an_invalid_template_names_part_line_and_reason(source: TemplateSource, said: str) -> None:
    with pytest.raises(InvalidTemplate) as caught:
        compile_template(source)
    assert said in str(caught.value)


def test_html_escapes_text_and_subject_do_not() -> None:
    compiled = compile_template(
        TemplateSource(
            "{{ n }}",
            "{{ n }} <a href='{{ n }}'>{{ n ~ '<i>' }}</a>"
            "{% macro m(x) %}<b>{{ x }}</b>{% endmacro %}{{ m(n) }}"
            "{% set s %}<u>{{ n }}</u>{% endset %}{{ s }}{{ n|upper }}{{ [n]|join('<') }}",
            "{{ n ~ '<i>' }}",
        )
    )
    content = render(compiled, {"n": "<x>&'\""})
    assert (content.subject, content.text) == ("<x>&'\"", "<x>&'\"<i>")
    escaped = "&lt;x&gt;&amp;&#39;&#34;"
    assert content.html == (
        f"{escaped} <a href='{escaped}'>{escaped}&lt;i&gt;</a><b>{escaped}</b><u>{escaped}</u>"
        "&lt;X&gt;&amp;&#39;&#34;"
        f"{escaped}"
    )


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_attributes_are_data_in_every_part(name: str, city: str) -> None:
    content = render(
        _PERSONAL, {"name": name, "city": city, "unsubscribe_url": "https://u.example/?a=1&b=2"}
    )
    assert "\n" not in content.subject and "\r" not in content.subject
    assert not any(ord(c) < 32 or ord(c) == 127 for c in content.subject)
    assert content.text == f"{name} in {city}"
    assert content.html is not None
    inner = content.html.removeprefix("<p>").removesuffix("</p>")
    assert "<" not in inner and ">" not in inner and '"' not in inner
    assert inner == html_module.escape(name).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


_PERSONAL = compile_template(
    TemplateSource("To {{ name }} of {{ city }}", "<p>{{ name }}</p>", "{{ name }} in {{ city }}")
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("plain", "plain"), ("  a  b  ", "a b"), ("a\r\nBcc: x@y", "a Bcc: x@y"),
        ("a\x00b\x1fc\x7fd\x85e", "a b c d e"), ("a\u2028b\u2029c", "a b c"),
        ("\u00e9\t\u00e9", "\u00e9 \u00e9"),
    ],
)  # fmt: skip
def test_header_text_is_one_clean_line(raw: str, clean: str) -> None:
    assert clean_header_text(raw) == clean


def test_a_subject_that_renders_to_nothing_fails() -> None:
    with pytest.raises(RenderingFailed, match="nothing"):
        render(compile_template(TemplateSource(" {{ a }}\n", None, "t")), {"a": "\r\n"})


def test_variables_are_named_without_what_the_template_makes_itself() -> None:
    source = TemplateSource(
        "{{ first_name }}",
        "{% set a = 1 %}{{ a }}{{ city|default('x') }}"
        "{% for i in range(3) %}{{ i }}{{ loop.index }}{% endfor %}"
        "{% macro m(p) %}{{ p }}{{ inner }}{% endmacro %}{{ m(1) }}",
        "{% if vip is defined %}{{ unsubscribe_url }}{% endif %}{{ namespace(a=1).a }}",
    )
    expected = {"first_name", "city", "inner", "vip", "unsubscribe_url"}
    assert explain_variables(source) == expected
    assert compile_template(source).variables == expected


def test_renderings_do_not_leak_into_each_other() -> None:
    compiled = compile_template(
        TemplateSource(
            "{% set leak = name %}{{ name }}",
            "{% if leak is defined %}LEAK{% endif %}{% set leak = name %}{{ name }}",
            "{% if leak is defined %}LEAK{% endif %}{{ name }}",
        )
    )
    for name in ("Ann", "Bob"):
        content = render(compiled, {"name": name})
        assert (content.subject, content.html, content.text) == (name, name, name)


def test_templates_are_named_by_their_content() -> None:
    source = TemplateSource("s \u00e9", "<p>h</p>", None)
    content = canonical_bytes(source)
    assert content == '{"html":"<p>h</p>","subject":"s \u00e9","text":null}'.encode()
    assert parse_source(content) == source
    assert template_id(source) == hashlib.sha256(content).hexdigest()
    assert compile_template(source).template_id == template_id(source)
    assert template_id(source) != template_id(TemplateSource("s \u00e9", "<p>h</p>", ""))
    for broken in (b"", b"[]", b'{"subject": 3, "html": null, "text": null}', b'{"subject": ""}'):
        with pytest.raises(InvalidTemplate):
            parse_source(broken)


def test_the_cache_keeps_the_most_recent_and_checks_what_it_is_given() -> None:
    cache = TemplateCache(capacity=2)
    sources = [TemplateSource(f"s{n}", None, "t") for n in range(3)]
    ids = [template_id(source) for source in sources]
    for n in (0, 1):
        cache.add(ids[n], canonical_bytes(sources[n]))
    first = cache.get(ids[0])
    assert first is not None and cache.get(ids[0]) is first
    cache.add(ids[2], canonical_bytes(sources[2]))
    assert cache.get(ids[1]) is None and cache.get(ids[0]) is first and len(cache) == 2
    with pytest.raises(Corrupt):
        cache.add(ids[1], canonical_bytes(sources[0]))
