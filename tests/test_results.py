"The committed run of all seven methods: every number of its tables, and of the front page, comes from a sealed file beside them."
import re

import pytest

from ctdiffusion.evaluation.claims import DESIGNS, verdicts
from ctdiffusion.evaluation.references import REFERENCES
from ctdiffusion.evaluation.report import markdown_text, table, to_csv, to_html, to_latex, to_markdown
from ctdiffusion.evaluation.results import METHODS, published, read_results, value
from ctdiffusion.models.variants import VARIANTS


@pytest.fixture(scope="module")
def folder(root): return root / "nbs" / "results" / "demo-full"


@pytest.fixture(scope="module")
def files(folder): return sorted(folder.glob("*.json"))


@pytest.fixture(scope="module")
def rows(files): return {(r["variant"], r["milestone"]): r for r in map(read_results, files)}


def test_all_rows_are_there_and_from_one_experiment(rows):
    milestones = ("10k", "50k", "100k", "150k")
    assert set(rows) == {(v, m) for v in DESIGNS for m in milestones} | {(v, "150k") for v in METHODS} | {(k, None) for k in REFERENCES}
    ours = [r for (v, _), r in rows.items() if v in METHODS]
    assert {(r["start"], r["preset"], r["seed"]) for r in ours} == {("scratch", "demo", 0)}
    assert {r["step"] for (v, m), r in rows.items() if m == "150k"} == {6000} and len({r["data"]["hash"] for r in rows.values()}) == 1
    assert {(r["n"]["patients"], r["n"]["slices"]) for r in ours} == {(8, 406)}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind, text", [("csv", to_csv), ("md", to_markdown), ("tex", to_latex), ("html", to_html)])
def test_the_tables_are_made_of_these_files(folder, files, number, kind, text):
    assert (folder / f"table{number}.{kind}").read_text() == text(table(number, files))


def test_the_verdicts_are_those_of_these_files(folder, rows):
    said = (folder / "claims.md").read_text()
    for _, claim in verdicts([r for (v, _), r in rows.items() if v in METHODS]).iterrows():
        assert " | ".join(markdown_text(x) for x in claim) in said


def test_no_diffusion_sample_of_the_last_milestone_has_residual_noise(rows):
    "Every one of 406 slices: the air of the synthetic slice at most 1.5 times that of the real ones."
    for v in VARIANTS:
        if VARIANTS[v].family == "diffusion":
            m = rows[v, "150k"]["metrics"]
            assert m["air_max"] <= 1.5 * m["air_real"], (v, m["air_max"], m["air_real"])


def test_the_judge_knows_its_organs(rows):
    "Its ceiling: 0.85 over the organs that are large enough at this size; three are smaller than 50 voxels."
    dice = rows["ceiling", None]["metrics"]["dice"]
    small = ("esophagus", "adrenal_gland_right", "adrenal_gland_left", "prostate_uterus")  # the last: no column in the paper
    large = [d for o, d in dice.items() if o not in small]
    assert len(large) == 11 and sum(large) / len(large) >= 85


def test_the_details_say_what_the_files_say(root, rows):
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (root / "nbs/details.md").read_text(), re.M)
    found = {name: [[float(x) for x in re.findall(r"-?\d+\.\d+", cell)] for cell in cells] for name, *cells in lines}
    paper = {r["variant"]: r for r in published(2)}
    for v, name in METHODS.items():
        want = [[round(value(r, key), digits) for r in (rows[v, "150k"], paper[v])] for key, digits in (("distance", 2), ("psnr", 2), ("ssim", 3), ("dice_mean", 1))]
        assert found[name] == want, name
