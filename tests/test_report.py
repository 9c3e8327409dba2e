"""Published digits, sealed results, tables, figures, verdicts; tables under attack are in faults/test_d_results.py."""
import csv
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.evaluation.claims import CLAIMS, difference, verdicts
from ctdiffusion.evaluation.report import DASH, WINDOW, figure3, figure4, table
from ctdiffusion.evaluation.results import (FIELDS, METHODS, METRICS, ORGANS, PUBLISHED, grouped, mean_dice, milestone, published, read_results,
                                            seal, value, write_results)

PRINTED = {1: """
50k conditional 30.57 14.17 0.589 77.6 75.0 91.1 87.8 57.3 60.6 90.4 30.4 66.4 54.1 53.8 61.7 77.7 64.4
50k mask 19.06 14.58 0.603 83.9 84.8 90.3 90.2 62.1 73.4 89.2 40.0 73.2 53.2 56.6 54.1 75.2 57.0
50k edge 35.97 13.43 0.576 56.4 56.7 86.6 82.5 51.2 52.2 86.8 10.6 58.3 52.6 58.2 53.6 73.7 61.2
100k conditional 11.27 16.07 0.643 93.8 95.3 93.9 92.5 73.8 85.0 91.1 64.5 76.6 66.5 62.8 65.1 81.0 70.8
100k mask 10.89 16.10 0.642 93.8 95.8 93.9 93.1 75.3 86.9 91.5 63.9 79.6 65.9 68.5 68.0 82.5 71.6
100k edge 10.32 16.14 0.644 93.6 95.1 94.1 93.4 73.8 85.1 90.8 65.0 77.3 64.9 64.1 64.5 80.6 71.0
150k conditional 10.56 16.26 0.646 94.0 95.6 93.9 91.2 76.3 86.4 90.8 64.0 78.2 67.2 66.0 65.6 80.9 70.0
150k mask 10.58 16.28 0.646 93.9 95.6 93.9 90.9 75.6 87.1 91.3 66.0 79.5 67.2 65.1 65.6 81.3 70.7
150k edge 10.64 16.20 0.646 93.5 95.4 93.8 92.8 75.0 86.7 90.3 64.5 78.1 65.4 64.1 65.3 79.6 69.3""", 2: """
pix2pix 78.86 15.04 0.561 79.3 94.7 94.5 92.0 68.8 86.5 80.8 53.5 67.9 58.4 61.8 61.0 75.9 56.0
oasis 43.57 14.75 0.560 91.8 93.5 92.0 88.1 73.4 88.9 88.6 78.9 80.1 69.0 75.6 71.7 86.3 74.5
spade 60.22 15.27 0.594 92.6 95.4 92.7 91.2 66.6 86.5 86.2 44.8 65.6 61.7 59.3 59.5 79.1 63.9
sdm 12.68 15.12 0.607 91.9 94.3 93.5 93.2 79.3 87.8 89.0 71.9 77.5 69.7 69.6 66.7 81.5 66.2
conditional 10.56 16.26 0.646 94.0 95.6 93.9 91.2 76.3 86.4 90.8 64.0 78.2 67.2 66.0 65.6 80.9 70.0
mask 10.58 16.28 0.646 93.9 95.6 93.9 90.9 75.6 87.1 91.3 66.0 79.5 67.2 65.1 65.6 81.3 70.7
edge 10.64 16.20 0.646 93.9 95.4 93.8 92.8 75.0 86.7 90.3 64.5 78.1 65.4 64.1 65.3 79.6 69.3"""}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def made(variant="mask", when="150k", seed=0, **more):
    "A result of invented numbers."
    dice = {o: 70.0 + seed + i / 10 for i, o in enumerate(ORGANS)} | {"prostate_uterus": None}
    run = dict(preset="demo", seed=seed, step=300, start="scratch", checkpoint="ab" * 32, config="cd" * 8) if variant in METHODS else dict.fromkeys(("preset", "seed", "step", "start", "checkpoint", "config"))
    metrics = dict(distance=1.5 + seed, distance_name="blocks-64", kid=0.01, psnr=20.25, ssim=0.7, psnr_body=None, dice=dice, dice_mean=mean_dice(dice))
    return dict(format=1, variant=variant, milestone=when, **run, sampler=None, data=dict(name="phantom", hash="ef" * 16), judge="a judge", features="blocks-64", n=dict(patients=4, slices=40, volumes={}),
                metrics=metrics, intervals=dict(psnr=[20.0, 20.5]), cases={"p0": dict(psnr=20.25)}, versions={}, hours=dict(training=0.1, sampling=None), machine="none") | more


@pytest.fixture
def keep(tmp_path):
    "Writes results, each to a file of its own, and returns the paths."
    def write(*results): return [write_results(tmp_path / f"{len(list(tmp_path.iterdir()))}.json", r) for r in results]
    return write


# ------------------------------------------------------------------------------------------------- published numbers

@pytest.mark.parametrize("number", [1, 2])
def test_every_published_digit(number):
    with (PUBLISHED / f"table{number}.csv").open(encoding="utf-8", newline="") as f: head, *rows = csv.reader(f)
    assert [" ".join(row[:-1]) for row in rows] == PRINTED[number].strip().splitlines()
    assert head[-18:] == ["fid", "psnr", "ssim", *ORGANS, "note"][-18:] and [bool(row[-1]) for row in rows] == [False] * (len(rows) - 1) + [True]
    lines = {(label[0], label[1]): cells for label, cells in table(number, []).cells.iterrows() if label[2] == "paper"}
    for text in PRINTED[number].strip().splitlines():
        *when, variant = text.split()[:3 - number]
        assert lines[(when or ["150k"])[0], METHODS[variant]].tolist()[:-1] == text.split()[3 - number:]


def test_means_and_the_spleen():
    mean = {(r["variant"], r["milestone"]): round(value(r, "dice_mean"), 2) for r in published()}
    assert len(mean) == 13 and mean["oasis", "150k"] == 82.31 and mean["mask", "150k"] == 80.26 and mean["mask", "100k"] == 80.74 and mean["edge", "150k"] == 79.56
    assert [value(published(n)[-1], "spleen") for n in (1, 2)] == [93.5, 93.9] and "93.9" in published(1)[-1]["note"]


# ----------------------------------------------------------------------------------------------------- sealed results

def test_round_trip_and_seal(keep):
    path, = keep(made() | dict(metrics=made()["metrics"] | dict(psnr=np.float32(20.5), kid=float("nan"))))
    document = read_results(path)
    assert document["metrics"]["psnr"] == 20.5 and document["metrics"]["kid"] is None and document["sha256"] == seal(document)
    assert FIELDS.keys() | {"sha256"} == document.keys() and document["metrics"].keys() == set(METRICS)
    again, = keep(document)
    assert again.read_bytes() == path.read_bytes()
    path.write_text(json.dumps(document, sort_keys=True))  # another layout, the same content
    assert read_results(path) == document


@pytest.mark.parametrize("old, new, why", [
    ("20.25", "21.25", "edited"), ('"phantom"', '"AMOS22"', "edited"), ('"patients": 4', '"patients": 5', "edited"), ('"sha256": "', '"sha256": "0', "edited"),
    ('"judge":', '"jury":', "no key judge"), ('"kid":', '"kit":', "no key metrics.kid"), ("20.25", "NaN", "NaN"), ("20.25", "Infinity", "Infinity"), ("20.25", "1e999", "1e999"),
    ('"format": 1', '"format": 2', "format 2"), ('"slices": 40', '"slices": null', "n.slices None"), ('"psnr": 20.25', '"psnr": "20.25"', "metrics.psnr '20.25'"),
    ("{", "[", "no JSON"), ('"seed": 0', '"seed": null', "seed None"), ('"mask"', "7", "variant 7")])
def test_an_edit_is_refused(keep, old, new, why):
    path, = keep(made())
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CTDiffusionError) as e: read_results(path)
    assert why in str(e.value) and path.name in str(e.value) and "Run the evaluation again" in str(e.value)


@pytest.mark.parametrize("content", [b"", b"7", b"[]", b"\xff\xfe\x00", b"[" * 100_000, json.dumps(made() | dict(metrics=[])).encode(), json.dumps(made() | dict(n=None, data=3)).encode(), json.dumps(made() | dict(intervals=dict(psnr=[None, "a"]))).encode()])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(CTDiffusionError, match="results.json"): read_results(path)
    with pytest.raises(CTDiffusionError, match="no file"): read_results(tmp_path / "none.json")


def test_milestones():
    assert [milestone(s, 150_000) for s in (10_000, 50_000, 100_000, 150_000, 75_000)] == ["10k", "50k", "100k", "150k", None]
    assert [milestone(s, 10_000) for s in (2_000, 5_000, 3_333, 10_000)] == [None, None, "50k", "150k"]



# ------------------------------------------------------------------------------------------------------------- tables

def test_published_bold_is_per_iteration():
    bold = table(1, []).bold
    lead = {when: [m for (i, m, whose), b in bold.iloc[:, 0].items() if b and i == when] for when in ("50k", "100k", "150k")}
    assert lead == {"50k": ["Mask-guided DDPM"], "100k": ["Edge-guided DDPM"], "150k": ["Conditional DDPM"]}
    assert bold.loc[("150k", slice(None), "paper"), :].iloc[:, 2].all()  # SSIM 0.646 three times


def test_rows_seeds_and_dashes(keep):
    t = table(1, keep(made(), made(seed=1), made("edge", step=290), made("ceiling", None), made("spade")))
    assert len(t.cells) == 9 * 3 + 1 and t.cells.index[-1] == (DASH, "ceiling (not in the paper)", "ours")
    ours = t.cells.loc[("150k", "Mask-guided DDPM", "ours, step 300, 2 seeds")]
    assert ours.iloc[0] == "2.00 ± 0.71" and ours.iloc[3] == "70.5 ± 0.7"
    assert t.cells.columns[0] == "blocks-64 (paper: FID) ↓"
    gap = t.cells.loc[("150k", "Mask-guided DDPM", "difference")]
    assert gap.iloc[0] == DASH and gap.iloc[3] == f"{70.5 - 93.9:+.1f}"
    assert (t.cells.loc[("100k", "Edge-guided DDPM", "ours")] == DASH).all() and ("150k", "Edge-guided DDPM", "ours, step 290") in t.cells.index
    assert not t.bold.iloc[-1].any() and not (t.bold & (t.cells == DASH)).any().any() and not t.bold.loc[(slice(None), slice(None), "difference"), :].any().any()
    assert "phantom" in t.caption and "a judge" in t.caption and "4 patients, 40 slices" in t.caption
    said = dict(zip(t.cells.index, t.protocol))
    assert "seed: 0 / 1; checkpoint: abab" in said["150k", "Mask-guided DDPM", "ours, step 300, 2 seeds"] and said["150k", "Edge-guided DDPM", "paper"].startswith("Spleen")
    gan = table(2, keep(made("spade"), made("ceiling", None)))
    assert len(gan.cells) == 7 * 3 + 1 and gan.cells.loc[("150k", "SPADE", "ours, step 300")].iloc[1] == "20.25"


def test_inception_alone_is_fid(keep):
    inception = made(features="Inception 2015, pool3", metrics=made()["metrics"] | dict(distance_name="FID"))
    t = table(2, keep(inception))
    assert t.cells.columns[0] == "FID ↓" and t.cells.loc[("150k", "Mask-guided DDPM", "difference")].iloc[0] == "-9.08"


def test_one_protocol_and_each_seed_once(keep):
    for other in (dict(judge="another"), dict(features="another"), dict(data=dict(name="phantom", hash="0")), dict(n=dict(patients=5, slices=40, volumes={}))):
        with pytest.raises(CTDiffusionError, match="one protocol"): table(1, keep(made(), made("edge", **other)))
    with pytest.raises(CTDiffusionError, match="each seed once"): table(1, keep(made(), made()))
    assert table(1, keep(made(), made("floor", None, n=dict(patients=2, slices=20, volumes={}))))


# ------------------------------------------------------------------------------------------------------------- claims

def test_verdicts_on_the_paper():
    assert 5 <= len(CLAIMS) <= 7
    assert verdicts(published(), face=True).verdict.tolist() == ["supported", "cannot decide", "supported", "contradicted", "contradicted", "contradicted", "supported"]
    assert set(verdicts(published()).verdict) == set(verdicts([]).verdict) == {"cannot decide"}


def test_seeds_before_patients_before_intervals():
    case = lambda *x: {str(i): dict(psnr=v) for i, v in enumerate(x)}
    a, b = made(cases=case(20, 30, 40)), made(cases=case(19, 28.9, 39.1))
    low, high = difference([a], [b], "psnr")
    assert 0 < low < 1 < high < 2
    assert difference([a], [made(cases=case(1, 2), intervals=dict(psnr=[10.0, 12.0]))], "psnr") == (8.0, 10.5)
    assert difference([a, a], [b], "psnr") is None and difference([a], [made(intervals={}, cases={})], "psnr") is None
    low, high = difference([made(), made(seed=1)], [made(), made(seed=1)], "distance")
    assert low < 0 < high and low == -high


def test_a_missing_variant_decides_nothing():
    without = [r for r in published() if r["variant"] != "oasis"]
    assert verdicts(without, face=True).verdict.iloc[-1] == "cannot decide"
    nan = [r | dict(metrics=r["metrics"] | dict(psnr=None)) for r in published()]
    assert "1 open" in verdicts(nan, face=True).tests.iloc[4]
    assert len(grouped(published())) == 13


# ------------------------------------------------------------------------------------------------------------ figures

def test_figure3():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 6
    fig = figure3(mask, {"50k": dict(conditional=np.ones((8, 8)), mask=np.zeros((8, 8))), "150k": {v: np.zeros((8, 8)) for v in ("conditional", "mask", "edge")}})
    assert len(fig.axes) == 2 * 4 and WINDOW in fig.get_suptitle() and [ax.get_title() for ax in fig.axes[:4]] == ["mask", "Conditional DDPM", "Mask-guided DDPM", "Edge-guided DDPM"]
    assert [t.get_text() for t in fig.axes[3].texts] == ["R", "L", DASH] and [t.get_text() for t in fig.legends[0].get_texts()] == ["liver"]
    assert tuple(fig.axes[0].images[0].get_array()[3, 3]) == (139, 0, 0)  # dark red, as in the paper


def test_figure4_goes_from_low_to_high():
    masks, truth = np.zeros((3, 8, 8), np.uint8), np.arange(3)[:, None, None] / 4 * np.ones((3, 8, 8))
    fig = figure4(masks, truth, dict(mask=truth, pix2pix=truth), [30.0, 10.0, 20.0])
    assert len(fig.axes) == 3 * 9 and [ax.get_title() for ax in fig.axes[:9]] == ["mask", *METHODS.values(), "ground truth"]
    assert [fig.axes[9 * r + 8].images[0].get_array()[0, 0] for r in range(3)] == [0.25, 0.5, 0.0]
    assert sum(DASH in [t.get_text() for t in ax.texts] for ax in fig.axes) == 3 * 5
    for wrong in (lambda: figure4(masks, truth[:2], {}, [1, 2, 3]), lambda: figure4(masks, truth, dict(mask=truth[:2]), [1, 2, 3]), lambda: figure4(masks, truth, {}, [1, 2]),
                  lambda: figure3(masks, {"50k": {}})):
        with pytest.raises(CTDiffusionError, match="Select the same slices"): wrong()
