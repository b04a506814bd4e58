"""What the documents say is there: commands, options, settings, files, links, examples."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from schemas.records import LegSpec, WhenZoneUnknown
from stack.cli import COMMANDS, load
from tests.docs import settings_table
from tests.docs.readme import README, ROOT, blocks, section
from transforms.campaign_file import parse_campaign
from transforms.rendering import TemplateSource, compile_template

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docker").glob("*.md"), *ROOT.glob("docs/*.md")])
TOP_LEVEL = {path.name for path in ROOT.iterdir()}
FOREIGN_OPTIONS = {"--help", "--install-completion", "--show-completion"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands() -> Iterator[tuple[str, Any]]:
    """Every command as it is typed, with its parameters."""
    for word, entry in COMMANDS.items():
        command = load(entry)
        if hasattr(command, "commands"):
            for sub, one in command.commands.items():
                yield f"fanfare {word} {sub}", one
        else:
            yield f"fanfare {word}", command


def undocumented(text: str) -> list[str]:
    """Commands and options that a text does not name."""
    missing = []
    for typed, command in commands():
        if not re.search(rf"`{typed}[ `]", text):
            missing.append(typed)
        options = {option for parameter in command.params for option in parameter.opts}
        for option in sorted(options - FOREIGN_OPTIONS):
            if option.startswith("--") and not re.search(rf"`{option}[ `]", text):
                missing.append(f"{typed} {option}")
    return missing


def test_every_command_and_option_is_in_the_readme() -> None:
    text = section("Commands")
    assert undocumented(text) == []
    assert undocumented(text.replace("`fanfare campaign pause RUN`", ""))[0] == (
        "fanfare campaign pause"
    )
    assert undocumented(text.replace("`--rejects FILE`", "")) == [
        "fanfare audience build --rejects"
    ]


def test_the_readme_names_no_command_that_there_is_not() -> None:
    known = {typed for typed, _ in commands()} | {f"fanfare {word}" for word in COMMANDS}
    for path in DOCUMENTS:
        typed = re.findall(r"`(fanfare [a-z-]+(?: [a-z-]+)?)", path.read_text())
        for one in typed:
            group = " ".join(one.split()[:2])
            assert one in known or (group in known and group not in _groups()), f"{path}: {one}"


def _groups() -> set[str]:
    return {" ".join(typed.split()[:2]) for typed, _ in commands() if len(typed.split()) == 3}


def test_the_table_of_settings_is_what_the_settings_are() -> None:
    text = README.read_text()
    assert settings_table.replaced(text) == text, "run: python -m tests.docs.settings_table"
    for variable in settings_table.variables():
        assert f"| `{variable}` |" in text


def test_the_documents_name_no_variable_that_nobody_reads() -> None:
    sources = [
        path.read_text()
        for folder in ("stack", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "docs"
    ]
    known = settings_table.variables()
    for source in sources:
        known |= set(re.findall(r"FANFARE_[A-Z_]+[A-Z]", source))
    documents = [*DOCUMENTS, ROOT / "docker" / "compose.yaml", ROOT / "docker" / "Dockerfile"]
    for path in documents:
        named = set(re.findall(r"FANFARE_[A-Z_]+[A-Z]", path.read_text()))
        assert named <= known, f"{path}: {named - known}"


def paths_named(text: str) -> set[str]:
    """Files and folders of the project that a text names in code marks."""
    found = set()
    for marked in re.findall(r"`([^`\s]+)`", text):
        first = marked.split("/")[0]
        if "<" not in marked and ("/" in marked or "." in marked) and first in TOP_LEVEL:
            found.add(marked)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    named = paths_named(path.read_text())
    missing = [one for one in named if not (ROOT / one).exists()]
    assert missing == []


def test_contributing_names_files_of_every_layer() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for title in ("Add a provider", "Add a rule", "Add a field"):
        named = paths_named(section(title, text))
        assert {one.split("/")[0] for one in named} >= {"schemas", "transforms", "tests"}, title


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in slugs, f"{path}: {target}"


def test_the_campaign_file_of_the_readme_can_be_launched() -> None:
    def check(leg: LegSpec) -> None:
        compile_template(TemplateSource(leg.subject, leg.html, leg.text))

    (example,) = blocks("yaml", section("Two commands"))
    now = datetime(2026, 3, 10, 12, tzinfo=UTC)
    spec = parse_campaign(
        example,
        now=now,
        read_text=lambda name: "",
        check_template=check,
        run="hello-1",
        tenant="default",
        snapshot="0" * 32,
    )
    assert spec.deadline == now + timedelta(hours=6)
    assert spec.when_zone_unknown is WhenZoneUnknown.ASSUME
    assert [cap.name for cap in spec.caps] == ["two-a-day", "five-a-week"]
    assert [route.provider for route in spec.legs[0].routes] == ["smtp", "sendgrid"]


def test_the_python_of_the_readme_is_python() -> None:
    examples = blocks("python", README.read_text())
    assert len(examples) == 3
    for example in examples:
        ast.parse(example)
    for line in re.findall(r"^python -c '(.*)'$", README.read_text(), re.M):
        module = ast.parse(line)
        for one in ast.walk(module):
            if isinstance(one, ast.ImportFrom):
                source = ast.parse((ROOT / f"{one.module}.py".replace(".", "/", 1)).read_text())
                defined = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
                assert {alias.name for alias in one.names} <= defined


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z]+)`", path.read_text()))
        named |= set(re.findall(r"^make ([a-z]+)", path.read_text(), re.M))
        assert named <= targets, path


def test_the_image_holds_what_is_installed() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    setup = (ROOT / "setup.py").read_text()
    (flink,) = re.findall(r"apache-flink==([\d.]+)", setup)
    assert f"ARG FLINK_VERSION={flink}\n" in dockerfile
    packages = set(re.findall(r'^        "([a-z]+)",$', setup.split("packages=")[1], re.M))
    assert packages == set(re.findall(r"^COPY ([a-z]+) \1$", dockerfile, re.M))
    pom = (ROOT / "stack" / "pom.xml").read_text()
    (wanted,) = re.findall(r"-DincludeArtifactIds=(\S+)", dockerfile)
    for artifact in wanted.split(","):
        assert f"<artifactId>{artifact}</artifactId>" in pom


def test_the_composition_is_sound() -> None:
    services = YAML(typ="safe").load(ROOT / "docker" / "compose.yaml")["services"]
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py") if "def main" in path.read_text()}
    started = set()
    for service in services.values():
        command = service.get("command")
        scripts = [Path(word).stem for word in command or () if str(word).endswith(".py")]
        started |= set(scripts)
        for needed in service.get("depends_on", {}):
            assert needed in services
    assert started == jobs
    assert services["redis"]["command"][1:5] == ["--appendonly", "yes", "--appendfsync", "always"]


def test_commit_hooks_run_what_make_check_runs() -> None:
    check = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    run = {line.split("||")[0].strip() for line in re.findall(r"\$\(BIN\)/(.*)", check)}
    hooks = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert {hook["entry"].removeprefix(".venv/bin/") for hook in hooks} == run


def test_the_changelog_leads_to_the_version() -> None:
    (version,) = re.findall(r'^    version="([\d.]+)"', (ROOT / "setup.py").read_text(), re.M)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog and version in changelog
