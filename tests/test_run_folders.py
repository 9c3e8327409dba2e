"""Where results lie that were given no folder, and that a remedy that is named can be passed."""
import csv
import inspect
import re
import shutil
from dataclasses import fields
from pathlib import Path

import papermill
import pytest

from ctdiffusion.apps.jobs import ReproduceJob
from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.store import PrepareError, prepare
from ctdiffusion.models.variants import preset
from ctdiffusion.synthesis.processes import prepared
from ctdiffusion.training.parameters import PrepareJob, TrainJob, data_name, project_root, runs_folder

PRESET = preset("mask", "demo")


@pytest.fixture
def project(tmp_path):
    "The root of a project, with its folder of notebooks."
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs").mkdir()
    return tmp_path


@pytest.mark.fault("F64")
def test_defaults_lie_in_the_project_wherever_the_kernel_works(project, monkeypatch):
    "A command is typed in the root; JupyterLab works in nbs."
    jobs = [TrainJob(), PrepareJob(), ReproduceJob(), TrainJob(data_root="mydata")]
    for here in (project, project / "nbs"):
        monkeypatch.chdir(here)
        folders = [job.folder if isinstance(job, ReproduceJob) else job.folder() for job in jobs]
        names = ["mask-demo-s0", "prepare", "reproduce-demo-quick", "mydata-mask-demo-s0"]
        assert [folder.resolve() for folder in folders] == [project / "runs" / name for name in names]
        assert not Path(folders[0]).is_absolute(), "short where it is printed"
    assert runs_folder() == Path("../runs") and project_root() == project


@pytest.mark.fault("F64")
def test_without_a_project_they_lie_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs_folder() == Path("runs") and project_root() == tmp_path


@pytest.mark.fault("F64")
def test_a_folder_that_was_given_begins_where_it_was_typed(project, monkeypatch):
    monkeypatch.chdir(project / "nbs")
    assert TrainJob(run_dir="mine").folder() == Path("mine")
    assert TrainJob(run_dir="mine").store_folder() == Path("mine/store")
    assert TrainJob(store="slices").store_folder() == Path("slices")


@pytest.mark.fault("F64")
@pytest.mark.parametrize("given, name", [
    (dict(), "mask-demo-s0"), (dict(variant="edge", preset="small", seed=3), "edge-small-s3"),
    (dict(data_root="/data/mydata"), "mydata-mask-demo-s0"), (dict(data_root="my data/"), "my-data-mask-demo-s0"),
    (dict(data_root="/data/amos22", store="/data/amos22-256"), "amos22-256-mask-demo-s0"),
    (dict(store="runs/mine/store"), "mine-mask-demo-s0"), (dict(patients=2), "2-drawn-mask-demo-s0"),
    (dict(data_root="\N{GREEK SMALL LETTER PI}"), "data-mask-demo-s0"), (dict(data_root="/"), "data-mask-demo-s0"),
])
def test_the_default_names_data_and_variant(given, name):
    assert TrainJob(**given).folder().name == name
    assert re.fullmatch(r"[A-Za-z0-9._-]*", data_name(given.get("data_root", ""), given.get("store", "")))


# ------------------------------------------------------------------------------------------------------- remedies exist

@pytest.mark.fault("F64")
def test_rebuild_is_a_parameter_wherever_it_is_named(project, monkeypatch):
    monkeypatch.chdir(project)
    make_dataset(project / "mydata", 2, 1, size=48)
    prepared(TrainJob(data_root="mydata"), PRESET, None)
    shutil.rmtree(project / "mydata" / "imagesVa")
    shutil.rmtree(project / "mydata" / "labelsVa")
    (project / "mydata" / "dataset.json").unlink()
    with pytest.raises(CTDiffusionError, match="-p rebuild True"):
        prepared(TrainJob(data_root="mydata"), PRESET, None)
    store = prepared(TrainJob(data_root="mydata", rebuild=True), PRESET, None)
    assert store.splits == {"train": ["amos_0001"], "val": ["amos_0002"]}


@pytest.mark.fault("F64")
def test_a_damaged_store_is_rebuilt_by_the_job_that_names_the_remedy(project, monkeypatch):
    monkeypatch.chdir(project)
    make_dataset(project / "mydata", 1, 1, size=48)
    whole = prepared(TrainJob(data_root="mydata"), PRESET, None)
    for damage in (b"{", b"{}"):
        (whole.path / "manifest.json").write_bytes(damage)
        with pytest.raises(CTDiffusionError, match="-p rebuild True"):
            prepared(TrainJob(data_root="mydata"), PRESET, None)
        assert prepared(TrainJob(data_root="mydata", rebuild=True), PRESET, None).hash == whole.hash


# ---------------------------------------------------------------------------------------------------------- problems.csv

def rows(file):
    with file.open(newline="") as text:
        return [(r["case"], r["severity"]) for r in csv.DictReader(text)]


@pytest.mark.fault("F64")
def test_the_table_of_problems_has_one_name(project):
    "Beside the store where there is none, in it where there is one; a file of the user's that is called so stays."
    folder = make_dataset(project / "data", 1, 1, size=48)
    label = folder / "labelsTr" / "amos_0001.nii.gz"
    whole = label.read_bytes()
    label.write_bytes(whole[:-500])
    with pytest.raises(PrepareError, match=re.escape(str(project / "problems.csv"))):
        prepare(folder, project / "slices", PrepareConfig(32))
    assert ("amos_0001", "error") in rows(project / "problems.csv")
    label.write_bytes(whole)
    prepare(folder, project / "slices", PrepareConfig(32))
    assert not (project / "problems.csv").exists() and ("amos_0507", "note") in rows(project / "slices" / "problems.csv")
    (project / "problems.csv").write_text("mine\n")
    label.write_bytes(whole[:-500])
    with pytest.raises(PrepareError):
        prepare(folder, project / "other", PrepareConfig(32))
    assert (project / "problems.csv").read_text() == "mine\n" and rows(project / "other-problems.csv")


@pytest.mark.fault("F64")
@pytest.mark.parametrize("good", [True, False])
def test_the_job_writes_it_into_its_folder(root, tmp_path, good):
    folder = make_dataset(tmp_path / "data", 1, 1, size=48)
    label = folder / "labelsTr" / "amos_0001.nii.gz"
    if not good:
        label.write_bytes(label.read_bytes()[:-500])
    given = dict(data_root=str(folder), run_dir=str(tmp_path / "run"), size=32)
    arguments = (str(root / "nbs" / "prepare.ipynb"), str(tmp_path / "out.ipynb"), given)
    if good:
        papermill.execute_notebook(*arguments, progress_bar=False)
    else:
        with pytest.raises(papermill.PapermillExecutionError, match="in 1 case"):
            papermill.execute_notebook(*arguments, progress_bar=False)
    found = rows(tmp_path / "run" / "problems.csv")
    assert ("amos_0507", "note") in found and (("amos_0001", "error") in found) == (not good)


@pytest.mark.fault("F64")
def test_every_parameter_that_a_preparation_names_exists_in_both_jobs():
    "The fields of PrepareConfig that a message may name as a remedy."
    remedies = {"exclude", "allow_mirrored", "assume", "max_voxels"}
    assert remedies <= {f.name for f in fields(PrepareConfig)}
    for job in (PrepareJob, TrainJob):
        assert remedies | {"rebuild", "split_file", "class_table"} <= {f.name for f in fields(job)}
    assert {"rebuild", "split_file"} <= set(inspect.signature(prepare).parameters)
