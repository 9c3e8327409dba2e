"Part D of the fault table: volumes that are made, numbers that are measured, tables that are written."
import csv
import io
import json
import os
import re
import resource
import signal
import warnings
from html.parser import HTMLParser
from pathlib import Path
from time import monotonic

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from forks import ended, forked, killed_at_random
from rows import refused
from test_distance import Means, network, no_warning_of_few_images, population, rng  # noqa: F401, fixtures among them
from test_judge import V2
from test_quality import pair, slices
from test_report import keep, made  # noqa: F401
from test_synthesis import model  # noqa: F401

from ctdiffusion.apps.launch import _markdown
from ctdiffusion.data import whole as whole_page
from ctdiffusion.data.cases import Problem, problems_table, write_problems
from ctdiffusion.data.labels import AMOS, ClassTable, LabelClass
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.volumes import Source, write_volume
from ctdiffusion.data.whole import finished, sidecar
from ctdiffusion.evaluation import distance as page
from ctdiffusion.evaluation.distance import Inception, distance, inception_file
from ctdiffusion.evaluation.judge import by_name
from ctdiffusion.evaluation.measure import Patient, synthesize_patient
from ctdiffusion.evaluation.quality import DICE, PSNR, SSIM, check_slices, dice, mean_of, organ_dice, paired_scores, psnr, ssim, to_bytes
from ctdiffusion.evaluation.report import DASH, best, latex_text, table, to_csv, to_html, to_latex, to_markdown, write_table
from ctdiffusion.evaluation.results import COLUMNS, faults, write_results
from ctdiffusion.synthesis import synthesis
from ctdiffusion.synthesis.synthesis import pieces, synthesize



# ------------------------------------------------------------------------------------------------ F39: volumes and kills

@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    "Six slices of a phantom, the body drawn as a block around its organs."
    p, path = phantom(seed=5, size=48), tmp_path_factory.mktemp("labels") / "p.nii.gz"
    ids = p.labels[:, :, 10:16].copy()
    ids[8:-8, 8:-8][ids[8:-8, 8:-8] == 0] = AMOS.body
    return write_volume(path, ids, Source("drawn", ids.shape, np.diag([-2.0, -2.0, 5.0, 1.0]), "0" * 64), np.uint8, "label map")


@pytest.fixture
def make(model, labels):  # noqa: F811
    "Makes the volume: three batches of two slices, four steps each."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda out, **more: synthesize(model, labels, out, **dict(batch=2, sampler="ddim4") | more)
    torch.set_num_threads(before)


@pytest.fixture
def whole(make, tmp_path) -> bytes: return make(tmp_path / "undisturbed" / "ct.nii.gz").read_bytes()


ALL = {"ct.nii.gz", "ct.json", "organs.ctbl", "organs.label.txt"}
def names(folder: Path) -> set: return {p.name for p in folder.iterdir()}


def test_F39_killed_at_random(make, whole, tmp_path):
    "Ten kills, each at a random moment of a life; whoever is not hit has ended. Nobody ever sees half a volume."
    make(tmp_path / "warm" / "ct.nii.gz"); start = monotonic(); make(tmp_path / "timed" / "ct.nii.gz"); longest = 1.3 * (monotonic() - start)
    kills = runs = 0
    while kills < 10:
        out = tmp_path / f"run{runs}" / "ct.nii.gz"
        def look():
            assert not out.exists() or out.read_bytes() == whole
            assert not sidecar(out).exists() or out.exists()
        hit = killed_at_random(lambda: make(out), 10 - kills, longest, seed=runs, between=look)
        assert out.read_bytes() == whole and names(out.parent) == ALL, (hit, names(out.parent))
        kills, runs = kills + hit, runs + 1
        assert runs < 60


@pytest.mark.parametrize("point, at, left", [("atomic_write", 0, set()), ("atomic_write", 2, set()), ("write_volume", 0, set()), ("atomic_write", 3, set()), ("replace", 0, set()), ("replace", 3, ALL - {"ct.json"}), ("rmtree", 0, ALL)])
def test_F39_killed_at_each_of_its_steps(make, whole, tmp_path, monkeypatch, point, at, left):
    "Before a batch is written, before the volume, before its record, before either is moved into place, before the clean-up: the same command ends with the same bytes."
    out, count = tmp_path / "ct.nii.gz", iter(range(99))
    where = {"replace": os, "rmtree": whole_page.shutil, "write_volume": synthesis}.get(point, whole_page)
    old = getattr(where, point)
    def dying(*args, **options):
        if point != "replace" or Path(args[0]).parent.name.startswith(".ct.nii.gz."):  # moves into place, no others
            if (point != "replace" or Path(args[1]).parent == tmp_path) and next(count) == at: os.kill(os.getpid(), signal.SIGKILL)
        return old(*args, **options)
    def life(): monkeypatch.setattr(where, point, dying); make(out)
    assert ended(forked(life)) == -signal.SIGKILL
    seen = {n for n in names(tmp_path) if not n.startswith(".")} - {"undisturbed"}
    assert seen == left and (not out.exists() or out.read_bytes() == whole)
    assert make(out).read_bytes() == whole and names(tmp_path) == ALL | {"undisturbed"}
    image = nib.load(out)  # by its suffix: gzip, and whole
    assert image.shape == (48, 48, 6) and np.asanyarray(image.dataobj).dtype == np.int16


def test_F39_a_finished_volume_is_believed_only_whole(make, whole, tmp_path):
    "Found finished, nothing is said; cut off, lost or of another job it is made again. Without its record it may be anybody's: made again on request."
    out, told = tmp_path / "ct.nii.gz", []
    again = lambda **more: (told.clear(), make(out, say=told.append, **more).read_bytes(), bool(told))[1:]
    assert again() == (whole, True) and again() == (whole, False)
    for spoil in (lambda: out.write_bytes(whole[: len(whole) // 2]), lambda: out.write_bytes(b""), out.unlink):
        spoil()
        assert again() == (whole, True) and again() == (whole, False)
    for spoil in (sidecar(out).unlink, lambda: sidecar(out).write_text('{"job": '), lambda: sidecar(out).write_text("[1]")):
        spoil()
        with refused(out.parent, "overwrite=True"): again()
        assert again(overwrite=True) == (whole, True) and again() == (whole, False)
    other, made_again = again(seed=1)
    assert made_again and other != whole
    assert again() == (whole, True) and names(tmp_path) == ALL | {"undisturbed"}


def test_F39_no_flipped_bit_is_believed(model, make, whole, tmp_path):  # noqa: F811
    "200 bits: in the volume, in its record, in a batch that a killed run has left, which is also cut off at five places."
    out, draw = make(tmp_path / "ct.nii.gz"), np.random.default_rng(0)
    job = json.loads(sidecar(out).read_text())["job"]
    masks = np.random.default_rng(1).integers(0, 17, (2, 16, 16)).astype(np.uint8)
    slow = dict(seed=0, case="p", sampler="ddim1", batch=2)
    clean, told = pieces(model, masks, slow, tmp_path / "parts"), []
    part, = (tmp_path / "parts").iterdir()
    kept = part.read_bytes()
    def flipped(path: Path):
        raw = bytearray(path.read_bytes())
        at = int(draw.integers(0, 8 * len(raw)))
        raw[at // 8] ^= 1 << at % 8
        path.write_bytes(raw)
    for _ in range(80):
        flipped(out)
        assert not finished(out, job)
        out.write_bytes(whole)
    record = sidecar(out).read_bytes()
    for _ in range(60):  # a bit of the model's name does no harm: what is believed is the right volume
        flipped(sidecar(out))
        try: side = json.loads(sidecar(out).read_text())
        except ValueError: side = {}
        assert finished(out, job) == (side.get("job") == job and side.get("sha256") == json.loads(record)["sha256"])
        sidecar(out).write_bytes(record)
    for n in range(65):
        flipped(part) if n < 60 else part.write_bytes(kept[: [0, 1, 31, 32, -1][n - 60]])
        told.clear()
        assert np.array_equal(pieces(model, masks, slow, tmp_path / "parts", told.append), clean) and told == ["2 of 2 slices"] and part.read_bytes() == kept
    told.clear(); pieces(model, masks, slow, tmp_path / "parts", told.append)
    assert not told


@pytest.mark.parametrize("room, parts", [(600, 0), (1300, 6)])  # for a batch, for the volume
def test_F39_a_full_disk_is_said_and_harms_nothing(make, tmp_path, room, parts):
    "A limit on the size of files plays the full disk. What was there stays; with room again the same command goes on."
    before, out = make(tmp_path / "before" / "ct.nii.gz", batch=1), tmp_path / "ct.nii.gz"
    whole, stamp = before.read_bytes(), before.stat().st_mtime_ns
    assert len(whole) > 1300
    def life():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with refused(out, "cannot be written (File too large)", "bytes free", "run the same command again"): make(out, batch=1)
    assert ended(forked(life)) == 0
    scratch = list(tmp_path.glob(".ct.nii.gz.*"))
    assert names(tmp_path) == {"before", *(s.name for s in scratch)} and len(scratch) == bool(parts)
    assert {name for s in scratch for name in names(s)} == {f"{k:05d}.part" for k in range(parts)}, "no half file"
    assert make(before, batch=1).read_bytes() == whole and before.stat().st_mtime_ns == stamp
    assert make(out, batch=1).read_bytes() == whole and names(tmp_path) == ALL | {"before"}


def test_F39_the_slices_of_a_test_patient(model, tmp_path):  # noqa: F811
    "The same way for an evaluation: killed, then damaged, always the same slices."
    masks = np.random.default_rng(1).integers(0, 17, (4, 16, 16)).astype(np.uint8)
    patient = Patient("p", masks, masks, Source("drawn", (16, 16, 4), np.eye(4), "0" * 64))
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    make = lambda folder, **more: synthesize_patient(model, patient, tmp_path / folder, sampler="ddim2", batch=2, **more)
    clean, raw = make("clean"), (tmp_path / "clean" / "p.npy").read_bytes()
    def life(): make("cut", say=lambda line: os.kill(os.getpid(), signal.SIGKILL))
    for _ in range(2): assert ended(forked(life)) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "p.npy").exists() and np.array_equal(make("cut"), clean)
    for damage in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[:-9], b""):
        (tmp_path / "cut" / "p.npy").write_bytes(damage)
        assert np.array_equal(make("cut"), clean) and (tmp_path / "cut" / "p.npy").read_bytes() == raw and names(tmp_path / "cut") == {"p.npy", "p.npy.json"}
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------ F40: distances

SPOILT = {"another size": (lambda x: x[:, 1:], "distance", "one size"), "[-1, 1]": (lambda x: 2 * x - 1, "slices", "Map [-1, 1]"), "0 to 255 as floats": (lambda x: 255 * x, "slices", "values from"), "an empty folder": (lambda x: x[:0], "slices", "at least one slice"),
          "a folder of folders": (lambda x: x.reshape(2, 3, 8, 8), "slices", "(N, H, W)"), "nan": (lambda x: np.where(x > .5, np.nan, x), "slices", "not finite"), "HU": (lambda x: (99 * x).astype(int), "slices", "uint8 or floating"), "one slice": (lambda x: x[:1], "features", "at least 2")}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("side", [0, 1])
def test_F40_sets_that_cannot_be_compared(side, what):
    spoil, where, said = SPOILT[what]
    sets = [rng(0).random((6, 8, 8)), rng(1).random((6, 8, 8))]
    sets[side] = spoil(sets[side])
    with refused(where, said): distance(*sets, Means())


def test_F40_few_images_warn_and_enough_do_not():
    x = rng().random((2048, 4, 4))
    with pytest.warns(UserWarning, match="2047 images are fewer than 2,048.*same N, and look at KID"): distance(x, x[1:], Means())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance(x, x, Means())


def test_F40_bytes_and_floats_give_the_same_number(population):  # noqa: F811
    x, _, _ = population
    assert distance(x[::2], to_bytes(x[1::2]), Means()) == distance(to_bytes(x[::2]), x[1::2], Means())
    greys = np.arange(256).reshape(1, 16, 16)
    for nearly in (-.3, 0, .3): assert np.array_equal(to_bytes(((greys + nearly) / 255).clip(0, 1)), greys)


def test_F40_a_distance_says_everything_and_cannot_be_changed(population):  # noqa: F811
    x, _, _ = population
    d = distance(x[::2], x[1::2], Means())
    assert (d.n_real, d.n_fake) == (len(x[::2]), len(x[1::2]))
    for part in ("not FID", Means.protocol, "48x48", "N-1", "unbiased"): assert part in d.protocol
    for part in (f"N = {d.n_real} real, {d.n_fake} synthetic", d.protocol, f"{d.value:.4g}", "KID"): assert part in str(d)
    with pytest.raises(AttributeError): d.value = 0


def test_F40_no_number_is_written_without_its_protocol(tmp_path):
    m, path = made()["metrics"], tmp_path / "x.json"
    for wrong, why in [(dict(features=None), "without features"), (dict(judge=None), "without a judge"), (dict(metrics=m | dict(distance_name="FID")), "FID on features"), (dict(metrics=m | dict(distance_name=None)), "without features and their name"),
                       (dict(metrics=m | dict(dice_mean=71.0)), "dice_mean"), (dict(checkpoint=None), "checkpoint None"), (dict(metrics=m | dict(psnr=float("inf"))), "Infinity")]:
        with refused(path, why, "Run the evaluation again"): write_results(path, made(**wrong))
    assert not list(tmp_path.iterdir()) and not faults(made("ceiling", None))


def test_F40_only_inception_is_called_fid(network):  # noqa: F811
    x = rng().random((6, 8, 8))
    protocol = distance(x, x[::-1], Inception(network.weights)).protocol
    assert protocol.startswith("FID; ") and "torch-fidelity 0.0.test" in protocol and page.INCEPTION_SHA256[:16] in protocol
    named = Means()
    named.name = Inception.name
    assert distance(x, x, named).protocol.startswith("Fréchet distance, not FID")


@pytest.mark.parametrize("content, said", [(None, "no file"), (b"", "damaged or another"), (b"other weights", "damaged or another")])
def test_F40_missing_or_damaged_weights(network, content, said):  # noqa: F811
    network.weights.unlink()
    if content is not None: network.weights.write_bytes(content)
    with refused(network.weights, said, page.INCEPTION_SHA256, page.INCEPTION_URL): Inception(network.weights)


@pytest.mark.parametrize("failure", [ConnectionError("no route"), ValueError("hash of downloaded file differs")])
def test_F40_without_a_download_it_is_said_what_to_put_where(network, monkeypatch, tmp_path, failure):  # noqa: F811
    def retrieve(*args): raise failure
    monkeypatch.setattr(page.pooch, "retrieve", retrieve)
    monkeypatch.setattr(page.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    target = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with refused(target, page.INCEPTION_SHA256, page.INCEPTION_URL, "weights=PATH"): inception_file()


def test_F40_the_download_is_pinned_by_the_whole_hash(network, monkeypatch, tmp_path):  # noqa: F811
    def retrieve(url, known_hash, fname, path):
        assert (url, known_hash) == (page.INCEPTION_URL, f"sha256:{page.INCEPTION_SHA256}")
        Path(path).mkdir(parents=True)
        (Path(path) / fname).write_bytes(b"weights")
    monkeypatch.setattr(page.pooch, "retrieve", retrieve)
    monkeypatch.setattr(page.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert inception_file().read_bytes() == b"weights"


# -------------------------------------------------------------------------------- F41: what is left out, and is not lost

def test_F41_identical_slices_are_infinite_counted_and_not_averaged():
    real, fake = pair("noise")
    fake[2] = real[2]
    values = psnr(real, fake)
    assert np.isinf(values[2]) and np.isfinite(np.delete(values, 2)).all()
    score = mean_of(values, PSNR)
    assert (score.n, score.left_out, score.protocol) == (5, 1, PSNR)
    assert score.value == pytest.approx(np.delete(values, 2).mean())
    assert "n = 5" in str(score) and "1 left out" in str(score) and PSNR in str(score)
    nothing = mean_of([np.inf, np.nan], PSNR)
    assert np.isnan(nothing.value) and (nothing.n, nothing.left_out) == (0, 2)
    alike = paired_scores(real, real, np.full(real.shape, AMOS.body))
    assert (alike["psnr"].n, alike["psnr"].left_out, alike["ssim"].value) == (0, 6, 1)


# by hand: grey values of two flat slices, PSNR and SSIM
FLAT = {"identical black": (0, 0, np.inf, 1), "identical grey": (.5, .5, np.inf, 1), "identical white": (1, 1, np.inf, 1), "a tenth apart": (.5, .6, 20, (2 * .5 * .6 + 1e-4) / (.25 + .36 + 1e-4)), "black and white": (0, 1, 0, 1e-4 / (1 + 1e-4)),
        "one of 255": (0, 1 / 255, 20 * np.log10(255), 1e-4 / (255 ** -2 + 1e-4))}


@pytest.mark.parametrize("what", FLAT)
def test_F41_flat_slices_by_hand(what):
    "The data range is 1, whatever the values are; bytes count as what they stand for."
    a, b, db, s = FLAT[what]
    a, b = np.full((2, 9, 9), a, float), np.full((2, 9, 9), b, float)
    np.testing.assert_allclose(psnr(a, b), db, atol=1e-9); np.testing.assert_allclose(ssim(a, b), s, atol=1e-9)
    if not set(np.unique([a, b])) & {.5, .6}: np.testing.assert_allclose([psnr(to_bytes(a), to_bytes(b)), ssim(to_bytes(a), to_bytes(b))], [psnr(a, b), ssim(a, b)], atol=1e-9)
    assert "peak 1" in PSNR and "data range 1" in SSIM


CASES = {
    "perfect":                        ([1, 1, 0, 0], [1, 1, 0, 0], 1, 100),
    "half found":                     ([1, 1, 0, 0], [1, 0, 0, 0], 1, 200 * 1 / 3),
    "all found and as much again":    ([1, 0, 0, 1], [1, 1, 1, 1], 1, 200 * 2 / 6),
    "disjoint":                       ([1, 1, 0, 0], [0, 0, 1, 1], 1, 0),
    "asked, not given":               ([2, 2, 0, 0], [0, 0, 0, 0], 2, 0),
    "given, not asked":               ([0, 0, 0, 0], [2, 2, 0, 0], 2, np.nan),
    "neither asked nor given":        ([0, 0, 1, 1], [0, 0, 1, 1], 2, np.nan),
    "taken for another organ":        ([2, 2, 2, 2], [3, 3, 3, 2], 2, 200 * 1 / 5),
    "the other organ":                ([2, 2, 2, 2], [3, 3, 3, 2], 3, np.nan),
    "body around it does not matter": ([16, 5, 5, 16], [0, 5, 0, 0], 5, 200 * 1 / 3),
    "one voxel":                      ([15, 0, 0, 0], [15, 15, 15, 0], 15, 200 * 1 / 4),
}


@pytest.mark.parametrize("case", CASES)
def test_F41_dice_by_hand(case):
    truth, prediction, organ, expected = CASES[case]
    found = dice(np.array(truth), np.array(prediction))[AMOS.names[organ]]
    assert (np.isnan(found) and np.isnan(expected)) or found == pytest.approx(expected, rel=1e-12)


def test_F41_mean_dice_counts_the_volumes_that_have_the_organ():
    volumes = [dice(np.array(t), np.array(p)) for t, p in (([1, 1], [1, 1]), ([1, 2], [0, 0]), ([2, 0], [2, 0]))]
    means = organ_dice(volumes)
    assert (means["spleen"].value, means["spleen"].n, means["spleen"].left_out) == (50, 2, 1)
    assert (means["kidney_right"].value, means["kidney_right"].n) == (50, 2)
    assert np.isnan(means["liver"].value) and means["liver"].n == 0 and means["liver"].protocol == DICE
    assert "nan where the mask has no organ" in DICE


REFUSED = {
    "[-1, 1]": (lambda x: 2 * x - 1, "0 to 1. Map [-1, 1]"),
    "HU": (lambda x: 400 * x - 160, "window"),
    "0 to 255 as floats": (lambda x: 255 * x, "values from"),
    "nan": (lambda x: np.where(x > .9, np.nan, x), "not finite"),
    "inf": (lambda x: np.where(x > .9, np.inf, x), "not finite"),
    "empty": (lambda x: x[:0], "at least one slice"),
    "one slice alone": (lambda x: x[0], "(N, H, W)"),
    "channels": (lambda x: x[:, None], "(N, H, W)"),
    "labels": (lambda x: (16 * x).astype(np.int16), "uint8 or floating point"),
    "bool": (lambda x: x > .5, "uint8 or floating point"),
}


@pytest.mark.parametrize("metric", [psnr, ssim, lambda r, f: to_bytes(f), lambda r, f: check_slices(f)])
@pytest.mark.parametrize("case", REFUSED)
def test_F41_another_range_is_refused(case, metric):
    spoil, said = REFUSED[case]
    with refused("slices", said): metric(slices(), spoil(slices()))


def test_F41_classes_are_matched_by_name():
    "The numbers of version 1 and version 2 differ, and so may those of any other."
    ids = np.array([0, *V2])
    ours = by_name(ids, V2)
    assert ours.dtype == np.uint8 and ours[0] == 0 and ours[-1] == 0
    assert {V2[i]: AMOS.classes[o].ts_v2 for i, o in zip(ids[1:-1], ours[1:-1])} == {c.ts_v2: c.ts_v2 for c in AMOS.organs}
    other = {i + 30: n for i, n in V2.items()}
    assert (by_name(ids[1:] + 30, other) == ours[1:]).all(), "numbers do not matter"
    one = {k: c.ts_v1 for k, c in enumerate((c for c in AMOS.organs if c.ts_v1), 1)}
    assert by_name(np.array([0, *one]), one, key="ts_v1").tolist() == [0, *(c.id for c in AMOS.organs if c.ts_v1)]


def test_F41_missing_and_unknown_classes():
    without = {i: n for i, n in V2.items() if n != "aorta"}
    with refused("segmenter", "no class called aorta", "ts_v2"): by_name(np.zeros(1, int), without)
    for strange in (-1, 118, 300):
        with refused("segmenter", f"[{strange}] without a name"): by_name(np.array([0, strange]), V2)
    mine = ClassTable("mine", (LabelClass(0, "background", (0, 0, 0)), LabelClass(1, "spleen", (1, 1, 1))))
    with refused("class table 'mine'", "empty column ts_v2"): by_name(np.array([1]), V2, table=mine)
    assert by_name(np.array([22]), V2) == AMOS.id("prostate_uterus")
    assert by_name(np.array([22]), without | {52: "aorta"}) == 15


# ---------------------------------------------------------------------------------------------------- F42: hostile text

HOSTILE = ["<img src=x onerror=alert(1)>", "amos_0001", "=cmd|' /C calc'!A0", "\t=1+1", "@SUM(1)", "-1+1", "+1-1", "＝1+1", "a\r\n=1+1", '"><script>x</script>',
           "\\input{/etc/passwd}", "}} $x^2$ 50% #1 & ~", "[2cm] | `x` *y* ](javascript:x)"]


class Page(HTMLParser):
    "Tags, attributes and text of a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), []
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attributes): self.tags.append(tag); self.attributes |= {name for name, _ in attributes}
    def handle_data(self, data): self.text.append(data)


@pytest.fixture
def attacked(keep):  # noqa: F811
    "Table 2 with hostile rows, a hostile distance, judge, sampler and data set."
    metrics = made()["metrics"] | dict(distance_name=HOSTILE[0] + HOSTILE[1])
    same = dict(metrics=metrics, judge=" ".join(HOSTILE), data=dict(name=HOSTILE[2], hash="0"), sampler=HOSTILE[2])
    return table(2, keep(made(**same), *(made(text, None, **same) for text in HOSTILE)))


def test_F42_html(attacked):
    page, plain = Page(to_html(attacked)), Page(to_html(table(2, [])))
    assert set(page.tags) == set(plain.tags) and page.attributes == plain.attributes and "script" not in page.tags
    text = [t.strip() for t in page.text]
    assert all(f"{' '.join(h.split())} (not in the paper)" in text for h in HOSTILE)
    assert len([t for t in text if t == DASH]) >= 6 * 18


def test_F42_latex(attacked):
    text = to_latex(attacked)
    assert r"amos\_0001" in text and r"\input" not in text and "^" not in text and latex_text("[2cm]") == "{[}2cm{]}"
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and not set("%#_^~") & set(bare)
    depth = np.cumsum([(c == "{") - (c == "}") for c in bare])
    assert depth.min() == 0 and depth[-1] == 0
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {2 + 18} and not any(row.startswith("[") for row in rows)
    assert [text.count(rf"\{rule}rule") for rule in ("top", "mid", "bottom")] == [1, 1, 1] and r"\bfseries 10.56" in text


def test_F42_csv(attacked):
    text = to_csv(attacked)
    rows = list(csv.reader(io.StringIO(text)))
    assert {len(row) for row in rows} == {3 + 18 + 1} and len(rows) == 1 + len(attacked.cells)
    begins = [cell for row in rows for cell in row if cell[:1] in tuple("=+-@\t\r＝＋－＠")]
    assert begins and all(re.fullmatch(r"[+-]\d+\.\d+", cell) for cell in begins)
    assert "'=cmd|' /C calc'!A0 (not in the paper)" in [row[1] for row in rows] and "\t" not in text and "\r" not in text
    assert [row[-1] for row in rows if row[2] == "paper"][-1].startswith("Spleen")


def test_F42_markdown(attacked):
    for text, columns, rows in ((to_markdown(attacked), 3 + 18 + 1, len(attacked.cells)), (_markdown(pd.DataFrame(dict(claim=HOSTILE, verdict=HOSTILE))), 2 + 1, len(HOSTILE))):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {columns} and len(lines) == 2 + rows
        assert "<" not in text and r"amos\_0001" in text and not re.search(r"(?<!\\)\]\(", text)
    assert "**10.56**" in to_markdown(attacked)


def test_F42_problems(tmp_path):
    "The table of what is wrong with a data set, which begins with names of files that somebody else gave."
    problems = [Problem(h, h, h, h, h) for h in HOSTILE]
    text = problems_table(problems)
    assert "<" not in text and not re.search(r"(?<!\\)\]\(", text) and {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()} == {7} and len(text.splitlines()) == 2 + len(HOSTILE)
    rows = list(csv.reader(write_problems(tmp_path / "p.csv", problems).open(newline="")))
    assert len(rows) == 1 + len(HOSTILE) and not any(cell[:1] in tuple("=+-@\t\r＝＋－＠") for row in rows for cell in row)


def test_F42_a_missing_value_is_a_dash(keep):  # noqa: F811
    "A missing organ empties its cell and the mean, for all seeds; a missing method keeps its row."
    dice = made()["metrics"]["dice"] | {"gallbladder": None}
    t = table(1, keep(made(metrics=made()["metrics"] | dict(dice=dice, dice_mean=None)), made(seed=1)))
    row = t.cells.loc[("150k", "Mask-guided DDPM", "ours, step 300, 2 seeds")]
    assert row["Gall_bld ↑"] == DASH == row["Mean ↑"] and row["Liv. ↑"] != DASH
    assert len(t.cells) == 9 * 3 and (t.cells.loc[("100k", "Edge-guided DDPM", "ours")] == DASH).all() and not (t.bold & (t.cells == DASH)).any().any()


def test_F42_ties_share_and_missing_never_wins():
    keys = [c.key for c in COLUMNS]
    frame = pd.DataFrame([[1.001, 2.0, np.nan], [1.002, 3.0, 4.0], [5.0, np.nan, 4.01]], columns=["distance", "psnr", "spleen"]).reindex(columns=keys)
    won = best(frame)
    assert won.distance.tolist() == [True, True, False] and won.psnr.tolist() == [False, True, False] and won.spleen.tolist() == [False, True, True]
    assert not won.ssim.any() and not best(frame.iloc[:1]).any().any()


def test_F42_four_files(attacked, tmp_path):
    assert [p.name for p in write_table(tmp_path, attacked)] == ["table2.csv", "table2.md", "table2.tex", "table2.html"]
    written = {p.suffix: p.read_text(encoding="utf-8") for p in tmp_path.glob("table2.*")}
    assert written == {".csv": to_csv(attacked), ".md": to_markdown(attacked), ".tex": to_latex(attacked), ".html": to_html(attacked)} and all(DASH in text or "--" in text for text in written.values())
