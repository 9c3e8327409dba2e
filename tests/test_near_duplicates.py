"""A scan that occurs twice under two names is found, also where its voxels are not quite the same; different patients are never one."""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctdiffusion.data.duplicates import SAME, similarity, thumbnail
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.slices import axial, resize_images, window
from ctdiffusion.data.store import PrepareError, prepare
from ctdiffusion.data.volumes import read_image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = Path(os.environ.get("CTDIFFUSION_REAL_CT") or SHARED / "real-ct")
CONFIG = PrepareConfig(size=64)


def less(patient, slices, pixels=slice(None)):
    "A part of a patient; its origin moves along."
    start = [pixels.start or 0, pixels.start or 0, slices.start or 0]
    affine = patient.affine.copy()
    affine[:3, 3] = (patient.affine @ [*start, 1])[:3]
    cut = (pixels, pixels, slices)
    return replace(patient, hu=patient.hu[cut], labels=patient.labels[cut], affine=affine)


def moved(patient):
    "The same voxels with another origin."
    affine = patient.affine.copy()
    affine[:3, 3] += [37.5, -12.25, 400]
    return replace(patient, affine=affine)


def noisy(patient):
    noise = np.random.default_rng(0).normal(0, 3, patient.hu.shape)
    return replace(patient, hu=(patient.hu + noise.round()).astype(np.int16))


DISGUISES = {
    "one HU more": lambda p: replace(p, hu=p.hu + np.int16(1)),
    "other noise": noisy,
    "another origin": moved,
    "one slice less below": lambda p: less(p, slice(1, None)),
    "one slice less above": lambda p: less(p, slice(0, -1)),
    "the upper half": lambda p: less(p, slice(p.hu.shape[2] // 2, None)),
    "a border of air less": lambda p: less(p, slice(None), slice(3, -2)),
}


def dataset(folder, train, val):
    "A data set in the layout of AMOS22."
    for split, patients in (("Tr", train), ("Va", val)):
        for name, patient in patients.items():
            save_patient(patient, folder / f"images{split}" / f"{name}.nii.gz", folder / f"labels{split}" / f"{name}.nii.gz", "LPS" if split == "Va" else "RAS")
    return folder


@pytest.fixture(scope="module")
def patients():
    return [phantom(seed, size=64) for seed in range(3)]


@pytest.mark.fault("F60")
@pytest.mark.parametrize("how", DISGUISES)
def test_a_disguised_scan_in_both_splits_is_a_leak(patients, tmp_path, how):
    folder = dataset(tmp_path / "data", dict(a=patients[0], b=patients[1]), dict(x=patients[2], y=DISGUISES[how](patients[0])))
    with pytest.raises(PrepareError, match="nobody may be trained on and tested with") as error:
        prepare(folder, tmp_path / "s", CONFIG)
    (problem,) = [p for p in error.value.problems if p.severity == "error"]
    same = "the same voxels as a" if how == "another origin" else "nearly the same scan (similarity "
    assert problem.case == "y" and problem.found.startswith(same) and problem.found.endswith("(train and val)")
    assert prepare(folder, tmp_path / "s", replace(CONFIG, exclude=("y",))).splits["val"] == ["x"], "the remedy of the message"


@pytest.mark.fault("F60")
def test_within_one_split_it_is_a_note(patients, tmp_path):
    twin = DISGUISES["one HU more"](patients[0])
    folder = dataset(tmp_path / "data", dict(a=patients[0], b=twin), dict(x=patients[2]))
    problems = prepare(folder, tmp_path / "s", CONFIG).problems
    assert [(p.case, p.severity) for p in problems if "nearly the same scan" in p.found] == [("b", "note")]


def stored(hu, distance, size=64):
    "The thumbnail of a volume as a store of that size would have it."
    pictures = resize_images(axial(window(hu)), size)
    return thumbnail(np.rint(255 * pictures).astype(np.uint8), distance)


def most_alike(thumbnails):
    return max(similarity(a, b) for k, a in enumerate(thumbnails) for b in thumbnails[:k])


@pytest.mark.fault("F60")
@pytest.mark.parametrize("size, count", [(32, 12), (64, 12)])
def test_different_drawn_patients_are_no_duplicates(size, count):
    "Two hundred of them reached 0.61; the threshold has room above."
    patients = [phantom(seed, size=size) for seed in range(100, 100 + count)]
    assert most_alike([stored(p.hu, p.spacing[2], size) for p in patients]) < SAME - 0.05


@pytest.mark.fault("F60")
def test_what_shows_no_body_is_like_nothing():
    air = thumbnail(np.zeros((40, 64, 64), np.uint8), 5.0)
    one = phantom(0, size=48)
    two = stored(one.hu[:, :, :3], one.spacing[2])
    assert similarity(air, air) == similarity(air, stored(one.hu, one.spacing[2])) == 0
    assert similarity(two, two) == 0, "too few slices to tell"


@pytest.mark.fault("F60")
@pytest.mark.skipif(not (REAL / "imagesTr").is_dir(), reason=f"no real CT in {REAL}: set CTDIFFUSION_REAL_CT")
def test_real_scans_and_their_disguises():
    "The scans of one's shelf: no two are one, unless they come from one patient; each is found again."
    files = [f for f in sorted(REAL.rglob("*.nii.gz")) if f.parent.name in ("imagesTr", "unlabelled")]
    volumes = [read_image(f) for f in files]
    thumbnails = [stored(v.data, v.spacing[2]) for v in volumes]
    assert most_alike(thumbnails) < 0.5
    for v, mine in zip(volumes, thumbnails):
        for hu, distance in ((v.data + 1, 1), (v.data[:, :, 1:], 1), (v.data[:, :, ::2], 2)):
            assert similarity(mine, stored(hu, distance * v.spacing[2])) > 0.9
