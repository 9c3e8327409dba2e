"Folders of patients and the store, and the prepare job. What is wrong with a patient or a folder is in faults/test_a_data.py."
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import nibabel as nib
import numpy as np
import papermill as pm
import pytest
from ctdiffusion.data.cases import Case, find_cases, has_error, hold_out, read_case
from ctdiffusion.data.labels import AMOS, ClassTable, CTDiffusionError, LabelClass
from ctdiffusion.data.phantom import save_patient
from ctdiffusion.data.preparation import PrepareConfig, choose, count_slices, digest, entry, slices_of
from ctdiffusion.data.slices import axial, body_mask, resize_images, resize_labels, window, with_body
from ctdiffusion.data.store import open_store, prepare
from ctdiffusion.data.volumes import nifti_bytes

CONFIG = PrepareConfig(size=32)


def errors(problems): return [p for p in problems if p.severity == "error"]


# one folder

def test_nnunet_names(data):
    for f in (data / "imagesTr").iterdir(): f.rename(f.with_name(f.name.replace(".nii", "_0000.nii")))
    (data / "dataset.json").unlink()
    cases, problems = find_cases(data)
    assert len(cases) == 5 and not errors(problems)


def test_dataset_json_lists_what_is_missing(data):
    (data / "imagesTr/amos_0003.nii.gz").unlink()
    assert "listed in dataset.json but missing" in {p.found for p in errors(find_cases(data)[1]) if p.case == "amos_0003"}


def test_split_is_by_patient_and_stated():
    cases = [Case(f"c{i:02}", Path("x"), None, "train") for i in range(11)]
    assert [c.id for c in hold_out(cases) if c.split == "val"] == ["c04", "c09"]
    assert [c.split for c in hold_out(cases[:1])] == ["train"] and [c.split for c in hold_out(cases[:3])] == ["train", "train", "val"]


def test_empty_and_missing_folders(tmp_path):
    for root in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CTDiffusionError, match="data_instructions"): find_cases(root)


# the store

def test_store_holds_every_slice_once(original, tmp_path):
    s = prepare(original, tmp_path / "s", CONFIG)
    assert {k: len(v) for k, v in s.splits.items()} == {"train": 3, "val": 2}
    assert sorted(np.concatenate([s.rows("train"), s.rows("val")])) == list(range(len(s)))
    for c in s.cases:
        i = original / c["image"]["path"]
        assert c["stop"] - c["start"] == count_slices(i) == c["shape"][2] and nib.load(i).shape == tuple(c["source_shape"])
        x, y = s.images[c["start"]:c["stop"]], s.labels[c["start"]:c["stop"]]
        organs = np.isin(y, np.arange(1, 16))
        assert x.max() > 150 and organs.any() and (y == 16).any()
        assert (y[:, :, :16] == AMOS.id("liver")).sum() > (y[:, :, 16:] == AMOS.id("liver")).sum()
    with pytest.raises(CTDiffusionError, match="no split"): s.rows("test")


def test_processes_and_orientation_do_not_change_a_byte(original, tmp_path):
    turned = tmp_path / "turned"
    for folder in ("imagesTr", "labelsTr", "imagesVa", "labelsVa"):
        (turned / folder).mkdir(parents=True)
        for f in (original / folder).iterdir():
            image = nib.as_closest_canonical(nib.load(f))
            nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PIR"))), turned / folder / f.name)
    a, b, c = prepare(original, tmp_path / "a", CONFIG), prepare(original, tmp_path / "b", CONFIG, processes=2), prepare(turned, tmp_path / "c", CONFIG)
    assert a.hash == b.hash == c.hash and {e["axcodes"] for e in c.cases} == {"PIR"}
    for name in ("images.npy", "labels.npy"): assert len({(s.path / name).read_bytes() for s in (a, b, c)}) == 1
    assert (a.path / "manifest.json").read_bytes() == (b.path / "manifest.json").read_bytes()


def test_a_single_patient_is_its_own_held_out(tmp_path, patient):
    for f in ("images", "labels"): (tmp_path / f).mkdir()
    save_patient(patient, tmp_path / "images/me.nii.gz", tmp_path / "labels/me.nii.gz")
    s = prepare(tmp_path, tmp_path / "s", CONFIG)
    assert s.held_out_is_train and (s.rows("val") == s.rows("train")).all()
    assert "ALSO shown as held-out" in s.problems[0].do


def test_images_without_labels(original, tmp_path):
    s = prepare(original, tmp_path / "s", replace(CONFIG, labels="none"))
    assert list(s.splits) == ["unlabelled"] and set(np.unique(s.labels)) == {0, 16}
    with pytest.raises(CTDiffusionError, match="no split"): s.rows("train")


def test_another_class_table(original, tmp_path):
    table = ClassTable("whole", tuple(LabelClass(i, f"thing{i}" if i else "background", (i, i, i)) for i in range(16)))
    s = prepare(original, tmp_path / "s", CONFIG, table)
    assert s.labels.max() <= 15 and s.table.name == "whole"
    with pytest.raises(CTDiffusionError, match="class table"): open_store(tmp_path / "s", table=AMOS)


def test_two_preparations_do_not_meet(original, tmp_path):
    from filelock import FileLock
    with FileLock(tmp_path / ".s.lock"), pytest.raises(CTDiffusionError, match="another preparation"): prepare(original, tmp_path / "s", CONFIG)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_full_disk_leaves_nothing(original, tmp_path):
    import resource
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            prepare(original, tmp_path / "s", CONFIG)
        except CTDiffusionError as e: code = 0 if "room for" in str(e) else 2
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s.tmp*"))


def test_parameters_are_checked(original):
    for wrong in (dict(size=4), dict(width=0), dict(every=1), dict(labels="no"), dict(held_out=0)):
        with pytest.raises(CTDiffusionError, match=f"PrepareConfig.{list(wrong)[0]}"): PrepareConfig(**wrong)
    with pytest.raises(CTDiffusionError, match="exclude"): choose(original, PrepareConfig(exclude=("nobody",)))
    cases, problems = choose(original, PrepareConfig(exclude=("amos_0001",), held_out=1))
    assert [c.id for c in cases] == ["amos_0002", "amos_0003", "amos_0401"] and not has_error(problems)


# the job

JOB = Path(__file__).parents[1] / "nbs" / "prepare.ipynb"


@pytest.fixture(autouse=True)
def pictures_in_the_kernel(monkeypatch): monkeypatch.delenv("MPLBACKEND", raising=False)


def run(tmp_path, **parameters):
    pm.execute_notebook(str(JOB), str(tmp_path / "out.ipynb"), parameters=dict(run_dir=str(tmp_path / "run"), size=32) | parameters, progress_bar=False, cwd=str(tmp_path))
    return (tmp_path / "out.ipynb").read_text()


def test_job(original, tmp_path):
    page = run(tmp_path, data_root=str(original), store=str(tmp_path / "store"))
    assert len(open_store(tmp_path / "store").cases) == 5 and "26,069" in page and page.count("image/jpeg") >= 5
    assert len((tmp_path / "run/cases.csv").read_text().splitlines()) == 6


def test_job_shows_everything_and_then_fails(data, tmp_path):
    (data / "imagesVa/amos_0401.nii.gz").write_bytes(b"<html>log in</html>")
    (data / "labelsTr/amos_0001.nii.gz").write_bytes(nifti_bytes(np.full((48, 48, 45), 255, np.uint8), np.eye(4)))
    with pytest.raises(pm.PapermillExecutionError, match="in 2 cases"): run(tmp_path, data_root=str(data))
    page = (tmp_path / "out.ipynb").read_text()
    assert "a web page" in page and "255 (" in page and '"name": "stderr"' not in page
    assert not (tmp_path / "run/store").exists() and "No store, no figures." in page and "No search: 1 validation patients" in page


def test_slices_are_the_plain_chain_and_the_voxels_one_checksum(tmp_path, patient):
    "Window, axial slices, resize of the whole volume at once; the same for every order of storage."
    p, sums = patient, set()
    for codes in ("RAS", "LPS", "LPI", "PIR", "SAL"):
        save_patient(p, tmp_path / "i.nii.gz", tmp_path / "l.nii.gz", orientation=codes)
        case = Case("c", tmp_path / "i.nii.gz", tmp_path / "l.nii.gz", "train")
        image, label, _ = read_case(case)
        x, y = slices_of(image, label, CONFIG)
        full = with_body(p.labels, body_mask(p.hu, image.spacing, p.labels), AMOS.body)
        assert (x == np.rint(255 * resize_images(axial(window(p.hu)), 32)).astype(np.uint8)).all() and (y == resize_labels(axial(full), 32)).all()
        assert (slices_of(image, None, CONFIG)[1] == AMOS.body * resize_labels(axial(body_mask(p.hu, image.spacing)), 32)).all()
        e = entry(case, image, label, x, y)
        sums.add((e["voxels"], e["sha256"]))
        assert e["sha256"] == digest(x.tobytes(), y.tobytes()) and all((np.diff(np.abs(v.data.strides)) > 0).all() for v in (image, label))
    assert len(sums) == 1
