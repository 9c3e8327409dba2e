"""The reproduction as people run it: planned, killed, continued, recognised, and handed to a scheduler."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from ctdiffusion.apps import jobs, launch
from ctdiffusion.apps.jobs import ReproduceJob, plan, price, priced, slices, state
from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.store import PrepareConfig, prepare
from ctdiffusion.training.parameters import TrainJob, parameters_cell
from ctdiffusion.training.trainer import train

CPU = dict(device="cpu", workers=2)


def named(tasks, name): return next(t for t in tasks if t.name == name)


# -------------------------------------------------------------------------------------------------------- the plan

def test_the_parameters_cell_declares_the_job(root):
    assert parameters_cell(root / "nbs" / "reproduce.ipynb") == {name: (type(value).__name__, value) for name, value in vars(ReproduceJob()).items()}


def test_the_full_budget_is_what_it_says(tmp_path):
    for v, lr in dict(mask=None, spade=5e-4, pix2pix=5e-4, oasis=4e-4).items():
        made = named(plan(ReproduceJob(root=str(tmp_path), budget="full", **CPU)), f"train-{v}-s0").parameters
        by_hand = dict(variant=v, init="scratch", max_steps=6000, batch=8, sampler="60,12,8", threads=1, milestones=True, confirm=True, data_root=str(tmp_path / "data"), store=str(tmp_path / "store"), run_dir=str(tmp_path / f"{v}-s0"))
        assert TrainJob(**made | dict(threads=1, device="auto")) == TrainJob(**by_hand | ({"lr": lr} if lr else {}))


def test_every_parameter_of_a_task_exists_in_its_notebook(root):
    for t in plan(ReproduceJob(**CPU)):
        assert t.parameters.keys() <= parameters_cell(root / "nbs" / t.notebook).keys()


@pytest.mark.parametrize("name", ["demo", "small"])
def test_every_preset_has_a_price(name, tmp_path):
    job = ReproduceJob(preset=name, root=str(tmp_path), **CPU)
    bill = priced(plan(job), job)
    assert len(bill) == 1 + 7 + 7 + 1 and (bill["hours"] > 0).all() and bill.drop(index="prepare")["GB in memory"].gt(0).all()


def test_the_demo_fits_into_an_hour_of_two_cores(tmp_path):
    job = ReproduceJob(root=str(tmp_path), **CPU)
    assert sum(price(t, job, slices(job))["hours"] for t in plan(job)) < 2 * 0.75


def test_more_work_has_a_higher_price(tmp_path):
    quick, full = (ReproduceJob(root=str(tmp_path), budget=b, **CPU) for b in ("quick", "full"))
    for a, b in zip(plan(quick), plan(full)):
        one_pass = a.kind == "evaluate" and any(v in a.name for v in ("pix2pix", "spade", "oasis"))  # on the same patients
        assert one_pass or price(a, quick, slices(quick))["hours"] < price(b, full, slices(full))["hours"], a.name


# ------------------------------------------------------------------------------------------------- recognised, or not

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    "A plan whose training takes a second."
    monkeypatch.setitem(jobs.BUDGETS, "quick", dict(max_steps=15, batch=1, sampler="ddim5"))
    return ReproduceJob(root=str(tmp_path / "root"), variants="pix2pix", **CPU)


def test_a_run_made_by_hand_is_recognised_by_its_folder(tiny):
    task = named(plan(tiny), "train-pix2pix-s0")
    store = prepare(make_dataset(tiny.data, 1, 1), tiny.folder / "store", PrepareConfig(64))
    p = TrainJob(**task.parameters).config()
    assert train(p.model, p.train, store, task.run, say=None).done and state(task) == "done"
    other = named(plan(ReproduceJob(root=str(tiny.folder), variants="pix2pix", seeds=2, **CPU)), "train-pix2pix-s1")
    shutil.copytree(task.run, other.run)
    assert state(other) == "another run: seed=0 (planned 1)"
    (task.run / "DONE").unlink()
    assert state(task) == "interrupted"
    run = json.loads((task.run / "run.json").read_text())
    (task.run / "run.json").write_text(json.dumps(run | dict(data=run["data"] | dict(hash="0"))))
    assert state(task).startswith("another run: data.hash='0'")


def test_a_run_that_was_shorter_is_not_done(tiny):
    task = named(plan(tiny), "train-pix2pix-s0")
    task.run.mkdir(parents=True)
    (task.run / "run.json").write_text("{}")
    for steps, told in ((14, "interrupted"), (15, "done")):
        (task.run / "DONE").write_text(f"{steps}\n")
        assert state(task) == told


def test_an_evaluation_is_done_with_its_parameters_only(tiny):
    def task(**given): return named(plan(ReproduceJob(root=given.pop("root", str(tiny.folder)), variants="pix2pix", **CPU | given)), "evaluate-pix2pix-s0")
    for made in task().makes: made.parent.mkdir(parents=True); made.write_text("{}")
    assert state(task()) == "new"
    task().folder.mkdir()
    launch.record(task())
    assert state(task()) == "done" and state(task(workers=1, device="auto")) == "done" and state(task(judge="none")) == "new"
    moved = shutil.move(tiny.folder, tiny.folder.with_name("moved"))
    assert state(task(root=str(moved))) == "done"


def test_somebody_elses_run_stops_only_what_needs_it(tiny, root):
    task = named(plan(tiny), "train-pix2pix-s0")
    (task.run).mkdir(parents=True)
    (task.run / "run.json").write_text(json.dumps(dict(seed=7)))
    prepare(make_dataset(tiny.data, 1, 1), tiny.folder / "store", PrepareConfig(64))
    ended = launch.run_tasks(plan(tiny), 1, lambda line: None, root / "nbs")
    assert list(ended.values()) == ["done", "another run: seed=7 (planned 0)", "not begun: train-pix2pix-s0 is not done"]
    with pytest.raises(CTDiffusionError, match="another run"): launch.insist(ended, tiny)


# --------------------------------------------------------------------------------------- real processes, real signals

TRAIN = """
import json, os, time
from pathlib import Path
run = Path(run_dir); run.mkdir(parents=True, exist_ok=True)
(run / "STOP").unlink(missing_ok=True); (run / "lock").touch(); (run / "pid").write_text(str(os.getpid()))
(run / "run.json").write_text("{}")
step = int((run / "checkpoint").read_text()) if (run / "checkpoint").exists() else 0
with open(run / "begun", "a") as f: f.write(f"{step}\\n")
while step < max_steps and not (run / "STOP").exists():
    step += 1; time.sleep(0.02)
(run / "checkpoint").write_text(str(step)); (run / "lock").unlink()
if step == max_steps: (run / "DONE").write_text(str(step))
else: time.sleep(60)  # pictures, which nobody waits for
"""

EVALUATE = """
import numpy as np
from pathlib import Path
from ctdiffusion.data.store import Store
from ctdiffusion.evaluation.results import ORGANS, milestone, write_results
open_store, run = Store(store), Path(run_dir)
for step in (40, 200, 400, 600) if milestones else (600,):
    where = run / "evaluation" / f"step_{step:08d}"
    where.mkdir(parents=True, exist_ok=True)
    cases = {c["id"]: np.array(open_store.images[c["start"]:c["stop"]]) for c in open_store.cases if c["split"] == "val"}
    np.savez_compressed(where / "slices.npz", **cases)
    write_results(where / "results.json", dict(format=1, variant=run.name.split("-")[0], milestone=milestone(step, 600), preset="demo", seed=0, step=step, start="scratch", checkpoint="0", config="0",
        sampler="ddim25", data=dict(name="phantom", hash=open_store.hash), judge=judge, features="random", n=dict(patients=1, slices=50), intervals={}, cases={}, versions={}, hours={}, machine="a test",
        metrics=dict(distance=1.0, distance_name="blocks", kid=None, psnr=20.0, ssim=0.5, psnr_body=None, dice={o: 50.0 for o in ORGANS}, dice_mean=50.0)))
"""


@pytest.fixture
def nbs(root, tmp_path):
    "Notebooks with the parameters of the real ones that leave the same files; prepare and reproduce are the real ones."
    there = tmp_path / "nbs"
    (there / "results").mkdir(parents=True)
    shutil.copy(root / "nbs" / "results" / "steps-demo-cpu.json", there / "results")
    for name in ("prepare", "reproduce"): shutil.copy(root / "nbs" / f"{name}.ipynb", there)
    tasks = plan(ReproduceJob())
    for kind, work in dict(train=TRAIN, evaluate=EVALUATE).items():
        declared = {k: v for t in reversed(tasks) if t.kind == kind for k, v in t.parameters.items()}
        head = "\n".join(f"{k}: {type(v).__name__} = {v!r}" for k, v in declared.items())
        nb = new_notebook(cells=[new_code_cell(head, metadata=dict(tags=["parameters"])), new_code_cell(work)], metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
        nbformat.write(nb, there / f"{kind}.ipynb")
    return there


def until(what, seconds=600):
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc/self").exists() else os.kill(pid, 0) is None
    except OSError: return False


def reproduce(nbs, page, *given):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(nbs / "reproduce.ipynb"), str(page), *map(str, given)]
    return subprocess.run(command, cwd=nbs.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_a_reproduction_from_nothing_and_again(nbs, tmp_path, monkeypatch):
    there = tmp_path / "root"
    make_dataset(there / "data", 1, 1)  # fewer patients than the budget's
    for name in ("first", "second"):
        done = reproduce(nbs, tmp_path / f"{name}.ipynb", "-p", "root", there, "-p", "variants", "mask,pix2pix", "-p", "workers", 2, "-p", "device", "cpu")
        assert done.returncode == 0, done.stderr[-2000:]
    assert {f.name for f in (there / "report").iterdir()} == {"claims.md", "differences.md", "figure3.png", "figure4.png"} | {f"table{n}.{k}" for n in (1, 2) for k in ("csv", "md", "tex", "html")}
    assert len((there / "mask-s0" / "begun").read_text().split()) == 1
    assert "5 of 5 tasks are done already" in (tmp_path / "second.ipynb").read_text()


def test_a_dry_run_prints_the_plan_and_does_nothing(nbs, tmp_path):
    done = reproduce(nbs, tmp_path / "dry.ipynb", "-p", "dry_run", "True", "-p", "root", tmp_path / "root")
    page = (tmp_path / "dry.ipynb").read_text()
    assert done.returncode == 0 and "evaluate-oasis-s0" in page and "15 of 15" in page and not (tmp_path / "root").exists()


# ---------------------------------------------------------------------------------------------- a scheduler of our own

STUBS = dict(
    papermill="""echo "papermill $*" >> "$CALLS"; printf '%s\\n' "$@" > "$CALLS.argv"
run=$(while [ $# -gt 0 ]; do [ "$1" = run_dir ] && echo "$2"; shift; done); mkdir -p "$run"
case $MODE in
  fail) exit 7;;
  stop) touch "$run/lock"; echo here > "$CALLS.here"; until [ -e "$run/STOP" ]; do sleep 0.05; done; touch "$run/saved"; rm "$run/lock"; exec sleep 60;;
  wait) echo here > "$CALLS.here"; exec sleep 60;;
  early) ;;
  *) rm -f "$run/STOP"; touch "$run/DONE";;
esac""",
    srun='[ "$1" = --kill-on-bad-exit=1 ] && shift; exec "$@"',
    torchrun="""echo "torchrun $*" >> "$CALLS"; run=$(while [ $# -gt 0 ]; do [ "$1" = run_dir ] && echo "$2"; shift; done)
case $MODE in
  shardfail) exit 1;;
  early) ;;
  stopall) mkdir -p "$run"; touch "$run/lock"; echo here > "$CALLS.here"; until [ -e "$run/STOP" ]; do sleep 0.05; done; touch "$run/saved"; rm "$run/lock";;
  together) mkdir -p "$run"; touch "$run/DONE";;
esac""",
    python='echo "python $* rank $RANK of $WORLD_SIZE" >> "$CALLS"',
    scontrol='echo "scontrol $*" >> "$CALLS"',
    sbatch='echo "sbatch $*" >> "$CALLS"; echo "$(wc -l < "$CALLS");cluster"',
)


@pytest.fixture
def cluster(root, tmp_path):
    "Runs a file of slurm/ as the scheduler would, with programs that only pretend."
    bin, calls = tmp_path / "bin", tmp_path / "calls"
    bin.mkdir()
    for name, body in STUBS.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    job = ReproduceJob(root=str(tmp_path / "a root"), variants="mask,pix2pix", device="cpu", where="slurm")
    launch.write_matrix(plan(job), job, root / "nbs")
    def submit(file, *words, mode="", task=0, signals=(), nodes=1, gpus=1, array=(0, 1)):
        env = os.environ | dict(PATH=f"{bin}:{os.environ['PATH']}", CALLS=str(calls), MODE=mode, SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_ID="4711", SLURM_NNODES=str(nodes), SLURM_GPUS_ON_NODE=str(gpus),
                                SLURM_ARRAY_TASK_MIN=str(array[0]), SLURM_ARRAY_TASK_MAX=str(array[1]), SLURM_ARRAY_TASK_COUNT=str(array[1] - array[0] + 1))
        calls.with_name("calls.here").unlink(missing_ok=True)
        batch = subprocess.Popen(["bash", str(root / "slurm" / file), *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if signals: until(lambda: calls.with_name("calls.here").exists())
        for s in signals: batch.send_signal(s)
        said, _ = batch.communicate(timeout=300)
        return batch.returncode, said, calls.read_text() if calls.exists() else ""
    submit.root, submit.argv = job.folder, lambda: (tmp_path / "calls.argv").read_text().splitlines()
    return submit


def test_a_training_that_fails_or_ends_early_is_not_queued_again(cluster):
    for mode, code in (("fail", 7), ("early", 75)):
        returned, said, calls = cluster("train.sbatch", cluster.root, mode=mode)
        assert (returned, "requeue" in calls) == (code, False) and "train-mask-s0" in said


def test_folders_with_spaces_reach_papermill_whole(cluster):
    cluster("train.sbatch", cluster.root, task=1)
    argv = cluster.argv()
    given = dict(zip(argv[4::3], argv[5::3]))
    assert argv[0] == "--no-progress-bar" and argv[1].endswith("nbs/train.ipynb") and argv[2] == str(cluster.root / "jobs" / "train-pix2pix-s0.ipynb")
    assert given["run_dir"] == str(cluster.root / "pix2pix-s0") and given["max_steps"] == "600" and set(argv[3::3]) == {"-p", "-r"}
    assert cluster("train.sbatch", cluster.root, task=2)[0] == 64


@pytest.mark.parametrize("nodes, gpus", [(1, 4), (2, 3)])
def test_several_gpus_train_together_then_the_notebook_draws(cluster, nodes, gpus):
    code, said, calls = cluster("train.sbatch", cluster.root, mode="together", nodes=nodes, gpus=gpus)
    first, second = calls.splitlines()
    assert code == 0 and "train-mask-s0 is done" in said
    assert first.startswith(f"torchrun --nnodes {nodes} --nproc_per_node {gpus} --rdzv_backend c10d --rdzv_id 4711 --rdzv_endpoint ") and second.startswith("papermill ")
    words = first.split(" -m ctdiffusion.synthesis.processes train ")[1]
    assert f"-r run_dir {cluster.root / 'mask-s0'} " in words and f"-r store {cluster.root / 'store'} " in words and words == second.split(".ipynb ")[-1]


def test_what_several_gpus_leave_unfinished_goes_on_or_is_reported(cluster):
    run = cluster.root / "mask-s0"
    code, said, calls = cluster("train.sbatch", cluster.root, mode="stopall", gpus=2, signals=[signal.SIGUSR1])
    assert code == 0 and "goes on later" in said and "scontrol requeue 4711" in calls and (run / "saved").exists() and not (run / "lock").exists()
    for mode, expected in (("shardfail", 1), ("early", 75)):
        returned, said, calls = cluster("train.sbatch", cluster.root, mode=mode, gpus=2)
        assert returned == expected and calls.count("requeue") == 1 and "papermill" not in calls


def test_an_array_of_shares(cluster):
    words = ["-p", "model", "mask-demo", "-p", "labels", "a folder", "-p", "out", "volumes"]
    code, said, calls = cluster("synthesize.sbatch", *words, task=2, array=(0, 7))
    assert code == 0 and calls == "python -m ctdiffusion.synthesis.processes synthesize -p model mask-demo -p labels a folder -p out volumes rank 2 of 8\n"
    assert cluster("synthesize.sbatch", *words, task=2, array=(1, 7))[0] == 64


def test_an_evaluation_is_shared_among_processes_and_recorded(cluster):
    code, said, calls = cluster("evaluate.sbatch", cluster.root, nodes=2, gpus=3)
    assert code == 0, said
    first, second = calls.splitlines()
    assert first.startswith("torchrun --nnodes 2 --nproc_per_node 3 ") and "-m ctdiffusion.evaluation.evaluation -r data_root" in first and f"-r run_dir {cluster.root / 'mask-s0'} " in first
    assert second.startswith("papermill ")
    task = named(plan(ReproduceJob(root=str(cluster.root), variants="mask", **CPU)), "evaluate-mask-s0")
    for made in task.makes: made.parent.mkdir(parents=True); made.touch()
    assert state(task) == "done"


def test_an_evaluation_without_volumes_is_not_recorded(cluster):
    code, _, calls = cluster("evaluate.sbatch", cluster.root, mode="shardfail")
    assert code != 0 and "papermill" not in calls and not (cluster.root / "jobs" / "evaluate-mask-s0.json").exists()
    code, _, calls = cluster("evaluate.sbatch", cluster.root, mode="wait", signals=[signal.SIGUSR1])
    assert code == 0 and "scontrol requeue 4711" in calls and not (cluster.root / "jobs" / "evaluate-mask-s0.json").exists()


def test_submitting_it_all_waits_in_the_right_order(cluster):
    code, said, calls = cluster("submit.sh", cluster.root, "--partition=gpu")
    lines = calls.splitlines()
    assert code == 0 and len(lines) == 4 and "prepare 1, train 2, evaluate 3, report 4" in said
    for line, words in zip(lines, ("", "--array=0-1 --dependency=afterok:1", "--array=0-1 --dependency=aftercorr:2", "--dependency=afterany:3")): assert line.startswith("sbatch --parsable --partition=gpu") and words in line
    code, _, calls = cluster("notebook.sbatch", cluster.root, "report")
    assert code == 0 and calls.splitlines()[-1].startswith("papermill --no-progress-bar") and "-r where report" in calls
