"""The README's tables say what the recorded reports say, and its flags and files exist."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402


def test_tables_come_from_the_reports():
    for part in (tables.runs, tables.pushes, tables.loops, tables.startup, tables.drills, tables.soaks, tables.tested):
        assert part() in README, "run `python benchmarks/tables.py` and put its output into the README"


def test_every_flag_and_file_in_the_readme_exists():
    script = (ROOT / "colocate/config.py").read_text()
    own = set(re.findall(r"--(num-gpus|tensor-parallel-size|inject|model|output-json|ray-address)\b", README))
    assert own, "the README names no flag"
    for flag in own:
        assert f"    {flag.replace('-', '_')}: " in script
    for path in re.findall(r"`((?:benchmarks|tests|results)/[\w.\-]*)`", README):
        assert (ROOT / path).exists(), path
    for fault in re.findall(r"\| `([\w\-]+)`(?:, `[\w\-]+`)* \|$", README, re.MULTILINE):
        assert f'"{fault}"' in script
