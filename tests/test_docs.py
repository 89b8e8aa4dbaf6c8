"""The pages of docs/ name what there is: files, definitions, sections; their programs run."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from nasray import checkpoint
from nasray.algorithms import ALGORITHMS
from nasray.spaces import space_by_name
from nasray.spaces.supernet import build_subnet
from tests.conftest import FinishedRun

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
STOP = re.compile(r"^\| (\d+) \| `(nasray/[\w/]+\.py)` \| `([\w.]+)` \|", re.M)
LONGEST_WAY = 8  # stops


def definitions(path: Path) -> set[str]:
    """Functions and classes at the top of a file, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if hasattr(each, "name")}
    return found


def test_the_stops_of_each_way_exist():
    ways = (ROOT / "docs/architecture.md").read_text().split("\n## The way of ")[1:]
    assert len(ways) == 3
    for way in ways:
        stops = STOP.findall(way)
        assert [int(number) for number, _, _ in stops] == list(range(1, len(stops) + 1))
        assert len(stops) == len(re.findall(r"^\| \d", way, re.M)) <= LONGEST_WAY
        for _, path, name in stops:
            assert name in definitions(ROOT / path), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    for link in links:
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:nasray|tests|docs|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_sections_of_the_spec_that_comments_name_exist():
    known = set(
        re.findall(r"^## ((?:OneShot|OFA) \d\.\d)", (ROOT / "docs/spec.md").read_text(), re.M)
    )
    assert len(known) > 30
    for path in [
        each for room in ("nasray", "tests", "benchmarks") for each in ROOT.glob(f"{room}/**/*.py")
    ]:
        text = path.read_text()
        for name in re.findall(r"\b(?:OneShot|OFA) \d\.\d\b", text):
            assert name in known, f"{path}: {name}"
        # Two sources number their sections alike: a number alone names none.
        assert not re.search(r"[( ]spec \d", text), f"{path}: says not which spec"


def test_the_readme_tells_of_every_algorithm():
    text = (ROOT / "README.md").read_text()
    assert [name for name in ALGORITHMS if f"`{name}`" not in text] == []


def test_messages_that_the_debugging_page_explains_are_those_of_the_code():
    page = (ROOT / "docs/debugging.md").read_text()
    tables = [part for part in page.split("\n\n") if part.startswith(("| `error` ", "| you see "))]
    rows = [row for table in tables for row in table.splitlines()[2:]]
    messages = re.findall(r"^\| [^|`]*`(.+?)` \|", "\n".join(rows), re.M)
    code = "\n".join(path.read_text() for path in ROOT.glob("nasray/**/*.py"))
    assert len(messages) >= 5
    for message in messages:
        pattern = re.sub(r"\\\.\\\.\\\.|\bN\b", ".*", re.escape(message))
        assert re.search(pattern, code), message


PROGRAMS = re.findall(r"```python\n(.+?)```", (ROOT / "docs/debugging.md").read_text(), re.S)


@pytest.mark.parametrize("program", PROGRAMS, ids=["failed", "again"])
def test_programs_of_the_debugging_page_run(
    program: str, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
):
    names: dict[str, Any] = {}
    exec(program.replace("RUN_DIR", finished_run.folder), names)
    said = capsys.readouterr().out
    if "candidate" in names:  # the one that evaluates again
        assert names["correct"].mean() == names["candidate"].fitness
    assert said


ELSEWHERE = re.findall(r"```python\n(.+?)```", (ROOT / "docs/run.md").read_text(), re.S)


@pytest.mark.parametrize("program", ELSEWHERE, ids=["backbone", "classes"])
def test_programs_of_the_page_on_runs_run(program: str, tmp_path: Path):
    """On a network as retraining leaves it; all that they claim is asserted in them."""
    space = space_by_name("ofa_mobilenetv3", num_classes=3)
    arch = space.named["smallest"]
    path = tmp_path / "retrain/0/model.pt"
    path.parent.mkdir(parents=True)
    subnet = build_subnet(space.decode(arch))
    checkpoint.save_subnet(str(path), space, arch, subnet, classes=["a", "b", "c"])
    names: dict[str, Any] = {}
    exec(program.replace("RUN_DIR", str(tmp_path)), names)
    loaded = names["backbone"] if "backbone" in names else names["model"]
    assert loaded.arch == space.to_json(arch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_was_left_halfway_through_a_merge(page: Path):
    assert not re.findall(r"^(?:<<<<<<<|=======|>>>>>>>)(?: .*)?$", page.read_text(), re.M)
