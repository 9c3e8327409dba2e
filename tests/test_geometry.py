"Affines as files have them: sheared ones, two forms that differ (F51), grids that differ by rounding (F54)."
import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ctdiffusion.data.cases import Case, grid_difference, has_error, pair_fault, read_case
from ctdiffusion.data.volumes import Source, Volume, forms_apart, nifti_bytes, read_image, read_labels, shear, write_volume


def save(path, data, q, s, q_code=1, s_code=1):
    image = nib.Nifti1Image(data, s)
    image.set_sform(s, s_code)
    image.set_qform(q, q_code)
    nib.save(image, path)
    return path


def sheared(affine, degrees, row=1, column=2):
    out = affine.copy()
    out[row, column] += np.tan(np.radians(degrees)) * np.linalg.norm(affine[:3, column])
    return out


def moved(affine, *mm): return affine + np.outer([1, 1, 1, 0], [0, 0, 0, 1]) * np.array([*mm, 0])[:, None]


# ---------------------------------------------------------------------------------------------------- qform and sform

@pytest.mark.fault("F51")
@pytest.mark.parametrize("axes", [(1, 2), (0, 1), (2, 0)])
@pytest.mark.parametrize("degrees", [0.5, 3, 22])
def test_a_sheared_grid_is_written_without_a_qform(tmp_path, patient, axes, degrees):
    affine = sheared(patient.affine, degrees, *axes)
    (tmp_path / "a.nii.gz").write_bytes(nifti_bytes(patient.hu, affine))
    v = read_image(tmp_path / "a.nii.gz")
    assert "sheared" in " ".join(v.notes) and np.isclose(shear(affine), degrees, rtol=.05)
    h = nib.load(write_volume(tmp_path / "b.nii.gz", v.data, v.source)).header
    assert (h["qform_code"], h["sform_code"]) == (0, 1) and np.allclose(h.get_sform(), affine, atol=1e-4)
    assert np.allclose(h.get_zooms(), np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-5)
    again = read_image(tmp_path / "b.nii.gz")
    assert (again.data == patient.hu).all() and np.allclose(again.affine, v.affine) and again.notes == v.notes


@pytest.mark.fault("F51")
def test_a_grid_that_a_quaternion_holds_keeps_both_forms_and_has_no_note(tmp_path, patient):
    "Turned grids, also those near half a turn, where the quaternion loses most to rounding."
    rng, half = np.random.default_rng(0), np.diag([-1, -1, 1.])
    for k in range(60):
        turn = np.eye(4)
        turn[:3, :3] = (half if k % 2 else np.eye(3)) @ Rotation.from_rotvec(rng.normal(size=3) * 10 ** rng.uniform(-5, 0)).as_matrix()
        affine = moved(turn @ np.diag([.7, .7, 1, 1]), *rng.uniform(-300, 300, 3))
        raw = nifti_bytes(np.zeros((512, 512, 2), np.int16)[:, :, :1], affine, gz=False)
        image = nib.Nifti1Image.from_bytes(raw)
        assert image.header["qform_code"] == image.header["sform_code"] == 1
        assert forms_apart(image.get_qform(), image.get_sform(), (512, 512, 400)) == 0
    v = read_image(save(tmp_path / "a.nii", patient.hu, patient.affine, patient.affine))
    assert v.notes == ()


@pytest.mark.fault("F51")
@pytest.mark.parametrize("name", ["shifted", "sheared", "flipped", "spacing"])
def test_forms_that_differ_are_noted_with_their_distance(tmp_path, patient, name):
    s = patient.affine
    q = dict(shifted=moved(s, 3, 0, 4), sheared=s, flipped=s @ np.diag([-1, -1, 1, 1]), spacing=s @ np.diag([1.02, 1, 1, 1]))[name]
    if name == "sheared": s = sheared(s, 14)
    path = save(tmp_path / "a.nii.gz", patient.hu, q, s)
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*np.subtract(patient.hu.shape, 1), 1]
    stored = nib.load(path)
    apart = np.linalg.norm((corners @ (stored.get_qform() - stored.get_sform()).T)[:, :3], axis=1).max()
    v = read_image(path)
    assert f"qform and sform up to {apart:.3g} mm apart: the sform was used" in v.notes and np.allclose(v.source.affine, s, atol=1e-4)
    assert read_image(save(tmp_path / "b.nii.gz", patient.hu, s, s, q_code=0)).notes == tuple(n for n in v.notes if "qform and sform" not in n)
    assert "qform and sform" in " ".join(read_labels(save(tmp_path / "c.nii.gz", patient.labels, q, s)).notes)


@pytest.mark.fault("F51")
def test_a_qform_that_is_no_rotation_beside_a_good_sform_is_a_note(tmp_path, patient):
    path = save(tmp_path / "a.nii", patient.hu, patient.affine, patient.affine)
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array([3, 3, 3], "<f4").tobytes()
    path.write_bytes(raw)
    assert read_image(path).notes == ("the qform is no rotation: the sform was used",)
    raw[256:268] = np.array([np.nan, 0, 0], "<f4").tobytes()
    path.write_bytes(raw)
    (note,) = read_image(path).notes
    assert "the sform was used" in note


# ------------------------------------------------------------------------------------------- image and label (F54)

def case_of(folder, patient, label_affine, labels=None):
    (folder / "i.nii.gz").write_bytes(nifti_bytes(patient.hu, patient.affine))
    (folder / "l.nii.gz").write_bytes(nifti_bytes(patient.labels if labels is None else labels, label_affine))
    return Case("c", folder / "i.nii.gz", folder / "l.nii.gz", "train")


def volume(shape, affine): return Volume(np.zeros(shape, np.uint8), affine, Source("v", shape, affine, ""))


@pytest.mark.fault("F54")
@pytest.mark.parametrize("axis", range(3))
def test_an_origin_off_by_less_than_a_hundredth_of_a_voxel_is_a_note(tmp_path, patient, axis):
    off = np.eye(3)[axis] * patient.spacing[axis]
    image, label, found = read_case(case_of(tmp_path, patient, moved(patient.affine, *(.008 * off))))
    assert [p.severity for p in found] == ["note"] and "taken as the same" in found[0].found
    assert (label.affine == image.affine).all() and (label.data == patient.labels).all()
    for share in (.02, .5, 1):
        (problem,) = [p for p in read_case(case_of(tmp_path, patient, moved(patient.affine, *(share * off))))[2] if p.severity == "error"]
        assert "Resample" in problem.do and "mm apart" in problem.found


@pytest.mark.fault("F54")
@pytest.mark.parametrize("codes", [(1, 1), (-1, -1)])
def test_a_rounded_spacing_is_a_note_from_whichever_corner_it_is_counted(codes):
    "0.703125 mm written as 0.703 over 512 voxels, as RAS and as LPS: 0.09 mm at the far corner."
    shape, flip = (512, 512, 60), np.diag([*codes, 1, 1.])
    exact = moved(flip @ np.diag([.703125, .703125, 5, 1]), -180, -180, 40)
    for spacing, fine in ((.7031, True), (.703, True), (.7025, True), (.702, False), (.71, False)):
        rounded = moved(flip @ np.diag([spacing, spacing, 5, 1]), -180, -180, 40)
        ras = [a @ np.array([[codes[0], 0, 0, (codes[0] < 0) * 511], [0, codes[1], 0, (codes[1] < 0) * 511], [0, 0, 1, 0], [0, 0, 0, 1]]) for a in (exact, rounded)]
        image, label = (volume(shape, a) for a in ras)
        assert (pair_fault(image, label) is None) == fine, spacing
        nearest, axis, farthest = grid_difference(image, label)
        assert nearest < 1e-9 and np.isclose(axis, abs(spacing / .703125 - 1)) and np.isclose(farthest, 511 * abs(spacing - .703125))


@pytest.mark.fault("F54")
def test_the_note_says_how_far_and_only_when_it_matters(tmp_path, patient):
    rounded = patient.affine @ np.diag([1.0009, 1, 1, 1])
    _, label, found = read_case(case_of(tmp_path, patient, rounded))
    far = 47 * .0009 * patient.spacing[0]
    assert [p.severity for p in found] == [] and far < .1 * patient.spacing.min()
    off = moved(rounded, *(.005 * patient.spacing))
    _, label, found = read_case(case_of(tmp_path, patient, off))
    assert [p.severity for p in found] == ["note"] and f"{far + .005 * patient.spacing[0]:.3g} mm" in found[0].found
    assert not has_error(found) and np.allclose(label.affine, patient.affine, atol=1e-5)
