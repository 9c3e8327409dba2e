"Run folders: draws, files, identity, and how to stop. (Crashes, full disks, flipped bits, second jobs: tests/faults/test_c_training.py.)"
import hashlib
import os
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from little_runs import save

from ctdiffusion.data.labels import atomic_write
from ctdiffusion.training.folder import RunLock, Stop, claim_run
from ctdiffusion.training.runs import add_metrics, batch_rows, cut_metrics, generator, prune, read_checkpoint, read_metrics, write_checkpoint


def names(run: Path) -> set: return {p.name for p in run.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------------- randomness

def test_generator_is_pinned():
    "Anybody's resumed run depends on these numbers: they may never change."
    assert generator(0, 0, "noise").initial_seed() == int.from_bytes(hashlib.sha256(b"0/0/noise/0").digest()[:7], "big")
    assert len({generator(s, k, p, r).initial_seed() for s in range(3) for k in range(50) for p in ("noise", "t") for r in range(2)}) == 600


@pytest.mark.parametrize("batch,world", [(4, 1), (6, 2), (6, 3), (16, 4), (40, 2)])
def test_batches_visit_every_slice_once_an_epoch(batch, world):
    "Whatever the batch (also larger than the data) and the number of processes; order differs between epochs and seeds."
    rows, n = np.arange(50, 63), 13
    steps = [np.concatenate([batch_rows(rows, batch, s, 3, r, world) for r in range(world)]) for s in range(n)]
    assert np.array_equal(np.bincount(np.concatenate(steps) - 50), [batch] * n)
    assert all(len(batch_rows(rows, batch, 5, 3, r, world)) == batch // world for r in range(world))
    order = lambda seed, epoch: batch_rows(rows, n, epoch, seed).tolist()
    assert order(0, 0) != order(0, 1) != order(1, 1) and sorted(order(0, 0)) == rows.tolist()


# ------------------------------------------------------------------------------------------------------ checkpoints

def test_checkpoint_round_trip(tmp_path):
    tensors = {"a.b": torch.randn(3, 4), "n": torch.arange(3), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)}
    path = write_checkpoint(tmp_path, 7, {"model": tensors, "window": {"losses": torch.ones(2, 3)}}, dict(config="abc", model={"size": 64}))
    c = read_checkpoint(path)
    assert c["step"] == 7 and c["meta"]["model"] == {"size": 64} and c["ema"] == {}
    assert all(torch.equal(c["model"][k], v) and c["model"][k].dtype == v.dtype for k, v in tensors.items())
    assert torch.equal(c["optim"]["window"]["losses"], torch.ones(2, 3))


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_colleagues_can_read_what_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try: save(tmp_path, 1); atomic_write(tmp_path / "x.json", "{}")
    finally: os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()} == {mode}




def test_prune_keeps_two_and_the_milestones(tmp_path):
    for step in range(10, 80, 10): save(tmp_path, step); prune(tmp_path, milestones=(20, 50))
    assert [int(p.stem[5:]) for p in sorted((tmp_path / "checkpoints").glob("*.safetensors"))] == [20, 50, 60, 70]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 8


# -------------------------------------------------------------------------------------------------------------- lock

def test_lock_is_released_by_an_error_and_sweeps_only_its_own_litter(tmp_path):
    (tmp_path / "checkpoints").mkdir(); (tmp_path / ".ipynb_checkpoints").mkdir(); (tmp_path / "checkpoints/.ipynb_checkpoints").mkdir()
    for litter in (".latest.json.tmp99", "checkpoints/.step.safetensors.tmp99", "checkpoints/.tmpAb3"): (tmp_path / litter).touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(KeyError):
        with RunLock(tmp_path): raise KeyError
    assert names(tmp_path) == {"notes.txt"}
    with RunLock(tmp_path): pass


# ---------------------------------------------------------------------------------------------------------- identity

IDENTITY = dict(variant="mask", seed=0, model=dict(size=64, mult=(1, 2)), train=dict(lr=1e-3, max_steps=100, log_every=10), data=dict(hash="aa"))


def test_run_json_is_written_once_and_grows_old_gracefully(tmp_path):
    first = claim_run(tmp_path, IDENTITY, dict(device="cpu"))
    longer = IDENTITY | dict(train=dict(lr=1e-3, max_steps=5000, log_every=50, new_option=0))
    assert claim_run(tmp_path, longer, dict(device="cuda")) == first and first["device"] == "cpu"


# ----------------------------------------------------------------------------------------------------- metrics, stop

def test_metrics_are_cut_back(tmp_path):
    file = tmp_path / "metrics.csv"
    for step in (10, 20, 30): add_metrics(file, dict(step=step, loss=step / 7, val_loss=None))
    whole = file.read_bytes()
    with open(file, "a") as f: f.write("40,0.3")  # killed in the middle of a line
    cut_metrics(file, 100)
    assert file.read_bytes() == whole
    cut_metrics(file, 20); add_metrics(file, dict(step=30, loss=30 / 7, val_loss=None))
    assert file.read_bytes() == whole
    cut_metrics(file, 0)
    assert file.read_text() == "step,loss,val_loss\n" and read_metrics(tmp_path)["loss"].shape == (0,)
    cut_metrics(tmp_path / "none.csv", 5)


def test_stop_reasons(tmp_path):
    (tmp_path / "STOP").touch()
    with Stop(tmp_path) as stop: assert stop() is None and not (tmp_path / "STOP").exists()
    with Stop(tmp_path, max_hours=0) as stop: assert stop() == "max_hours"
    before = signal.getsignal(signal.SIGINT)
    with Stop(tmp_path) as stop:
        signal.raise_signal(signal.SIGINT); assert stop() == "interrupted"
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
