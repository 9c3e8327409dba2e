"A body estimated from the organs where labels have none and there is no CT (row F50)."
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ctdiffusion import load, synthesize
from ctdiffusion.data.body import estimate_body, estimate_outline
from ctdiffusion.data.cases import find_cases, read_case
from ctdiffusion.data.labels import AMOS, ClassTable, CTDiffusionError, LabelClass
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.slices import body_mask
from ctdiffusion.data.volumes import read_labels
from ctdiffusion.synthesis.processes import SynthesizeJob, synthesize_job
from ctdiffusion.synthesis.synthesis import complete_labels

pytestmark = pytest.mark.fault("F50")
REAL = Path(os.environ.get("CTDIFFUSION_REAL_CT") or Path(__file__).resolve().parents[2] / "shared" / "data" / "real-ct")
NOTE = "body estimated from the organs, not measured"


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def model():
    return load("pix2pix-demo", device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, patient = tmp_path_factory.mktemp("patient"), phantom(seed=5, size=48)
    save_patient(patient, folder / "image.nii.gz", folder / "organs.nii.gz", "LPS")
    return folder


@pytest.mark.parametrize("seed, least", [(1, .88), (4, .88), (5, .88), (0, .84), (2, .68)])  # the last has 53 mm of fat under the skin, which organs do not tell
def test_the_estimate_is_near_the_body_of_the_phantom(seed, least):
    p = phantom(seed, 48)
    body = estimate_body(p.labels, p.spacing)
    assert dice(body, body_mask(p.hu, p.spacing, p.labels)) > least
    assert body[p.labels > 0].all()


@pytest.mark.skipif(not (REAL / "imagesTr").is_dir(), reason=f"no real CT in {REAL}: set CTDIFFUSION_REAL_CT")
def test_the_estimate_is_near_the_body_of_a_real_patient():
    (case,), _ = find_cases(REAL)
    image, label, _ = read_case(case)
    body = estimate_body(label.data, label.spacing)
    assert dice(body, body_mask(image.data, image.spacing, label.data)) > .88
    for few in ((6,), (1, 2, 3), (8,), (14,)):  # the liver alone, spleen and kidneys, the aorta alone, the bladder alone
        some = np.where(np.isin(label.data, few), label.data, 0)
        assert dice(estimate_body(some, label.spacing), body_mask(image.data, image.spacing, label.data)) > .78


def test_spine_side_and_slices_without_organs():
    p = phantom(4, 48)
    body = estimate_body(p.labels, p.spacing)
    assert body.any((0, 1)).all(), "slices without organs have their neighbours' outline"
    aorta = np.argwhere(p.labels == AMOS.id("aorta")).mean(0)[1] * p.spacing[1]
    behind = aorta - np.flatnonzero(body.any((0, 2)))[0] * p.spacing[1]
    assert 80 < behind < 180, "the spine lies behind the aorta"
    front = np.flatnonzero(body.any((0, 2)))[-1]
    assert front > np.flatnonzero((p.labels == AMOS.id("liver")).any((0, 2)))[-1]


def test_every_organ_is_inside_with_its_skin():
    labels = np.zeros((60, 60, 5), np.uint8)
    labels[30, 30, 2] = AMOS.id("aorta")
    labels[2, 30, 2] = AMOS.id("spleen")  # an organ where no trunk would be
    body = estimate_body(labels, np.array([8., 8., 5.]))
    assert body[labels > 0].all() and body[3, 30, 2]


def test_an_outline_is_that_of_the_patient_in_mm():
    p = phantom(4, 48)
    coarse = estimate_outline(p.labels[::2, ::2], p.spacing * (2, 2, 1))
    fine = estimate_outline(p.labels, p.spacing)
    assert np.abs(np.subtract(coarse, fine)).max() < 2 * p.spacing[0]


def test_nothing_to_estimate_from():
    bones = ClassTable("bones", (LabelClass(0, "background", (0, 0, 0)), LabelClass(1, "femur", (9, 9, 9)), LabelClass(2, "body", (5, 5, 5))))
    assert estimate_body(np.ones((8, 8, 8), np.uint8), np.ones(3), bones) is None
    assert estimate_body(np.zeros((8, 8, 8), np.uint8), np.ones(3)) is None


def test_the_message_offers_it_and_it_works(files, model, tmp_path):
    with pytest.raises(CTDiffusionError, match="no body.*image=.*body='estimate'"):
        synthesize(model, files / "organs.nii.gz", tmp_path / "a.nii.gz")
    said = []
    out = synthesize(model, files / "organs.nii.gz", tmp_path / "a.nii.gz", body="estimate", say=said.append)
    assert out.exists()
    assert any(line.endswith(NOTE) for line in said)
    assert NOTE in json.loads((tmp_path / "a.json").read_text())["notes"]


def test_a_measured_body_goes_first(files):
    measured = complete_labels(files / "organs.nii.gz", files / "image.nii.gz")
    both = complete_labels(files / "organs.nii.gz", files / "image.nii.gz", body="estimate")
    assert (both.data == measured.data).all() and NOTE not in both.notes
    organs = read_labels(files / "organs.nii.gz").data
    estimated = complete_labels(files / "organs.nii.gz", body="estimate")
    assert (estimated.data[organs > 0] == organs[organs > 0]).all() and (estimated.data == AMOS.body).any()


def test_a_misspelt_word_names_the_right_one(files):
    with pytest.raises(CTDiffusionError, match="Did you mean 'estimate'"):
        complete_labels(files / "organs.nii.gz", body="estimated")


def test_a_folder_of_label_maps(files, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "p.nii.gz").write_bytes((files / "organs.nii.gz").read_bytes())
    (made,) = synthesize_job(SynthesizeJob(str(tmp_path / "labels"), str(tmp_path / "ct"), model="pix2pix-demo", device="cpu", body="estimate"), print)
    assert made.exists()
