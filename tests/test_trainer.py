"What a run writes, what it averages, and several processes that are one. (Killed, stopped, starved or poisoned runs: tests/faults/test_c_training.py.)"
import csv
import json
import socket
import subprocess
import time
from dataclasses import replace

import pytest
import torch
from little_runs import CONFIG, MODEL, ONE, PLAIN, SHORT, STEPS, STORE, close, command, fingerprint, nothing_left_behind, run, torchrun
from little_runs import memory, one_thread, there, whole  # noqa: F401, fixtures

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.training import state as state_module
from ctdiffusion.training.runs import read_checkpoint, read_metrics
from ctdiffusion.training.state import Denoising
from ctdiffusion.training.step import EMA, first_weights, weights_hash
from ctdiffusion.training.trainer import Trainer


def test_logging_validating_and_drawing_change_nothing(whole, there):
    run(there, replace(CONFIG, log_every=11, grid_every=0, milestones=()), grid=None, val_every=0)
    a, b = (read_checkpoint(w / "checkpoints/step_00000060.safetensors") for w in (whole, there))
    assert all(torch.equal(v, b[g][k]) for g in ("model", "ema") for k, v in a[g].items())
    assert [int(p.stem[5:]) for p in sorted((there / "checkpoints").glob("*.safetensors"))] == [60]


def test_finished_run_returns_at_once_and_goes_on_if_asked_for_more(whole, there):
    short = run(there, replace(CONFIG, max_steps=30))
    stamp = short.checkpoint.stat().st_mtime_ns
    assert run(there, replace(CONFIG, max_steps=30)) == short and short.checkpoint.stat().st_mtime_ns == stamp
    assert run(there).step == STEPS and fingerprint(there) == fingerprint(whole)
    assert (there / "DONE").read_text() == "60\n"




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
    done = torchrun(there, program, timeout=600)
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
    nodes = [subprocess.Popen(command(there, program, *options(r)), env=ONE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for node in nodes: assert node.wait(120) == 0, node.stderr.read()[-3000:]
    run(there.with_name("one node"), SHORT, PLAIN, grid=None, val_every=0)
    close(there, there.with_name("one node"), 3)


def test_slices_must_divide_among_processes(monkeypatch):
    monkeypatch.setattr(state_module, "where", lambda device: (torch.device("cpu"), 0, 3))
    with pytest.raises(CTDiffusionError, match="4 slices for 3 processes"): Denoising(MODEL, CONFIG, STORE)


def test_processes_talk_only_where_a_line_is_written(monkeypatch, there):
    "Between two lines of metrics.csv nobody asks whether to leave; what the step decides is known without asking."
    trainer = Trainer(Denoising(MODEL, CONFIG, STORE, device="cpu"), there, say=None, save_every=5)
    trainer.world, trainer.saved, asked = 2, time.monotonic() - 1e6, []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda flags, source: asked.append(trainer.step))
    orders = {}
    for trainer.state.step in range(1, 29): orders[trainer.step] = trainer.orders(lambda: "STOP file")
    assert asked == [7, 14, 21, 28] and [s for s, (leave, _) in orders.items() if leave] == asked
    assert [s for s, (_, save) in orders.items() if save] == sorted({20, 5, 10, 15, 25, *asked})
