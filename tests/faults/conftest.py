"""Tests of the fault table: `test_F07_...` belongs to row F07, and `guard` says which lines protect from it.

`pytest tests/faults --faults FILE` prints the table and writes it to FILE; `unguarded.py` takes each guard away and wants red."""
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "bench")]  # rows.py, forks.py
from rows import ROWS, row_of  # noqa: E402

BEST = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    parser.addoption("--faults", metavar="FILE", help="print the fault table and write it to FILE")


def pytest_configure(config):
    config.addinivalue_line("markers", "guard(file, old, new): what protects from the fault, and how it is taken away")
    config.seen = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if row_of(item.name):
        test = item.config.seen.setdefault(item.nodeid.split("::", 1)[1].split("[")[0], dict(row=row_of(item.name), outcome="passed", cases=0, seconds=0.0, why=""))
        test["seconds"] += report.duration
        test["cases"] += report.when == "call" or report.outcome == "skipped"
        if BEST.index(report.outcome) > BEST.index(test["outcome"]): test["outcome"] = report.outcome
        if report.outcome == "skipped": test["why"] = report.longrepr[2].removeprefix("Skipped: ")
    return report


def table(seen: dict) -> list[dict]:
    "One entry for each row of the fault table, with its tests."
    def entry(row: str, words: dict) -> dict:
        tests = {name: {k: round(v, 1) if k == "seconds" else v for k, v in t.items() if k != "row"} for name, t in sorted(seen.items()) if t["row"] == row}
        return words | dict(outcome=max((t["outcome"] for t in tests.values()), key=BEST.index, default="no test"), tests=tests)
    return [entry(row, words) for row, words in ROWS.items()]


def pytest_terminal_summary(terminalreporter, config):
    if not (file := config.getoption("faults")): return
    rows = table(config.seen)
    terminalreporter.section("fault table")
    for r in rows:
        for n, (name, t) in enumerate(r["tests"].items() or [("", dict(outcome="no test", cases=0, seconds=0))]):
            terminalreporter.write_line(f"{'' if n else r['row']:4} {t['outcome']:8} {t['cases']:4} {t['seconds']:6.1f} s  {name}")
    good = sum(r["outcome"] == "passed" for r in rows)
    terminalreporter.write_line(f"{good} of {len(rows)} rows passed in {sum(t['seconds'] for r in rows for t in r['tests'].values()):.0f} s")
    old = {t: v for r in json.loads(Path(file).read_text(encoding="utf-8"))["rows"] for t, v in r["tests"].items()} if Path(file).exists() else {}
    for r in rows:
        for name, t in r["tests"].items(): t["guards"] = old.get(name, {}).get("guards", [])  # what unguarded.py found
    Path(file).write_text(json.dumps(dict(rows=rows), indent=1) + "\n", encoding="utf-8")
