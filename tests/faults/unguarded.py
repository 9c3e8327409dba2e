"""Take each guard of the fault table away, run its test, and see red.

    python tests/faults/unguarded.py [F07 F12 ...] [--out nbs/results/faults.json]

A test that stays green without its guard tests nothing. Works on a copy of the project; a few minutes for all."""
import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Guards:
    "Plugin of pytest: the guards of all tests that were collected."
    def __init__(self): self.found = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for mark in item.iter_markers("guard"): self.found[item.nodeid.split("[")[0], mark.args] = item.name.split("_")[1][:3]


def collect() -> dict:
    "(test, (file, old, new)) -> row."
    plugin = Guards()
    with redirect_stdout(io.StringIO()): code = pytest.main(["--collect-only", "-q", str(ROOT / "tests" / "faults")], plugins=[plugin])
    if code: sys.exit(f"the tests of the fault table cannot be collected ({code!r})")
    return plugin.found


def seen_red(copy: Path, test: str, file: str, old: str, new: str) -> bool:
    "Does the test fail in `copy` when `old` is replaced by `new`?"
    path = copy / file
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1: sys.exit(f"{test}: its guard stands {text.count(old)} times in {file}, expected once: {old!r}")
    path.write_text(text.replace(old, new), encoding="utf-8")
    try: done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test], cwd=copy, capture_output=True, text=True, timeout=600,
                               env=os.environ | dict(PYTHONPATH=str(copy), OMP_NUM_THREADS="1"))
    finally: path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1): sys.exit(f"{test} without its guard in {file}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", help="F07 ...; none: all")
    p.add_argument("--out", help="fault table to write the findings into")
    args, red, green = p.parse_args(), {}, []
    guards = {key: row for key, row in collect().items() if not args.rows or row in args.rows}
    with tempfile.TemporaryDirectory() as there:
        copy = Path(there) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"))
        for (test, (file, old, new)), row in guards.items():
            since, failed = time.monotonic(), seen_red(copy, test, file, old, new)
            print(f"{row} {'red' if failed else 'GREEN WITHOUT ITS GUARD':24} {time.monotonic() - since:5.1f} s  {test.split('::', 1)[1]}  {file}: {old.strip().splitlines()[0][:70]}", flush=True)
            red.setdefault(test.split("::", 1)[1], []).append(dict(file=file, red=failed))
            if not failed: green.append(test)
    if args.out:
        faults = json.loads(Path(args.out).read_text(encoding="utf-8"))
        for r in faults["rows"]:
            for name, t in r["tests"].items(): t["guards"] = red.get(name, [] if not args.rows else t.get("guards", []))
        Path(args.out).write_text(json.dumps(faults, indent=1) + "\n", encoding="utf-8")
    if green: sys.exit(f"{len(green)} tests stay green without a guard")


if __name__ == "__main__": main()
