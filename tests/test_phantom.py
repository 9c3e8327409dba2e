"The phantom: deterministic, anatomically right, varied, and written as real data sets are."
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from ctdiffusion.data.anatomy import COLON, EXTENT, PARTS, PHASES, TISSUES, bowel_course, ellipsoids, noise_field
from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import STORAGE, Patient, make_dataset, phantom, save_patient

SEEDS = range(8)


@pytest.fixture(scope="module")
def people() -> list: return [phantom(seed, 64) for seed in SEEDS]


def where(patient: Patient, name: str) -> np.ndarray: return patient.labels == AMOS.id(name)
def ml(patient: Patient, name: str) -> float: return where(patient, name).sum() * np.prod(patient.spacing) / 1000


def centre(patient: Patient, name: str) -> np.ndarray:
    "Centre of an organ in world millimetres, RAS+."
    return patient.affine[:3, :3] @ np.argwhere(where(patient, name)).mean(0) + patient.affine[:3, 3]


# ------------------------------------------------------------------------------------------------ anatomy

def test_table_refers_to_what_exists():
    assert {p.tissue for p in PARTS} | {t.shell for t in TISSUES.values() if t.shell} <= set(TISSUES)
    assert {p.label for p in PARTS} - {"background"} == {c.name for c in AMOS.organs}
    assert all(len(t.hu) in (1, len(PHASES)) for t in TISSUES.values())


def test_every_bead_lies_where_noise_is_defined():
    for part in PARTS: assert ((part.rows[:, :3] > EXTENT[:, 0]) & (part.rows[:, :3] < EXTENT[:, 1])).all(), part


@pytest.mark.parametrize("step", [9, 34, 90])
def test_noise_has_unit_variance_everywhere(step):
    axes = [np.linspace(lo, hi, 9) for lo, hi in EXTENT]
    fields = np.stack([noise_field(axes, step, np.random.default_rng(s)) for s in range(150)])
    assert abs(fields.mean()) < .05 and abs(fields.std() - 1) < .12
    assert fields.std(0).min() > .5, "no dead corner"


def test_noise_does_not_depend_on_the_grid():
    fine = [np.linspace(lo, hi, 21) for lo, hi in EXTENT]
    a, b = (noise_field(axes, 34, np.random.default_rng(0)) for axes in (fine, [f[::4] for f in fine]))
    np.testing.assert_allclose(a[::4, ::4, ::4], b, atol=1e-4)


def test_ellipsoid_is_zero_on_its_surface():
    r = np.array([30., 20., 10.])
    u = np.random.default_rng(0).standard_normal((3, 500))
    q = (u / np.linalg.norm(u, axis=0) * r[:, None]).astype(np.float32)[..., None, None]
    assert np.abs(ellipsoids(q, [(0, 0, 0, *r)])).max() < 1e-3


def test_bowel_visits_every_node_once():
    tour = bowel_course(np.random.default_rng(0))
    assert len(np.unique(tour, axis=0)) == len(tour) > 50 and COLON.shape[1] == 3


# ------------------------------------------------------------------------------------------------ one patient

def test_same_seed_same_bytes():
    a, b = phantom(5, 48), phantom(5, 48)
    assert a.hu.tobytes() == b.hu.tobytes() and a.labels.tobytes() == b.labels.tobytes() and a.info == b.info
    assert phantom(6, 48).hu.tobytes() != a.hu.tobytes()


def test_types_and_geometry(people):
    for p in people:
        assert (p.hu.dtype, p.labels.dtype) == (np.int16, np.uint8) and p.hu.shape == p.labels.shape
        assert p.hu.shape[:2] == (64, 64) and 35 <= p.hu.shape[2] <= 75
        assert nib.aff2axcodes(p.affine) == ("R", "A", "S")
        np.testing.assert_allclose(np.diag(p.affine)[:3], p.spacing)
        assert p.hu.min() >= -1024 and p.hu.max() > 400 and set(np.unique(p.labels)) <= set(range(16))


def test_resolution_does_not_change_the_patient():
    coarse, fine = phantom(4, 48), phantom(4, 96)
    assert coarse.info == fine.info and coarse.hu.shape[2] == fine.hu.shape[2]
    for name in ("liver", "spleen", "kidney_right"): assert ml(coarse, name) == pytest.approx(ml(fine, name), rel=.05)
    for name in ("liver", "spleen"): np.testing.assert_allclose(centre(coarse, name), centre(fine, name), atol=6)


def test_phase_changes_the_image_only():
    plain, arterial, portal = (phantom(4, 64, phase) for phase in PHASES)
    assert (plain.labels == arterial.labels).all() and (plain.labels == portal.labels).all()
    hu = {name: [np.median(p.hu[where(p, name)]) for p in (plain, arterial, portal)] for name in ("liver", "aorta", "gallbladder")}
    assert hu["aorta"][1] > hu["aorta"][2] > hu["aorta"][0] + 50
    assert hu["liver"][2] > hu["liver"][1] + 15 > hu["liver"][0]
    assert np.ptp(hu["gallbladder"]) < 15


def test_unknown_phase_names_the_known_ones():
    with pytest.raises(CTDiffusionError, match="none, arterial, portal"): phantom(0, 32, phase="venous")


def test_sides_and_order(people):
    for p in people:
        x, y, z = np.array([centre(p, c.name) for c in AMOS.organs if c.name != "prostate_uterus"]).T
        i = {c.name: k for k, c in enumerate(c for c in AMOS.organs if c.name != "prostate_uterus")}
        assert x[i["liver"]] > x[i["aorta"]] + 20 and x[i["spleen"]] < x[i["aorta"]] - 50 and x[i["stomach"]] < x[i["liver"]]
        assert x[i["kidney_right"]] > x[i["adrenal_gland_right"]] > x[i["aorta"]] > x[i["kidney_left"]]
        assert x[i["inferior_vena_cava"]] > x[i["aorta"]] and x[i["gallbladder"]] > x[i["pancreas"]]
        assert z[i["adrenal_gland_right"]] > z[i["kidney_right"]] and z[i["adrenal_gland_left"]] > z[i["kidney_left"]]
        assert z[i["liver"]] > z[i["kidney_right"]] > z[i["urinary_bladder"]] and z[i["gallbladder"]] < z[i["liver"]]
        assert y[i["stomach"]] > y[i["kidney_left"]] + 20 and z[i["esophagus"]] > z[i["stomach"]]


def test_slices_change_from_pelvis_to_dome(people):
    for p in people:
        n = p.hu.shape[2]
        low, high = p.labels[..., :n // 4], p.labels[..., -n // 6:]
        assert AMOS.id("liver") not in low and AMOS.id("urinary_bladder") in low
        assert AMOS.id("liver") in high and AMOS.id("urinary_bladder") not in high
        assert (p.hu[..., -2:] < -700).mean() > (p.hu[..., n // 2:n // 2 + 2] < -700).mean() * .9


def test_liver_is_one_piece(people):
    for p in people:
        sizes = np.bincount(ndimage.label(where(p, "liver"))[0].ravel())[1:]
        assert sizes.max() > .97 * sizes.sum()


# ------------------------------------------------------------------------------------------------ a population

NORMAL_ML = dict(spleen=(60, 400), kidney_right=(80, 270), kidney_left=(80, 270), gallbladder=(5, 90), liver=(700, 2200), stomach=(60, 800),
                 aorta=(30, 130), inferior_vena_cava=(30, 150), pancreas=(20, 130), duodenum=(30, 150), urinary_bladder=(30, 700))


def test_volumes_are_those_of_adults(people):
    for name, (low, high) in NORMAL_ML.items():
        volumes = np.array([ml(p, name) for p in people])
        assert ((low < volumes) & (volumes < high)).all(), (name, volumes.round())
        assert volumes.std() > .03 * volumes.mean(), f"{name} never varies"


def test_hu_of_portal_phase():
    patients = [phantom(seed, 64, "portal") for seed in range(4)]
    for name, low, high in (("liver", 85, 130), ("spleen", 90, 140), ("kidney_left", 120, 200), ("aorta", 110, 190), ("urinary_bladder", -10, 30), ("stomach", -10, 60)):
        medians = [np.median(p.hu[where(p, name)]) for p in patients]
        assert low < min(medians) and max(medians) < high, (name, medians)


def test_people_differ(people):
    assert {p.info["sex"] for p in people} == {"f", "m"}
    assert len({tuple(p.spacing) for p in people}) == len(people) and max(p.info["fat"] for p in people) > 30
    infos = [phantom(seed, 16).info for seed in range(30, 60)]
    assert {i["phase"] for i in infos} == set(PHASES) and {i["arms"] for i in infos} == {i["table"] for i in infos} == {True, False}
    assert sum(i["phase"] == "portal" for i in infos) > 15


# ------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPS", "LPI", "ASL", "SPR"])
def test_any_storage_order_reads_back(tmp_path, orientation):
    p = phantom(1, 24)
    save_patient(p, tmp_path / "ct.nii.gz", tmp_path / "labels.nii.gz", orientation)
    for file, data in (("ct", p.hu), ("labels", p.labels)):
        img = nib.load(tmp_path / f"{file}.nii.gz")
        assert nib.aff2axcodes(img.affine) == tuple(orientation) and img.header.get_data_dtype() == data.dtype
        assert int(img.header["qform_code"]) == int(img.header["sform_code"]) == 1 and img.header.get_xyzt_units()[0] == "mm"
        back = nib.as_closest_canonical(img)
        assert (np.asarray(back.dataobj) == data).all()
        np.testing.assert_allclose(back.affine, p.affine, atol=1e-3)


def test_dataset_has_the_layout_of_amos(tmp_path):
    root = make_dataset(tmp_path / "amos", train=3, val=2, size=24)
    about = json.loads((root / "dataset.json").read_text())
    assert {about["labels"][k] for k in ("4", "8", "9", "15")} == {"gall bladder", "arota", "postcava", "prostate/uterus"}
    assert [len(about[k]) for k in ("training", "validation")] == [about["numTraining"], about["numValidation"]] == [4, 2]
    for entry in about["training"] + about["validation"]: assert all((root / p).is_file() for p in entry.values())
    axes = {nib.aff2axcodes(nib.load(p).affine) for p in root.glob("images*/*")}
    assert len(axes) >= 4 and axes <= set(map(tuple, STORAGE))
    mri = np.asarray(nib.load(root / "imagesTr/amos_0507.nii.gz").dataobj)
    assert mri.min() >= 0 and 0 < np.median(mri[mri > 0])


def contents(root: Path) -> dict: return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_dataset_is_reproducible_and_processes_do_not_matter(tmp_path):
    a, b = (contents(make_dataset(tmp_path / str(n), train=2, val=1, size=24, processes=n)) for n in (1, 2))
    assert a == b
    other = contents(make_dataset(tmp_path / "other", train=2, val=1, seed=1, size=24))
    assert all(other[k] != v for k, v in a.items() if k != "dataset.json")


def test_held_out_patients_are_the_same_whatever_the_training_set(tmp_path):
    small, large = (contents(make_dataset(tmp_path / str(n), train=n, val=2, size=24)) for n in (1, 3))
    held = [k for k in small if "Va/" in k]
    assert len(held) == 4 and all(small[k] == large[k] for k in held)
    trained = {v for k, v in large.items() if "imagesTr/" in k}
    assert not trained & {small[k] for k in held}


@pytest.mark.parametrize("train, val", [(0, 1), (401, 1), (1, 100)])
def test_too_many_patients_are_refused(tmp_path, train, val):
    with pytest.raises(CTDiffusionError, match="below 500"): make_dataset(tmp_path / "x", train=train, val=val, size=16)
    assert not (tmp_path / "x").exists()
