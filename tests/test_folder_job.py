"""A folder of label maps in which some are bad (fault F58): the good ones are made, one table names the rest, exit code 1."""
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctdiffusion import CTDiffusionError
from ctdiffusion.data.labels import AMOS
from ctdiffusion.synthesis.processes import SynthesisError, SynthesizeJob, as_words, find_volumes, synthesize_job

pytestmark = pytest.mark.fault("F58")
GOOD = ["a.nii.gz", "b b.nii", "C.NII.GZ", "d (2) ü.nii.gz", "l" * 150 + ".nii.gz"]
BAD = ["half.nii.gz", "17.nii.gz", "$(touch P).nii.gz", "e.nrrd", "b b.nii.gz"]
NOTED = ["read me.txt", "series"]


def label_map(path: Path, top: int = AMOS.body) -> Path:
    ids = np.full((16, 16, 2), top, np.uint8)
    ids[4:8, 4:8] = 6
    nib.save(nib.Nifti1Image(ids, np.diag([-5.0, -5.0, 5.0, 1.0])), path.with_name("saved.nii.gz" if path.name.lower().endswith("gz") else "saved.nii"))
    return path.with_name("saved.nii.gz" if path.name.lower().endswith("gz") else "saved.nii").rename(path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    "Good maps, bad ones, and what is no map."
    monkeypatch.chdir(tmp_path)
    labels = tmp_path / "label maps"
    labels.mkdir()
    for name in GOOD: label_map(labels / name)
    (labels / "half.nii.gz").write_bytes((labels / "a.nii.gz").read_bytes()[:60])
    label_map(labels / "17.nii.gz", 17)
    label_map(labels / "$(touch P).nii.gz")
    label_map(labels / "b b.nii.gz")
    for name in ("e.nrrd", "read me.txt", ".hidden"): (labels / name).write_bytes(b"x")
    (labels / "series").mkdir()
    yield labels
    assert not list(tmp_path.rglob("P")) and not [p for p in tmp_path.rglob(".problems.*")]


@pytest.fixture
def job(folder) -> SynthesizeJob:
    return SynthesizeJob(labels=str(folder), out=str(folder.parent / "ct s"), model="pix2pix-demo", device="cpu", threads=1)


def made(job: SynthesizeJob) -> list[str]:
    return sorted(f.name for f in Path(job.out).iterdir() if f.name.lower().endswith((".nii", ".nii.gz")))


def rows(table: str) -> dict[str, str]:
    "File name -> severity, of a markdown table."
    cells = [[c.strip() for c in line.strip().strip("|").split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    return {Path(c[1]).name: c[-1] for c in cells if c[0] not in ("case", "---")}


def the_others(job: SynthesizeJob) -> None:
    "Only good maps, and a text."
    for name in BAD: (Path(job.labels) / name).unlink()
    (Path(job.labels) / "series").rmdir()


def test_the_good_ones_are_made_and_one_table_names_the_rest(job):
    told = []
    with pytest.raises(SynthesisError, match="5 files that no CT could be made of") as error: synthesize_job(job, told.append)
    tables = [line for line in told if line.startswith("| case")]
    assert len(tables) == 1 and made(job) == sorted(GOOD)
    found = {Path(p.path).name: p.severity for p in error.value.problems}
    assert found == dict.fromkeys(BAD, "error") | dict.fromkeys(NOTED, "note") and set(rows(tables[0]).values()) == {"error", "note"}
    assert all(p.found and p.path for p in error.value.problems) and all(p.do for p in error.value.problems)


def test_all_are_checked_before_the_first_is_made(job, monkeypatch):
    from ctdiffusion.synthesis import processes
    order, check, make = [], processes.planned_volume, processes.synthesize
    monkeypatch.setattr(processes, "planned_volume", lambda *a, **k: order.append("check") or check(*a, **k))
    monkeypatch.setattr(processes, "synthesize", lambda *a, **k: order.append("make") or make(*a, **k))
    with pytest.raises(SynthesisError): synthesize_job(job, lambda line: None)
    assert order == ["check"] * 8 + ["make"] * 5


def test_a_second_call_makes_nothing_twice(job):
    for _ in range(2):
        with pytest.raises(SynthesisError): synthesize_job(job, lambda line: None)
        stamps = {name: (Path(job.out) / name).stat().st_mtime_ns for name in made(job)}
    with pytest.raises(SynthesisError): synthesize_job(job, lambda line: None)
    assert stamps == {name: (Path(job.out) / name).stat().st_mtime_ns for name in made(job)}


def test_without_bad_ones_there_is_no_error(job):
    the_others(job)
    told = []
    assert [f.name for f in synthesize_job(job, told.append)] == sorted(GOOD)
    assert rows(told[-1]) == {"read me.txt": "note"}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how", ["alone", "processes", "torchrun"])
def test_from_the_command_line(job, how):
    "Exit code 1, one table, the good ones made; also in two processes, of which each has good and bad ones."
    words = ["ctdiffusion.synthesis.processes", "synthesize", *as_words(job), *["-p", "processes", "2"] * (how == "processes")]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"] if how == "torchrun" else []
    done = run(*launch, *words)
    assert done.returncode == 1, done.stderr[-2000:]
    assert made(job) == sorted(GOOD)
    assert (done.stdout + done.stderr).count("| case | path |") == 1
    table = "\n".join(line for line in done.stdout.splitlines() if line.startswith("| "))
    assert sorted(rows(table).values()) == ["error"] * 5 + ["note"] * 2
    assert "5 files that no CT could be made of" in done.stderr
    if how == "alone": assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["out", "images", "link"])
def test_a_folder_is_not_both_input_and_output(job, what):
    before = {f.name: f.stat().st_mtime_ns for f in Path(job.labels).iterdir()}
    if what == "link": Path(job.out).symlink_to(job.labels)
    clash = dict(out=replace(job, out=str(Path(job.labels) / ".." / Path(job.labels).name)), images=replace(job, images=job.out), link=job)[what]
    if what == "images": Path(job.out).mkdir()
    with pytest.raises(CTDiffusionError, match="the place of an input"): synthesize_job(clash)
    assert {f.name: f.stat().st_mtime_ns for f in Path(job.labels).iterdir()} == before


def test_a_foreign_volume_in_the_results_is_kept(job):
    the_others(job)
    Path(job.out).mkdir()
    foreign = Path(job.out) / "a.nii.gz"
    foreign.write_bytes(b"measured")
    with pytest.raises(SynthesisError, match="a file that we have not made") as error: synthesize_job(job, lambda line: None)
    assert foreign.read_bytes() == b"measured" and made(job) == sorted(GOOD) and [p.case for p in error.value.problems if p.severity == "error"] == ["a.nii.gz"]
    synthesize_job(replace(job, overwrite=True), lambda line: None)
    assert foreign.read_bytes() != b"measured"


def test_images_are_found_by_name(job):
    "The same name, nnU-Net's _0000, another compression or other capitals; a missing one is a problem of its map alone."
    the_others(job)
    images = Path(job.labels).with_name("images")
    images.mkdir()
    names = ["a.nii.gz", "b b_0000.nii.gz", "C.nii"]
    for path in Path(job.labels).glob("*.[nN]*"):
        image = nib.load(path)
        ids = np.asanyarray(image.dataobj)
        nib.save(nib.Nifti1Image(np.where(ids == 6, ids, 0).astype(np.uint8), image.affine), path.with_name("x.nii.gz" if path.name.lower().endswith("gz") else "x.nii"))
        path.with_name("x.nii.gz" if path.name.lower().endswith("gz") else "x.nii").rename(path)
    for name in names:
        hu = np.full((16, 16, 2), -1000, np.int16)
        hu[2:14, 2:14] = 40
        nib.save(nib.Nifti1Image(hu, np.diag([-5.0, -5.0, 5.0, 1.0])), images / name)
    volumes, _ = find_volumes(job.labels, job.out, images)
    assert [v["image"].name for v in volumes if v["labels"].name[0] in "abC"] == [names[2], names[0], names[1]]
    with pytest.raises(SynthesisError) as error: synthesize_job(replace(job, images=str(images)), lambda line: None)
    assert made(job) == ["C.NII.GZ", "a.nii.gz", "b b.nii"] and sum(p.severity == "error" for p in error.value.problems) == 2


def test_nothing_to_do_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    for labels, out in (("", ""), (str(tmp_path / "empty"), "ct"), (str(tmp_path / "nowhere"), "ct")):
        with pytest.raises(CTDiffusionError, match="Pass -p labels FOLDER -p out FOLDER|no label volumes"): SynthesizeJob(labels=labels, out=out).volumes()
    with pytest.raises(CTDiffusionError, match="no such sampler"): SynthesizeJob(sampler="dimd50")
    shutil.rmtree(tmp_path / "empty")
