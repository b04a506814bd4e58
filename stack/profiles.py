"""Made-up profiles for the demo, tests and measurements: as varied as people are, and seeded.

The same number and seed give the same file. Beside ``people`` good rows of distinct people there
are about 2 % older or newer rows of the same people and about 1 % rows that must be refused.
Addresses lie in domains reserved for examples (RFC 2606), phone numbers in made-up ranges.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

CHUNK_ROWS = 20_000
DUPLICATES = 0.02
BAD_ROWS = 0.01

_NAMES: dict[str, tuple[str, str]] = {
    "english": ("Emma Liam Olivia Noah Zoë Seán Siân D'Arcy", "O'Neil Smith Brown-Jones Lee Núñez"),
    "german": ("Jürgen Käthe Björn Anneliese Jörg", "Müller Groß Weiß Schröder-Łukasz Öztürk"),
    "french": ("Élodie François Chloé Noël Anaïs", "Lefèvre D'Aubigné Garçon Bœuf Le-Goff"),
    "iberian": ("José Begoña João Conceição Iñaki", "Muñoz Gonçalves Peñarrubia Simões Ibáñez"),
    "nordic": ("Åse Bjørn Þórunn Søren Äiti", "Ångström Kjær Ðorvaldsson Lindström Mäkinen"),
    "slavic": ("Łukasz Żaneta Šimon Čeněk Ðurđa", "Wałęsa Dvořák Gąsior Żółć Škvorecký"),
    "turkish": ("İbrahim Gülşen Çağla Işıl Ömer", "Yılmaz Şahin Çelik Öztürk Doğan"),
    "cyrillic": ("Анна Фёдор Юлия Їжак Владимир", "Иванова Щербаков Ґонґадзе Петренко Жуков"),
    "greek": ("Ἀθηνᾶ Γιώργος Ελένη Άγγελος Ζωή", "Παπαδόπουλος Οικονόμου Ψαράς Βλάχος"),
    "arabic": ("محمد فاطمة عبد‌الله ليلى يوسف", "الحسيني بن‌سلمان خوري المصري"),
    "hebrew": ("דוד שָׂרָה יעל משה נועה", "כהן לוי ביטון בן-דוד"),
    "japanese": ("さくら 健太 美咲 ジョン 翔", "佐藤 鈴木 髙橋 渡邉"),
    "chinese": ("伟 芳 娜 秀英 𠮷", "王 李 张 欧阳"),
    "korean": ("지민 서연 민준 하은", "김 이 박 남궁"),
    "hindi": ("अमित प्रिया श्रेया कृष्ण", "शर्मा पटेल सिंह श्रीवास्तव"),
    "thai": ("สมชาย กนกวรรณ ณัฐ", "ศรีสุข จันทร์เพ็ญ ทองดี"),
    "emoji": ("Zoë✨ Max🚀 👩‍👩‍👧 Ada💜", "🏳️‍🌈 von-🌍 Lovelace"),
}
_PLACES = """\
Europe/Berlin de-DE DE german Köln
Europe/Vienna de-AT AT german Wien
Europe/Zurich de-CH CH german Zürich
Europe/London en-GB GB english Newcastle-upon-Tyne
Europe/Dublin en-IE IE english Dún-Laoghaire
Europe/Paris fr-FR FR french Besançon
Europe/Madrid es-ES ES iberian A-Coruña
Europe/Lisbon pt-PT PT iberian Évora
Europe/Stockholm sv-SE SE nordic Malmö
Atlantic/Reykjavik is-IS IS nordic Reykjavík
Europe/Warsaw pl-PL PL slavic Łódź
Europe/Prague cs-CZ CZ slavic Plzeň
Europe/Istanbul tr-TR TR turkish İzmir
Europe/Kyiv uk-UA UA cyrillic Київ
Asia/Almaty ru-KZ KZ cyrillic Алматы
Europe/Athens el-GR GR greek Θεσσαλονίκη
Africa/Cairo ar-EG EG arabic القاهرة
Asia/Riyadh ar-SA SA arabic الرياض
Asia/Jerusalem he-IL IL hebrew תל-אביב
Asia/Tokyo ja-JP JP japanese 東京
Asia/Shanghai zh-CN CN chinese 上海
Asia/Taipei zh-TW TW chinese 臺北
Asia/Seoul ko-KR KR korean 서울
Asia/Kolkata hi-IN IN hindi मुंबई
Asia/Bangkok th-TH TH thai กรุงเทพ
America/New_York en-US US english Winston-Salem
America/Los_Angeles en-US US emoji San-José
America/Sao_Paulo pt-BR BR iberian São-Paulo
America/St_Johns en-CA CA english St.-John's
Australia/Lord_Howe en-AU AU english Lord-Howe
"""
_CONSENTS: dict[str, float] = {
    "email:offers;email:news;sms:offers;push:offers": 0.22,
    "email:offers;email:news": 0.30,
    "email:offers": 0.18,
    "email:*;sms:*": 0.10,
    "email:offers;push:*": 0.09,
    "email:news": 0.05,
    "sms:offers": 0.03,
    "": 0.03,
}
_PLANS = {"free": 0.6, "plus": 0.25, "pro": 0.12, 'Größe XL, "best"': 0.03}
_DAY_US = 86_400_000_000
_START_US = 1_735_689_600_000_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where people live, and how they are called there."""

    zone: str
    locale: str
    country: str
    city: str
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]


def places() -> list[Place]:
    """The 30 places of the generated people."""
    found = []
    for line in _PLACES.splitlines():
        zone, locale, country, names, city = line.split()
        first, last = (tuple(part.split()) for part in _NAMES[names])
        found.append(Place(zone, locale, country, city.replace("-", " "), first, last))
    return found


def generate(people: int, seed: int, out: Path, first: int = 0) -> int:
    """Write profiles to ``out`` (CSV, or Parquet by its ending); the number of rows written.

    ``first`` is the number of the first person: another range of numbers is another crowd.
    """
    tables = _tables(people, seed, first)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() in (".parquet", ".pq"):
        return _write_parquet(tables, out)
    return _write_csv(tables, out)


def _write_parquet(tables: Iterator[pa.Table], out: Path) -> int:
    writer = None
    rows = 0
    for table in tables:
        writer = writer or pq.ParquetWriter(out, table.schema)
        # Row groups of several chunks would have to be held; 20,000 rows are enough for readers.
        writer.write_table(table)
        rows += table.num_rows
    if writer:
        writer.close()
    return rows


def _write_csv(tables: Iterator[pa.Table], out: Path) -> int:
    """CSV has two more ways to be wrong: the number of columns, and bytes that are not UTF-8."""
    rows = 0
    with out.open("wb") as file:
        for table in tables:
            sheet = io.BytesIO()
            header = rows == 0
            pacsv.write_csv(
                _as_text(table),
                sheet,
                pacsv.WriteOptions(include_header=header, quoting_style="needed"),
            )
            file.write(sheet.getvalue())
            rows += table.num_rows
            for number in range(table.num_rows // 1000):
                file.write(b"u-cut-%d,only,three\n" % number)
                file.write(b"u-latin-%d,latin@example.com,,,,,,,J\xfcrgen,,,,,,,\n" % number)
                rows += 2
    return rows


def _as_text(table: pa.Table) -> pa.Table:
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name == "updated_at":
            column = pc.strftime(column.cast(pa.timestamp("s", "UTC")), "%Y-%m-%dT%H:%M:%SZ")
        columns.append(column)
    return pa.table(columns, names=table.column_names)


def _tables(people: int, seed: int, first: int) -> Iterator[pa.Table]:
    random = np.random.default_rng(seed)
    for start in range(0, max(people, 1), CHUNK_ROWS):
        numbers = first + np.arange(start, min(start + CHUNK_ROWS, people), dtype=np.int64)
        yield _chunk(numbers, random)


def _pick(random: np.random.Generator, options: dict[str, float], count: int) -> pa.Array:
    chances = np.array(list(options.values()))
    chosen = random.choice(len(options), size=count, p=chances / chances.sum())
    return pa.array([one or None for one in options], pa.string()).take(pa.array(chosen))


def _join(*parts: Any) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def _padded(numbers: npt.NDArray[np.int64], digits: int) -> pa.Array:
    return pc.utf8_lpad(pa.array(numbers).cast(pa.string()), digits, "0")


def _unless(mask: npt.NDArray[np.bool_], array: pa.Array) -> pa.Array:
    return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)


def _chunk(numbers: npt.NDArray[np.int64], random: np.random.Generator) -> pa.Table:
    """Good rows of the people with these numbers, then duplicates and bad rows, mixed."""
    good = _people(numbers, random)
    count = len(numbers)
    again = random.permutation(count)[: int(count * DUPLICATES)]
    duplicates = good.take(pa.array(again, pa.int64()))
    shift = pa.array(random.integers(-300, 300, len(duplicates)) * _DAY_US)
    moved = pc.add(duplicates["updated_at"].cast(pa.int64()), shift).cast(good["updated_at"].type)
    duplicates = _replace(duplicates, "updated_at", moved)
    duplicates = _replace(duplicates, "plan", _pick(random, _PLANS, len(duplicates)))
    bad = _spoil(good.take(pa.array(random.choice(count, int(count * BAD_ROWS)), pa.int64())))
    table = pa.concat_tables([good, duplicates, bad])
    return table.take(pa.array(random.permutation(table.num_rows)))


def _replace(table: pa.Table, name: str, array: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, array)


def _spoil(table: pa.Table) -> pa.Table:
    """Each row refused for one of the reasons, in turn."""
    count = table.num_rows
    turn = np.arange(count) % 7
    faults: list[tuple[str, str | None]] = [
        ("recipient_id", None),
        ("recipient_id", "x" * 300),
        ("email", "nobody at example.com"),
        ("phone", "0171 / 555"),
        ("zone", "Mars/Olympus_Mons"),
        ("consents", "email offers"),
        ("first_name", "N\0L"),
    ]
    for number, (name, fault) in enumerate(faults):
        column = table[name].combine_chunks()
        spoiled = pc.if_else(pa.array(turn == number), pa.scalar(fault, pa.string()), column)
        table = _replace(table, name, spoiled)
    return table


def _people(numbers: npt.NDArray[np.int64], random: np.random.Generator) -> pa.Table:
    count = len(numbers)
    where = places()
    at = random.integers(0, len(where), count)
    firsts = [name for place in where for name in place.first_names]
    lasts = [name for place in where for name in place.last_names]
    first_start = np.cumsum([0, *(len(place.first_names) for place in where)])
    last_start = np.cumsum([0, *(len(place.last_names) for place in where)])
    first = first_start[at] + random.integers(0, np.diff(first_start)[at])
    last = last_start[at] + random.integers(0, np.diff(last_start)[at])

    def of_place(field: str) -> pa.Array:
        return pa.array([getattr(place, field) for place in where]).take(pa.array(at))

    ids = _padded(numbers, 8)
    tags = pa.array(["", "+offers", ".o'hara", ".bounce"])
    domains = pa.array(["@example.com", "@example.org", "@example.net", "@mail.example.com"])
    tag = random.choice(4, count, p=[0.9, 0.05, 0.045, 0.005])
    email = _join("p", ids, tags.take(pa.array(tag)), domains.take(pa.array(numbers % 4)))
    phone = _join("+999", _padded(numbers % 10**9, 9))
    token = _join(_padded(numbers * 2654435761 % 10**12, 12), "-", ids)
    spent = np.round(random.gamma(1.5, 120.0, count), 2)
    updated = _START_US + random.integers(0, 365, count) * _DAY_US
    return pa.table(
        {
            "recipient_id": _join("u-", ids),
            "email": _unless(random.random(count) < 0.01, email),
            "phone": _unless(random.random(count) < 0.4, phone),
            "push_token": _unless(random.random(count) < 0.6, token),
            "zone": _unless(random.random(count) < 0.002, of_place("zone")),
            "locale": of_place("locale"),
            "consents": _pick(random, _CONSENTS, count),
            "updated_at": pa.array(updated).cast(pa.timestamp("us", "UTC")),
            "first_name": pa.array(firsts).take(pa.array(first)),
            "last_name": pa.array(lasts).take(pa.array(last)),
            "country": of_place("country"),
            "city": of_place("city"),
            "age": pa.array(16 + random.binomial(70, random.beta(1.6, 3.0, count))),
            "plan": _pick(random, _PLANS, count),
            "lifetime_value": pa.array(spent),
            "orders": pa.array(random.poisson(3.0, count)),
        }
    )
