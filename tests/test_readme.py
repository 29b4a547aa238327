"""README and docs: their tables say what the reports in results/ say; the flags, files and links in them exist."""

import re
import sys
from pathlib import Path

import pytest

from benchmarks.drills import DRILLS, FAULTS
from colocate.config import Config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@each_page
def test_tables_come_from_the_reports(page):
    assert tables.filled(page.read_text()) == page.read_text(), "run `python benchmarks/tables.py`"


@each_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@each_page
def test_every_flag_and_file_exists(page):
    flags = {"--" + name.replace("_", "-") for name in Config.__dataclass_fields__}
    flags |= {f"--no-{name.replace('_', '-')}" for name, f in Config.__dataclass_fields__.items() if f.type == "bool"}
    text = page.read_text()
    for command in re.findall(r"python rlhf_colocate\.py (.*)", text):
        assert set(re.findall(r"--[\w-]+", command.split("#")[0])) <= flags, command
    for path in re.findall(r"`((?:benchmarks|tests|results|examples|docs|colocate)/[\w.\-]+)", text):
        assert (ROOT / path).exists(), path


@each_page
def test_what_is_gone_is_not_mentioned(page):
    for word in ("--inject", "rlhf_faults", "rlhf_report", "rlhf_grpo", "TRANSITIONS", "training actor"):
        assert word not in page.read_text(), word


def test_the_file_tree_names_every_file():
    tree = (ROOT / "README.md").read_text().partition("## The files")[2]
    files = {path.name for path in (ROOT / "colocate").glob("*.py")} - {"__init__.py", "check_python.py"}
    assert set(re.findall(r"\w+\.py", tree)) == files | {"rlhf_colocate.py", "rlhf_utils.py"}


@each_page
def test_every_drill_that_a_page_names_exists(page):
    assert set(re.findall(r"benchmarks/drills\.py ([a-z-]+)", page.read_text())) <= set(DRILLS)


def test_the_table_of_checks_has_every_negative_control():
    rows = [line for line in (ROOT / "docs/checks.md").read_text().splitlines() if line.startswith("| ")]
    controls = {name for row in rows for name in re.findall("`([a-z-]+)`", row.split("|")[-2])}
    assert controls == set(FAULTS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000
