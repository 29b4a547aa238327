"""How long the first hour's commands take here: `make run`, `make test`, and `make test` beside two busy loops.

python benchmarks/first_hour.py [--avx2] [--only run test beside] [--output results/first-hour.json]

Each runs in a fresh clone of the last commit, after `make install`. There is one row per CPU, instruction set and
Python; what is measured anew replaces what it had. --avx2: let PyTorch use what a CPU without AVX-512 has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
AVX2 |= {"RLHF_COLOCATE_AVX2": "1"}  # vLLM asks the CPU by itself
ASK = "import platform, torch; print(torch.backends.cpu.get_cpu_capability(), platform.python_version())"


def cpu_name() -> str:
    """As the kernel has it, with how many cores there are."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found.group(1) if found else platform.machine()}, {os.cpu_count()} cores"


def timed(clone: Path, target: str) -> tuple[float, str]:
    """(seconds, output) of `make TARGET`, which is shown as it comes. Ends the script if it fails."""
    start = time.perf_counter()
    lines = []
    command = ["make", "-C", str(clone), target]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **options) as process:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    if process.returncode:
        sys.exit(f"make {target} failed with exit code {process.returncode}: no times are written")
    return round(time.perf_counter() - start, 1), "".join(lines)


@contextlib.contextmanager
def busy_loops(count: int):
    """So many processes that do nothing but use a core."""
    loops = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def note(row: dict, path: Path) -> None:
    """Write what is known of the row into the one of the same CPU, instruction set and Python."""
    row["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = {}
    for other in [*(json.loads(path.read_text()) if path.exists() else []), row]:
        same = (other["cpu"], other["capability"], other["python"])
        rows[same] = rows.get(same, {}) | other
    path.write_text(json.dumps([*rows.values()], indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="imitate a CPU that has AVX2 and no AVX-512")
    whole = ["run", "test", "beside"]
    parser.add_argument("--only", nargs="+", choices=whole, default=whole, help="which of the three to measure")
    parser.add_argument("--output", type=Path, default=ROOT / "results/first-hour.json", help="JSON file of the rows")
    args = parser.parse_args()
    if args.avx2:
        os.environ.update(AVX2)
    with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        timed(clone, "install")
        asked = subprocess.run([clone / ".venv/bin/python", "-c", ASK], capture_output=True, text=True, check=True)
        capability, python = asked.stdout.split()
        if args.avx2:
            capability += " (imitated)"
        row = {"cpu": cpu_name(), "capability": capability, "python": python}
        if "run" in args.only:
            row["make_run_s"], _ = timed(clone, "run")
            note(row, args.output)
        if "test" in args.only:
            row["make_test_s"], output = timed(clone, "test")
            row["tests"] = int(re.findall(r"(\d+) passed", output)[-1])
            note(row, args.output)
        if "beside" in args.only:
            with busy_loops(2):
                row["make_test_beside_two_busy_loops_s"], _ = timed(clone, "test")
            note(row, args.output)
    print(json.dumps(row, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
