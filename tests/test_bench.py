"The benchmarks' own machinery: no test here asserts how fast anything is."
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import harness  # noqa: E402


class Busy:
    "A clock of the machine's CPU seconds; others use it during the calls whose numbers are in `loud`."
    def __init__(self, loud=lambda call: False): self.loud, self.reads, self.seconds = loud, 0, 0.0

    def __call__(self) -> float:
        call, end = divmod(self.reads, 2)
        self.reads += 1
        if end and self.loud(call): self.seconds += 1e6
        return self.seconds


def timed(calls: dict, **options) -> dict:
    return harness.interleave(calls, least=0, own=lambda: 0.0, reference=lambda: 100.0, **options)


def test_calls_take_turns_after_a_warm_up_of_each():
    order = []
    rows = timed({k: lambda k=k: order.append(k) for k in "abc"}, repeats=3, machine=Busy())
    assert "".join(order) == "abc" + 3 * "abc"
    assert all(r["kept"] == 3 and r["dropped"] == 0 and r["matmul"] == 100 and r["read"] == "seconds" for r in rows.values())


def test_noisy_calls_are_dropped_and_made_again():
    order = []
    rows = timed({k: lambda k=k: order.append(k) for k in "ab"}, repeats=2, machine=Busy(lambda call: call in (2, 5)))
    assert "".join(order[2:]) == "ababab"
    assert [(r["kept"], r["dropped"], r["foreign"]) for r in rows.values()] == [(2, 1, 0), (2, 1, 0)]


def test_patience_ends_and_the_result_says_so(capsys):
    rows = timed({"a": lambda: time.sleep(0.01), "b": lambda: None}, repeats=2, patience=0, machine=Busy(lambda call: True))
    assert all(r["read"] == "cpu" and r["kept"] == 0 and r["dropped"] >= 1 for r in rows.values())
    harness.report("loud", rows, None)
    assert "NOT QUIET (all rows)" in capsys.readouterr().out


def test_where_nobody_counts_all_calls_are_kept(capsys):
    rows = timed({"a": lambda: None}, repeats=2, machine=lambda: None)
    assert (rows["a"]["kept"], rows["a"]["foreign"], rows["a"]["read"]) == (2, None, "seconds")
    harness.report("unknown", rows, None)
    assert "every call was kept" in capsys.readouterr().out


def test_own_work_is_not_foreign():
    "The machine's counter sees this process, too, and is not fooled by it."
    work = lambda: sum(i * i for i in range(300_000))
    clock = iter(range(10**9))
    row = harness.interleave({"a": work}, repeats=2, least=0, reference=None, machine=lambda: next(clock) * 5.0, own=lambda c=iter(range(10**9)): next(c) * 5.0)["a"]
    assert row["foreign"] == 0 and row["kept"] == 2 and row["matmul"] is None


def test_short_calls_are_repeated_within_a_measurement(monkeypatch):
    order = []
    clock = [0.0]
    def call():
        order.append(1)
        clock[0] += 0.002
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])  # a clock of its own, however busy the machine is
    row = harness.interleave({"a": call}, repeats=1, least=0.05, reference=None, machine=lambda: None)["a"]
    assert len(order) == 1 + 1 + 25 and row["seconds"] == pytest.approx(0.002)


def test_the_report_is_json_with_its_origin(tmp_path, capsys):
    whole = harness.report("test", {"ours": dict(seconds=1.5, read="seconds", foreign=0.0, parts=[1, 2]), "theirs": dict(params=7)}, str(tmp_path / "new/bench.json"), batch=8)
    assert json.loads((tmp_path / "new/bench.json").read_text()) == json.loads(json.dumps(whole))
    assert whole["batch"] == 8 and {"processor", "threads", "torch", "environment", "rows"} <= whole.keys()
    assert "ours" in (said := capsys.readouterr().out) and "parts" not in said


def test_a_missing_peer_is_named(capsys):
    assert harness.optional("no_such_module", "no-such-package") is None
    assert "MISSING: no-such-package" in capsys.readouterr().out


@pytest.mark.parametrize("script", sorted(p.name for p in BENCH.glob("*.py") if p.name not in ("harness.py", "forks.py")))
def test_every_benchmark_explains_itself(script):
    done = subprocess.run([sys.executable, BENCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout, done.stderr
