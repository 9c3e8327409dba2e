"""From a run to sealed rows: measured by hand, killed and continued, dealt out to processes, and refused."""
import os, shutil, subprocess, sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import papermill as pm
import pytest

from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.store import PrepareConfig, prepare
from ctdiffusion.data.volumes import Source
from ctdiffusion.evaluation.distance import RandomConvolutions, jackknife
from ctdiffusion.evaluation.evaluation import EvaluateJob, features_of, judge_of, main, milestone_rows, reference_rows, share, worst_and_best
from ctdiffusion.evaluation.judge import write_masks
from ctdiffusion.evaluation.measure import Patient, check_model, evaluate, judge_patient, kept_steps, measure, patients, synthesize_patient, training_hours
from ctdiffusion.evaluation.references import REFERENCES, floor, organ_means, painted, twin
from ctdiffusion.evaluation.results import read_results
from ctdiffusion.models.variants import preset
from ctdiffusion.synthesis.synthesis import exported, load
from ctdiffusion.training.parameters import parameters_cell, scaled
from ctdiffusion.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore:.*images are fewer than.*")


class Knows:
    "A judge that has read the masks: what it is shown does not matter."
    name, protocol = "knows", "reads the masks"
    def __init__(self, cases, wrong=0): self.masks, self.wrong = {p.id: p for p in cases}, wrong
    def __call__(self, image, out):
        p = self.masks[image.name.split(".")[0]]
        ids = np.where(p.masks == self.wrong, 0, p.masks) if self.wrong else p.masks
        write_masks(out, ids, p.grid)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "data", 4, 3)
    return folder, prepare(folder / "data", folder / "store", PrepareConfig(64))


@pytest.fixture(scope="module")
def run(data):
    "Thirty steps of Pix2Pix on its embedded weights, with the milestones of Table 1."
    folder, store = data
    p = preset("pix2pix", "demo")
    config = replace(p.train, max_steps=30, batch=2, milestones=scaled(30), log_every=10)
    train(p.model, config, store, folder / "run", init=exported("pix2pix-demo")[1], device="cpu", say=None)
    return folder / "run"


# -- patients and numbers -------------------------------------------------------------------------------------------


def test_patients_are_the_held_out_ones_slice_by_slice(data):
    store = data[1]
    cases = patients(store)
    rows = store.rows("val")
    assert np.array_equal(np.concatenate([p.real for p in cases]), store.images[rows]) and np.array_equal(np.concatenate([p.masks for p in cases]), store.labels[rows])
    assert [p.id for p in patients(store, 1)] == [cases[0].id]


def test_what_the_judge_answers_is_compared_on_the_grid_of_the_masks(data, tmp_path):
    "Whatever the axis order of the scanner (the phantom has several), a judge that repeats the masks has Dice 100 everywhere."
    cases = patients(data[1])
    assert len({"".join(c["axcodes"]) for c in data[1].cases if c["split"] == "val"}) > 1
    found = [judge_patient(Knows(cases), p, p.real, tmp_path) for p in cases]
    assert all(np.array_equal(f, p.masks) for f, p in zip(found, cases))
    row = measure(cases, [p.real for p in cases], found)
    assert set(row["metrics"]["dice"].values()) <= {100.0, None} and row["metrics"]["psnr"] is None and row["metrics"]["ssim"] == 1


def test_a_row_by_hand():
    "Two patients of two slices; numbers that fit on a page."
    grid = Source("drawn", (8, 8, 2), np.eye(4), "0" * 64)
    masks = np.zeros((2, 8, 8), np.uint8); masks[:, 2:6, 2:6] = 6; masks[1, 0, 0] = 1
    real = np.full((2, 8, 8), 100, np.uint8)
    cases = [Patient("a", masks, real, grid), Patient("b", np.where(masks == 1, 0, masks).astype(np.uint8), real, grid)]
    fakes, found = [real + 10, real + 51], [np.where(masks == 1, 6, masks), np.zeros_like(masks)]
    row = measure(cases, [f.astype(np.uint8) for f in fakes], found)
    values = [20 * np.log10(255 / 10), 20 * np.log10(255 / 51)]
    assert row["metrics"]["psnr"] == pytest.approx(np.mean(values)) and row["cases"]["b"]["psnr"] == pytest.approx(values[1])
    assert row["metrics"]["dice"]["liver"] == pytest.approx((200 * 32 / 65 + 0) / 2)   # a: one voxel too many; b: not found, 0
    assert row["metrics"]["dice"]["spleen"] == 0                                       # only patient a has one, and it was called liver
    assert row["n"]["volumes"]["spleen"] == 1 and row["n"]["volumes"]["aorta"] == 0 and row["metrics"]["dice"]["aorta"] is None
    assert row["metrics"]["dice_mean"] is None and row["cases"]["b"]["dice"]["spleen"] is None
    assert row["metrics"]["air"] == pytest.approx(0) and row["intervals"]["spleen"] is None
    assert row["intervals"]["psnr"] == pytest.approx(sorted(values))                   # both of the pair, or one twice


def test_jackknife_of_a_mean_is_the_textbook_interval():
    values = np.random.default_rng(0).normal(size=10)
    low, high = jackknife(lambda keep: values[keep].mean(), np.arange(10))
    assert (high - low) / 2 == pytest.approx(2.262157 * values.std(ddof=1) / 10 ** 0.5, rel=1e-6)
    assert jackknife(lambda keep: 0.0, np.array([0, 1])) is None


def test_hours_over_a_kill(tmp_path):
    (tmp_path / "train.log").write_text("2026-01-01 10:00:00 beginning at step 0\n2026-01-01 12:00:00 step 1,000/2,000\n2026-01-02 00:00:00 continuing after step 500\n2026-01-02 01:00:00 step 1,000/2,000\n2026-01-02 03:00:00 step 2,000/2,000\n")
    assert [training_hours(tmp_path, s) for s in (1000, 2000)] == [3, 5]


# -- synthesis ------------------------------------------------------------------------------------------------------


def test_a_patient_killed_half_way_is_the_same_patient(data, run, tmp_path):
    model, p = load(run, "cpu"), patients(data[1])[0]
    whole = synthesize_patient(model, p, tmp_path / "whole")
    class Killed(Exception): pass
    def kill(line): raise Killed(line)
    with pytest.raises(Killed): synthesize_patient(model, p, tmp_path / "cut", say=kill)
    assert not (tmp_path / "cut" / f"{p.id}.npy").exists()
    lines = []
    assert np.array_equal(synthesize_patient(model, p, tmp_path / "cut", say=lines.append), whole)
    assert len(lines) == -(-len(p.masks) // 16) - 1                                     # one batch was there already
    assert (tmp_path / "cut" / f"{p.id}.npy").read_bytes() == (tmp_path / "whole" / f"{p.id}.npy").read_bytes()


def test_a_damaged_file_is_made_again(data, run, tmp_path):
    model, p = load(run, "cpu"), patients(data[1])[0]
    whole, path = synthesize_patient(model, p, tmp_path), tmp_path / f"{p.id}.npy"
    raw = bytearray(path.read_bytes()); raw[-1] ^= 1; path.write_bytes(raw)
    assert np.array_equal(synthesize_patient(model, p, tmp_path), whole)


def test_dealt_out_to_two_processes_of_torchrun_and_one_is_lost(data, run):
    "Process 1 is killed before its second patient; called again, two processes have made what one would have made, and the evaluation finds it."
    folder, store = data
    words = ["-r", "run_dir", str(run), "-r", "data_root", str(folder / "data"), "-r", "store", str(folder / "store"), "-p", "threads", "1"]
    deal = lambda **env: subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ctdiffusion.evaluation.evaluation", *words],
                                        capture_output=True, text=True, timeout=600, env=os.environ | dict(OMP_NUM_THREADS="1") | env)
    lost, last = deal(CRASH_AT="patient@1#1"), run / "evaluation" / "step_00000030"
    assert lost.returncode != 0 and not (last / f"{patients(store)[1].id}.npy").exists()
    ended = deal()
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "process 0 of 2" in ended.stdout and "process 1 of 2" in ended.stdout
    before = {f.name: f.stat().st_mtime_ns for f in last.glob("*.npy")}
    assert sorted(before) == [f"{p.id}.npy" for p in patients(store)]
    evaluate(run, 30, store, None, None, device="cpu", say=lambda line: None)
    assert {f.name: f.stat().st_mtime_ns for f in last.glob("*.npy")} == before
    p = patients(store)[1]
    assert np.array_equal(np.load(last / f"{p.id}.npy"), synthesize_patient(load(run, "cpu"), p, run.parent / "alone"))


def test_shares_cover_everything_once():
    for world in (1, 2, 3, 7): assert sorted(sum((share(range(5), r, world) for r in range(world)), [])) == list(range(5))


# -- rows -----------------------------------------------------------------------------------------------------------


def test_milestones_references_and_a_second_call(data, run, tmp_path):
    folder, store = data
    job = EvaluateJob(str(run), str(folder / "data"), str(folder / "store"), str(tmp_path / "shared"))
    judge, said = Knows(patients(store), wrong=6), []
    quiet = lambda line: None
    both = lambda say: [p for rows in (reference_rows, milestone_rows) for p in rows(job, store, judge, RandomConvolutions(), say)]
    files = both(quiet)
    rows = {(r["variant"], r["milestone"]): r for r in map(read_results, files)}
    assert set(rows) == {(k, None) for k in REFERENCES} | {("pix2pix", m) for m in ("10k", "50k", "100k", "150k")}
    last = rows["pix2pix", "150k"]
    assert last["metrics"]["dice"]["liver"] == 0 and last["metrics"]["dice"]["spleen"] == 100 and last["start"] != "scratch"
    assert last["data"] == dict(name="phantom", hash=store.hash) and last["preset"] == "demo" and last["step"] == 30
    assert rows["floor", None]["judge"] is None and rows["ceiling", None]["metrics"]["distance"] is None
    again = []
    assert both(again.append) == files and all("found finished" in line for line in again)
    other = Knows(patients(store)); other.protocol = "another judge"
    changed = evaluate(run, 30, store, other, RandomConvolutions(), device="cpu", say=said.append)
    assert read_results(changed)["metrics"]["dice"]["liver"] == 100 and not any("found finished" in line for line in said)


def test_an_edited_result_stops_the_evaluation(data, run):
    path = evaluate(run, 20, data[1], None, None, device="cpu", say=lambda line: None)
    path.write_text(path.read_text().replace('"patients": 3', '"patients": 5'))
    with pytest.raises(CTDiffusionError, match="edited after it was sealed"): evaluate(run, 20, data[1], None, None, device="cpu", say=lambda line: None)
    path.unlink()


def test_flat_paint_and_twins(data):
    store = data[1]
    means, rows = organ_means(store, piece=7), store.rows("train")
    for id in (0, 6, 16): assert means[id] == pytest.approx(store.images[rows][store.labels[rows] == id].mean())
    p = patients(store)[0]
    assert np.array_equal(painted(p.masks, means)[p.masks == 6], np.full((p.masks == 6).sum(), round(means[6])))
    short = Patient("short", p.masks[:5], p.real[:5], p.grid)
    assert np.array_equal(twin(short, p)[[0, -1]], p.real[[0, -1]]) and len(twin(short, p)) == 5
    found = floor(store, RandomConvolutions(), first=1)
    assert found["metrics"]["distance"] > 0 and len(found["intervals"]["distance"]) == 2 and found["n"]["patients"] == 1


def test_the_worst_and_the_best_patient():
    case = lambda d, s=0.5: dict(dice=d, ssim=s)
    assert worst_and_best(dict(cases=dict(a=case(dict(liver=90, spleen=None)), b=case(dict(liver=20, spleen=60)), c=case(dict(liver=50))))) == ("b", "a")
    assert worst_and_best(dict(cases=dict(a=case({}, 0.7), b=case({}, 0.8)))) == ("a", "b")


# -- refusals -------------------------------------------------------------------------------------------------------


def test_refusals(data, run, tmp_path):
    folder, store = data
    cases, model = patients(store), load(run, "cpu")
    with pytest.raises(CTDiffusionError, match="one for each mask"): measure(cases, [p.real[:-1] for p in cases])
    with pytest.raises(CTDiffusionError, match="0 to 1"): measure(cases, [p.real / 127.5 - 1 for p in cases])
    with pytest.raises(CTDiffusionError, match="found window width 350.0; expected window width 400"): check_model(replace(model, width=350.0), store)
    with pytest.raises(CTDiffusionError, match="class table"): check_model(replace(model, table=replace(AMOS, name="other")), store)
    with pytest.raises(CTDiffusionError, match="pixels per side 64"): check_model(model, prepare(folder / "data", tmp_path / "s32", PrepareConfig(32)))
    shutil.copy(run / "run.json", tmp_path)
    with pytest.raises(CTDiffusionError, match="without a checkpoint"): kept_steps(tmp_path)
    with pytest.raises(CTDiffusionError, match="no weights|no such package"): judge_of(EvaluateJob(judge="totalsegmentator"), store)
    with pytest.raises(CTDiffusionError, match="no file|no usable torch-fidelity"): features_of(EvaluateJob(features=str(tmp_path / "none.pth")))
    with pytest.raises(CTDiffusionError, match="fewer training patients"): floor(prepare(folder / "data", tmp_path / "few", PrepareConfig(64, exclude=tuple(store.splits["train"][:2]))), None)
    for words, why in ((["somewhere"], "-p name value"), (["-p", "run_dir", "x", "-p", "juge", "none"], "did you mean judge"), (["-p", "judge", "nobody"], "one of embedded")):
        with pytest.raises(CTDiffusionError, match=why): main(words)
    with pytest.raises(CTDiffusionError, match="ddim"): EvaluateJob(sampler="ddim999")


# -- the job --------------------------------------------------------------------------------------------------------


def test_the_parameters_cell_declares_the_job(root):
    declared = parameters_cell(root / "nbs" / "evaluate.ipynb")
    assert declared == {f.name: (type(f.default).__name__, f.default) for f in fields(EvaluateJob)}


def test_the_job_through_papermill(root, data, run, tmp_path):
    "With a judge of thirty steps, on two patients, all milestones, in two processes; then again, in a few seconds."
    folder, store = data
    given = dict(run_dir=str(run), data_root=str(folder / "data"), store=str(folder / "store"), shared=str(tmp_path / "shared"), judge_steps=30, patients=2, threads=1)
    execute = lambda n: pm.execute_notebook(str(root / "nbs" / "evaluate.ipynb"), str(tmp_path / "out.ipynb"), parameters=given | dict(processes=n), progress_bar=False)
    for made in (run / "evaluation").glob("*/*.npy"): made.unlink()
    execute(2)
    log, judged = run / "evaluation" / "processes.log", list((run / "evaluation").glob("*/embedded-segmenter/*.nii.gz"))
    assert "process 1 of 2: step 30" in log.read_text() and len(judged) == 8 and max(f.stat().st_mtime for f in judged) <= log.stat().st_mtime  # judged by the children, too
    rows = [read_results(f) for f in sorted((run / "evaluation").glob("*/results.json"))]
    assert [r["milestone"] for r in rows] == ["10k", "50k", "100k", "150k"] and all(r["n"]["patients"] == 2 and r["judge"].startswith("MONAI") for r in rows)
    assert (tmp_path / "shared" / "judge-30-steps" / "segmenter.json").exists() and {f.parent.name for f in (tmp_path / "shared").glob("*/results.json")} == set(REFERENCES)
    execute(0)
    text = Path(tmp_path / "out.ipynb").read_text()
    assert text.count("found finished") == 7
