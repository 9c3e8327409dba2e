"Part C of the fault table, row F28: the job scripts of a cluster, with real notebooks, kernels and signals."
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from little_runs import STEPS, fingerprint, nothing_left_behind, silent
from little_runs import memory, one_thread, there, whole  # noqa: F401, fixtures
from nbformat.v4 import new_code_cell, new_notebook
from test_jobs import alive, cluster, nbs, until  # noqa: F401, fixtures

from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.training.runs import latest_checkpoint, read_checkpoint



SLOWLY = """
import sys, time; sys.path.insert(0, {folder!r})
import torch; torch.set_num_threads(1)
from little_runs import Denoising, run
real = Denoising.train_step
def slowly(self): time.sleep(0.1); real(self)
Denoising.train_step = slowly
print(run(run_dir, save_every={every}))
"""


def test_F28_the_job_script_with_a_real_training(whole, cluster, there, tmp_path, root):
    """slurm/train.sbatch as the scheduler runs it, with papermill, a kernel and a training that are real.
    USR1 five minutes before the end: saved at once, exit code 0, no DONE, queued again; the second job goes on to the same bytes."""
    cells = [new_code_cell("run_dir = ''", metadata=dict(tags=["parameters"])), new_code_cell(SLOWLY.format(folder=str(Path(__file__).parents[1]), every=1000))]
    nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), tmp_path / "train.ipynb")
    (cluster.root / "jobs" / "train.txt").write_text("\t".join(["little", str(there), str(tmp_path / "train.ipynb"), str(tmp_path / "out.ipynb"), "-r", "run_dir", str(there)]) + "\n")
    (tmp_path / "bin/papermill").write_text(f'#!/bin/bash\nexec {sys.executable} -m papermill "$@"\n')
    env = os.environ | dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", CALLS=str(tmp_path / "calls"), SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="4711", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="1", OMP_NUM_THREADS="1")
    job = lambda: subprocess.Popen(["bash", str(root / "slurm/train.sbatch"), str(cluster.root)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = job()
    until(lambda: (there / "metrics.csv").exists(), 90)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=600)
    step = read_checkpoint(latest_checkpoint(there, silent))["step"]
    assert first.returncode == 0 and "goes on later" in said and "scontrol requeue 4711" in (tmp_path / "calls").read_text(), said
    assert 7 <= step < STEPS and not (there / "DONE").exists() and nothing_left_behind(there) and "STOP file at step" in (there / "train.log").read_text()
    second = job(); said, _ = second.communicate(timeout=600)
    assert second.returncode == 0 and "little is done" in said and (there / "DONE").exists() and not (there / "STOP").exists()
    assert f"continuing after step {step}" in (there / "train.log").read_text() and fingerprint(there) == fingerprint(whole)


@pytest.mark.parametrize("s", [signal.SIGUSR1, signal.SIGTERM])
def test_F28_a_job_is_queued_again_before_its_time_is_up(cluster, s):
    run = cluster.root / "mask-s0"
    code, said, calls = cluster("train.sbatch", cluster.root, mode="stop", signals=[s])
    assert code == 0 and "goes on later" in said and "scontrol requeue 4711" in calls
    assert (run / "STOP").exists() and (run / "saved").exists() and not (run / "lock").exists()
    code, said, calls = cluster("train.sbatch", cluster.root)  # the second start
    assert code == 0 and "train-mask-s0 is done" in said and (run / "DONE").exists() and calls.count("requeue") == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_F28_a_reproduction_that_is_killed_leaves_no_training_behind(nbs, tmp_path, how):
    "The parent of several notebooks is killed: the training below it saves and leaves, and the same command goes on."
    there = tmp_path / "a root"
    make_dataset(there / "data", 1, 1)
    again = "from ctdiffusion.apps.jobs import ReproduceJob, plan\nfrom ctdiffusion.apps.launch import run_tasks\nimport sys\nfrom pathlib import Path\n" \
            "tasks = [t for t in plan(ReproduceJob(root=sys.argv[1], variants='mask', workers=1)) if t.kind != 'evaluate']\nprint(run_tasks(tasks, 1, nbs=Path(sys.argv[2])))"
    command, run = [sys.executable, "-c", again, str(there), str(nbs)], there / "mask-s0"
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: parent.poll() is not None or (run / "lock").exists() and (run / "pid").exists() and (run / "pid").read_text())
    assert parent.poll() is None, "it ended before the training began"
    kernel = int((run / "pid").read_text())
    parent.send_signal(how)
    assert parent.wait(30) != 0
    until(lambda: not alive(kernel), 20)  # no orphan goes on training
    assert (run / "STOP").exists() and not (run / "lock").exists() and not (run / "DONE").exists()
    kept = int((run / "checkpoint").read_text())
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "'train-mask-s0': 'done'" in done.stdout and "train-mask-s0: goes on" in done.stdout, done.stdout + done.stderr
    assert 0 < kept < 600 and (run / "begun").read_text().split() == ["0", str(kept)] and not (run / "STOP").exists()
