"The CT that is passed to find the body in is believed no more than the CT of a data set."
import numpy as np
import pytest

from ctdiffusion import load, synthesize
from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.volumes import nifti_bytes
from ctdiffusion.synthesis.synthesis import complete_labels

pytestmark = pytest.mark.fault("F49")


def t1_weighted(hu):
    "Positive numbers, fat bright, bone and air dark."
    return np.interp(hu, (-1000, -850, -110, -50, 0, 60, 110, 180, 300, 900), (0, 15, 420, 380, 90, 170, 230, 190, 60, 20)).astype(np.int16)


@pytest.fixture(scope="module")
def p(): return phantom(seed=2, size=48)


@pytest.fixture
def files(p, tmp_path):
    "A function that writes an image and gives the two paths."
    label = tmp_path / "organs.nii.gz"
    label.write_bytes(nifti_bytes(p.labels, p.affine))

    def write(data, affine=p.affine):
        image = tmp_path / "image.nii.gz"
        image.write_bytes(nifti_bytes(np.asarray(data), affine))
        return label, image
    return write


NO_CT = {
    "8 bit": (lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.uint8), "grey levels of a picture"),
    "[0, 1]": (lambda hu: np.clip((hu + 160) / 400, 0, 1).astype(np.float32), "normalised"),
    "+1024": (lambda hu: (hu + 1024).astype(np.int16), "intercept|soft tissue"),
    "MRI": (t1_weighted, "no air, like MRI"),
}


@pytest.mark.parametrize("what", NO_CT)
def test_an_image_without_hounsfield_units_is_refused(what, p, files):
    spoil, words = NO_CT[what]
    label, image = files(spoil(p.hu))
    with pytest.raises(CTDiffusionError, match=words) as e: complete_labels(label, image)
    assert e.value.path == str(image)


def test_a_label_map_in_place_of_the_image_is_refused(p, files):
    label, image = files(p.labels)
    with pytest.raises(CTDiffusionError, match="expected air near -1000 HU"): complete_labels(label, image)


def test_another_grid_is_refused(p, files):
    shifted = p.affine + np.outer([1, 0, 0, 0], [0, 0, 0, 30.])
    spacing = p.affine @ np.diag([1, 1, 1.2, 1])
    for data, affine in ((p.hu, shifted), (p.hu, spacing), (p.hu[:-1], p.affine)):
        label, image = files(data, affine)
        with pytest.raises(CTDiffusionError, match="Resample the label to the grid of the image"): complete_labels(label, image)


def test_the_ct_of_other_labels_is_refused(p, files):
    for hu in (p.hu[:, ::-1], p.hu[::-1], np.roll(p.hu, 8, 2)):
        label, image = files(hu)
        with pytest.raises(CTDiffusionError, match="labels beside their organs") as e: complete_labels(label, image)
        assert e.value.path == str(label) and "draw the body into the label map" in e.value.do and "allow_" not in e.value.do


def test_synthesize_refuses_before_it_writes(p, files, tmp_path):
    label, image = files(NO_CT["8 bit"][0](p.hu))
    with pytest.raises(CTDiffusionError, match="grey levels"): synthesize(load("pix2pix-demo", device="cpu"), label, tmp_path / "ct.nii.gz", image=image)
    assert {f.name for f in tmp_path.iterdir()} == {label.name, image.name}


def test_the_right_ct_gives_the_body_in_any_storage_order(p, tmp_path):
    from ctdiffusion.data.phantom import save_patient
    save_patient(p, tmp_path / "i.nii.gz", tmp_path / "l.nii.gz", "RAS")
    save_patient(p, tmp_path / "j.nii.gz", tmp_path / "m.nii.gz", "PIL")
    straight, turned = (complete_labels(tmp_path / "l.nii.gz", tmp_path / i) for i in ("i.nii.gz", "j.nii.gz"))
    assert (straight.data == turned.data).all() and (straight.data == AMOS.body).mean() > .2
    assert straight.notes == () and any("stored as RAS" in n for n in turned.notes)


def test_an_image_that_is_not_needed_is_noted(p, tmp_path, files):
    label, image = files(p.hu)
    full = complete_labels(label, image).data
    whole = tmp_path / "whole.nii.gz"
    whole.write_bytes(nifti_bytes(full, p.affine))
    found = complete_labels(whole, image)
    assert (found.data == full).all() and any(str(image) in n and "not looked at" in n for n in found.notes)
    assert complete_labels(whole).notes == ()


def test_a_mirrored_pair_is_noted_and_not_refused(p, tmp_path):
    for name, data in (("i", p.hu[::-1]), ("l", p.labels[::-1])): (tmp_path / f"{name}.nii.gz").write_bytes(nifti_bytes(data, p.affine))
    found = complete_labels(tmp_path / "l.nii.gz", tmp_path / "i.nii.gz")
    assert any("situs inversus" in n for n in found.notes)
