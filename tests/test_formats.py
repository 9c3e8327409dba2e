"Volumes in other files than .nii.gz: each format is read as the NIfTI original is, and what cannot be read is said."
import gzip
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctdiffusion.data.cases import find_cases, has_error, read_case, volumes_in
from ctdiffusion.data.formats import case_name, format_of, has_reader, open_other, readable, stamp, volume_files, volume_sha256
from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.preparation import PrepareConfig, count_slices
from ctdiffusion.data.store import open_store, prepare, stale
from ctdiffusion.data.volumes import read_image, read_labels, sha256_file, write_volume
from volumes_as import UID, itk_image, oblique, save, save_itk, save_nifti, save_series, segmentation_tags, sitk, stored_as

SINGLE = ["p.nii", "p.NII.GZ", "p.Nii", "p.nrrd", "p.NRRD", "p.nhdr", "p.mha", "p.mhd", "p.mgz", "p.mgh", "p.hdr", "p.img"]
NAMES = {c.name: c.id for c in AMOS.organs}


def refused(*words):
    "The block ends with our error, which has a remedy and holds the words."
    return pytest.raises(CTDiffusionError, match="(?s)" + ".*".join(words))


def as_csv(problems): return [(p.severity, p.found) for p in problems]


@pytest.fixture(scope="module")
def grids(patient_volume):
    "The patient on four grids: plain, in two other orders of axes, and oblique, anisotropic and far from the origin."
    hu, affine = patient_volume
    return {"RAS": (hu, affine), "LPS": stored_as("LPS", hu, affine), "PIL": stored_as("PIL", hu, affine), "oblique": stored_as("LPS", hu, oblique(affine))}


@pytest.fixture(scope="module")
def patient_volume():
    from ctdiffusion.data.phantom import phantom
    p = phantom(seed=11, size=48)
    return p.hu, p.affine


# ------------------------------------------------------------------------------------ the same volume from each format

@pytest.mark.fault("F52")
@pytest.mark.parametrize("grid", ["RAS", "LPS", "PIL", "oblique"])
@pytest.mark.parametrize("name", SINGLE)
def test_every_format_gives_the_volume_of_the_nifti_original(tmp_path, grids, name, grid):
    data, affine = grids[grid]
    original = read_image(save_nifti(tmp_path / "original.nii.gz", data, affine))
    v = read_image(save(tmp_path / name, data, affine))
    assert v.data.dtype == np.int16 and (v.data == original.data).all()
    assert np.allclose(v.affine, original.affine, atol=2e-4) and np.allclose(v.source.affine, affine, atol=2e-4)
    assert v.source.shape == data.shape and v.source.path == str(tmp_path / name) and v.notes == original.notes
    assert v.source.sha256 == volume_sha256(tmp_path / name)
    assert count_slices(tmp_path / name) == original.data.shape[2]


@pytest.mark.fault("F52")
@pytest.mark.parametrize("grid", ["LPS", "oblique"])
def test_a_dicom_series_gives_the_volume_of_the_nifti_original(tmp_path, grids, grid):
    data, affine = grids[grid]
    original = read_image(save_nifti(tmp_path / "original.nii.gz", data, affine))
    v = read_image(save_series(tmp_path / "p", data, affine))
    assert v.data.dtype == np.int16 and (v.data == original.data).all() and np.allclose(v.affine, original.affine, atol=2e-4)
    assert count_slices(tmp_path / "p") == original.data.shape[2]


@pytest.mark.fault("F52")
def test_a_tilted_gantry_in_dicom_keeps_its_shear(tmp_path, patient_volume):
    hu, affine = patient_volume
    sheared = affine.copy()
    sheared[1, 2] = affine[2, 2] * np.tan(np.radians(15))
    data, stored = stored_as("LPS", hu, sheared)
    v = read_image(save_series(tmp_path / "p", data, stored))
    assert (v.data == hu).all() and np.allclose(v.affine, sheared, atol=1e-3) and "sheared by 15 degrees" in " ".join(v.notes)


@pytest.mark.fault("F52")
def test_the_three_spaces_of_nrrd_and_a_sheared_one(tmp_path, patient_volume):
    hu, affine = patient_volume
    path = save_itk(tmp_path / "p.nhdr", hu, affine)
    text = path.read_text()
    for space, turn in (("LPS", [1, 1]), ("right-anterior-superior", [-1, -1]), ("LAS", [1, -1])):
        path.write_text(text.replace("left-posterior-superior", space))
        v = read_image(path)
        assert np.allclose(v.source.affine, np.diag([*turn, 1, 1]) @ affine, atol=1e-6)
    path.write_text(text.replace("left-posterior-superior", "scanner-xyz"))
    with refused("no orientation"): read_image(path)
    step = float(affine[2, 2])
    path.write_text(re.sub(r"\(0,0,[\d.]+\)", f"(0,{step / 4},{step})", text))
    assert path.read_text() != text
    v = read_image(path)
    assert np.isclose(v.affine[1, 2], -step / 4) and (v.data == hu).all() and "sheared by 14 degrees" in " ".join(v.notes)


@pytest.mark.fault("F52")
def test_slope_and_intercept_of_dicom_are_applied(tmp_path, patient_volume):
    hu, affine = stored_as("LPS", *patient_volume)
    folder = save_series(tmp_path / "p", hu, affine, t0028_1052="-1024", t0028_1053="1")
    one = sorted(folder.iterdir())[0]
    k = int(one.stem.split("-")[1])
    assert one.read_bytes()[-hu[:, :, k].nbytes:] == (hu[:, :, k].T + 1024).astype("<i2").tobytes(), "stored without the intercept"
    assert (read_image(folder).data == stored_as("RAS", *patient_volume)[0]).all()


@pytest.mark.fault("F52")
def test_floats_and_unsigned_numbers_are_hu_as_well(tmp_path, patient_volume):
    hu, affine = patient_volume
    for dtype in (np.float32, np.float64, np.int32):
        v = read_image(save_itk(tmp_path / "p.nrrd", hu.astype(dtype), affine))
        assert v.data.dtype == np.int16 and (v.data == hu).all()
    holes = hu.astype(np.float32)
    holes[3, 4, 5] = np.nan
    save_itk(tmp_path / "p.mha", holes, affine)
    with refused("1 voxels that are NaN"): read_image(tmp_path / "p.mha")
    padded = np.where(hu < -900, -3024, hu).astype(np.int16)
    v = read_image(save_itk(tmp_path / "p.nrrd", padded, affine))
    assert v.data.min() == -1024 and "-3024" in v.notes[-1]


@pytest.mark.fault("F52")
def test_a_synthetic_volume_returns_to_the_grid_as_nifti(tmp_path, grids):
    data, affine = grids["oblique"]
    for name in ("p.nrrd", "p.mgz", "p"):
        v = read_image(save(tmp_path / name, data, affine))
        back = nib.load(write_volume(tmp_path / "back.nii.gz", v.data, v.source))
        assert back.shape == v.source.shape and np.allclose(back.affine, v.source.affine, atol=1e-3)
        assert (read_image(tmp_path / "back.nii.gz").data == v.data).all()


# --------------------------------------------------------------------------------------- labels and Slicer's segments

def crop(labels):
    "The smallest box around all organs, and where it begins."
    box = [np.nonzero((labels > 0).any(tuple({0, 1, 2} - {axis})))[0] for axis in range(3)]
    begin = [b.min() for b in box]
    return labels[tuple(slice(b.min(), b.max() + 1) for b in box)], begin


@pytest.mark.fault("F52")
@pytest.mark.parametrize("name", ["l.nrrd", "l.mha", "l.mgz", "l.nii", "l.hdr"])
def test_label_maps_in_every_format(tmp_path, patient, name):
    data, affine = stored_as("LPS", patient.labels, oblique(patient.affine))
    v = read_labels(save(tmp_path / name, data, affine))
    assert v.data.dtype == np.uint8 and (v.data == patient.labels).all()
    save(tmp_path / name, np.where(data == 3, 99, data).astype(np.uint8), affine)
    with refused("labels 99"): read_labels(tmp_path / name)


@pytest.mark.fault("F52")
def test_segments_are_read_by_their_names(tmp_path, patient):
    names = {"Spleen": 11, "right kidney": 3, "kidney-left": 7, "Liver": 1, "arota": 2}
    ids = dict(zip(names.values(), (1, 2, 3, 6, 8)))
    values = np.zeros_like(patient.labels)
    for value, id in ids.items(): values[patient.labels == id] = value
    v = read_labels(save_itk(tmp_path / "l.seg.nrrd", values, patient.affine, segmentation_tags(names)))
    assert (v.data == np.where(np.isin(patient.labels, list(ids.values())), patient.labels, 0)).all() and v.source.cropped
    assert case_name("l.seg.nrrd") == case_name("l.SEG.NRRD") == "l"
    save_itk(tmp_path / "m.seg.nrrd", values, patient.affine, segmentation_tags({"Spleen": 11, "Tumour": 3, "Segment_3": 7, "Liver": 1, "aorta": 2}))
    with refused("'Tumour', 'Segment_3'", "kidney_right", "Rename"): read_labels(tmp_path / "m.seg.nrrd")
    save_itk(tmp_path / "n.seg.nrrd", values, patient.affine, segmentation_tags({"Spleen": 11}))
    with refused(r"values \[1, 2, 3, 7\] that no segment has"): read_labels(tmp_path / "n.seg.nrrd")


@pytest.mark.fault("F52")
def test_segments_in_layers_are_merged_and_may_not_overlap(tmp_path, patient):
    liver, spleen, aorta = (patient.labels == AMOS.id(n) for n in ("liver", "spleen", "aorta"))
    layers = np.stack([liver * 1 + aorta * 2, spleen * 1], -1).astype(np.uint8)
    tags = segmentation_tags({"liver": 1, "aorta": 2, "spleen": 1}, {"spleen": 1})
    v = read_labels(save_itk(tmp_path / "l.seg.nrrd", layers, patient.affine, tags))
    assert all(((v.data == AMOS.id(n)) == m).all() for n, m in (("liver", liver), ("spleen", spleen), ("aorta", aorta)))
    layers[liver, 1] = 1
    save_itk(tmp_path / "m.seg.nrrd", layers, patient.affine, tags)
    with refused(f"{liver.sum()} voxels in both spleen and liver", "Overwrite all"): read_labels(tmp_path / "m.seg.nrrd")
    with refused("segmentation in 2 layers"): read_image(tmp_path / "l.seg.nrrd")
    save_itk(tmp_path / "c.nrrd", layers, patient.affine)
    with refused("2 numbers at every voxel"): read_image(tmp_path / "c.nrrd")


@pytest.mark.fault("F52")
def test_a_cropped_segmentation_is_put_back_into_its_image(tmp_path, patient):
    "3D Slicer stores the box around all segments; image in another order of axes."
    small, begin = crop(patient.labels)
    corner = patient.affine.copy()
    corner[:3, 3] = (patient.affine @ [*begin, 1])[:3]
    assert small.shape != patient.labels.shape
    for folder in ("images", "labels"): (tmp_path / folder).mkdir()
    save_series(tmp_path / "images/p", *stored_as("LPS", patient.hu, patient.affine))
    save_itk(tmp_path / "labels/p.seg.nrrd", small, corner, segmentation_tags(NAMES))
    (case,), problems = find_cases(tmp_path)
    image, label, found = read_case(case)
    assert not problems and not has_error(found) and "put back" in " ".join(p.found for p in found)
    assert (label.data == patient.labels).all() and np.allclose(label.affine, image.affine) and label.source.shape == image.source.shape
    corner[0, 3] += 0.4 * patient.spacing[0]
    save_itk(tmp_path / "labels/p.seg.nrrd", small, corner, segmentation_tags(NAMES))
    assert "Resample" in [p.do for p in read_case(case)[2] if p.severity == "error"][0]
    save_itk(tmp_path / "labels/p.nrrd", small, patient.affine)
    (tmp_path / "labels/p.seg.nrrd").unlink()
    assert has_error(read_case(find_cases(tmp_path)[0][0])[2]), "a label map of another shape that is no segmentation stays refused"


# -------------------------------------------------------------------------------------------------------- a data folder

def folder_of(tmp_path, hu, labels, affine, image="p.mha", label="p.nrrd"):
    for name in ("images", "labels"): (tmp_path / name).mkdir(parents=True)
    save(tmp_path / "images" / image, hu, affine)
    save(tmp_path / "labels" / label, labels, affine)
    return tmp_path


@pytest.mark.fault("F52")
@pytest.mark.parametrize("image, label", [("p.NII.GZ", "p.nii"), ("p.nii", "p.Nii.Gz"), ("p_0000.mha", "p.nrrd"), ("p", "p.nii.gz"), ("p.hdr", "p.img"), ("p.mhd", "p.nhdr"), ("p.nrrd", "p.mgz")])
def test_pairs_of_any_suffixes_become_the_same_store(tmp_path, patient, image, label):
    as_nifti, mixed = tmp_path / "nifti", tmp_path / "mixed"
    for root, names in ((as_nifti, ("p.nii.gz", "p.nii.gz")), (mixed, (image, label))):
        folder_of(root, *[stored_as("LPS", v, patient.affine)[0] for v in (patient.hu, patient.labels)], stored_as("LPS", patient.hu, patient.affine)[1], *names)
    cases, problems = find_cases(mixed)
    assert [c.id for c in cases] == ["p"] and not problems
    made = [prepare(root, root / "s", PrepareConfig(size=32)) for root in (as_nifti, mixed)]
    assert (made[0].images == made[1].images).all() and (made[0].labels == made[1].labels).all()
    assert stale(made[1], mixed) is None
    part = volume_files(mixed / "images" / image)[-1]
    part.write_bytes(part.read_bytes() + b"\0")
    assert "has changed" in stale(made[1], mixed)


@pytest.mark.fault("F52")
def test_nobody_vanishes_in_silence(tmp_path, patient):
    "What is no volume is a note with its name, what it looks like and the formats that are read; hidden files are not."
    root = folder_of(tmp_path, patient.hu, patient.labels, patient.affine, "p.nii.gz", "p.nii.gz")
    images = root / "images"
    (images / "q.rec").write_bytes(b"anything")
    (images / "page.pdf").write_bytes(b"<html>")
    (images / "q.img").write_bytes(b"voxels without a header")
    (images / "empty").mkdir()
    (images / ".hidden").write_bytes(b"x")
    for k in range(3): (images / f"{k}.dcm").write_bytes(bytes(128) + b"DICM")
    (root / "labels/readme.txt").write_bytes(b"hello")
    cases, problems = find_cases(root)
    said = {p.path.rsplit("/", 1)[-1]: p for p in problems if p.severity == "note"}
    assert [c.id for c in cases] == ["p"] and set(said) == {"q.rec", "page.pdf", "empty", "images", "readme.txt"}
    assert "a web page" in said["page.pdf"].found and "3 DICOM files" in said["images"].found and "without DICOM" in said["empty"].found
    assert all(".nii.gz" in said[n].expected and ".nrrd" in said[n].expected for n in ("q.rec", "empty"))
    assert [(p.severity, p.case, p.found) for p in problems if p.severity == "error"] == [("error", "q", "an image without label")]
    (images / "q.img").unlink()
    store = prepare(root, tmp_path / "s", PrepareConfig(size=32))
    assert {p.path for p in store.problems} >= {p.path for p in said.values()}
    for f in images.iterdir(): shutil.rmtree(f) if f.is_dir() else f.unlink()
    shutil.rmtree(root / "labels")
    (images / "q.rec").write_bytes(b"anything")
    with refused("no volumes", "q.rec"): find_cases(root)


@pytest.mark.fault("F52")
def test_volumes_in_lists_what_a_folder_holds(tmp_path, patient):
    for name in ("b.nii", "a.NII.gz", "c.mhd", "d.hdr", "e"): save(tmp_path / name, patient.hu, patient.affine)
    found, problems = volumes_in(tmp_path)
    assert {id: path.name for id, path in found.items()} == {"a": "a.NII.gz", "b": "b.nii", "c": "c.mhd", "d": "d.hdr", "e": "e"} and not problems
    save(tmp_path / "a.mha", patient.hu, patient.affine)
    assert "the same case as" in volumes_in(tmp_path)[1][0].found
    assert volumes_in(tmp_path / "nothing") == ({}, [])


@pytest.mark.fault("F52")
def test_without_the_extra_one_line_says_what_to_do(tmp_path, patient, monkeypatch):
    root = folder_of(tmp_path, patient.hu, patient.labels, patient.affine, "p", "p.nrrd")
    save(tmp_path / "q.mha", patient.hu, patient.affine)
    save(tmp_path / "q.mgz", patient.hu, patient.affine)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert not has_reader() and "pip install SimpleITK" in readable()
    with refused("p: found DICOM", r"pip install SimpleITK", "dcm2niix"): read_image(root / "images/p")
    with refused("q.mha: found MetaImage", r"pip install SimpleITK", "Slicer"): read_image(tmp_path / "q.mha")
    assert (read_image(tmp_path / "q.mgz").data == patient.hu).all()
    (case,), problems = find_cases(root)
    assert len([p for p in read_case(case)[2] if "pip install" in p.do]) == 2


# ------------------------------------------------------------------------------------------------------------ refusals

@pytest.mark.fault("F52")
@pytest.mark.parametrize("name", ["p.nrrd", "p.mha", "p.mhd", "p.mgz", "p.mgh", "p.hdr"])
def test_half_a_file_and_a_foreign_file_are_refused(tmp_path, patient, name):
    path = save(tmp_path / name, patient.hu, patient.affine)
    for part in volume_files(path):
        whole = part.read_bytes()
        for share in (0.6, 0.98):
            part.write_bytes(whole[:int(len(whole) * share)])
            for read in (read_image, read_labels):
                with refused(tmp_path.name): read(path)
        part.write_bytes(whole)
    assert (read_image(path).data == patient.hu).all()
    path.write_bytes(b"<html>Please log in</html>" + bytes(400))
    with refused("a web page", "download it again"): read_image(path)
    path.write_bytes(b"")
    with refused("again"): read_image(path)


@pytest.mark.fault("F52")
@pytest.mark.parametrize("name", ["p.nrrd", "p.mha", "p.mgz"])
def test_a_flipped_bit_in_compressed_voxels_is_never_read_in_silence(tmp_path, patient, name):
    path = save(tmp_path / name, patient.hu, patient.affine)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for at in (*rng.integers(1200, len(whole), 25), len(whole) - 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try: assert (read_image(path).data == patient.hu).all()  # bits that gzip does not use
        except CTDiffusionError as e: assert e.path == str(path) and "again" in e.do


@pytest.mark.fault("F52")
def test_a_path_that_is_no_text_does_not_end_the_process(tmp_path, patient):
    "SimpleITK would end it without a word."
    strange = tmp_path / os.fsdecode(b"n\xff")
    strange.mkdir()
    for name in ("p.nrrd", "p"):
        shutil.move(save(tmp_path / name, patient.hu, patient.affine), strange / name)
        with refused("no text", "Rename"): read_image(strange / name)


@pytest.mark.fault("F52")
@pytest.mark.parametrize("name", ["p.nrrd", "p.mha", "p.mgz", "p.hdr", "p"])
def test_the_size_is_checked_before_the_voxels_are_read(tmp_path, patient, monkeypatch, name):
    path = save(tmp_path / name, *stored_as("LPS", patient.hu, patient.affine))
    def never(*_): raise AssertionError("the voxels were read")
    for reader in ("ImageFileReader", "ImageSeriesReader"): monkeypatch.setattr(getattr(sitk, reader), "Execute", never)
    with refused(f"{patient.hu.size:,} voxels", "max_voxels"): read_image(path, max_voxels=1000)


@pytest.mark.fault("F52")
def test_claims_of_a_header_cost_nothing(tmp_path, patient):
    text = save_itk(tmp_path / "p.mhd", patient.hu, patient.affine).read_text()
    (tmp_path / "p.mhd").write_text(text.replace("DimSize = 48 48", "DimSize = 4800 9600"))
    with refused("bytes that claim to hold|voxels"): read_image(tmp_path / "p.mhd", max_voxels=2**40)
    save(tmp_path / "p.mgh", patient.hu, patient.affine)
    raw = bytearray((tmp_path / "p.mgh").read_bytes())
    struct.pack_into(">2i", raw, 4, 48000, 48000)
    (tmp_path / "p.mgz").write_bytes(gzip.compress(bytes(raw[:600])))
    with refused("bytes that claim to hold|voxels"): read_image(tmp_path / "p.mgz", max_voxels=2**40)


@pytest.mark.fault("F52")
def test_a_file_without_orientation_is_refused_until_one_is_assumed(tmp_path, patient):
    data, affine = stored_as("LPS", patient.hu, patient.affine)
    text = save_itk(tmp_path / "p.mhd", data, affine).read_text()
    (tmp_path / "p.mhd").write_text("\n".join(line for line in text.split("\n") if not line.startswith(("TransformMatrix", "Offset"))))
    text = save_itk(tmp_path / "p.nhdr", data, affine).read_text()
    spacings = "spacings: " + " ".join(map(str, patient.spacing))
    kept = [spacings if line.startswith("space directions") else line for line in text.split("\n") if not line.startswith(("space:", "space origin"))]
    (tmp_path / "p.nhdr").write_text("\n".join(kept))
    raw = bytearray(save(tmp_path / "p.mgh", data, affine).read_bytes())
    struct.pack_into(">h", raw, 28, 0)
    (tmp_path / "p.mgh").write_bytes(raw)
    with refused("neither spacing nor orientation"): read_image(tmp_path / "p.mgh", assume="LPS")
    for name in ("p.mhd", "p.nhdr"):
        with refused("no orientation", "assume='RAS'"): read_image(tmp_path / name)
        v = read_image(tmp_path / name, assume="LPS")
        assert (v.data == patient.hu).all() and np.allclose(v.spacing, patient.spacing, atol=1e-4)


@pytest.mark.fault("F52")
def test_analyze_is_refused_and_half_a_pair_named(tmp_path, patient):
    nib.save(nib.AnalyzeImage(patient.hu, patient.affine), tmp_path / "a.hdr")
    with refused("Analyze 7.5", "orientation"): read_image(tmp_path / "a.hdr")
    save(tmp_path / "b.hdr", patient.hu, patient.affine)
    (tmp_path / "b.img").unlink()
    with refused("one half of a pair"): read_image(tmp_path / "b.hdr")


@pytest.mark.fault("F52")
@pytest.mark.parametrize("named", ["../other.raw", "/etc/passwd", "LIST", "missing.raw", "slice%03d.raw 1 9 1"])
def test_a_header_that_names_other_files_is_refused(tmp_path, patient, named):
    (tmp_path / "other.raw").write_bytes(patient.hu.tobytes())
    (tmp_path / "d").mkdir()
    for name in ("p.mhd", "p.nhdr"):
        path = save_itk(tmp_path / "d" / name, patient.hu, patient.affine)
        path.write_text(path.read_text().replace("p.raw", named))
        with refused("one file beside the header"): read_image(path)


@pytest.mark.fault("F52")
def test_dicom_that_is_no_even_stack_is_refused(tmp_path, patient):
    data, affine = stored_as("LPS", patient.hu, patient.affine)
    data = data[:, :, :12]
    def fresh(name, **tags): return save_series(tmp_path / name, data, affine, **tags)
    for name, lost in (("middle", (5,)), ("near the end", (10,)), ("two", (4, 5))):
        folder = fresh(name)
        for k in lost: next(folder.glob(f"*-{k:03d}.dcm")).unlink()
        with refused("mm apart", "missing"): read_image(folder)
    two = fresh("series")
    for f in fresh("other", t0020_000e=UID + ".2").iterdir(): shutil.copy(f, two / f"x{f.name}")
    with refused("2 series", r"12 files", "folder of its own"): read_image(two)
    twice = fresh("twice")
    for f in fresh("again").iterdir(): shutil.copy(f, twice / f"x{f.name}")
    with refused("two slices at one position"): read_image(twice)
    damaged = fresh("damaged")
    last = next(damaged.glob("*-011.dcm"))
    last.write_bytes(last.read_bytes()[:200])
    with refused("011.dcm"): read_image(damaged)
    cut = fresh("cut")
    last = next(cut.glob("*-011.dcm"))
    last.write_bytes(last.read_bytes()[:-900])
    with refused("cut"): read_image(cut)
    with refused("modality SEG", "segimage2itkimage"): read_labels(fresh("seg", t0008_0060="SEG"))
    single = fresh("single")
    for f in sorted(single.iterdir())[1:]: f.unlink()
    with refused("a single slice"): read_image(single)
    one = next(fresh("one").iterdir())
    with refused("a DICOM file", "folder of their own"): read_image(one)


@pytest.mark.fault("F52")
def test_checksums_and_stamps_see_every_file_of_a_volume(tmp_path, patient):
    data, affine = stored_as("LPS", patient.hu, patient.affine)
    for name in ("p.mhd", "p.hdr", "p"):
        path = save(tmp_path / name, data, affine)
        before = volume_sha256(path), stamp(path)
        assert read_image(path).source.sha256 == before[0]
        part = volume_files(path)[-1]
        part.write_bytes(part.read_bytes()[:-1] + b"\x07")
        assert volume_sha256(path) != before[0]
    assert volume_sha256(save(tmp_path / "q.nii.gz", data, affine)) == sha256_file(tmp_path / "q.nii.gz")


# ------------------------------------------------------------------------------------- nnU-Net's folders, links (F53)

@pytest.fixture
def nnunet(data):
    "The five patients as nnU-Net version 1 keeps them: images with _0000, dataset.json without, test images as plain names."
    for f in (data / "imagesTr").iterdir(): f.rename(f.with_name(f.name.replace(".nii", "_0000.nii")))
    listed = sorted(f.name for f in (data / "labelsTr").iterdir())
    rows = [dict(image=f"./imagesTr/{n}", label=f"./labelsTr/{n}") for n in listed]
    (data / "dataset.json").write_text(json.dumps(dict(name="Task05", modality={"0": "CT"}, training=rows, test=["./imagesTs/la_007.nii.gz"], numTraining=len(rows))))
    return data


@pytest.mark.fault("F53")
def test_dataset_json_of_nnunet_version_1(nnunet):
    cases, problems = find_cases(nnunet)
    assert len(cases) == 5 and not has_error(problems)
    (nnunet / "imagesTr/amos_0002_0000.nii.gz").unlink()
    assert ("amos_0002", "listed in dataset.json but missing") in {(p.case, p.found) for p in find_cases(nnunet)[1]}
    label = nnunet / "labelsTr/amos_0003.nii.gz"
    label.rename(label.with_name("amos_0003_0000.nii.gz"))
    assert ("amos_0003", "listed in dataset.json but missing") in {(p.case, p.found) for p in find_cases(nnunet)[1]}


@pytest.mark.fault("F53")
@pytest.mark.parametrize("linked", ["imagesTr", "labelsTr/amos_0001.nii.gz", "."])
def test_symbolic_links_are_read(nnunet, tmp_path, linked):
    elsewhere = tmp_path / "elsewhere"
    if linked == ".":
        nnunet.rename(elsewhere)
        nnunet.symlink_to(elsewhere)
    else:
        (nnunet / linked).rename(elsewhere)
        (nnunet / linked).symlink_to(elsewhere)
    cases, problems = find_cases(nnunet)
    assert len(cases) == 5 and not has_error(problems)
    store = prepare(nnunet, tmp_path / "s", PrepareConfig(size=32))
    assert len(store.cases) == 5 and open_store(tmp_path / "s").hash == store.hash and stale(store, nnunet) is None


@pytest.mark.fault("F53")
@pytest.mark.parametrize("name", ["../x.nii.gz", "/etc/passwd", "imagesTr/../../x.nii.gz", "..", "./../x"])
def test_paths_that_leave_the_folder_by_their_text_stay_refused(data, name):
    (data / "dataset.json").write_text(json.dumps(dict(training=[dict(image=name, label="./labelsTr/amos_0001.nii.gz")])))
    (problem,) = [p for p in find_cases(data)[1] if p.severity == "error"]
    assert "leaves" in problem.found and problem.path.endswith("dataset.json")


@pytest.mark.fault("F52")
def test_volumes_beside_the_folders_of_images_and_labels_are_listed(tmp_path):
    make_dataset(tmp_path / "data", train=2, val=0, size=48)
    root = tmp_path / "data"
    scan = next((root / "imagesTr").glob("*.nii.gz"))
    (root / "more").mkdir()
    for there in (root / "lost.nii.gz", root / "more/q.nii.gz"):
        shutil.copy(scan, there)
    notes = {Path(p.path).name: p.severity for p in find_cases(root)[1] if not p.case}
    assert notes == {"lost.nii.gz": "note", "more": "note"}
