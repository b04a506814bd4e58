"""What is made of benchmarks' figures: what moved, and charts."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from bench.charts import draw
from bench.harness import RESULTS
from bench.profile import REST, parts
from bench.quick import moved, ratios
from bench.targets import PAGE, TARGETS, with_table

FIGURES = {
    "rendering": {"render, plain Jinja2": 20.0, "render, metered": 10.0},
    "rules": {"decide: no state": 1_000_000.0},
    "loop": {"smtp_loop_cpu_us": 100.0, "smtp_per_s": 3_000.0},
    "clients": {"http.ours.cpu_us": 15.0, "http.pyreqwest.cpu_us": 80.0, "http.ours.per_s": 9.0},
    "decide": {"taskmanager_cpu_s_per_million": 12.0, "no_caps_kafka_cpu_s_per_million": 3.0},
    "deliver": {"smtp_taskmanager_cpu_s_per_million": 120.0},
    "scaling": {
        "decide_cpu_s_per_million_10k": 30.0,
        "decide_cpu_s_per_million_1m": 20.0,
        "ledger_redis_cpu_s_per_million_10k": 9.0,
    },
}


def test_a_slower_machine_moves_nothing() -> None:
    """Costs are compared with the yardstick of the same run."""
    slower = {
        section: {
            name: number / 2 if section == "rules" else number * 2 for name, number in found.items()
        }
        for section, found in FIGURES.items()
    }
    assert moved(ratios(FIGURES), ratios(slower), 0.01) == {}


def test_what_became_dearer_or_cheaper_is_said() -> None:
    """By a cost of its own, or by a rate that is one over a cost."""
    now = FIGURES | {
        "loop": {"smtp_loop_cpu_us": 150.0, "smtp_per_s": 1.0},
        "rules": {"decide: no state": 2_000_000.0},
    }
    changes = moved(ratios(FIGURES), ratios(now), 0.25)
    assert changes == {"loop: smtp_loop_cpu_us": 0.5, "rules: decide: no state": -0.5}


def test_charts_are_pictures_and_the_same_each_time(tmp_path: Path) -> None:
    """One for each section that has figures."""
    first = draw(FIGURES, tmp_path / "one")
    again = draw(FIGURES, tmp_path / "two")
    assert {path.stem for path in first} == {"rendering", "clients", "scaling", "cost"}
    for one, other in zip(first, again, strict=True):
        assert ElementTree.parse(one).getroot().tag.endswith("svg")
        assert one.read_bytes() == other.read_bytes()
    assert draw({"rules": {}}, tmp_path / "none") == []


def test_a_profile_is_added_up_by_the_innermost_part_of_the_loop_alone() -> None:
    loop = "_main (sinks/engine.py:150);_drive (sinks/delivery_loop.py:370)"
    by_part, by_line = parts(
        [
            f"{loop};render (sinks/delivery_pages.py:120);root (<template html>:3) 5",
            f"{loop};begin (sinks/smtp_client.py:330);Wire.write (sinks/connections.py:87) 3",
            f"{loop};begin (sinks/smtp_client.py:330) 2",
            "_main (sinks/engine.py:150) 1",
            "collect (sinks/other.py:1) 90",
        ]
    )
    assert by_part == {
        "rendering": 5,
        "writing to the provider (the system call)": 3,
        "the rest of the provider's client": 2,
        REST: 1,
    }
    assert by_line["root (<template html>:3)"] == 5


def test_the_page_says_what_the_results_say() -> None:
    page = PAGE.read_text()
    results = json.loads(RESULTS.read_text())
    assert with_table(page, results) == page
    results["stack"]["idle_cpu_pct"] = 10.5
    assert "| 10.5 |" in (told := with_table(page, results)) and "**no**" in told


def test_targets_are_of_figures_that_are_measured() -> None:
    results = json.loads(RESULTS.read_text())
    for name, target in TARGETS.items():
        section, figure = name.split(".")
        assert figure in results[section], name
        assert target.met(target.limit)
        assert not target.met(target.limit + (-1 if target.at_least else 1))
