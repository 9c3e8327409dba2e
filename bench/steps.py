"""One training step of every method: seconds and peak memory, each method in a process of its own.

    python bench/steps.py --preset demo
    python bench/steps.py --preset paper --batch 1 --steps 1 --warmup 0 --threads 1 --device cpu --out nbs/results/steps-paper-cpu.json

On a CPU the seconds are those of the process (they hold on a busy machine), the memory is the largest resident set;
on a GPU they are wall seconds between two synchronisations, and torch's peak. The optimiser and the averaged weights are in both.
In the very first step (--warmup 0 --steps 1) Adam has no moments yet while activations are held, so later steps need more memory.
"""
import argparse, json, resource, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from harness import processor

from ctdiffusion.data.labels import atomic_write
from ctdiffusion.models.variants import VARIANTS, preset
from ctdiffusion.training.folder import environment
from ctdiffusion.training.state import begin


class Slices:
    "Blocks of organs under noise, as many as a batch needs: what a step costs does not depend on what it sees."
    splits = {"train": [0], "val": [1]}

    def __init__(self, n: int, size: int):
        draw = np.random.default_rng(0)
        self.images = draw.integers(0, 256, (n, size, size), np.uint8)
        self.labels = np.kron(draw.integers(0, 17, (n, 8, 8), np.uint8), np.ones((1, size // 8, size // 8), np.uint8))

    def rows(self, split: str) -> np.ndarray: return np.arange(len(self.images))


def measure(variant: str, name: str, batch: int, steps: int, warmup: int, device: str) -> dict:
    "Seconds and memory of one variant, in this process."
    p = preset(variant, name)
    model, train = replace(p.model, vgg="off"), replace(p.train, batch=batch or p.train.batch)
    state, seconds = begin(model, train, Slices(train.batch, model.size), device=device), []
    gpu = state.device.type == "cuda"
    now = time.perf_counter if gpu else time.process_time
    for _ in range(warmup + steps):
        start = now()
        state.train_step()
        if gpu: torch.cuda.synchronize()
        seconds.append(now() - start)
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert state.losses().isfinite().all()
    return dict(variant=variant, batch=train.batch, seconds=round(median(seconds[warmup:]), 4), gb=round(peak / 1e9, 3), steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch", type=int, default=0, help="slices a step; 0: the preset's")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: torch's choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--only", choices=list(VARIANTS), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    if a.only: return print(json.dumps(measure(a.only, a.preset, a.batch, a.steps, a.warmup, a.device)))
    rows, again = [], [sys.executable, __file__, *sys.argv[1:]]
    for v in VARIANTS:
        done = subprocess.run([*again, "--only", v], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{v:12s} {rows[-1]['batch']:3d} slices {rows[-1]['seconds']:9.3f} s {rows[-1]['gb']:8.2f} GB", flush=True)
    gpu = a.device != "cpu" and torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else f"{processor()}, {torch.get_num_threads()} thread(s)"
    print(where)
    if a.out: atomic_write(Path(a.out), json.dumps(dict(preset=a.preset, where=where, warmup=a.warmup, rows=rows, environment=environment()), indent=1) + "\n")


if __name__ == "__main__": main()
