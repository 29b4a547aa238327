"""README and docs: their tables say what the reports in results/ say; the flags, files and links in them exist."""

import re
import sys
from pathlib import Path

import pytest

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
    text = page.read_text()
    for command in re.findall(r"python rlhf_colocate\.py (.*)", text):
        assert set(re.findall(r"--[\w-]+", command.split("#")[0])) <= flags, command
    for path in re.findall(r"`((?:benchmarks|tests|results|examples|docs|colocate)/[\w.\-]+)", text):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000
