"Runs that take a second: a store in memory, a diffusion model and GANs of a few thousand weights, and what a disturbed run and an undisturbed one must have in common."
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.store import PrepareConfig
from ctdiffusion.data.volumes import sha256_file
from ctdiffusion.models.variants import VARIANTS, ModelConfig, TrainConfig, preset
from ctdiffusion.training.runs import read_checkpoint, read_metrics, write_checkpoint
from ctdiffusion.training.state import Denoising  # noqa: F401, for programs of torchrun
from ctdiffusion.training.step import sample_grid
from ctdiffusion.training.trainer import Result, train

MODEL = ModelConfig("mask", size=16, channels=4, mult=(1, 2), blocks=1, attention=(8,), groups=4, encoder_blocks=1, target="velocity", dropout=0.1)
CONFIG = TrainConfig(batch=4, lr=1e-3, warmup=10, max_steps=60, ema=0.99, ema_warmup=True, grad_clip=1.0, log_every=7, grid_every=25, milestones=(20,), sampler="ddim5")
STEPS = 60
silent = lambda line: None


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
    "All that an undisturbed and a disturbed run must have in common: weights, average, moments, metrics, pictures."
    files = [f"checkpoints/step_{step:08d}.safetensors", "metrics.csv", f"samples/step_{step:08d}.png", "samples/step_00000025.png"]
    return {f: sha256_file(where / f) for f in files}


def nothing_left_behind(where: Path) -> bool:
    "No temporary file, no lock, no sidecar without its checkpoint."
    lonely = [p for p in where.glob("checkpoints/*.json") if not p.with_suffix(".safetensors").exists()]
    return not lonely + [p for p in where.rglob("*") if p.name.startswith(".") or p.name in ("lock", "owner.json")]


def save(where: Path, step: int, numbers: int = 100) -> Path:
    "A checkpoint of next to nothing."
    return write_checkpoint(where, step, {g: {"w": torch.full((numbers,), float(step))} for g in ("model", "ema", "exp_avg")}, dict(config="abc"))


# ---------------------------------------------------------------------------------------------------------------- GANs

WIDE = Slices()  # twice as large: a judge of patches needs some
WIDE.labels, WIDE.images = (np.kron(a, np.ones((1, 2, 2), np.uint8)) for a in (STORE.labels, STORE.images))

GANS = [v for v in VARIANTS if VARIANTS[v].family == "gan"]
GAME = TrainConfig(batch=4, lr=1e-3, warmup=0, max_steps=12, ema=0.0, log_every=5, grid_every=6, milestones=(4,), sampler="ddim5")


def small(variant: str) -> ModelConfig:
    "The demo network of a GAN for slices of 32 pixels."
    return replace(preset(variant, "demo").model, size=32, channels=4, widest=2, doublings=3, hidden=4, noise_size=3, judge_channels=4, judge_halvings=2)


def game(variant: str) -> TrainConfig: return replace(GAME, ema=0.9 if variant == "oasis" else 0.0)


def play(where: Path, variant: str, max_steps: int = 12, **options) -> Result:
    "The run of a GAN."
    options = dict(say=None, val_every=5, device="cpu", grid=sample_grid(small(variant), WIDE.labels[30:33])) | options
    return train(small(variant), replace(game(variant), max_steps=max_steps), WIDE, where, **options)


def played(where: Path) -> dict:
    "What runs of a GAN must have in common."
    return {f: sha256_file(where / f) for f in ("checkpoints/step_00000012.safetensors", "checkpoints/step_00000004.safetensors", "metrics.csv", "samples/step_00000012.png", "samples/step_00000006.png")}


# --------------------------------------------------------------------------------------------------- several processes

PLAIN, SHORT = replace(MODEL, dropout=0.0, channels=8), replace(CONFIG, max_steps=3, log_every=1)  # one channel alone in a group: its bias has no gradient but rounding, of which Adam makes a whole step
FIRST = "import sys; sys.path.insert(0, {folder!r})\nfrom little_runs import CONFIG, PLAIN, SHORT, Denoising, replace, run\n"
ONE = os.environ | {"OMP_NUM_THREADS": "1"}


def command(where: Path, program: str, *options: str) -> list:
    "Processes of `program` by torchrun."
    script = where.with_suffix(".py")
    script.write_text(FIRST.format(folder=str(Path(__file__).parent)) + program)
    return [sys.executable, "-m", "torch.distributed.run", *(options or ("--standalone", "--nproc_per_node", "2")), script, where]


def torchrun(where: Path, program: str, timeout: int, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(where, program), env=ONE | env, timeout=timeout, capture_output=True, text=True)


def close(one: Path, other: Path, step: int) -> None:
    "Weights, average, moments and losses of two runs are equal up to the order of sums."
    a, b = (read_checkpoint(w / f"checkpoints/step_{step:08d}.safetensors") for w in (one, other))
    for x, y in ((a["model"], b["model"]), (a["ema"], b["ema"]), (a["optim"]["exp_avg"], b["optim"]["exp_avg"])):
        for k in x: torch.testing.assert_close(x[k], y[k], rtol=0, atol=1e-6)
    for k, v in read_metrics(one).items(): np.testing.assert_allclose(v, read_metrics(other)[k], rtol=0, atol=1e-6, err_msg=k)


# ------------------------------------------------------------------------------------------------------------ fixtures

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
