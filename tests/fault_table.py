"""Which tests belong to which row of the fault table, and the table that `make faults` prints.

A test belongs to row F43 if it is marked `@pytest.mark.fault("F43")`, or if its name begins with `test_F43_`.
The rows themselves, with the behaviour that is demanded, are in tests/faults/rows.csv.
"""
import csv
import re
from pathlib import Path

import pytest

ROWS = Path(__file__).parent / "faults" / "rows.csv"
WORST_LAST = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    parser.addoption("--fault-table", action="store_true", help="run only the tests of the fault table, and print the table")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(row): the test belongs to this row of the fault table")
    config.fault_outcomes = {}


def pytest_collection_modifyitems(config, items):
    for item in items:
        if named := re.match(r"test_(F\d\d)_", item.name):
            item.add_marker(pytest.mark.fault(named[1]))
    if config.getoption("fault_table"):
        chosen = [item for item in items if item.get_closest_marker("fault")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        for mark in item.iter_markers("fault"):
            outcomes = item.config.fault_outcomes.setdefault(mark.args[0], {})
            outcomes[item.nodeid] = report.outcome
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("fault_table"):
        return
    terminalreporter.section("fault table")
    with ROWS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            outcomes = config.fault_outcomes.get(row["row"], {}).values()
            worst = max(outcomes, key=WORST_LAST.index, default="no test")
            terminalreporter.write_line(f"{row['row']}  {worst:8} {len(outcomes):4} tests  {row['fault']}: {row['behaviour']}")
