"""Real CT, where it is at hand: set CTDIFFUSION_REAL_CT, or keep `shared/data/real-ct` beside the repository. None of it is part of the project."""
import os
from pathlib import Path
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from ctdiffusion.data.cases import find_cases, has_error, read_case
from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.slices import axial, body_mask
from ctdiffusion.data.store import prepare
from ctdiffusion.data.volumes import read_image, write_volume

REAL = Path(os.environ.get("CTDIFFUSION_REAL_CT") or Path(__file__).resolve().parents[2] / "shared" / "data" / "real-ct")
pytestmark = pytest.mark.skipif(not (REAL / "imagesTr").is_dir(), reason=f"no real CT in {REAL}: set CTDIFFUSION_REAL_CT")
UNLABELLED = ("cptac_pda_c3l00189", "lidc_idri_0314")


def test_labelled_abdomen(tmp_path):
    s = prepare(REAL, tmp_path / "s", PrepareConfig(size=64))
    assert len(s) == 112 and s.held_out_is_train and s.cases[0]["shape"] == [122, 101, 112]
    assert set(np.unique(s.labels)) == set(range(17)) - {AMOS.id("esophagus")}
    assert np.allclose(s.cases[0]["pixel"], [3 * 101 / 64, 3 * 122 / 64])
    assert .5 < s.cases[0]["body"] < .75


def test_liver_is_right_and_kidneys_agree():
    (case,), _ = find_cases(REAL)
    image, label, problems = read_case(case)
    assert not has_error(problems)
    column = lambda name: np.nonzero(axial(label.data) == AMOS.id(name))[2].mean()
    assert column("liver") < column("spleen") and column("kidney_right") < column("kidney_left")
    body = body_mask(image.data, image.spacing)
    assert body[label.data > 0].mean() > .999


@pytest.mark.parametrize("name, padding", [(UNLABELLED[0], True), (UNLABELLED[1], False)])
def test_unlabelled(name, padding):
    v = read_image(REAL / "unlabelled" / f"{name}.nii.gz")
    assert v.source.axcodes == "LPS" and v.data.min() >= -1024 and bool(v.notes) == padding
    body, bone = axial(body_mask(v.data, v.spacing)), axial(v.data) > 300
    rows = np.arange(body.shape[1])[:, None]
    spine, middle = (bone * rows).sum() / bone.sum(), (body * rows).sum() / body.sum()
    assert spine > middle and .3 < body.mean() < .55
    lung_or_gas = (axial(v.data) < -700) & body
    assert lung_or_gas.sum() > 1000
    assert not body[:, -40:].any() and not body[:, :40].any()


def test_liver_side_of_the_unlabelled():
    v = read_image(REAL / "unlabelled" / f"{UNLABELLED[1]}.nii.gz")
    top = axial(v.data)[-1]
    lung = (top < -700) & axial(body_mask(v.data, v.spacing))[-1]
    assert lung[:, :256].sum() < lung[:, 256:].sum(), "the right dome of the liver stands higher, so there is less lung on the patient's right"


def test_oddities_derived_from_a_real_ct(tmp_path):
    b = nib.load(REAL / "unlabelled" / f"{UNLABELLED[1]}.nii.gz")
    hu, A = np.asanyarray(b.dataobj), b.affine

    def save(name, data, affine, form="both"):
        image = nib.Nifti1Image(data, None if form == "sform" else affine)
        image.set_sform(affine, 0 if form == "qform" else 1)
        if form != "sform": image.set_qform(affine, 1)
        nib.save(image, tmp_path / f"{name}.nii")

    save("a_plain", hu, A)
    down = nib.Nifti1Image(hu, A).as_reoriented(np.array([[0, 1], [1, 1], [2, -1]]))
    save("b_descending", np.asanyarray(down.dataobj), down.affine)
    side = nib.Nifti1Image(hu, A).as_reoriented(ornt_transform(io_orientation(A), axcodes2ornt("PIR")))
    save("c_sagittal", np.asanyarray(side.dataobj), side.affine)
    save("d_one_frame_qform", hu[..., None], A, "qform")
    gantry = A.copy()
    gantry[1, 2] = 4 * np.tan(np.radians(12))
    save("e_gantry", hu, gantry, "sform")
    save("f_not_square", hu[:, ::2].copy(), A @ np.diag([1, 2, 1, 1]))
    s = prepare(tmp_path, tmp_path / "s", PrepareConfig(size=64, labels="none"))
    part = {c["id"]: (s.images[c["start"]:c["stop"]], s.labels[c["start"]:c["stop"]]) for c in s.cases}
    x, y = part["a_plain"]
    for id in list(part)[1:5]: assert (part[id][0] == x).all() and (part[id][1] == y).all(), id
    assert "12 degrees" in " ".join(p.found for p in s.problems if p.case == "e_gantry")
    fx, fy = part["f_not_square"]
    assert np.abs(fx.astype(int) - x).mean() < 3 and ((fy > 0) != (y > 0)).mean() < .002
    c = next(c for c in s.cases if c["id"] == "f_not_square")
    assert np.allclose(c["pixel"], s.cases[0]["pixel"])


def test_round_trip(tmp_path):
    for f in (REAL / "unlabelled").glob("*.nii.gz"):
        v = read_image(f)
        back = nib.load(write_volume(tmp_path / "b.nii", v.data, v.source))
        ref = nib.load(f)
        assert back.shape == ref.shape and np.allclose(back.affine, ref.affine, atol=1e-4)
        assert (np.asanyarray(back.dataobj) == np.maximum(np.asanyarray(ref.dataobj), -1024)).all()
