"Run folders: what a crash, a full disk, a flipped bit or a second job may do, and what it may not."
import hashlib
import json
import os
import resource
import signal
import socket
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ctdiffusion.data.labels import CTDiffusionError, atomic_write
from ctdiffusion.training import folder as folder_module
from ctdiffusion.training.folder import RunLock, Stop, claim_run, persistent
from ctdiffusion.training.runs import (add_metrics, batch_rows, cut_metrics, damage, generator, latest_checkpoint, prune,
    read_checkpoint, read_metrics, write_checkpoint)

silent = lambda line: None


def forked(work, timeout: int = 60) -> int:
    "The exit status of `work()` in a child of this process: 0, 1 where it raised, -9 where it was killed."
    pid = os.fork()
    if pid == 0:
        signal.alarm(timeout)
        try: work(); os._exit(0)
        except BaseException as error: print(repr(error)); os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save(run: Path, step: int, numbers: int = 100) -> Path:
    groups = {g: {"w": torch.full((numbers,), float(step))} for g in ("model", "ema", "exp_avg")}
    return write_checkpoint(run, step, groups, dict(config="abc"))


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


POINTS = ("temp", "sidecar", "renamed", "pointer", "prune")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", [10, 30])
def test_killed_inside_a_save(tmp_path, monkeypatch, point, first):
    "A whole checkpoint is left, or, in the very first save, none and no error; and the run goes on from it."
    monkeypatch.setenv("CRASH_AT", f"{point}@{first}")
    def life():
        for step in (10, 20, 30): save(tmp_path, step); prune(tmp_path, keep=1 if point == "prune" else 2)
    killed = not (point == "prune" and first == 10)
    assert forked(life) == (-signal.SIGKILL if killed else 0)
    monkeypatch.delenv("CRASH_AT")
    saved = {"temp": first - 10, "sidecar": first - 10}.get(point, first) if killed else 30
    path = latest_checkpoint(tmp_path, silent)
    assert (read_checkpoint(path)["step"] if path else 0) == saved
    with RunLock(tmp_path):
        for step in range(saved + 10, 41, 10): save(tmp_path, step); prune(tmp_path)
    assert read_checkpoint(latest_checkpoint(tmp_path, silent))["step"] == 40
    assert not [n for n in names(tmp_path) if n.startswith(".")]


BROKEN = {
    "pointer empty": lambda run, newest: (run / "latest.json").write_text(""),
    "pointer truncated": lambda run, newest: os.truncate(run / "latest.json", 20),
    "pointer garbage": lambda run, newest: (run / "latest.json").write_bytes(os.urandom(64)),
    "pointer a list": lambda run, newest: (run / "latest.json").write_text("[1, 2]"),
    "pointer gone": lambda run, newest: (run / "latest.json").unlink(),
    "newest truncated": lambda run, newest: os.truncate(newest, 500),
    "newest empty": lambda run, newest: os.truncate(newest, 0),
    "newest gone": lambda run, newest: newest.unlink(),
    "newest longer": lambda run, newest: newest.write_bytes(newest.read_bytes() + b"x"),
    "sidecar gone": lambda run, newest: newest.with_suffix(".json").unlink(),
    "sidecar empty": lambda run, newest: newest.with_suffix(".json").write_text(""),
    "sidecar of another": lambda run, newest: newest.with_suffix(".json").write_text((newest.parent / "step_00000020.json").read_text()),
}


@pytest.mark.parametrize("what", BROKEN)
def test_damaged_newest_falls_back(tmp_path, what):
    "To the previous good one, naming both; a broken pointer alone loses nothing."
    for step in (10, 20, 30): save(tmp_path, step)
    BROKEN[what](tmp_path, tmp_path / "checkpoints/step_00000030.safetensors")
    said = []
    path = latest_checkpoint(tmp_path, said.append)
    assert read_checkpoint(path)["step"] == (30 if what.startswith("pointer") else 20)
    if what != "pointer gone": assert path.name in said[0] and ("latest.json" if what.startswith("pointer") else "step_00000030") in said[0]


def test_none_usable_stops_and_starts_nothing(tmp_path):
    for step in (10, 20): os.truncate(save(tmp_path, step), 100)
    with pytest.raises(CTDiffusionError, match="no usable checkpoint.*step_00000020.*step_00000010") as error: latest_checkpoint(tmp_path, silent)
    assert str(tmp_path) in str(error.value)
    for p in (tmp_path / "checkpoints").iterdir(): p.unlink()
    with pytest.raises(CTDiffusionError, match="no such file"): latest_checkpoint(tmp_path, silent)  # the pointer remembers
    (tmp_path / "latest.json").unlink()
    assert latest_checkpoint(tmp_path, silent) is None


def test_two_hundred_flipped_bits_and_no_silent_load(tmp_path):
    path, rng, silent_loads = save(tmp_path, 10, numbers=8000), np.random.default_rng(0), 0
    whole = path.read_bytes()
    for at, bit in zip(rng.integers(0, len(whole), 200), rng.integers(0, 8, 200)):
        data = bytearray(whole); data[at] ^= 1 << bit; path.write_bytes(data)
        silent_loads += damage(path) is None
    path.write_bytes(whole)
    assert silent_loads == 0 and damage(path) is None


def test_prune_keeps_two_and_the_milestones(tmp_path):
    for step in range(10, 80, 10): save(tmp_path, step); prune(tmp_path, milestones=(20, 50))
    assert [int(p.stem[5:]) for p in sorted((tmp_path / "checkpoints").glob("*.safetensors"))] == [20, 50, 60, 70]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 8


# --------------------------------------------------------------------------------------------------------- full disk

def test_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, capfd):
    "Files over 2 kB cannot be written: the save is tried three times, then stops in plain words."
    save(tmp_path, 10, numbers=10)
    def life():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        persistent(lambda: save(tmp_path, 20, numbers=5000), tmp_path, wait=(0, 0))
    assert forked(life) == 1
    said = capfd.readouterr().out
    assert "cannot be written" in said and "bytes free" in said and "Make room" in said and str(tmp_path) in said
    assert read_checkpoint(latest_checkpoint(tmp_path, silent))["step"] == 10
    assert not [n for n in names(tmp_path) if "tmp" in n]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    save(tmp_path, 10); (tmp_path / "checkpoints").chmod(0o555)
    try:
        with pytest.raises(CTDiffusionError, match="Permission denied"): persistent(lambda: save(tmp_path, 20), tmp_path, wait=(0, 0))
    finally: (tmp_path / "checkpoints").chmod(0o755)


# -------------------------------------------------------------------------------------------------------------- lock

def test_second_job_is_refused_and_a_dead_one_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    ready, go = os.pipe()
    def life():
        with RunLock(tmp_path): os.write(go, b"x"); time.sleep(30)
    pid = os.fork()
    if pid == 0: life()
    os.read(ready, 1)
    with pytest.raises(CTDiffusionError, match=f"in use by job 123 on {socket.gethostname()} since 20") as error: RunLock(tmp_path).__enter__()
    assert str(tmp_path) in str(error.value)
    with pytest.raises(CTDiffusionError): RunLock(tmp_path, steal=True).__enter__()  # it has just been heard of
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    with RunLock(tmp_path): assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    assert names(tmp_path) == set()


def test_lock_of_another_computer(tmp_path):
    "Refused; taken over only on request, and only after two missed heartbeats."
    forge = lambda: ((tmp_path / "lock").write_text("4711\ncn0456\n"), (tmp_path / "owner.json").write_text('{"pid": 4711, "host": "cn0456", "since": "then"}'))
    forge()
    for steal in (False, True):
        with pytest.raises(CTDiffusionError, match="process 4711 on cn0456 since then"): RunLock(tmp_path, steal).__enter__()
    old = time.time() - 2.1 * folder_module.HEARTBEAT
    os.utime(tmp_path / "owner.json", (old, old))
    with pytest.raises(CTDiffusionError, match="steal_lock=True"): RunLock(tmp_path).__enter__()
    with RunLock(tmp_path, steal=True): pass
    assert names(tmp_path) == set()


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
