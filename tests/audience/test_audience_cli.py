"""`fanfare audience`, as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from schemas.snapshot import shard_file_name
from sinks.store import FileStore
from stack.cli_audience import app
from stack.profiles import generate, places


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_generate_build_show_verify(tmp_path: Path) -> None:
    out, store, rejects = tmp_path / "p.parquet", tmp_path / "store", tmp_path / "rejects.csv"
    assert "2,060 rows" in run("generate", "--people", 2000, "--seed", 3, "--out", out)
    options = ("--store", store, "--segment", "age >= 18", "--tenant", "acme")
    told = json.loads(run("build", out, *options, "--rejects", rejects, "--json"))
    assert told["read"] == 2060
    assert told["rejected"] == 20
    assert told["audience"] + told["not_selected"] == 2000
    name = told["snapshot"]
    plain = run("build", out, *options)
    assert name in plain
    assert f"{told['audience']:,}" in plain
    assert "--rejects FILE" in plain
    assert "Europe/Berlin" in run("show", name[:6], "--store", store)
    shown = json.loads(run("show", name, "--store", store, "--json"))
    assert shown["counts"]["audience"] == told["audience"]
    assert shown["segment"] == "age >= 18"
    assert "as they were written" in run("verify", name, "--store", store)

    snapshot = FileStore(store).open_snapshot(name)
    entry = snapshot.manifest.pages[5]
    (snapshot.folder / shard_file_name(entry.shard)).unlink()
    assert f"shard {entry.shard}" in run("verify", name, "--store", store, status=1)


def test_errors_are_one_line_and_a_status(tmp_path: Path) -> None:
    source = tmp_path / "p.csv"
    source.write_text("recipient_id,age\na,1\n")
    store = ("--store", tmp_path / "store")
    assert "column 5" in run("build", source, "--segment", "age ? 3", *store, status=1)
    assert "'x[0]]'" in run("build", source, "--segment", "[x[0]]", *store, status=1)
    assert "No such file" in run("build", tmp_path / "none.csv", *store, status=1)
    assert "fanfare audience build" in run("show", "0" * 32, *store, status=1)


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    for path, seed in zip(names, (1, 1, 2), strict=True):
        generate(3000, seed, path)
    first, second, third = (path.read_bytes() for path in names)
    assert first == second
    assert first != third


def test_thirty_zones_and_every_kind_of_letter() -> None:
    found = places()
    assert len({place.zone for place in found}) == 30
    letters = {ord(letter) for place in found for name in place.first_names for letter in name}
    for script in ("Я", "Ω", "م", "ש", "健", "민", "अ", "ส", "🚀", "é", "ł", "'"):
        assert any(abs(ord(script) - letter) < 60 for letter in letters), script
