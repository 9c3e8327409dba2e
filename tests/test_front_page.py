"The tables of nbs/details.md say what is counted and what was measured."
import json
import re
from pathlib import Path

import pytest

from ctdiffusion.evaluation.fast import verdict
from ctdiffusion.models.variants import VARIANTS, cost, preset

ROOT = Path(__file__).resolve().parents[1]
DETAILS = (ROOT / "nbs/details.md").read_text()


@pytest.fixture(scope="module")
def rows(root):
    "variant: (millions of parameters, GMAC, steps, GB, seconds), each a list of numbers."
    lines = re.findall(r"^\| .* \| \[(\w+)\]\(\d\d_\w+\.ipynb\) \| (.*) \|$", DETAILS, re.M)
    return {v: [[float(x) for x in re.findall(r"\d+(?:\.\d+)?", cell)] for cell in cells.split(" | ")] for v, cells in lines}


def test_every_method_has_a_row(rows): assert list(rows) == list(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_counted(rows, variant):
    c, (millions, gmac, _, gb, _) = cost(preset(variant, "paper").model), rows[variant]
    assert millions == [round(n / 1e6, 1) for n in (c["params"], c["judge"]) if n]
    assert gmac == [round(c[k], 1) for k in ("gmac_mask", "gmac_step")]
    assert gb == [round(c[k], 1) for k in ("gb_state", "gb_slice")]


def test_what_was_measured(rows, root):
    measured = json.loads((root / "nbs/results/steps-paper-cpu.json").read_text())
    assert (measured["preset"], [r["batch"] for r in measured["rows"]]) == ("paper", [1] * 7)
    assert {r["variant"]: [round(r["seconds"], 1)] for r in measured["rows"]} == {v: cells[4] for v, cells in rows.items()}


def measured(benchmark: str, table: str, row: str, key: str = "times_ours") -> float:
    rows = json.loads((ROOT / f"nbs/results/bench-{benchmark}.json").read_text())["rows"]
    return next(v for k, v in rows.items() if k.startswith(table))[row][key]


def test_speed_as_it_was_measured():
    "Every ratio of the table is in the benchmark's file, and nothing was read on a busy machine."
    table = dict(re.findall(r"^\| (P\w+|G1-G4) \|.*\| (.*) \|$", DETAILS, re.M))
    one, job = "one evaluation, the mask", "1000 ancestral, all anew"
    told = {"P1": [f"{measured('sampling', f'a slice {of}', job):.0f}x" for of in ("at 64 x 64, conditional", "at 64 x 64, mask", "by conditional-demo", "by mask-demo")],
            "P1c": [f"{measured('sampling', 'a slice at 64 x 64, conditional', 'diffusers, DDIM-50'):.1f}x"],
            "P2": [f"{measured('network', 'one evaluation', peer):.2f}x" for peer in ("diffusers", "MONAI")] + [f"{measured('network', 'one evaluation', 'ours', 'of_matmul'):.2f} of"],
            "P3": [f"{measured('sampling', one, f'{net}, all anew'):.2f}x" for net in ("mask, paper", "mask, 64 x 64", "sdm, 64 x 64")],
            "P4": [f"{min(measured('network', 'one training step', peer) for peer in ('diffusers', 'MONAI')):.2f}x"],
            "P6": [f"{measured('metrics', 'Dice (P6', 'MONAI one_hot, DiceMetric'):.0f}x", f"{measured('metrics', 'SSIM', 'scikit-image'):.1f}x", f"{measured('metrics', 'trace term', 'scipy.linalg.sqrtm'):.1f}x"],
            "P7": [f"{round(measured('data', 'batches', 'ours: order and bytes', 'slices_per_s'), -2):,.0f} slices/s", f"{measured('data', 'one case', 'ours', 'times_usual'):.1f}x"]}
    assert not [(row, figure) for row, figures in told.items() for figure in figures if figure not in table[row]]
    files = [json.loads(p.read_text())["rows"] for p in (ROOT / "nbs/results").glob("bench-*.json")]
    timed = [row for rows in files for part in rows.values() for row in part.values() if "read" in row]
    assert len(timed) > 50 and all(row["read"] == "seconds" and row["kept"] >= 5 and row["foreign"] <= 0.025 for row in timed)


def test_quality_of_the_default_sampler_as_it_was_measured():
    rows = json.loads((ROOT / "nbs/results/fast-phantom.json").read_text())["rows"]
    all = [verdict(rows, f"{m}-demo", "sde12") for m in ("conditional", "mask", "edge")]
    row = re.search(r"^\| P1q \|.*$", DETAILS, re.M)[0]
    assert "distance " + ", ".join(f"{100 * (v['distance'] / v['of'] - 1):+.0f}" for v in all) + " %" in row
    assert "mean Dice " + ", ".join(f"{v['dice_mean']:+.1f}" for v in all) in row
    assert f"errors {min(v['dice_mean_error'] for v in all):.1f} to {max(v['dice_mean_error'] for v in all):.1f}" in row and "not decided" in row
