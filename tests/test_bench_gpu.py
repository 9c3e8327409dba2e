"The benchmark of a graphics card, whole, where there is none: a small network on the processor, and no figure that could be taken for a measurement."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GOALS = ("G1", "G2", "G3", "G4", "G5")


def bench(root: Path, *options: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, root / "bench/gpu.py", *options], env=env, capture_output=True, text=True, cwd=root)


@pytest.fixture(scope="module")
def result(root, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    done = bench(root, "--tiny", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout
    return json.loads(out.read_text())


def test_every_part_has_run(result):
    parts = result["rows"]
    assert set(parts["training step (G1, G2)"]) >= {"ours, eager", "ours, compiled"}
    assert set(parts["evaluation (G3)"]) == set(parts["volumes (G3)"]) == {"eager", "compile"} and set(parts["one slice (G4)"]) == {"eager", "graph"}
    assert all(row["seconds"] > 0 for name in ("training step (G1, G2)", "evaluation (G3)", "volumes (G3)", "one slice (G4)") for row in parts[name].values())


def test_without_a_card_no_goal_is_measured(result):
    goals = result["rows"]["goals"]
    assert {k[:2] for k in goals} == set(GOALS) and all(row["measured"] == "not measured" for row in goals.values())
    assert "no card" in result["card"] and result["tiny"]


def test_recorded_and_kept_are_the_same(result):
    checks = result["rows"]["checks"]
    assert set(checks) == {"bfloat16", "learned", "compiled", "recorded", "cached"}
    assert checks["recorded"]["found"] == 0 and checks["cached"]["holds"] and checks["bfloat16"]["holds"]
    assert len(checks["bfloat16"]["curve"][0]) == 4 and checks["bfloat16"]["curve"][0] != checks["bfloat16"]["curve"][1]


def test_operations_are_three_times_forwards(result):
    training, evaluation = result["rows"]["training step (G1, G2)"]["ours, eager"], result["rows"]["evaluation (G3)"]["eager"]
    assert training["tflop"] / result["batch"] == pytest.approx(3 * evaluation["tflop"] / result["sample_batch"])
    assert training["mfu"] == pytest.approx(training["tflop"] * 1e3 / training["seconds"] / training["matmul"])
    assert training["counted_gb"] > evaluation["counted_gb"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_machine_without_a_card_is_told_so(root):
    done = bench(root)
    assert done.returncode == 0 and "No CUDA device: not measured" in done.stdout
