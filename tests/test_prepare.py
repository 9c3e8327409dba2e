"""Folders of patients and the store (faults F7-F10, F14-F15, F17-F20), and the prepare job."""
import csv, os, shutil, signal, sys, time
from dataclasses import replace
from pathlib import Path
import nibabel as nib
import numpy as np
import papermill as pm
import pytest
from ctdiffusion.data.cases import Case, check_case_id, find_cases, has_error, hold_out, inside, problems_table, read_case, write_problems
from ctdiffusion.data.labels import AMOS, ClassTable, CTDiffusionError, LabelClass
from ctdiffusion.data.phantom import make_dataset, phantom, save_patient
from ctdiffusion.data.preparation import PrepareConfig, choose, count_slices, digest, entry, slices_of
from ctdiffusion.data.slices import axial, body_mask, resize_images, resize_labels, window, with_body
from ctdiffusion.data.store import PrepareError, open_store, prepare
from ctdiffusion.data.volumes import nifti_bytes

CONFIG = PrepareConfig(size=32)


@pytest.fixture(scope="module")
def original(tmp_path_factory): return make_dataset(tmp_path_factory.mktemp("data") / "amos", train=3, val=2, size=48)


@pytest.fixture
def data(original, tmp_path): return Path(shutil.copytree(original, tmp_path / "amos"))


@pytest.fixture(scope="module")
def patient(): return phantom(seed=11, size=48)


def case_of(folder, hu, labels, affine, label_affine=None):
    (folder / "i.nii.gz").write_bytes(nifti_bytes(hu, affine))
    (folder / "l.nii.gz").write_bytes(nifti_bytes(labels, affine if label_affine is None else label_affine))
    return Case("c", folder / "i.nii.gz", folder / "l.nii.gz", "train")


def errors(problems): return [p for p in problems if p.severity == "error"]


# one patient

def test_a_sound_patient_has_no_errors(tmp_path, patient):
    assert not errors(read_case(case_of(tmp_path, patient.hu, patient.labels, patient.affine))[2])


def test_shapes_differ(tmp_path, patient):
    (p,) = errors(read_case(case_of(tmp_path, patient.hu, patient.labels[1:], patient.affine))[2])
    assert "l.nii.gz" in p.path and "i.nii.gz" in p.found and "nearest neighbour" in p.do


@pytest.mark.parametrize("shift, fine", [(1e-6, True), (1e-3, True), (.3, False), (7, False)])
def test_affines_differ(tmp_path, patient, shift, fine):
    moved = patient.affine.copy()
    moved[0, 3] += shift
    found = errors(read_case(case_of(tmp_path, patient.hu, patient.labels, patient.affine, moved))[2])
    assert not found if fine else "the same grid" == found[0].expected and found[0].found.count("[[") == 2


def test_other_spacing_is_refused(tmp_path, patient):
    assert errors(read_case(case_of(tmp_path, patient.hu, patient.labels, patient.affine, patient.affine @ np.diag([1, 1, 1.1, 1])))[2])


def test_label_in_another_orientation_is_reoriented(tmp_path, patient):
    save_patient(patient, tmp_path / "i.nii.gz", tmp_path / "x.nii.gz", orientation="LPS")
    save_patient(patient, tmp_path / "y.nii.gz", tmp_path / "l.nii.gz", orientation="SAR")
    image, label, found = read_case(Case("c", tmp_path / "i.nii.gz", tmp_path / "l.nii.gz", "train"))
    assert (image.data == patient.hu).all() and (label.data == patient.labels).all()
    assert [p.severity for p in found] == ["note"] and "SAR" in found[0].found


def test_mirrored_data_is_refused_unless_confirmed(tmp_path, patient):
    case = case_of(tmp_path, patient.hu[::-1], patient.labels[::-1], patient.affine)
    (p,) = errors(read_case(case)[2])
    assert "liver left of spleen" in p.found and "allow_mirrored" in p.do
    assert not errors(read_case(case, allow_mirrored=["c"])[2])


@pytest.mark.parametrize("spoil, word", [(lambda x: x + 1024, "intercept"), (lambda x: np.clip(x / 2000 + .5, 0, 1), "normalised"), (lambda x: np.rint(255 * np.clip(x / 2000 + .5, 0, 1)), "grey levels"),
                                         (lambda x: np.clip(x, -160, 240), "windowed"), (lambda x: np.clip((x + 160) / 400, 0, 1) * 2 - 1, "normalised"), (lambda x: np.abs(x + 1000.) * .3, "MRI"), (lambda x: x - 1024., "soft tissue, and"), (lambda x: x * 10., "soft tissue, and")])
def test_hu_lost(tmp_path, patient, spoil, word):
    hu = spoil(patient.hu.astype(np.float32)).astype(np.float32)
    found = errors(read_case(case_of(tmp_path, hu, patient.labels, patient.affine))[2])
    assert word in found[0].found + found[0].do and "i.nii.gz" in found[0].path


def test_many_phantoms_are_accepted(tmp_path):
    for seed in range(4):
        p = phantom(seed=seed, size=48)
        assert not errors(read_case(case_of(tmp_path, p.hu, p.labels, p.affine))[2]), p.info


# one folder

def test_hostile_names(tmp_path, patient):
    names = ["$(touch P)", "con<img onerror=x>", "a b", "-rf", "x" * 200, "a..b", "'; rm", "ünï", "=cmd|x"]
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        for n in names: (tmp_path / folder / f"{n}.nii.gz").write_bytes(b"")
    cases, problems = find_cases(tmp_path)
    assert not cases and len(errors(problems)) == 2 * len(names)
    with pytest.raises(PrepareError): prepare(tmp_path, tmp_path / "s", CONFIG)
    assert "<img" not in problems_table(problems)
    assert not any(row[0][:1] in "=+-@" for row in csv.reader(open(write_problems(tmp_path / "p.csv", problems))))
    for n in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(CTDiffusionError): inside(tmp_path, n)
        with pytest.raises(CTDiffusionError): check_case_id(n, "f")


def test_pairs_and_duplicates(data):
    tr = data / "imagesTr"
    (data / "labelsTr/amos_0002.nii.gz").unlink()
    shutil.copy(tr / "amos_0001.nii.gz", data / "imagesVa/amos_0401.nii.gz")
    shutil.copy(data / "labelsTr/amos_0001.nii.gz", data / "labelsVa/amos_0401.nii.gz")
    (data / "labelsTr/amos_0099.nii.gz").write_bytes(b"x")
    with pytest.raises(PrepareError) as e: prepare(data, data / "s", CONFIG)
    found = {(p.case, p.found) for p in errors(e.value.problems)}
    assert ("amos_0002", "an image without label") in found and ("amos_0099", "a label without image") in found
    assert any(c == "amos_0401" and "same voxels as amos_0001" in f for c, f in found)
    assert "amos_0401" in str(e.value) and (data / "s_problems.csv").exists() and not (data / "s").exists()


def test_same_id_twice(data):
    shutil.copy(data / "imagesTr/amos_0001.nii.gz", data / "imagesVa")
    shutil.copy(data / "labelsTr/amos_0001.nii.gz", data / "labelsVa")
    assert "one id in two folders" in {p.found for p in errors(find_cases(data)[1])}


def test_mri_is_listed_and_left_out(data):
    cases, problems = find_cases(data)
    assert "amos_0507" not in {c.id for c in cases} and [(p.case, p.severity) for p in problems] == [("amos_0507", "note")]


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


def test_stale_stores_are_refused_and_rebuilt(data, tmp_path):
    s = prepare(data, tmp_path / "s", CONFIG)
    with pytest.raises(CTDiffusionError, match="level=40 .now 50.*rebuild=True"): prepare(data, tmp_path / "s", replace(CONFIG, level=50))
    for f in data.rglob("*.nii.gz"): os.utime(f)
    assert prepare(data, tmp_path / "s", CONFIG).hash == s.hash
    p = phantom(seed=99, size=48)
    save_patient(p, data / "imagesTr/amos_0002.nii.gz", data / "labelsTr/amos_0002.nii.gz")
    with pytest.raises(CTDiffusionError, match="amos_0002.*has changed.*rebuild=True"): prepare(data, tmp_path / "s", CONFIG)
    assert prepare(data, tmp_path / "s", CONFIG, rebuild=True).hash != s.hash
    with pytest.raises(CTDiffusionError, match="other cases: amos_0402"):
        for f in ("images", "labels"): (data / f"{f}Va/amos_0402.nii.gz").unlink()
        (data / "dataset.json").unlink()
        prepare(data, tmp_path / "s", CONFIG)


def test_damaged_stores_are_refused(original, tmp_path):
    s = prepare(original, tmp_path / "s", CONFIG)
    manifest = (s.path / "manifest.json").read_text()
    for text in ("", "{}", "[]", manifest[:-50], manifest.replace('"split": "val"', '"split": "train"', 1), manifest.replace('"version": 1', '"version": 0')):
        (s.path / "manifest.json").write_text(text)
        with pytest.raises(CTDiffusionError, match="rebuild=True"): open_store(s.path)
    (s.path / "manifest.json").write_text(manifest)
    (s.path / "labels.npy").unlink()
    with pytest.raises(CTDiffusionError, match="labels.npy of 0 bytes"): open_store(s.path)
    with pytest.raises(CTDiffusionError, match="Run prepare first"): open_store(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(CTDiffusionError, match="no store"): prepare(original, tmp_path / "mine", CONFIG, rebuild=True)
    assert (tmp_path / "mine/thesis.txt").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_preparation_is_never_picked_up(original, tmp_path):
    clean = prepare(original, tmp_path / "clean", CONFIG)
    start = time.perf_counter()
    prepare(original, tmp_path / "timed", CONFIG)
    full, rng = time.perf_counter() - start, np.random.default_rng(0)
    target = tmp_path / "k"
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            try: prepare(original, target, CONFIG)
            finally: os._exit(0)
        time.sleep(float(rng.random() * full))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if target.exists(): assert open_store(target).hash == clean.hash; shutil.rmtree(target)
    s = prepare(original, target, CONFIG)
    for f in ("images.npy", "labels.npy", "manifest.json"): assert (s.path / f).read_bytes() == (clean.path / f).read_bytes()
    assert not (tmp_path / ".k.tmp").exists()


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
    assert not (tmp_path / "s").exists() and not (tmp_path / ".s.tmp").exists()


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
