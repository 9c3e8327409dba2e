"""Many processes on one computer: dealt out, killed, left by their parent, and found again."""
import os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.store import PrepareConfig, prepare
from ctdiffusion.data.volumes import write_volume
from ctdiffusion.models.oasis import coin_mask
from ctdiffusion.models.variants import TrainConfig, preset
from ctdiffusion.synthesis import processes
from ctdiffusion.synthesis.processes import SynthesizeJob, as_words, read_words, stand_alone, train_job, training
from ctdiffusion.synthesis.synthesis import complete_labels
from ctdiffusion.training.parameters import TrainJob
from ctdiffusion.training.runs import latest_checkpoint, read_checkpoint
from ctdiffusion.training.state import begin

quiet = lambda line: None
ONE = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*words: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ctdiffusion.synthesis.processes", *words]
    return subprocess.run(command, env=ONE | env, timeout=600, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return folder, prepare(make_dataset(folder / "data", 2, 4, size=64), folder / "store", PrepareConfig(64))


@pytest.fixture(scope="module")
def labels(data):
    "Four label volumes, and a job for them with the quickest model."
    folder, store = data
    (folder / "labels").mkdir()
    for case in (c for c in store.cases if c["split"] == "val"):
        full = complete_labels(*(folder / "data" / case[k]["path"] for k in ("label", "image")))
        write_volume(folder / "labels" / f"{case['id']}.nii.gz", full.data, full.source, np.uint8, "label map")
    return SynthesizeJob(labels=str(folder / "labels"), model="pix2pix-demo", device="cpu", threads=1)


def test_who_is_left_by_its_parent_saves_and_goes(data, tmp_path):
    "SIGKILL of the process that started them: two trainings save, free the folder and are gone; then one goes on."
    folder, store = data
    job = TrainJob("mask", run_dir=str(tmp_path / "run"), store=str(folder / "store"), max_steps=100_000, batch=2, sampler="ddim5", device="cpu", threads=1, processes=2)
    imports = "from ctdiffusion.data.store import open_store\nfrom ctdiffusion.synthesis.processes import train_job\nfrom ctdiffusion.training.parameters import TrainJob\n"
    program = imports + f"train_job({job!r}, open_store({job.store!r}))"
    parent, run = subprocess.Popen([sys.executable, "-c", program], env=ONE, stdout=subprocess.DEVNULL), tmp_path / "run"
    def until(what, seconds):
        end = time.monotonic() + seconds
        while not what(): assert time.monotonic() < end and parent.poll() in (None, -9), "it never came"; time.sleep(0.1)
    def ours():
        "Processes that work on this run, by their command line."
        found = []
        for p in Path("/proc").glob("[0-9]*"):
            try: words = (p / "cmdline").read_bytes()
            except OSError: continue
            if f"run_dir\0{run}".encode() in words and (p / "stat").read_text().rpartition(")")[2].split()[0] != "Z": found.append(int(p.name))
        return found
    until(lambda: (run / "metrics.csv").exists(), 600)
    assert len(ours()) == 3  # torchrun and two of it
    parent.send_signal(signal.SIGKILL); parent.wait()
    until(lambda: not ours(), 300)
    saved = latest_checkpoint(run, quiet)
    assert saved and not (run / "lock").exists() and "STOP file at step" in (run / "train.log").read_text()
    step = read_checkpoint(saved)["step"]
    assert step % 10 == 0 and train_job(replace(job, max_steps=step + 1, processes=0), store, quiet).step == step + 1


def test_what_stops_a_child_is_in_the_message(data, tmp_path):
    "The run belongs to somebody else's configuration: the child's words are the parent's error, and nothing was begun."
    folder, store = data
    job = TrainJob("pix2pix", run_dir=str(tmp_path), store=str(folder / "store"), max_steps=2, batch=2, sampler="ddim5", device="cpu", threads=1)
    train_job(job, store, quiet)
    with pytest.raises(CTDiffusionError, match=r"2 processes that ended with: .*CTDiffusionError.*seed=0 \(now 1\)"): train_job(replace(job, seed=1, max_steps=4, processes=2), store, quiet)
    assert read_checkpoint(latest_checkpoint(tmp_path, quiet))["step"] == 2


@pytest.mark.parametrize("variant", ["mask", "sdm", "oasis"])
def test_draws_are_those_of_the_whole_batch(data, variant, monkeypatch):
    "Noise, steps, dropped labels: three processes have together what one has; the coins of a GAN are the same for all."
    c = TrainConfig(batch=6, max_steps=4, label_drop=0.5)
    seen = {}
    for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3)):
        state = begin(preset(variant, "demo").model, c, data[1], seed=3, device="cpu")
        state.rank, state.world, state.step = rank, world, 2
        masks, n = state.slices()[1], 6 // world
        kept = state.part("label drop", lambda g: torch.rand(6, generator=g))
        seen[rank, world] = masks, state.gaussian(n, 5), state.part("timesteps", lambda g: torch.randint(1000, (6,), generator=g)), kept
    for rank in range(3):
        for whole, mine in zip(seen[0, 1], seen[rank, 3]): assert torch.equal(whole[rank::3], mine)
    if variant != "oasis": return
    drawn = []
    monkeypatch.setattr("ctdiffusion.models.oasis.coin_mask", lambda mask, classes, draw: drawn.append(draw.initial_seed()) or coin_mask(mask, classes, draw))
    monkeypatch.setattr(type(state), "share", lambda self, player: None)
    for state.rank in range(3): state.step = 2; state.train_step()
    assert len(drawn) == 3 and len(set(drawn)) == 1


def test_a_process_of_its_own_waits_for_no_group(monkeypatch):
    for k, v in dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="6,7").items(): monkeypatch.setenv(k, v)
    assert stand_alone() == (5, 8) and os.environ["CUDA_VISIBLE_DEVICES"] == "7" and not {"WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
    for k in ("RANK", "CUDA_VISIBLE_DEVICES"): monkeypatch.delenv(k)
    assert stand_alone() == (0, 1) and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_job_survives_the_command_line(data):
    job = TrainJob("edge", milestones=True, lr=1e-4, max_hours=0.5, seed=7, run_dir="a folder", init="0001", processes=4)
    assert read_words(as_words(job), TrainJob) == replace(job, processes=0)
    job = TrainJob("mask", store=str(data[0] / "store"))
    mine, theirs = (training(j, data[1]) for j in (job, read_words(as_words(job), TrainJob)))
    assert all(mine[k] == theirs[k] for k in ("model", "config", "seed", "run_dir", "device"))


def test_refusals(data, labels, monkeypatch):
    with pytest.raises(CTDiffusionError, match="3 for a batch of 16"): train_job(TrainJob(device="cpu", processes=3), data[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CTDiffusionError, match="4 for 2 graphics cards"): train_job(TrainJob(processes=4), data[1])
    with pytest.raises(CTDiffusionError, match="0 or more"): TrainJob(processes=-1)
    with pytest.raises(CTDiffusionError, match="out=''"): labels.volumes()
    with pytest.raises(CTDiffusionError, match="mask-demo"): processes.main(["synthesize", *as_words(replace(labels, out="x", model="mask-dmeo"))])
