"""What prepare was told is known to train: a store is taken as it was made, and its parameters have the same names."""
import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import papermill
import pytest

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.phantom import make_dataset, phantom, save_patient
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.store import PrepareError, Store, prepare
from ctdiffusion.models.variants import preset
from ctdiffusion.synthesis.processes import beginning, confirm_price, prepared, training_price, volumes_folder, whole_patient
from ctdiffusion.training.parameters import PrepareJob, TrainJob, parameters_cell, told

PRESET = preset("mask", "demo")


def silent(line):
    pass


def write(folder, name, patient, labels=None, orientation="RAS"):
    "One patient of a folder images/labels."
    labels = patient.labels if labels is None else labels
    patient = replace(patient, labels=labels)
    save_patient(patient, folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz", orientation)


@pytest.fixture(scope="module")
def patients():
    return [phantom(seed, size=48) for seed in range(4)]


@pytest.fixture
def mine(tmp_path, patients):
    "Four patients: p2 is mirrored, p3 is no CT, and p4, who is held out, has no organs."
    folder = tmp_path / "mine"
    write(folder, "p1", patients[0])
    mirrored = replace(patients[1], hu=patients[1].hu[::-1].copy())
    write(folder, "p2", mirrored, patients[1].labels[::-1].copy())
    write(folder, "p3", patients[2])
    (folder / "images" / "p3.nii.gz").write_bytes(b"<html>log in</html>")
    write(folder, "p4", patients[3], np.zeros_like(patients[3].labels))
    return folder


REMEDIES = dict(exclude="p3", allow_mirrored="p2")


@pytest.mark.fault("F55")
def test_the_remedies_of_the_messages_are_parameters_of_the_job(mine, tmp_path):
    "The same folder: refused, then prepared by the job itself with what the messages say."
    job = TrainJob(data_root=str(mine), run_dir=str(tmp_path / "run"))
    with pytest.raises(PrepareError) as error:
        prepared(job, PRESET, silent)
    said = str(error.value)
    assert "exclude" in said and "allow_mirrored" in said
    store = prepared(replace(job, **REMEDIES), PRESET, silent)
    assert store.splits == {"train": ["p1", "p2"], "val": ["p4"]}


@pytest.mark.fault("F55")
def test_a_store_is_taken_as_it_was_made(mine, tmp_path):
    config = PrepareConfig(64, exclude=("p3",), allow_mirrored=("p2",), every=3, held_out=1)
    made = prepare(mine, tmp_path / "slices", config)
    for given in (dict(), dict(data_root=str(mine)), dict(data_root=str(mine), exclude="p3")):
        job = TrainJob(store=str(tmp_path / "slices"), run_dir=str(tmp_path / "run"), **given)
        assert prepared(job, PRESET, silent).hash == made.hash
        assert volumes_folder(job, made) == mine


@pytest.mark.fault("F55")
def test_a_store_made_with_a_split_file_is_taken_too(mine, tmp_path):
    (tmp_path / "mine.csv").write_text("id,split\np1,val\np2,train\n")
    config = PrepareConfig(64, 40.0, 400.0, allow_mirrored=("p2",))
    made = prepare(mine, tmp_path / "slices", config, split_file=tmp_path / "mine.csv")
    job = TrainJob(store=str(tmp_path / "slices"), data_root=str(mine))
    assert prepared(job, PRESET, silent).splits == made.splits == {"train": ["p2"], "val": ["p1"]}
    by_job = TrainJob(data_root=str(mine), run_dir=str(tmp_path / "run"), allow_mirrored="p2", split_file=str(tmp_path / "mine.csv"))
    assert prepared(by_job, PRESET, silent).hash == made.hash


@pytest.mark.fault("F55")
def test_what_does_not_fit_is_named(mine, tmp_path):
    prepare(mine, tmp_path / "slices", PrepareConfig(32, exclude=("p3",), allow_mirrored=("p2",)))
    job = TrainJob(store=str(tmp_path / "slices"), run_dir=str(tmp_path / "run"))
    with pytest.raises(CTDiffusionError, match=r"size=32 \(now 64\).*-p rebuild True"):
        prepared(job, PRESET, silent)
    small = replace(PRESET, model=replace(PRESET.model, size=32))
    assert prepared(job, small, silent)
    with pytest.raises(CTDiffusionError, match=r"exclude=\('p3',\) \(now \('p1',\)\)"):
        prepared(replace(job, exclude="p1"), small, silent)
    again = replace(job, rebuild=True, exclude="p3,p2")
    assert prepared(again, PRESET, silent).splits["train"] == ["p1"], "the volumes are found through the store"


@pytest.mark.fault("F55")
def test_a_store_without_its_volumes_can_be_trained_on(mine, tmp_path):
    made = prepare(mine, tmp_path / "slices", PrepareConfig(64, exclude=("p3",), allow_mirrored=("p2",)))
    mine.rename(tmp_path / "elsewhere")
    job = TrainJob(store=str(tmp_path / "slices"), run_dir=str(tmp_path / "run"))
    lines = []
    assert prepared(job, PRESET, lines.append).hash == made.hash
    assert "not where they were" in lines[0] and str(mine) in lines[0]
    assert whole_patient(made, made.cases[0], volumes_folder(job, made)) is None
    with pytest.raises(CTDiffusionError, match="Pass data_root"):
        prepared(replace(job, rebuild=True), PRESET, silent)
    assert Store(tmp_path / "slices").hash == made.hash
    found = replace(job, data_root=str(tmp_path / "elsewhere"))
    assert whole_patient(made, made.cases[0], volumes_folder(found, made))[0].data.shape == tuple(made.cases[0]["shape"])


@pytest.mark.fault("F55")
def test_an_assumed_orientation_reaches_the_volume_at_the_end(patients, tmp_path):
    "Files without orientation: read with `assume` when they are prepared, and again when a volume is made."
    for name, patient in zip(("a", "b"), patients):
        write(tmp_path / "mine", name, patient)
        for file in (tmp_path / "mine").glob(f"*/{name}.nii.gz"):
            image = nib.load(file)
            image.set_qform(None, 0)
            image.set_sform(None, 0)
            nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, image.header), file)
    job = TrainJob(data_root=str(tmp_path / "mine"), run_dir=str(tmp_path / "run"))
    with pytest.raises(PrepareError, match="assume"):
        prepared(job, PRESET, silent)
    store = prepared(replace(job, assume="RAS"), PRESET, silent)
    image, label = whole_patient(store, store.cases[0], volumes_folder(job, store))
    assert np.array_equal(image.data, patients[0].hu) and (label.data == 16).any()


@pytest.mark.fault("F55")
def test_patients_of_a_store_are_no_phantoms(mine, tmp_path):
    "On one's own patients the demo trains longer, whichever parameter names them."
    prepare(mine, tmp_path / "slices", PrepareConfig(64, exclude=("p3",), allow_mirrored=("p2",)))
    drawn = prepare(make_dataset(tmp_path / "drawn", 1, 1, size=48), tmp_path / "phantoms", PrepareConfig(64))
    steps = {name: beginning(TrainJob(store=str(tmp_path / name)))[1].train.max_steps for name in ("slices", "phantoms", "none")}
    usual = PRESET.train.max_steps
    assert steps == {"slices": 3 * usual, "phantoms": usual, "none": usual} and drawn.drawn


@pytest.mark.fault("F55")
def test_both_jobs_say_the_same_with_the_same_names(root):
    declared = parameters_cell(root / "nbs" / "prepare.ipynb")
    assert declared == {name: (type(value).__name__, value) for name, value in vars(PrepareJob()).items()}
    given = dict(exclude="a, b", allow_mirrored="c", assume="LPS", max_voxels=1000)
    said = told(PrepareJob(**given))
    assert told(TrainJob(**given)).items() <= said.items() and said["exclude"] == ("a", "b")
    assert told(TrainJob()) == {} and PrepareConfig(**told(PrepareJob(held_out=0, level=0.0))) == PrepareConfig(64, level=0.0, held_out=None)


# ------------------------------------------------------------------------------------------------- the job, through papermill

def train(root, folder, **parameters):
    small = dict(max_steps=2, sampler="ddim5", threads=1, run_dir=str(folder / "run"))
    folder.mkdir(exist_ok=True)
    papermill.execute_notebook(str(root / "nbs" / "train.ipynb"), str(folder / "out.ipynb"), parameters=small | parameters, progress_bar=False, cwd=str(folder))
    return folder / "run", (folder / "out.ipynb").read_text()


@pytest.mark.fault("F57")
def test_a_held_out_patient_without_organs_is_trained_to_the_end(root, mine, tmp_path):
    "From a store alone, whose held-out patient has no organs: pictures, numbers and a volume, and no median."
    prepare(mine, tmp_path / "slices", PrepareConfig(64, exclude=("p3",), allow_mirrored=("p2",)))
    run, page = train(root, tmp_path / "job", store=str(tmp_path / "slices"))
    assert "No organ in the held-out slices" in page
    assert nib.load(run / "p4_synthetic.nii.gz").shape == nib.load(mine / "images" / "p4.nii.gz").shape
    results = json.loads((run / "results.json").read_text())
    assert set(results["medians"]["real"]) == {"background", "body"}
    assert (run / "figures" / "volume_real.png").exists()


@pytest.mark.fault("F55")
def test_a_training_without_the_volumes_says_so_and_ends_well(root, mine, tmp_path):
    prepare(mine, tmp_path / "slices", PrepareConfig(64, exclude=("p3", "p4"), allow_mirrored=("p2",)))
    shutil.rmtree(mine)
    run, page = train(root, tmp_path / "job", store=str(tmp_path / "slices"))
    assert (run / "DONE").exists() and (run / "results.json").exists() and not list(run.glob("*.nii.gz"))
    assert "No volume: the files of p1 are not where the store was made from. Pass data_root" in page


# ------------------------------------------------------------------------------------------------------------ days of work

@pytest.mark.fault("F61")
def test_days_on_a_cpu_are_told_and_have_to_be_confirmed():
    job = TrainJob(preset="paper", device="cpu", threads=1)
    _, p = beginning(job)
    lines = []
    with pytest.raises(CTDiffusionError, match=r"150,000 steps of 16 slices, about 1\d,\d\d\d\.\d hours on 1 CPU core, and \d\d\.\d GB of memory.*confirm=True"):
        confirm_price(job, p, lines.append)
    assert "hours" in lines[0] and "GB of memory" in lines[0], "said before it is refused"
    confirm_price(replace(job, confirm=True), p, silent)
    confirm_price(TrainJob(device="cpu"), beginning(TrainJob(device="cpu"))[1], silent)
    limited = replace(job, max_hours=2.0)
    confirm_price(limited, beginning(limited)[1], silent)


@pytest.mark.fault("F61")
def test_the_job_stops_before_anything_is_done(root, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="confirm=True"):
        train(root, tmp_path / "job", preset="paper", device="cpu", max_steps=0)
    assert not (tmp_path / "job" / "run").exists()


@pytest.mark.fault("F61")
@pytest.mark.parametrize("name, variants", [("small", ("conditional", "mask", "edge")), ("paper", ("mask", "pix2pix"))])
def test_the_hours_are_those_that_were_measured(root, name, variants):
    "Within a factor of two."
    measured = json.loads((root / "nbs" / "results" / f"steps-{name}-cpu.json").read_text())["rows"]
    ratios = {}
    for row in measured:
        if row["variant"] not in variants:
            continue
        job = TrainJob(row["variant"], name, device="cpu", threads=1)
        _, p = beginning(job)
        seconds = row["seconds"] / row["batch"] * p.train.batch * p.train.max_steps
        ratios[row["variant"]] = training_price(job, p)["hours"] / (seconds / 3600)
    assert len(ratios) == len(variants) and all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
