"Part C of the fault table: trainings that are killed, stopped, starved and poisoned. (F32 to F34, foreign weights: test_c_weights.py; F28's job scripts: test_c_jobs.py.)"
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import ended, forked, killed_at_random, life
from little_runs import CONFIG, FIRST, GANS, MODEL, ONE, STEPS, STORE, command, fingerprint, nothing_left_behind, play, played, run, save, silent, small, torchrun
from little_runs import memory, one_thread, there, whole  # noqa: F401, fixtures
from rows import refused
from test_processes import data, labels  # noqa: F401, fixtures
from test_processes import torchrun as processes_run

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.store import PrepareConfig, prepare
from ctdiffusion.data.whole import persistent
from ctdiffusion.synthesis.processes import as_words, synthesize_job, training
from ctdiffusion.training import folder as folder_module, state as state_module, step as step_module, trainer as trainer_module
from ctdiffusion.training.folder import RunLock, alive
from ctdiffusion.training.parameters import TrainJob
from ctdiffusion.training.runs import damage, latest_checkpoint, prune, read_checkpoint, read_metrics, write_checkpoint
from ctdiffusion.training.state import Contest, Denoising, State
from ctdiffusion.training.step import first_weights, sample_grid, weights_hash
from ctdiffusion.training.trainer import Pulse, Trainer



def saved(where: Path) -> int:
    "The step that the next call begins with."
    path = latest_checkpoint(where, silent)
    return read_checkpoint(path)["step"] if path else 0


def all_of(c: dict) -> str:
    "Changes with any bit of weights, average, moments and losses."
    return weights_hash({f"{g} {k}": v for g, t in dict(c["optim"], model=c["model"], ema=c["ema"]).items() for k, v in t.items()})


def tree(where: Path) -> set: return {str(p.relative_to(where)) for p in where.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def games(memory):
    "Undisturbed runs of the three GANs."
    for v in GANS: assert play(memory / v, v).done
    return {v: memory / v for v in GANS}


# ------------------------------------------------------------------------------------------------- F26, F27: kill -9

def test_F26_one_run_is_killed_thirty_times(memory, there):
    "At random moments; progress never goes backwards, at most one interval is lost, and the end is that of the undisturbed run."
    config, reached = replace(CONFIG, max_steps=200), [0]
    start = time.monotonic(); run(memory / "longer", config); pace = (time.monotonic() - start) / 200
    start = time.monotonic(); assert life(lambda: run(memory / "longer", config)) == 0; began = time.monotonic() - start
    real, shared = State.end_step, memory / "counter"
    def end_step(self, losses): real(self, losses); shared.write_text(f"{self.step}.")
    def work():
        State.end_step = end_step
        run(there, config, save_every=2)
    def look():
        counted = shared.read_text() if shared.exists() else ""
        done, left = int(counted[:-1]) if counted.endswith(".") else 0, saved(there)
        assert left >= reached[0] and done - left <= 2
        reached[0] = left
    assert killed_at_random(work, 30, 2 * began + 4 * pace, between=look) == 30
    names = ("checkpoints/step_00000200.safetensors", "checkpoints/step_00000020.safetensors", "metrics.csv", "samples/step_00000200.png", "samples/step_00000175.png", "samples/step_00000025.png")
    for name in names: assert (there / name).read_bytes() == (memory / "longer" / name).read_bytes(), name
    kept = read_checkpoint(there / names[0])
    assert kept["step"] == 200 and {"model", "ema"} <= kept.keys() and {"exp_avg", "exp_avg_sq"} <= kept["optim"].keys()
    assert nothing_left_behind(there) and {f for f in tree(there) if not f.startswith("checkpoints")} == {f for f in tree(memory / "longer") if not f.startswith("checkpoints")}
    assert (there / "train.log").read_text().count("continuing after") >= 3


def test_F26_gans_too(games, memory, there):
    "Generator and judge, spectral vectors, batch statistics, two Adams, the average of OASIS: killed at random moments."
    for n, (v, undisturbed) in enumerate(games.items()):
        start = time.monotonic(); assert life(lambda: play(memory / f"{v} again", v)) == 0; longest = time.monotonic() - start
        killed_at_random(lambda: play(there / v, v, save_every=4), 3, longest, seed=n)
        assert played(there / v) == played(undisturbed) and nothing_left_behind(there / v), v


def test_F26_the_same_by_one_command(whole, there):
    "The contract as it is used: a real process of Python, SIGKILL in step 24, the same command again."
    program = FIRST.format(folder=str(Path(__file__).parents[1])) + "import torch; torch.set_num_threads(1); run(sys.argv[1], save_every=10)"
    line = [sys.executable, "-c", program, str(there)]
    assert subprocess.run(line, env=ONE | {"CRASH_AT": "step@23"}).returncode == -signal.SIGKILL
    assert not (there / "DONE").exists() and saved(there) == 20
    assert subprocess.run(line, env=ONE).returncode == 0 and "continuing after step 20 of 60" in (there / "train.log").read_text()
    assert fingerprint(there) == fingerprint(whole)


POINTS = ("temp", "sidecar", "renamed", "pointer", "prune")


@pytest.mark.parametrize("first", [15, 45])
@pytest.mark.parametrize("point", POINTS)
def test_F27_killed_inside_of_a_save(whole, memory, there, monkeypatch, point, first):
    "At each of its steps, in a later save and in the very first (of nothing there is nothing to prune: there it is the first that prunes)."
    at = 30 if (point, first) == ("prune", 15) else first
    monkeypatch.setenv("CRASH_AT", f"{point}@{at}")
    every = 10 if at == 30 and point == "prune" else 15
    config = replace(CONFIG, milestones=()) if point == "prune" else CONFIG
    assert life(lambda: run(there, config, save_every=every)) == -signal.SIGKILL
    monkeypatch.delenv("CRASH_AT")
    before = max([s for s in range(every, at, every)] + [20] * (at > 20 and point != "prune"), default=0)
    assert saved(there) == (before if point in ("temp", "sidecar") else at)
    assert run(there, save_every=25).done  # never again at that step
    assert fingerprint(there) == fingerprint(whole) and nothing_left_behind(there)


@pytest.mark.parametrize("v, crash", [("oasis", "renamed@6"), ("spade", "sidecar@6"), ("spade", "step@8"), ("pix2pix", "temp@3"), ("pix2pix", "pointer@9")])
def test_F27_gans_too(games, there, monkeypatch, v, crash):
    "In the middle of a game, and inside of a save of both players."
    monkeypatch.setenv("CRASH_AT", crash)
    assert life(lambda: play(there, v, save_every=3)) == -signal.SIGKILL
    monkeypatch.delenv("CRASH_AT")
    assert play(there, v, save_every=5).done
    assert played(there) == played(games[v]) and nothing_left_behind(there)


def test_F27_killed_while_taking_the_lock(there, tmp_path):
    "Before its name is in it; and while taking a dead one's over. What others are just doing is left alone."
    there.mkdir(); (there / "lock").touch()
    dead, mine = forked(lambda: None), there / f"lock.break.{os.getpid()}.ab"
    ended(dead)
    for f in (there / f"lock.break.{dead}.ab", mine, there / "lock.break.me", there / ".owner.json.tmp99", there / "notes.txt"): f.touch()
    start = time.monotonic()
    with RunLock(there): assert tree(there) == {"lock", "owner.json", mine.name, "lock.break.me", "notes.txt"}
    assert time.monotonic() - start > 1  # its maker was given time to write
    assert tree(there) == {mine.name, "lock.break.me", "notes.txt"}


# ----------------------------------------------------------------------------------------- F28: asked to stop, or not

def acting(act) -> object:
    "A grid function that acts when it is drawn; pictures are drawn every 25 steps."
    draw = sample_grid(MODEL, STORE.labels[30:33], CONFIG.sampler)
    def grid(net): act(); return draw(net)
    return grid


@pytest.mark.parametrize("reason", ["STOP file", "interrupted", "max_hours"])
def test_F28_asked_to_stop_it_saves_and_goes_on_later(whole, there, reason):
    "Saved at once, exit code 0, no DONE, no lock; the same command goes on to the same bytes."
    def later():
        clock = dict(vars(time)) | dict(monotonic=lambda: time.monotonic() + 3600)
        folder_module.time = SimpleNamespace(**clock)
    act = {"STOP file": lambda: ((there / "STOP").touch(), later()), "interrupted": lambda: signal.raise_signal(signal.SIGINT), "max_hours": later}[reason]
    def work():
        result = run(there, replace(CONFIG, max_hours=1.0) if reason == "max_hours" else CONFIG, grid=acting(act))
        assert (result.reason, result.done) == (reason, False) and 25 <= result.step <= 26 and saved(there) == result.step
    assert life(work) == 0
    assert not (there / "DONE").exists() and nothing_left_behind(there)
    assert run(there).done and not (there / "STOP").exists() and fingerprint(there) == fingerprint(whole)


@pytest.mark.parametrize("s", [signal.SIGTERM, signal.SIGUSR1])
def test_F28_signals_without_a_script_cost_one_interval(whole, there, s):
    "Nobody made a STOP file: the process is gone at once, at most `save_every` steps are lost, the same command goes on."
    def work():
        real = Denoising.train_step
        def step(self):
            real(self)
            if self.step == 33: os.kill(os.getpid(), s)
        Denoising.train_step = step
        run(there, save_every=4)
    assert life(work) == -s and 33 - 4 <= saved(there) < 33 and not (there / "DONE").exists()
    assert run(there).done and fingerprint(there) == fingerprint(whole) and nothing_left_behind(there)


def test_F28_a_longer_run_that_is_stopped_is_not_done(there):
    "DONE is what a job script looks at: that of a shorter run must not stay."
    assert run(there, replace(CONFIG, max_steps=10)).done and (there / "DONE").exists()
    assert run(there, replace(CONFIG, max_hours=0.0)).reason == "max_hours" and not (there / "DONE").exists()


# ---------------------------------------------------------------------------------------------- F29: nowhere to write

@contextmanager
def small_disk():
    "A file system of 3 MB where one may be mounted; elsewhere a folder, and None: files are limited in size instead."
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True).returncode == 0
    try: yield place / "run", mounted
    finally:
        if mounted: subprocess.run(["umount", place])
        shutil.rmtree(place)


def limit(size: int) -> None:
    "No file of this process may grow beyond that."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def impatient() -> None: persistent.__defaults__ = (None, (0, 0))


def test_F29_disk_full_while_training(whole, capfd):
    "Three tries, then the run stops and does not go on without checkpoints; what was saved before is whole; with room again it continues."
    with small_disk() as (where, mounted):
        assert run(where, replace(CONFIG, max_steps=8)).done
        def work():
            impatient()
            tries, real_save, real_step = [], trainer_module.write_checkpoint, Denoising.train_step
            def write(*args): tries.append(1); print("try", len(tries), "in step", args[1], flush=True); return real_save(*args)
            def step(self):
                real_step(self)
                if self.step == 12 and mounted: (where.parent / "filler").write_bytes(bytes(shutil.disk_usage(where).free - 24_576))
                if self.step == 12 and not mounted: limit(20_000)
            trainer_module.write_checkpoint, Denoising.train_step = write, step
            run(where, save_every=5)
        assert life(work) == 1
        out, said = capfd.readouterr()
        size = (where / "checkpoints/step_00000010.safetensors").stat().st_size
        assert [line for line in out.splitlines() if "step 1" in line] == ["try 1 in step 10", *(f"try {n} in step 15" for n in (2, 3, 4))]
        reason = said.splitlines()[-1]
        for words in (f"CTDiffusionError: {where / 'checkpoints'}: found a file of ", "cannot be written (", "No space left" if mounted else "File too large", " bytes free; expected", "Make room", "nothing that was saved before is lost"): assert words in reason
        needed = int(reason.split("a file of ")[1].split(" bytes")[0].replace(",", ""))
        assert 0.7 * size < needed <= size and saved(where) == 10 and nothing_left_behind(where) and not (where / "DONE").exists()
        (where.parent / "filler").unlink(missing_ok=True)
        assert run(where).done and fingerprint(where) == fingerprint(whole)


def test_F29_a_folder_that_may_not_be_written_to(whole, capfd):
    "Nobody's process, in a folder that is read-only as a whole, or only where checkpoints go. (As root it becomes somebody else first.)"
    place = Path(tempfile.mkdtemp()); place.chmod(0o755)
    where = place / "run"
    try:
        run(where, replace(CONFIG, max_steps=8))
        def work():
            if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
            impatient(); run(where, save_every=5)
        for folder, names in ((where, "lock"), (where / "checkpoints", "checkpoints")):
            for p in where.rglob("*"): p.chmod(0o777 if p.is_dir() else 0o666)
            where.chmod(0o777); folder.chmod(0o555)
            assert life(work) == 1
            reason = capfd.readouterr().err.splitlines()[-1]
            assert f"CTDiffusionError: {where / names}" in reason and "Permission denied" in reason and "bytes free" in reason and "correct the rights" in reason
            folder.chmod(0o777)
            assert saved(where) == 8 and nothing_left_behind(where)
        assert run(where).done and fingerprint(where) == fingerprint(whole)
    finally: shutil.rmtree(place)


@pytest.mark.parametrize("what", ["write_checkpoint", "write_png", "add_metrics", "DONE", "run.json"])
def test_F29_quota_wherever_it_strikes(there, monkeypatch, what):
    "Every file of a run: its path, why, and what to do; the lock is free afterwards, and nothing is half written."
    def full(*args): raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    real = trainer_module.atomic_write
    monkeypatch.setattr(persistent, "__defaults__", (None, (0, 0)))
    if what == "DONE": monkeypatch.setattr(trainer_module, "atomic_write", full)
    elif what == "run.json": monkeypatch.setattr(folder_module, "atomic_write", lambda path, content: full() if Path(path).name == what else real(path, content))
    else: monkeypatch.setattr(trainer_module, what, full)
    path = {"write_checkpoint": there / "checkpoints", "write_png": there / "samples/step_00000025.png", "add_metrics": there / "metrics.csv"}.get(what, there)
    with refused(path, "that cannot be written", "quota", "bytes free", "run the same command again"): run(there, replace(CONFIG, max_steps=30))
    assert nothing_left_behind(there) and not (there / "DONE").exists()


@pytest.mark.parametrize("name", ["train.log", "metrics.csv"])
def test_F29_no_half_line(whole, there, capfd, name):
    "The limit is reached in the middle of a line: what was written of it is taken back, the run stops, and goes on when there is room."
    run(there, replace(CONFIG, max_steps=8), save_every=5)
    file, most = there / name, 300_000
    before = file.read_text()
    line = before.splitlines()[-1] + "\n"
    file.write_text(before + line * ((most - len(before)) // len(line)))
    size = file.stat().st_size
    def work(): limit(size + 10); impatient(); run(there, save_every=5)
    assert life(work) == 1
    reason = capfd.readouterr().err.splitlines()[-1]
    assert f"CTDiffusionError: {file}: found a file" in reason and "File too large" in reason and "bytes free" in reason
    assert file.stat().st_size == size and nothing_left_behind(there)
    file.write_text(before)
    assert run(there).done and fingerprint(there) == fingerprint(whole)


@pytest.mark.parametrize("torn", ["in the head", "in a line", "after a line", "garbage"])
def test_F29_torn_metrics_are_mended(whole, there, torn):
    "Whatever a power cut left at the end of metrics.csv: readers pass over it, and the run that goes on makes it whole."
    run(there, replace(CONFIG, max_steps=5 if torn == "in the head" else 23), save_every=1)
    file = there / "metrics.csv"
    before = file.read_text() if file.exists() else ""
    file.write_bytes({"in the head": b"step,los", "in a line": before.encode() + b"28,0.", "after a line": before.encode() + b"28,0.5\n", "garbage": before.encode() + bytes(40) + b"\xff\xfe,\n"}[torn])
    assert len(read_metrics(there).get("step", [])) == before.count("\n") - bool(before)
    assert run(there).done and fingerprint(there) == fingerprint(whole)


def test_F29_no_room_is_said_before_the_first_step(there, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda p: SimpleNamespace(free=10**4))
    with refused(there, "10,000 bytes free", "for 4 checkpoints of"): run(there)
    assert not (there / "checkpoints").exists() and nothing_left_behind(there)


def test_F29_who_cannot_begin_keeps_nobody_out(there, monkeypatch):
    "The disk is full when the lock is taken: the error is kept, by a notebook for instance, and the lock is not."
    real = folder_module.atomic_write
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(folder_module, "atomic_write", full)
    with pytest.raises(CTDiffusionError) as kept: run(there)
    assert str(there) in str(kept.value) and nothing_left_behind(there)
    monkeypatch.setattr(folder_module, "atomic_write", real)
    with RunLock(there): pass


# ----------------------------------------------------------------------------------- F30, F31: checkpoints that are bad

BROKEN = {
    **{f"newest cut at {n}": lambda run, newest, n=n: os.truncate(newest, int(n * newest.stat().st_size)) for n in (0, 0.01, 0.3, 0.7, 0.999)},
    "newest gone": lambda run, newest: newest.unlink(),
    "newest longer": lambda run, newest: newest.write_bytes(newest.read_bytes() + b"x"),
    "sidecar gone": lambda run, newest: newest.with_suffix(".json").unlink(),
    "sidecar empty": lambda run, newest: newest.with_suffix(".json").write_text(""),
    "sidecar garbage": lambda run, newest: newest.with_suffix(".json").write_text('{"bytes": null, "sha256": []}'),
    "sidecar of another": lambda run, newest: newest.with_suffix(".json").write_text((newest.parent / "step_00000030.json").read_text()),
    "pointer empty": lambda run, newest: (run / "latest.json").write_text(""),
    "pointer cut": lambda run, newest: os.truncate(run / "latest.json", 20),
    "pointer garbage": lambda run, newest: (run / "latest.json").write_bytes(b"\xff\x00{" * 20),
    "pointer a list": lambda run, newest: (run / "latest.json").write_text("[1, 2]"),
    "pointer gone": lambda run, newest: (run / "latest.json").unlink(),
}


@pytest.fixture(scope="module")
def half(memory) -> Path:
    "A run that was stopped after 40 steps, with checkpoints of 20, 30 and 40."
    run(memory / "half", replace(CONFIG, max_steps=40), save_every=15)
    (memory / "half/DONE").unlink()
    return memory / "half"


@pytest.mark.parametrize("what", BROKEN)
def test_F30_damaged_newest_costs_time_only(whole, half, there, what):
    "The run goes on from the one before, says both names, and ends with the same bytes; a broken pointer alone loses nothing."
    shutil.copytree(half, there)
    assert sorted(p.name for p in (there / "checkpoints").glob("*.safetensors")) == [f"step_{n:08d}.safetensors" for n in (20, 30, 40)]
    BROKEN[what](there, there / "checkpoints/step_00000040.safetensors")
    said, lost = [], not what.startswith("pointer")
    assert run(there, say=said.append, save_every=9).done
    if what != "pointer gone": assert any(("step_00000040" if lost else "latest.json") in line and f"using step_000000{30 if lost else 40}.safetensors" in line for line in said)
    if what.startswith("newest cut"): assert any(" bytes)" in line for line in said)
    assert f"continuing after step {30 if lost else 40}" in "".join(said) and fingerprint(there) == fingerprint(whole) and nothing_left_behind(there)


def test_F30_none_good_starts_nothing(half, there):
    "Cut off, lost, or all but the pointer lost: an error that lists them; the folder stays as it was. Where nothing was ever saved, nothing is wrong."
    for n, spoil in enumerate((lambda f: os.truncate(f, 100), lambda f: f.with_suffix(".json").unlink(), Path.unlink)):
        where = there / str(n)
        shutil.copytree(half, where)
        for f in list(where.glob("checkpoints/*.safetensors")): spoil(f)
        before = {p: p.read_bytes() for p in where.rglob("*") if p.is_file()}
        with refused(where, "no usable checkpoint", "step_00000040", *([] if spoil is Path.unlink else ["step_00000030", "step_00000020"]), "move the folder away"): run(where)
        assert before == {p: p.read_bytes() for p in where.rglob("*") if p.is_file()}
    (where / "latest.json").unlink()
    assert latest_checkpoint(where, silent) is None


def test_F30_a_damaged_one_takes_no_good_ones_place(tmp_path):
    "Step 30 is damaged, the run goes back to 20 and saves 24 and 28: both are kept, and 30 is none of the last two."
    for step in (10, 20, 30): save(tmp_path, step)
    os.truncate(tmp_path / "checkpoints/step_00000030.safetensors", 99)
    for step in (24, 28): save(tmp_path, step); prune(tmp_path, milestones=(10,))
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("checkpoints/*.safetensors")) == [10, 24, 28] and len(tree(tmp_path)) == 7


def test_F31_two_hundred_flipped_bits(half, there):
    """One bit anywhere in the newest checkpoint, its sidecar or latest.json: 0 silent loads.

    In the tensors every flip is found. One in the papers may hit a word that decides nothing: then the right weights come, never others."""
    shutil.copytree(half, there)
    newest = there / "checkpoints/step_00000040.safetensors"
    right = {40: read_checkpoint(newest), 30: read_checkpoint(newest.with_name("step_00000030.safetensors"))}
    hashes = {step: all_of(c) for step, c in right.items()}
    rng, found = np.random.default_rng(0), []
    for file, flips in ((newest, 200), (newest.with_suffix(".json"), 60), (there / "latest.json", 60)):
        data = file.read_bytes()
        for at, bit in zip(rng.integers(0, len(data), flips), rng.integers(0, 8, flips)):
            broken = bytearray(data); broken[at] ^= 1 << bit; file.write_bytes(broken)
            said = []
            c = read_checkpoint(path := latest_checkpoint(there, said.append))
            assert int(path.stem[5:]) == c["step"] in ((30,) if file is newest else (40,) if file.name == "latest.json" else (30, 40))
            assert all_of(c) == hashes[c["step"]]
            if c["step"] == 30: found.append(file); assert newest.name in said[0] and path.name in said[0]
            if file is newest:
                with refused(newest, "another sha256"): read_checkpoint(newest)
        file.write_bytes(data)
    assert found.count(newest) == 200 and 20 < found.count(newest.with_suffix(".json")) < 60 and damage(newest) is None


# ------------------------------------------------------------------------------------------------- F35: not a number

def watched(monkeypatch, kind) -> list:
    "The state that trains, once it does."
    seen, real = [], kind.train_step
    def train_step(self): seen[:] = [self]; real(self)
    monkeypatch.setattr(kind, "train_step", train_step)
    return seen


def spoil(monkeypatch, kind: type, what: str, at: int, bad: float) -> None:
    "One thing is not finite in step `at` (counted from 1): a pixel, a loss, or a gradient. Losses stay finite where the gradient is what is spoilt."
    seen, now = watched(monkeypatch, kind), lambda: seen[0].step + 1 == at
    if what == "batch":
        fetch = state_module.fetch
        def broken(*args): x, y = fetch(*args); return torch.where(torch.arange(x.numel()).view(x.shape) == 99, bad if seen and now() else x, x), y
        monkeypatch.setattr(state_module, "fetch", broken)
    elif what == "gradient":
        descend = kind.descend
        def steep(self, who):
            if now(): next(p for p in getattr(self.whole, who, self.whole).parameters() if p.grad is not None).grad.view(-1)[0] = bad
            descend(self, who)
        monkeypatch.setattr(kind, "descend", steep)
    elif kind is Denoising:
        losses = state_module.losses_of
        monkeypatch.setattr(state_module, "losses_of", lambda *args: losses(*args) * (bad if now() else 1))
    else:
        move = kind.move
        def paid(self, who, *args): return {k: v * (bad if now() and who == "judge" else 1) for k, v in move(self, who, *args).items()}
        monkeypatch.setattr(kind, "move", paid)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient", "batch"])
@pytest.mark.parametrize("variant", ["mask", "mask in bf16", "oasis", "pix2pix"])
def test_F35_stopped_in_the_step_that_was_not_finite(there, monkeypatch, variant, what, bad):
    """Named with its slices, their patients and the last good checkpoint; nothing of it is written, also where that very step would be saved.

    In bfloat16 as on a graphics card (here on the CPU). There is no float16 and no scaler whose skipped steps would have to be counted."""
    gan = variant in GANS
    if "bf16" in variant: monkeypatch.setattr(step_module, "bfloat16", lambda device: torch.autocast("cpu", torch.bfloat16))
    spoil(monkeypatch, Contest if gan else Denoising, what, 10, bad)
    options = dict(save_every=5, val_every=0, grid=None)
    with refused(there, "a loss or gradient that is not finite in step 10, slices [", "of case_", "step_00000005.safetensors", "None of it was saved"):
        play(there, variant, **options) if gan else run(there, replace(CONFIG, grad_clip=None if what == "gradient" else 1.0), **options)
    good = read_checkpoint(latest_checkpoint(there, silent))
    assert good["step"] == 5 and all(v.isfinite().all() for g in ("model", "ema") for v in good[g].values()) and nothing_left_behind(there)
    assert all(np.isfinite(read_metrics(there)["loss"])) and max(read_metrics(there)["step"]) < 10


@pytest.mark.parametrize("what", ["weight", "average", "moment"])
def test_F35_weights_that_are_not_finite_are_never_saved(there, monkeypatch, what):
    "Finite losses and gradients, and an infinite weight, average or moment, in the very step that is saved."
    real = Denoising.train_step
    def broken(self):
        real(self)
        p = next(self.net.parameters())
        if self.step == 10: {"weight": p.data, "average": next(iter(self.ema.weights.values())), "moment": self.moments()[p]["exp_avg_sq"]}[what].view(-1)[0] = float("inf")
    monkeypatch.setattr(Denoising, "train_step", broken)
    with refused(there, "a weight or moment (", "not finite in step 10, slices [", "case_", "step_00000005"): run(there, save_every=5)
    assert saved(there) == 5


def test_F35_weights_that_are_not_finite_are_never_loaded(whole, there, memory):
    "As a start, or to go on from; for a GAN as well."
    poisoned = {k: v.clone() for k, v in read_checkpoint(whole / "checkpoints/step_00000060.safetensors")["ema"].items()}
    name = list(poisoned)[3]
    poisoned[name].view(-1)[0] = float("nan")
    with refused("init", f"not finite: {name}", "older checkpoint"): run(there, init=poisoned)
    assert not (there / "checkpoints").exists()
    game_weights = {k: v.clone() for k, v in first_weights(small("spade"), 0)[0].state_dict().items()}
    next(v for k, v in game_weights.items() if k.startswith("judge.")).view(-1)[0] = float("inf")
    with refused("init", "not finite: judge."): play(there / "game", "spade", init=game_weights)
    run(there, replace(CONFIG, max_steps=5))  # a checkpoint that somebody wrote with another program
    c = read_checkpoint(there / "checkpoints/step_00000005.safetensors")
    c["model"][name].view(-1)[0] = float("inf")
    write_checkpoint(there, 5, dict(model=c["model"], ema=c["ema"], **c["optim"]), c["meta"])
    with refused(there / "checkpoints/step_00000005.safetensors", f"not finite: {name}"): run(there)


# ------------------------------------------------------------------------------------------------- F36: one folder, two jobs

def test_F36_second_job_is_refused_and_a_dead_one_replaced(there, monkeypatch):
    "Two processes; the second is told who works there since when, also with steal_lock, and changes nothing. The first is killed: the folder is free at once."
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    ready, go = os.pipe()
    def work(): run(there, grid=acting(lambda: (os.write(go, b"x"), time.sleep(60))), save_every=10)
    pid = forked(work, 60)
    os.read(ready, 1)
    before = {p: p.read_bytes() for p in there.rglob("*") if p.is_file()}
    for steal in (False, True):
        with refused(there, f"in use by job 123 on {socket.gethostname()} since 20", "sign of life", "choose another run_dir"): run(there, steal_lock=steal)
    assert before == {p: p.read_bytes() for p in there.rglob("*") if p.is_file()}
    os.kill(pid, signal.SIGKILL); ended(pid)
    assert (there / "lock").exists() and run(there).done and nothing_left_behind(there)


def test_F36_lock_of_another_computer(there):
    "Refused; taken over only on request, and only after two missed heartbeats. As long as it is alive it gives signs of life."
    there.mkdir()
    forge = lambda: ((there / "lock").write_text("4711\ncn0456\n"), (there / "owner.json").write_text('{"pid": 4711, "host": "cn0456", "since": "then"}'))
    forge()
    aged = lambda beats: os.utime(there / "owner.json", (time.time() - beats * folder_module.HEARTBEAT,) * 2)
    for steal, beats in ((False, 0), (True, 0), (True, 1.9), (False, 2.1), (False, 1000)):
        aged(beats)
        with refused(there, "in use by process 4711 on cn0456 since then", "pass steal_lock=True (-p steal_lock True) once it was silent for 600 s"): run(there, steal_lock=steal)
    aged(2.1)
    assert run(there, replace(CONFIG, max_steps=2), steal_lock=True).done and nothing_left_behind(there)
    (there / "lock").write_text("4711\ncn0456\n")  # it has just come, its name will follow
    with refused(there, "in use by process ?"): run(there, steal_lock=True)


def test_F36_an_owner_that_wakes_up_leaves(there):
    "It slept, somebody else took the folder over: it says so, saves nothing more, and takes nobody's lock away."
    def other(): (there / "owner.json").write_text('{"pid": 4711, "host": "cn0456", "since": "now"}'); clock.__dict__.update(monotonic=lambda: time.monotonic() + 60)
    clock = SimpleNamespace(**vars(time))
    def work():
        folder_module.time = clock
        with refused(there, "taken over by process 4711 on cn0456 since now"): run(there, grid=acting(other), save_every=10)
    assert life(work) == 0 and saved(there) in (20, 25)
    assert json.loads((there / "owner.json").read_text())["host"] == "cn0456"
    lock = RunLock(there.with_name("awake"))
    with lock:
        old = time.time() - 100; os.utime(lock.owner, (old, old)); lock.beaten = 0.0; lock.beat()
        assert lock.silence() < 50


def test_F36_what_the_message_advises_can_be_done(root, data):
    "steal_lock is a parameter of the notebook, and of the processes below it."
    job = TrainJob(steal_lock=True)
    assert "steal_lock: bool = False" in (root / "nbs/train.ipynb").read_text() and as_words(job) == ["-r", "steal_lock", "True"]
    assert training(job, data[1])["steal_lock"] is True


def test_F36_a_lock_is_released_by_an_error_and_sweeps_only_its_own_litter(there):
    for folder in ("checkpoints/.ipynb_checkpoints", ".ipynb_checkpoints"): (there / folder).mkdir(parents=True)
    for litter in (".latest.json.tmp99", "checkpoints/.step.safetensors.tmp99", "checkpoints/.tmpAb3", "notes.txt"): (there / litter).touch()
    with pytest.raises(KeyError):
        with RunLock(there) as lock: raise KeyError
    assert tree(there) == {"notes.txt"} and lock.beaten == 0.0
    with RunLock(there): pass


# ------------------------------------------------------------------------------------------------- F37: the same end

@pytest.mark.parametrize("how", ["saved at 23", "saved every 10", "saved every step", "Ctrl-C", "slices in memory"])
def test_F37_60_steps_are_23_and_37(whole, there, how):
    """Interrupted after step 23, in the middle of an epoch (7.5 steps) and between two lines of metrics.csv; whatever the interval, and by Ctrl-C.

    There are no loader processes whose number could matter; the other way to the slices is the device's memory (`keep`). The number of threads is part of the promise."""
    every = {"saved every 10": 10, "saved every step": 1, "Ctrl-C": 1000}.get(how, 23)
    def work():
        real = Denoising.train_step
        def step(self):
            if self.step == 23 and how != "Ctrl-C": os.kill(os.getpid(), signal.SIGKILL)
            real(self)
            if self.step == 23 and how == "Ctrl-C": signal.raise_signal(signal.SIGINT)
        Denoising.train_step = step
        run(there, save_every=every)
    assert life(work) == (0 if how == "Ctrl-C" else -signal.SIGKILL)
    assert saved(there) == (20 if every == 10 else 23) and not (there / "DONE").exists()
    assert run(there, save_every=7, keep=how == "slices in memory").done
    assert fingerprint(there) == fingerprint(whole) and nothing_left_behind(there)
    assert all_of(read_checkpoint(there / "checkpoints/step_00000060.safetensors")) == all_of(read_checkpoint(whole / "checkpoints/step_00000060.safetensors"))
    steps = [line.split(",")[0] for line in (there / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(7, 60, 7))]


def test_F37_second_interrupt_leaves_at_once_and_frees_the_folder(whole, there):
    def twice(): signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): run(there, grid=acting(twice), save_every=10)
    assert nothing_left_behind(there) and saved(there) == 20
    assert run(there).done and fingerprint(there) == fingerprint(whole)


# ------------------------------------------------------------------------------------------- F38: one of several is lost

def test_F38_a_worker_of_a_preparation_is_killed(tmp_path):
    "The only pool of workers there is (batches are read by the training itself): an error within a minute, no half store, and the next call makes it."
    root = make_dataset(tmp_path / "data", 3, 1, size=48)
    def kill() -> None:
        while not (workers := multiprocessing.active_children()): time.sleep(0.01)
        time.sleep(0.3); os.kill(workers[0].pid, signal.SIGKILL)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with refused(tmp_path, "a worker process that died", "Use fewer processes"): prepare(root, tmp_path / "store", PrepareConfig(32), processes=2)
    assert not (tmp_path / "store").exists() and not (tmp_path / ".store.tmp").exists()
    assert len(prepare(root, tmp_path / "store", PrepareConfig(32)).cases) == 4


def test_F38_a_killed_process_takes_the_others_along(there):
    "SIGKILL of process 1 of 2 in step 6: all are gone within a minute, the last checkpoint is whole, the same command goes on from it."
    program = "import os, pathlib\npathlib.Path(f'{sys.argv[1]}.{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\nprint(run(sys.argv[1], replace(CONFIG, max_steps=8), save_every=2).done)"
    began = subprocess.Popen(command(there, program), env=ONE | {"CRASH_AT": "step@6#1"}, stderr=subprocess.PIPE, text=True)
    assert began.wait(600) != 0 and "Signal 9" in began.stderr.read()
    pids = [int(Path(f"{there}.{r}").read_text()) for r in range(2)]
    end = time.monotonic() + 300
    while any(alive(pid) for pid in pids): assert time.monotonic() < end; time.sleep(0.1)
    assert saved(there) == 6 and not (there / "DONE").exists()
    done = torchrun(there, program, timeout=600)
    assert done.returncode == 0 and done.stdout.replace("\n", "") == "TrueTrue", done.stderr[-3000:]
    assert "continuing after step 6" in (there / "train.log").read_text() and nothing_left_behind(there)


def test_F38_a_failed_process_takes_the_others_along(there):
    "One of two raises in step 3: the command ends with its error, soon, and does not hang."
    program = "real = Denoising.train_step\ndef broken(self):\n    if self.rank == 1 and self.step == 3: raise MemoryError('killed')\n    real(self)\nDenoising.train_step = broken\nrun(sys.argv[1], save_every=2)"
    done = torchrun(there, program, timeout=600)
    assert done.returncode != 0 and "MemoryError" in done.stderr and saved(there) == 2 and not (there / "DONE").exists()


def test_F38_who_waits_for_a_computer_that_is_gone_leaves(there):
    "No word comes from another computer that lost its power: the pulse ends the wait, frees the folder and says why."
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    there.mkdir()
    for name in ("lock", "owner.json"): (there / name).touch()
    def alone():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port))
        trainer = Trainer(Denoising(MODEL, CONFIG, STORE, device="cpu"), there, say=None)
        with Pulse(0, 2, trainer.lost, silence=1): time.sleep(10)
    assert life(alone) == 70 and trainer_module.SILENCE < 60
    assert nothing_left_behind(there) and "lost process 1" in (there / "train.log").read_text()


def test_F38_a_lost_process_leaves_its_volumes_to_the_next_call(labels, tmp_path):
    "SIGKILL of one of two before its second volume: an error; what was finished is found, and the bytes are those of one process."
    words = ["synthesize", *as_words(replace(labels, out=str(tmp_path / "two")))]
    lost = processes_run(*words, CRASH_AT="volume@1#1")
    names = [v["out"].name for v in replace(labels, out=str(tmp_path)).volumes()]
    made = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "two").glob("*.nii.gz")}
    assert lost.returncode != 0 and names[1] in made and names[3] not in made
    assert processes_run(*words).returncode == 0
    assert [f.name for f in sorted((tmp_path / "two").glob("*.nii.gz"))] == names and all((tmp_path / "two" / n).stat().st_mtime_ns == t for n, t in made.items())
    for f in synthesize_job(replace(labels, out=str(tmp_path / "one")), silent): assert f.read_bytes() == (tmp_path / "two" / f.name).read_bytes()
    assert sorted(f.name for f in (tmp_path / "two").iterdir()) == sorted(f.name for f in (tmp_path / "one").iterdir())
