"Data sets of one and two patients, and run folders that cannot be evaluated."
import json
import shutil
from dataclasses import replace

import numpy as np
import papermill as pm
import pytest

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.store import PrepareConfig, prepare
from ctdiffusion.data.volumes import Source
from ctdiffusion.evaluation.distance import RandomConvolutions
from ctdiffusion.evaluation.evaluation import (
    EvaluateJob,
    judge_of,
    milestone_rows,
    open_job,
    reference_rows,
    show_rows,
)
from ctdiffusion.evaluation.measure import Patient, measure, patients
from ctdiffusion.evaluation.report import table
from ctdiffusion.evaluation.results import read_results
from test_evaluate_without_organs import job_in, make_patients, make_run, quiet

pytestmark = pytest.mark.filterwarnings("ignore:.*images are fewer than.*")


def one_patient(folder):
    "Images and labels of a single patient."
    save_patient(phantom(1, size=48), folder / "images" / "anna.nii.gz", folder / "labels" / "anna.nii.gz")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A run that was trained on its only patient."
    folder = tmp_path_factory.mktemp("alone")
    store = prepare(one_patient(folder / "data"), folder / "store", PrepareConfig(64))
    assert store.held_out_is_train
    make_run(store, folder / "run")
    return folder, store


@pytest.mark.fault("F57")
def test_a_single_patient_is_evaluated_and_every_row_says_what_it_is(alone):
    folder, store = alone
    job = job_in(folder)
    judge, features = judge_of(job, store, quiet), RandomConvolutions()
    files = reference_rows(job, store, judge, features, quiet)
    files += milestone_rows(job, store, judge, features, quiet)
    rows = {r["variant"]: r for r in map(read_results, files)}
    for row in rows.values():
        assert any("training patients" in note for note in row["notes"])
    last = rows["pix2pix"]
    assert list(last["cases"]) == ["anna"] and last["metrics"]["ssim"] > 0
    assert last["metrics"]["distance"] > 0 and last["intervals"].get("distance") is None
    floor = rows["floor"]
    assert floor["metrics"]["distance"] is None and floor["metrics"]["psnr"] is None
    assert any("other patients" in note for note in floor["notes"])
    assert show_rows(list(rows.values())).notna().all().all()
    assert "training patients" in table(2, files).caption


@pytest.mark.fault("F57")
def test_the_page_says_on_top_that_these_are_training_patients(root, alone, tmp_path):
    folder, _ = alone
    given = {k: v for k, v in vars(job_in(folder)).items() if v} | dict(threads=1)
    notebook = str(root / "nbs" / "evaluate.ipynb")
    page = tmp_path / "out.ipynb"
    pm.execute_notebook(notebook, str(page), parameters=given, progress_bar=False)
    cells = json.loads(page.read_text())["cells"]
    texts = ["".join("".join(o.get("text", "")) for o in c.get("outputs", [])) for c in cells]
    first = next(k for k, text in enumerate(texts) if "training patients" in text)
    assert not any("judge" in text for text in texts[:first])
    assert "the only patient" in page.read_text()


@pytest.mark.fault("F57")
def test_one_to_train_on_and_one_held_out(tmp_path):
    store = prepare(make_patients(tmp_path / "data", (True, True), (0, 1)), tmp_path / "store", PrepareConfig(64))
    make_run(store, tmp_path / "run")
    job = job_in(tmp_path)
    files = reference_rows(job, store, None, RandomConvolutions(), quiet)
    files += milestone_rows(job, store, None, RandomConvolutions(), quiet)
    rows = {r["variant"]: r for r in map(read_results, files)}
    assert rows["floor"]["metrics"]["distance"] > 0 and rows["floor"]["intervals"]["distance"] is None
    assert not any("training patients" in note for note in rows["pix2pix"]["notes"])
    assert [p.id for p in patients(store)] == ["amos_0002"]


@pytest.mark.fault("F57")
def test_more_held_out_than_training_patients_leaves_the_floor_empty(tmp_path):
    store = prepare(make_patients(tmp_path / "data", (True,) * 3, (0, 1, 1)), tmp_path / "store", PrepareConfig(64))
    job = job_in(tmp_path)
    files = reference_rows(job, store, None, RandomConvolutions(), quiet)
    floor = next(r for r in map(read_results, files) if r["variant"] == "floor")
    assert floor["metrics"]["distance"] is None and floor["notes"]


@pytest.mark.fault("F57")
def test_other_training_patients_are_the_floor_of_one_of_them(tmp_path):
    "Nobody held out, one of three patients evaluated: the two others are other patients."
    data = make_patients(tmp_path / "data", (True,) * 3, (0, 0, 0))
    everybody = tuple((f"amos_{n:04d}", "train") for n in (1, 2, 3))
    store = prepare(data, tmp_path / "store", PrepareConfig(64, split=everybody))
    assert store.held_out_is_train
    job = EvaluateJob("run", str(tmp_path / "data"), str(tmp_path / "store"), str(tmp_path / "shared"), patients=1)
    files = reference_rows(job, store, None, RandomConvolutions(), quiet)
    floor = next(r for r in map(read_results, files) if r["variant"] == "floor")
    assert floor["metrics"]["distance"] > 0 and floor["metrics"]["psnr"] is not None


@pytest.mark.fault("F57")
def test_a_single_slice_has_no_distance():
    masks = np.zeros((1, 32, 32), np.uint8)
    masks[:, 8:24, 8:24] = 6
    real = np.random.default_rng(0).integers(0, 255, masks.shape).astype(np.uint8)
    grid = Source("drawn", (32, 32, 1), np.eye(4), "0" * 64)
    row = measure([Patient("a", masks, real, grid)], [real // 2], features=RandomConvolutions())
    assert row["metrics"]["distance"] is None and row["metrics"]["kid"] is None
    assert row["metrics"]["psnr"] > 0
    assert any("one slice" in note for note in row["notes"])


# -- a store alone, and what cannot be evaluated ------------------------------------------------


def test_the_store_is_enough_where_its_data_are_gone(alone, tmp_path):
    folder, _ = alone
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "store", tmp_path / "a-store")
    job = EvaluateJob(str(tmp_path / "run"), "", str(tmp_path / "a-store"), device="cpu")
    run, store, steps = open_job(job, quiet)
    path, = milestone_rows(job, store, None, None, quiet)
    assert steps == [2] and read_results(path)["data"]["name"] == "a-store"


def test_what_prepare_was_told_is_taken_from_the_store(tmp_path):
    "A store of other parameters than the defaults is opened and evaluated; HU are those of its window."
    data = make_patients(tmp_path / "data", (True,) * 4, (0, 0, 1, 1))
    stores = []
    for width in (400, 800):
        config = PrepareConfig(64, 40, width, body_threshold=-350, held_out=1, exclude=("amos_0001",))
        stores.append(prepare(data, tmp_path / f"store{width}", config))
    make_run(stores[1], tmp_path / "run")
    job = replace(job_in(tmp_path), store=str(stores[1].path))
    _, store, _ = open_job(job, quiet)
    path, = milestone_rows(job, store, None, None, quiet)
    assert list(read_results(path)["cases"]) == ["amos_0003"]
    hu = []
    for store in stores:  # the same grey values are twice as many HU apart in a window twice as wide
        patient, = patients(store)
        level, width = store.config.level, store.config.width
        darker = np.where(patient.masks > 0, 100, 0).astype(np.uint8)
        grey = replace(patient, real=np.where(patient.masks > 0, 140, 0).astype(np.uint8))
        hu.append(measure([grey], [darker], table=store.table, width=width, level=level)["hu"]["liver"])
    assert hu[1] == pytest.approx(2 * hu[0]) and hu[0] == pytest.approx(-40 / 255 * 400)


@pytest.mark.fault("F62")
def test_a_run_folder_that_is_not_there_names_the_nearest(alone):
    folder, _ = alone
    with pytest.raises(CTDiffusionError) as e:
        open_job(EvaluateJob(str(folder / "rum")), quiet)
    assert "run" in str(e.value) and "nbs/train.ipynb" in str(e.value) and f"{folder / 'run'}" in str(e.value)


def test_a_folder_that_is_no_run(alone):
    folder, _ = alone
    with pytest.raises(CTDiffusionError, match="no run.json"):
        open_job(EvaluateJob(str(folder / "data")), quiet)


def test_a_run_that_has_not_saved_yet(alone, tmp_path):
    folder, _ = alone
    (tmp_path / "run").mkdir()
    shutil.copy(folder / "run" / "run.json", tmp_path / "run")
    with pytest.raises(CTDiffusionError, match="without a checkpoint"):
        open_job(EvaluateJob(str(tmp_path / "run"), store=str(folder / "store")), quiet)


def test_a_store_that_is_elsewhere(alone):
    folder, _ = alone
    shutil.rmtree(folder / "run" / "store", ignore_errors=True)
    with pytest.raises(CTDiffusionError, match="-p store"):
        open_job(EvaluateJob(str(folder / "run")), quiet)


def test_a_shared_folder_that_cannot_be_made_is_refused_before_the_work(alone, tmp_path):
    folder, store = alone
    (tmp_path / "file").write_text("no folder")
    job = EvaluateJob(str(folder / "run"), store=str(store.path), shared=str(tmp_path / "file" / "shared"))
    with pytest.raises(CTDiffusionError, match="-p shared"):
        open_job(job, quiet)


def test_a_model_of_another_size_is_refused_before_the_judge_is_trained(alone, tmp_path):
    folder, _ = alone
    prepare(folder / "data", tmp_path / "small", PrepareConfig(32))
    with pytest.raises(CTDiffusionError, match="pixels per side"):
        open_job(EvaluateJob(str(folder / "run"), store=str(tmp_path / "small")), quiet)


def test_a_store_that_the_run_was_not_trained_on_is_said(alone, tmp_path):
    folder, _ = alone
    other = prepare(make_patients(tmp_path / "data", (True, True), (0, 1)), tmp_path / "other", PrepareConfig(64))
    said = []
    open_job(EvaluateJob(str(folder / "run"), store=str(other.path), device="cpu"), said.append)
    assert any("another store" in line for line in said)


def test_totalsegmentator_without_its_package_says_which_parameter_helps(alone, monkeypatch):
    _, store = alone
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", "nowhere")
    with pytest.raises(CTDiffusionError) as e:
        judge_of(EvaluateJob(judge="totalsegmentator"), store, quiet)
    assert "judge_python" in str(e.value) or "no weights" in str(e.value)
