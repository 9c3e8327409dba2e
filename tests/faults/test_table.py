"The fault table itself: every row has tests, every guard stands where it is said to stand, and the committed table is today's."
import json

import pytest
from rows import ROWS, row_of


@pytest.fixture(scope="module")
def tests(request) -> dict:
    "Test -> its guards, of all that was collected."
    found = {}
    for item in request.session.items:
        if row_of(item.name): found[item.nodeid.split("::", 1)[1].split("[")[0]] = [m.args for m in item.iter_markers("guard")]
    if len({row_of(name.split("::")[-1]) for name in found}) < 5: pytest.skip("needs the whole suite: pytest tests/faults")
    return found


def test_every_row_has_a_test_and_a_guard(tests):
    guarded = {row_of(name) for name, guards in tests.items() if guards}
    assert set(ROWS) == {f"F{n:02}" for n in range(1, 43)} == {row_of(name) for name in tests} == guarded


def test_every_guard_stands_once(root, tests):
    wrong = [(name, file, old) for name, guards in tests.items() for file, old, new in guards if (root / file).read_text(encoding="utf-8").count(old) != 1 or old == new]
    assert not wrong


def test_the_committed_table_is_todays(root, tests):
    rows = json.loads((root / "nbs/results/faults.json").read_text(encoding="utf-8"))["rows"]
    kept = {name: t for r in rows for name, t in r["tests"].items()}
    assert set(kept) == set(tests), "run `make faults`"
    assert [{k: r[k] for k in ("row", "part", "fault", "behaviour")} for r in rows] == list(ROWS.values())
    assert all(r["outcome"] == "passed" for r in rows)
    for name, guards in tests.items(): assert [g["file"] for g in kept[name]["guards"]] == [file for file, *_ in guards] and all(g["red"] for g in kept[name]["guards"]), f"{name}: run `make unguarded`"
