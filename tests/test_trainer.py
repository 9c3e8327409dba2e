"A run that is killed, stopped, starved or poisoned ends as if nothing had happened, or says what did."
import csv
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.store import PrepareConfig
from ctdiffusion.data.volumes import sha256_file
from ctdiffusion.models.variants import ModelConfig, TrainConfig
from ctdiffusion.training import state as state_module
from ctdiffusion.training.folder import RunLock
from ctdiffusion.training.runs import latest_checkpoint, read_checkpoint, read_metrics
from ctdiffusion.training.state import Denoising
from ctdiffusion.training.step import EMA, first_weights, sample_grid, weights_hash
from ctdiffusion.training.trainer import Pulse, Result, Trainer, train
from test_runs import forked, silent

MODEL = ModelConfig("mask", size=16, channels=4, mult=(1, 2), blocks=1, attention=(8,), groups=4, encoder_blocks=1, target="velocity", dropout=0.1)
CONFIG = TrainConfig(batch=4, lr=1e-3, warmup=10, max_steps=60, ema=0.99, ema_warmup=True, grad_clip=1.0, log_every=7, grid_every=25, milestones=(20,), sampler="ddim5")
STEPS = 60


class Slices:
    "A store in memory: 30 slices to train on (60 steps are eight epochs), 10 held out."
    hash, table, config = "in memory", AMOS, PrepareConfig(size=16)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.labels = np.zeros((40, 16, 16), np.uint8)
        self.labels[:, 3:13, 3:13], self.labels[:, 6:9, 6:9] = 16, rng.integers(1, 16, 40)[:, None, None]
        self.images = (self.labels * 12 + rng.integers(0, 20, self.labels.shape)).astype(np.uint8)

    def rows(self, split: str) -> np.ndarray: return np.arange(30) if split == "train" else np.arange(30, 40)
    def case_of(self, row: int) -> dict: return dict(id=f"case_{row // 10}")


STORE = Slices()


def run(where: Path, config: TrainConfig = CONFIG, model: ModelConfig = MODEL, **options) -> Result:
    "The command of this file: everybody who wants the same run calls this."
    options = dict(say=None, val_every=14, device="cpu", grid=sample_grid(model, STORE.labels[30:33], config.sampler)) | options
    return train(model, config, options.pop("store", STORE), where, **options)


def fingerprint(where: Path, step: int = STEPS) -> dict:
    "All that an undisturbed and a disturbed run must have in common."
    files = [f"checkpoints/step_{step:08d}.safetensors", "metrics.csv", f"samples/step_{step:08d}.png", "samples/step_00000025.png"]
    return {f: sha256_file(where / f) for f in files}


def nothing_left_behind(where: Path) -> bool: return not [p for p in where.rglob("*") if p.name.startswith(".") or p.name in ("lock", "owner.json")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Bytes are promised at a fixed number of threads, and a forked child has one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Path:
    "Where fsync is free, if there is such a place."
    shm = Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK)): yield tmp_path_factory.mktemp("runs"); return
    there = Path(tempfile.mkdtemp(dir=shm))
    yield there
    shutil.rmtree(there)


@pytest.fixture(scope="module")
def whole(memory) -> Path:
    "The undisturbed run."
    result = run(memory / "whole")
    assert (result.step, result.done, result.reason) == (STEPS, True, "done") and result.checkpoint.name == "step_00000060.safetensors"
    return memory / "whole"


@pytest.fixture
def there(memory, request) -> Path: return memory / "".join(c if c.isalnum() else "-" for c in request.node.name)


# ---------------------------------------------------------------------------------------------------- killed, resumed

@pytest.mark.parametrize("save_every,resumed_at", [(23, 23), (10, 20), (1, 23)])
def test_60_steps_equal_23_killed_and_37(whole, there, monkeypatch, save_every, resumed_at):
    "SIGKILL at step 23, then the same call again; whatever the save interval; 23 is in the middle of an epoch and of a logging window."
    monkeypatch.setenv("CRASH_AT", "step@23")
    assert forked(lambda: run(there, save_every=save_every)) == -signal.SIGKILL
    monkeypatch.delenv("CRASH_AT")
    assert read_checkpoint(latest_checkpoint(there, silent))["step"] == resumed_at and not (there / "DONE").exists()
    assert run(there).done
    assert fingerprint(there) == fingerprint(whole) and nothing_left_behind(there)


def test_the_same_by_one_command(whole, there):
    "The acceptance of the contract: a real process, SIGKILL at 23, the same command again."
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1); from test_trainer import run; run(sys.argv[1], save_every=23)"
    command = [sys.executable, "-c", program, str(there)]
    assert subprocess.run(command, env=os.environ | {"CRASH_AT": "step@23"}).returncode == -signal.SIGKILL
    assert subprocess.run(command).returncode == 0
    assert fingerprint(there) == fingerprint(whole)


def test_killed_at_random_moments(whole, there):
    "Up to eight lives of random length; progress never goes backwards."
    rng, reached = np.random.default_rng(), 0
    for life in range(8):
        pid = os.fork()
        if pid == 0:
            try: run(there, save_every=3); os._exit(0)
            except BaseException: os._exit(1)
        time.sleep(rng.uniform(0.2, 1.5))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        path = latest_checkpoint(there, silent)
        step = read_checkpoint(path)["step"] if path else 0
        assert step >= reached
        reached = step
        if (there / "DONE").exists(): break
    assert run(there).done and fingerprint(there) == fingerprint(whole) and nothing_left_behind(there)


@pytest.mark.parametrize("point", ["temp@45", "sidecar@45", "renamed@45", "pointer@45", "prune@30"])
def test_killed_inside_a_save(whole, there, monkeypatch, point):
    monkeypatch.setenv("CRASH_AT", point)
    assert forked(lambda: run(there, save_every=15)) == -signal.SIGKILL
    monkeypatch.delenv("CRASH_AT")
    assert run(there).done and fingerprint(there) == fingerprint(whole) and nothing_left_behind(there)


def test_damaged_newest_checkpoint_costs_time_only(whole, there):
    run(there, replace(CONFIG, max_steps=40), save_every=15)
    os.truncate(latest_checkpoint(there, silent), 1000)
    said = []
    assert run(there, say=said.append).done and fingerprint(there) == fingerprint(whole)
    assert any("passed over step_00000040.safetensors" in line and "using step_00000030.safetensors" in line for line in said)


def test_lost_checkpoints_never_start_anew(there):
    run(there, replace(CONFIG, max_steps=8))
    for p in (there / "checkpoints").iterdir(): p.unlink()
    with pytest.raises(CTDiffusionError, match="no usable checkpoint"): run(there)


def test_logging_validating_and_drawing_change_nothing(whole, there):
    run(there, replace(CONFIG, log_every=11, grid_every=0, milestones=()), grid=None, val_every=0)
    a, b = (read_checkpoint(w / "checkpoints/step_00000060.safetensors") for w in (whole, there))
    assert all(torch.equal(v, b[g][k]) for g in ("model", "ema") for k, v in a[g].items())
    assert [int(p.stem[5:]) for p in sorted((there / "checkpoints").glob("*.safetensors"))] == [60]


# -------------------------------------------------------------------------------------------------- stopped, continued

def after(steps: int, act) -> object:
    "A grid function that acts when it is drawn; pictures are drawn every 25 steps."
    draw = sample_grid(MODEL, STORE.labels[30:33], CONFIG.sampler)
    def grid(net): act(); return draw(net)
    return grid


@pytest.mark.parametrize("reason", ["STOP file", "interrupted", "max_hours"])
def test_stopped_cleanly_and_continued(whole, there, monkeypatch, reason):
    "Saved at once, no DONE, no lock; the same command goes on to the same bytes."
    act = {"STOP file": lambda: ((there / "STOP").touch(), time.sleep(1.05)), "interrupted": lambda: signal.raise_signal(signal.SIGINT), "max_hours": lambda: time.sleep(1.5)}[reason]
    config, before = replace(CONFIG, max_hours=1.4 / 3600) if reason == "max_hours" else CONFIG, signal.getsignal(signal.SIGINT)
    result = run(there, config, grid=after(25, act))
    assert (result.reason, result.done) == (reason, False) and result.step <= 26
    assert read_checkpoint(result.checkpoint)["step"] == result.step
    assert not (there / "DONE").exists() and nothing_left_behind(there) and signal.getsignal(signal.SIGINT) is before
    assert run(there).done and not (there / "STOP").exists()
    assert fingerprint(there) == fingerprint(whole)


def test_second_interrupt_raises_and_frees_the_folder(there):
    def twice(): signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): run(there, grid=after(25, twice), save_every=10)
    assert nothing_left_behind(there) and read_checkpoint(latest_checkpoint(there, silent))["step"] == 20


def test_finished_run_returns_at_once_and_goes_on_if_asked_for_more(whole, there):
    short = run(there, replace(CONFIG, max_steps=30))
    stamp = short.checkpoint.stat().st_mtime_ns
    assert run(there, replace(CONFIG, max_steps=30)) == short and short.checkpoint.stat().st_mtime_ns == stamp
    assert run(there).step == STEPS and fingerprint(there) == fingerprint(whole)
    assert (there / "DONE").read_text() == "60\n"


def test_second_job_is_refused(there):
    with RunLock(there):
        with pytest.raises(CTDiffusionError, match="in use by"): run(there)
    assert not (there / "run.json").exists()


# --------------------------------------------------------------------------------------------- full disks, bad numbers

def test_disk_full_while_training(there, monkeypatch, capfd):
    "The run stops, does not go on without checkpoints; what was saved before is whole; with room again it continues."
    run(there, replace(CONFIG, max_steps=8))
    def life():
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        run(there, replace(CONFIG, max_steps=20), save_every=5)
    assert forked(life) == 1
    assert "cannot be written" in capfd.readouterr().out
    assert read_checkpoint(latest_checkpoint(there, silent))["step"] == 8
    assert run(there, replace(CONFIG, max_steps=20)).done


def test_no_room_is_said_before_the_first_step(there, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda p: SimpleNamespace(free=10**4))
    with pytest.raises(CTDiffusionError, match="10,000 bytes free"): run(there)
    assert not (there / "checkpoints").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(there, monkeypatch, bad):
    "Named by step, slices and cases, with the last good checkpoint; nothing of it is written."
    real, calls = state_module.losses_of, []
    def poisoned(*args):
        calls.append(1)
        return real(*args) * (bad if len(calls) == 12 else 1)
    monkeypatch.setattr(state_module, "losses_of", poisoned)
    with pytest.raises(CTDiffusionError, match=r"loss that is not finite in step 12, slices \[.*case_.*step_00000010") as error: run(there, save_every=5, val_every=0)
    assert "not finite" in str(error.value)
    good = read_checkpoint(latest_checkpoint(there, silent))
    assert good["step"] == 10 and all(v.isfinite().all() for g in ("model", "ema") for v in good[g].values())
    assert list(read_metrics(there)["step"]) == [7]


def test_weight_that_is_not_finite(there, monkeypatch):
    "An infinite update with a finite loss, in the very step that is saved."
    real = Denoising.train_step
    def broken(self):
        real(self)
        if self.step == 10: next(self.net.parameters()).data[0] = float("inf")
    monkeypatch.setattr(Denoising, "train_step", broken)
    with pytest.raises(CTDiffusionError, match="a weight that is not finite in step 10"): run(there, save_every=5)
    assert read_checkpoint(latest_checkpoint(there, silent))["step"] == 5


# -------------------------------------------------------------------------------------------------------- the weights

def test_average_and_weights_never_mix():
    net, _ = first_weights(MODEL, 0)
    ema = EMA(net, 0.9)
    with torch.no_grad():
        for p in net.parameters(): p.add_(1)
    mine = weights_hash(net.state_dict())
    ema.update(0)
    with ema.applied(): assert weights_hash(net.state_dict()) not in (mine, weights_hash(ema.weights))
    average = {k: v.clone() for k, v in ema.weights.items()}
    with pytest.raises(ZeroDivisionError):
        with ema.applied(): assert weights_hash(net.state_dict()) == weights_hash(average); 1 / 0
    assert weights_hash(net.state_dict()) == mine and weights_hash(ema.weights) == weights_hash(average)
    net(torch.zeros(1, 1, 16, 16), torch.zeros(1), net.encode(torch.zeros(1, 16, 16, dtype=torch.long))).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_init_from_a_run(whole, there):
    "The averaged weights of another run, by folder or by file; wrong shapes are listed."
    average = read_checkpoint(whole / "checkpoints/step_00000060.safetensors")["ema"]
    for init in (whole, str(whole / "checkpoints/step_00000060.safetensors"), average):
        assert weights_hash(first_weights(MODEL, 0, init)[0].state_dict()) == weights_hash(average)
    run(there, replace(CONFIG, max_steps=5), init=average)
    run(there, replace(CONFIG, max_steps=6), init=whole)
    assert json.loads((there / "run.json").read_text())["init"] == f"weights {weights_hash(average)}"
    with pytest.raises(CTDiffusionError, match="init='weights"): run(there, replace(CONFIG, max_steps=7))
    with pytest.raises(CTDiffusionError, match="tensors of another network"): first_weights(replace(MODEL, channels=8), 0, whole)


def test_first_loss_is_the_variance_of_the_target(there):
    "A zero-initialised head: about 1 with eps as target."
    run(there, replace(CONFIG, max_steps=1, log_every=1, batch=30), replace(MODEL, target="eps"), grid=None)
    assert abs(read_metrics(there)["mse"][0] - 1) < 0.05


def test_no_number_is_read_from_the_device_in_a_step(monkeypatch):
    "A step never waits for the device."
    state = Denoising(MODEL, CONFIG, STORE, device="cpu")
    state.train_step()
    for name in ("item", "tolist", "cpu", "__bool__", "__float__"): monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(f"Tensor.{name} in a training step"))
    state.train_step()


def test_run_folder_is_complete(whole):
    "What the contract promises is there, and run.json says what a result depends on."
    assert {p.name for p in whole.iterdir()} == {"run.json", "train.log", "metrics.csv", "samples", "checkpoints", "latest.json", "DONE"}
    about = json.loads((whole / "run.json").read_text())
    assert (about["variant"], about["seed"], about["init"], about["batch"], about["world"], about["device"]) == ("mask", 0, "scratch", 4, 1, "cpu")
    assert about["environment"]["threads"] == 1 and about["environment"]["versions"]["torch"] == torch.__version__
    assert about["data"]["hash"] == "in memory" and about["model"]["dropout"] == 0.1
    assert [int(p.stem[5:]) for p in sorted((whole / "checkpoints").glob("*.safetensors"))] == [20, 60]
    rows = list(csv.DictReader(open(whole / "metrics.csv")))
    assert [int(r["step"]) for r in rows] == list(range(7, 60, 7)) and [bool(r["val_loss"]) for r in rows] == [int(r["step"]) % 14 == 0 for r in rows]
    assert "ETA" in (whole / "train.log").read_text()


# ------------------------------------------------------------------------------------------------- several processes

PLAIN, SHORT = replace(MODEL, dropout=0.0, channels=8), replace(CONFIG, max_steps=3, log_every=1)  # one channel alone in a group: its bias has no gradient but rounding, of which Adam makes a whole step
FIRST = "import sys; sys.path.insert(0, {folder!r})\nfrom test_trainer import CONFIG, PLAIN, SHORT, Denoising, replace, run\n"


def command(where: Path, program: str, *options: str) -> list:
    "Processes of `program` by torchrun."
    script = where.with_suffix(".py")
    script.write_text(FIRST.format(folder=str(Path(__file__).parent)) + program)
    return [sys.executable, "-m", "torch.distributed.run", *(options or ("--standalone", "--nproc_per_node", "2")), script, where]


def torchrun(where: Path, program: str, timeout: int, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(where, program), env=os.environ | {"OMP_NUM_THREADS": "1"} | env, timeout=timeout, capture_output=True, text=True)


def close(one: Path, other: Path, step: int) -> None:
    "Weights, average, moments and losses of two runs are equal up to the order of sums."
    a, b = (read_checkpoint(w / f"checkpoints/step_{step:08d}.safetensors") for w in (one, other))
    for x, y in ((a["model"], b["model"]), (a["ema"], b["ema"]), (a["optim"]["exp_avg"], b["optim"]["exp_avg"])):
        for k in x: torch.testing.assert_close(x[k], y[k], rtol=0, atol=1e-6)
    for k, v in read_metrics(one).items(): np.testing.assert_allclose(v, read_metrics(other)[k], rtol=0, atol=1e-6, err_msg=k)


def test_two_processes_are_one_and_leave_together(there):
    """Three steps of two processes are three steps of one, and one process goes on from them.
    In the same two processes: both leave when one is told to stop (in a step that is logged), and go on when called again."""
    program = """
import numpy, pathlib, time
where = pathlib.Path(sys.argv[1])
run(where / 'two', SHORT, PLAIN, grid=None, val_every=0)
def act(net): (where / 'STOP').touch(); time.sleep(1.1); return numpy.zeros((8, 8, 3), 'uint8')
config = replace(CONFIG, max_steps=12, grid_every=5, log_every=4)
first = run(where, config, grid=act, val_every=4)
assert (first.step, first.reason) in ((8, 'STOP file'), (8, 'stopped')), first
assert run(where, config, grid=None, val_every=4).done
"""
    done = torchrun(there, program, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((there / "run.json").read_text())["world"] == 2 and list(read_metrics(there)["step"]) == [4, 8, 12]
    assert (there / "DONE").exists() and nothing_left_behind(there)
    run(there / "one", SHORT, PLAIN, grid=None, val_every=0)
    close(there / "one", there / "two", 3)
    for name in ("one", "two"): run(there / name, replace(SHORT, max_steps=6), PLAIN, grid=None, val_every=0)
    close(there / "one", there / "two", 6)
    assert "2 processes" in (there / "two/train.log").read_text()


def test_two_nodes_are_one(there):
    "One process on each of two `computers` that find each other by an address."
    with socket.socket() as s: s.bind(("localhost", 0)); port = s.getsockname()[1]
    options = lambda r: ("--nnodes", "2", "--node_rank", str(r), "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "t")
    program = "run(sys.argv[1], SHORT, PLAIN, grid=None, val_every=0)"
    nodes = [subprocess.Popen(command(there, program, *options(r)), env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for node in nodes: assert node.wait(120) == 0, node.stderr.read()[-3000:]
    run(there.with_name("one node"), SHORT, PLAIN, grid=None, val_every=0)
    close(there, there.with_name("one node"), 3)


def test_slices_must_divide_among_processes(monkeypatch):
    monkeypatch.setattr(state_module, "where", lambda device: (torch.device("cpu"), 0, 3))
    with pytest.raises(CTDiffusionError, match="4 slices for 3 processes"): Denoising(MODEL, CONFIG, STORE)


def test_killed_process_takes_the_others_along(there):
    "SIGKILL of process 1 of 2 in step 6: all are gone within a minute, the last checkpoint is whole, the same command goes on from it."
    program = "import os, pathlib\npathlib.Path(f'{sys.argv[1]}.{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\nprint(run(sys.argv[1], replace(CONFIG, max_steps=8), save_every=2).done)"
    began = subprocess.Popen(command(there, program), env=os.environ | {"OMP_NUM_THREADS": "1", "CRASH_AT": "step@6#1"}, stderr=subprocess.PIPE, text=True)
    assert began.wait(120) != 0 and "Signal 9" in began.stderr.read()
    pids = [int(Path(f"{there}.{r}").read_text()) for r in range(2)]
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids): assert time.monotonic() < end; time.sleep(0.1)
    assert read_checkpoint(latest_checkpoint(there, silent))["step"] == 6 and not (there / "DONE").exists()
    done = torchrun(there, program, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["True", "True"], done.stderr[-3000:]
    assert "continuing after step 6" in (there / "train.log").read_text()


def test_failed_process_takes_the_others_along(there):
    "One of two raises in step 3: the command ends with an error, soon, and does not hang."
    program = "real = Denoising.train_step\ndef broken(self):\n    if self.rank == 1 and self.step == 3: raise MemoryError('killed')\n    real(self)\nDenoising.train_step = broken\nrun(sys.argv[1], save_every=2)"
    done = torchrun(there, program, timeout=90)
    assert done.returncode != 0 and "MemoryError" in done.stderr
    assert read_checkpoint(latest_checkpoint(there, silent))["step"] == 2


def test_who_waits_for_a_computer_that_is_gone_leaves(there):
    "No word comes from another computer that lost its power: the pulse ends the wait, frees the folder and says why."
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    there.mkdir()
    for name in ("lock", "owner.json"): (there / name).touch()
    def alone():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port))
        trainer = Trainer(Denoising(MODEL, CONFIG, STORE, device="cpu"), there, say=None)
        with Pulse(0, 2, trainer.lost, silence=1): time.sleep(30)
    assert forked(alone) == 70
    assert nothing_left_behind(there) and "lost process 1" in (there / "train.log").read_text()


def test_processes_talk_only_where_a_line_is_written(monkeypatch, there):
    "Between two lines of metrics.csv nobody asks whether to leave; what the step decides is known without asking."
    trainer = Trainer(Denoising(MODEL, CONFIG, STORE, device="cpu"), there, say=None, save_every=5)
    trainer.world, trainer.saved, asked = 2, time.monotonic() - 1e6, []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda flags, source: asked.append(trainer.step))
    orders = {}
    for trainer.state.step in range(1, 29): orders[trainer.step] = trainer.orders(lambda: "STOP file")
    assert asked == [7, 14, 21, 28] and [s for s, (leave, _) in orders.items() if leave] == asked
    assert [s for s, (_, save) in orders.items() if save] == sorted({20, 5, 10, 15, 25, *asked})
