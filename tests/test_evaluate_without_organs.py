"Held-out patients without organs: an evaluation runs to its end, and what cannot be computed is left empty and said."
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import papermill as pm
import pytest

from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.store import PrepareConfig, prepare
from ctdiffusion.data.volumes import Source
from ctdiffusion.evaluation.distance import RandomConvolutions
from ctdiffusion.evaluation.evaluation import (
    EvaluateJob,
    air_lines,
    judge_of,
    milestone_rows,
    patient_pictures,
    plot_organs,
    reference_rows,
    show_rows,
    worst_and_best,
)
from ctdiffusion.evaluation.measure import Patient, measure, patients
from ctdiffusion.evaluation.report import DASH, table
from ctdiffusion.evaluation.results import read_results
from ctdiffusion.evaluation.segmenter import ceiling, ceiling_table
from ctdiffusion.models.variants import preset
from ctdiffusion.synthesis.synthesis import exported
from ctdiffusion.training.trainer import train

pytestmark = [
    pytest.mark.fault("F57"),
    pytest.mark.filterwarnings("ignore:.*images are fewer than.*"),
]


def quiet(line):
    "Says nothing."


def make_patients(folder, with_organs, held_out):
    "Drawn patients in the layout of AMOS22; `with_organs` and `held_out` say of each whether."
    for number, (organs, out) in enumerate(zip(with_organs, held_out), 1):
        p = phantom(number, size=48)
        if not organs:
            p = replace(p, labels=np.zeros_like(p.labels))
        side = "Va" if out else "Tr"
        name = f"amos_{number:04d}.nii.gz"
        save_patient(p, folder / f"images{side}" / name, folder / f"labels{side}" / name)
    return folder


def make_run(store, folder, steps=2):
    "A run of Pix2Pix: two more steps on its embedded weights."
    p = preset("pix2pix", "demo")
    config = replace(p.train, max_steps=steps, batch=2, milestones=(), log_every=1)
    start = exported("pix2pix-demo")[1]
    train(p.model, config, store, folder, init=start, device="cpu", say=None)
    return folder


def job_in(folder):
    "A quick evaluation of the run in a folder."
    return EvaluateJob(
        str(folder / "run"),
        str(folder / "data"),
        str(folder / "store"),
        str(folder / "shared"),
        judge_steps=3,
        device="cpu",
    )


CASES = {
    "one held-out patient of two": ((True, True, True, False), (0, 0, 1, 1)),
    "all held-out patients": ((True, True, False, False), (0, 0, 1, 1)),
    "one training patient": ((True, False, True, True), (0, 0, 1, 1)),
    "everybody": ((False, False, False, False), (0, 0, 1, 1)),
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    "(folder, store, which patients have organs) of one of CASES."
    organs, out = CASES[request.param]
    folder = tmp_path_factory.mktemp("organs")
    store = prepare(make_patients(folder / "data", organs, out), folder / "store", PrepareConfig(64))
    make_run(store, folder / "run")
    return folder, store, dict(zip((f"amos_{n:04d}" for n in range(1, 5)), organs))


def test_every_row_is_made_and_its_empty_places_are_said(made):
    folder, store, organs = made
    job = job_in(folder)
    judge, features = judge_of(job, store, quiet), RandomConvolutions()
    files = reference_rows(job, store, judge, features, quiet)
    files += milestone_rows(job, store, judge, features, quiet)
    rows = [read_results(f) for f in files]
    last = rows[-1]
    for id in store.splits["val"]:
        assert any(d is not None for d in last["cases"][id]["dice"].values()) == organs[id]
        assert last["cases"][id]["ssim"] is not None
    without = [id for id in store.splits["val"] if not organs[id]]
    assert any("without organs" in note for note in last["notes"]) == bool(without)
    for id in without:
        assert any(id in note for note in last["notes"])
    if len(without) == 2:
        assert last["metrics"]["dice_mean"] is None and set(last["metrics"]["dice"].values()) == {None}
        assert last["intervals"]["liver"] is None and "liver" not in last["hu"]
        assert (show_rows(rows).loc["Mean"] == DASH).all()
    text = table(2, files)
    assert ("150k", "Pix2Pix", "ours, step 2") in text.cells.index


def test_every_picture_of_the_page_is_drawn(made):
    folder, store, organs = made
    job = job_in(folder)
    judge = judge_of(job, store, quiet)
    files = reference_rows(job, store, judge, None, quiet)
    files += milestone_rows(job, store, judge, None, quiet)
    rows = [read_results(f) for f in files]
    boxes = [r for r in rows if r["variant"] in ("ceiling", "pix2pix")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_organs(boxes)
    some = any(organs[id] for id in store.splits["val"])
    assert bool(figure.axes[0].texts) != some  # it says that there is nothing to show
    for id in {*worst_and_best(rows[-1])}:
        pictures = patient_pictures(job, store, rows[-1], judge, id)
        assert [len(column) for column in pictures.values()] == [4] * 4
    assert "nan" not in ceiling_table(ceiling(judge, store), store)


def test_who_has_no_organs_is_neither_the_worst_nor_the_best_of_those_who_have():
    def case(dice, ssim=0.5):
        return dict(dice=dice, ssim=ssim)

    cases = dict(a=case(dict(liver=90.0)), b=case(dict(liver=20.0)), c=case(dict(liver=None), 0.9))
    assert worst_and_best(dict(cases=cases)) == ("b", "a")


def test_slices_without_any_air():
    "The whole field is patient: no noise of air, and a sentence in its place."
    masks = np.full((3, 32, 32), 16, np.uint8)
    real = np.random.default_rng(0).integers(0, 255, masks.shape).astype(np.uint8)
    grid = Source("drawn", (32, 32, 3), np.eye(4), "0" * 64)
    row = measure([Patient("a", masks, real, grid)], [real // 2])
    assert "air" not in row["metrics"]
    said = air_lines([dict(row, step=2)])
    assert len(said) == 1 and "no air" in said[0]


def test_an_organ_that_no_training_patient_has_is_named_where_it_is_painted(tmp_path):
    folder = make_patients(tmp_path / "data", (False, False, True), (0, 0, 1))
    store = prepare(folder, tmp_path / "store", PrepareConfig(64))
    job = EvaluateJob("run", str(folder), str(tmp_path / "store"), str(tmp_path / "shared"))
    files = reference_rows(job, store, None, None, quiet)
    paint = next(r for r in map(read_results, files) if r["variant"] == "paint")
    assert any("liver" in note and "training" in note for note in paint["notes"])


def test_the_job_through_papermill(root, tmp_path):
    "Two training patients, one held out, and no organs anywhere: the page runs to its last cell."
    folder = make_patients(tmp_path / "data", (True, True, False), (0, 0, 1))
    store = prepare(folder, tmp_path / "store", PrepareConfig(64))
    make_run(store, tmp_path / "run")
    job = job_in(tmp_path)
    given = {k: v for k, v in vars(job).items() if v} | dict(threads=1)
    page = tmp_path / "out.ipynb"
    notebook = str(root / "nbs" / "evaluate.ipynb")
    pm.execute_notebook(notebook, str(page), parameters=given, progress_bar=False)
    row = read_results(tmp_path / "run" / "evaluation" / "step_00000002" / "results.json")
    assert row["cases"][patients(store)[0].id]["dice_mean"] is None
    text = Path(page).read_text()
    assert "without organs" in text and "step 2 of 2 (stands for 150k)" in text
