"The table of the seven methods on the front page says what is counted and what was measured."
import json
import re

import pytest

from ctdiffusion.models.variants import VARIANTS, cost, preset


@pytest.fixture(scope="module")
def rows(root):
    "variant: (millions of parameters, GMAC, steps, GB, seconds), each a list of numbers."
    lines = re.findall(r"^\| .* \| \[(\w+)\]\(nbs/\d\d_\w+\.ipynb\) \| (.*) \|$", (root / "README.md").read_text(), re.M)
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
