"""What one network evaluation, one training step and one sampling job cost as image size, batch, steps and processes grow.

    python bench/scaling.py --out nbs/results/bench-scaling.json
    python bench/scaling.py --sizes 32 --batches 1 2 --repeats 1 --patience 20

The network is the `demo` preset's (0.9 M parameters; --preset small for a large one), built for each size.
size, batch   seconds of one evaluation in channels_last, as in sampling, and of one training step; and both per slice
steps         a job of 5, 10, 20, 50 steps, with a straight line through its times: a job is its steps, and little else
processes     the same slices by one process with one thread, two processes with one thread each, and one process with two threads;
              all must draw the same pictures. The processes stand ready before the clock starts.
"""
import multiprocessing, os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from harness import arguments, interleave, report, seconds, spent
from network import Task, awake

from ctdiffusion.data.labels import AMOS
from ctdiffusion.models.cache import remember
from ctdiffusion.models.unet import n_params
from ctdiffusion.models.variants import ModelConfig, build, preset
from ctdiffusion.synthesis.synthesis import Model, synthesize_slices
from ctdiffusion.training.state import begin


def shaped(variant: str, name: str, size: int) -> ModelConfig:
    "A preset's network for pictures of another size, with attention at the same depth."
    c = preset(variant, name).model
    return replace(c, size=size, attention=tuple(n * size // c.size for n in c.attention), vgg="off")


def model_of(config: ModelConfig, threads: int | None = None) -> Model:
    "Random weights, laid out as `load` does it."
    if threads: torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = awake(build(config)).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return Model(net, config, AMOS, 40, 400, "ancestral", "random", "")


# ------------------------------------------------------------------------------------------ size and batch

def step_calls(variant: str, name: str, size: int, batch: int) -> dict[str, Callable[[], object]]:
    "One evaluation and one training step."
    config, task = shaped(variant, name, size), Task(size, batch)
    net = model_of(config).net
    net, cond = remember(net, net.encode(task.mask.long()))
    state = begin(config, replace(preset(variant, name).train, batch=batch), task.store, device="cpu")
    return {"evaluation": torch.no_grad()(lambda: net(task.eps, task.t, cond)), "training step": state.train_step}


def sizes_and_batches(a) -> dict[str, dict]:
    "A row for each size and batch."
    calls = {(s, b): step_calls(a.variant, a.preset, s, b) for s in a.sizes for b in a.batches}
    rows = interleave({f"{what} {s} {b}": call for (s, b), both in calls.items() for what, call in both.items()}, a.repeats, a.quiet, a.patience, least=0.2)
    def row(s: int, b: int, what: str) -> dict:
        r = rows[f"{what} {s} {b}"]
        return dict(size=s, batch=b, slice=seconds(r) / b) | r
    return {f"{what}, {s} x {s}, batch {b}": row(s, b, what) for what in ("evaluation", "training step") for s, b in calls}


# ------------------------------------------------------------------------------------------ steps

def steps(a) -> dict[str, dict]:
    "A job of each length, and what a straight line through all of them says."
    size, batch = a.sizes[len(a.sizes) // 2], 8
    model, masks = model_of(shaped(a.variant, a.preset, size)), Task(size, batch).mask.numpy()
    rows = interleave({n: lambda n=n: synthesize_slices(model, masks, sampler=str(n)) for n in a.steps}, a.repeats, a.quiet, a.patience)
    slope, start = np.polyfit(a.steps, [seconds(rows[n]) for n in a.steps], 1)
    return {f"{n} steps": dict(steps=n, line=float(start + slope * n), off_line=float(seconds(r) / (start + slope * n) - 1), per_step=seconds(r) / n) | r for n, r in rows.items()}


# ------------------------------------------------------------------------------------------ processes

def worker(pipe: Connection, config: ModelConfig, threads: int, sampler: str) -> None:
    "A process that draws the slices it is sent, until it is sent none."
    model = model_of(config, threads)
    while (order := pipe.recv()) is not None:
        masks, rows = order
        pipe.send(synthesize_slices(model, masks, rows=rows, sampler=sampler, batch=len(masks)))


class Crew:
    "Processes that share the slices of a job."
    def __init__(self, n: int, threads: int, config: ModelConfig, sampler: str):
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(n)]
        self.pipes = [ours for ours, _ in ends]
        self.people = [context.Process(target=worker, args=(theirs, config, threads, sampler), daemon=True) for _, theirs in ends]
        for p in self.people: p.start()

    def draw(self, masks: np.ndarray) -> np.ndarray:
        for pipe, rows in zip(self.pipes, np.array_split(np.arange(len(masks)), len(self.pipes))): pipe.send((masks[rows], rows))
        return np.concatenate([pipe.recv() for pipe in self.pipes])

    def spent(self) -> float:
        "CPU seconds of the processes, where the system tells them."
        ticks = [Path(f"/proc/{p.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for p in self.people if Path(f"/proc/{p.pid}/stat").exists()]
        return sum(map(int, sum(ticks, []))) / os.sysconf("SC_CLK_TCK")

    def dismiss(self) -> None:
        for pipe, person in zip(self.pipes, self.people): pipe.send(None); person.join()


def processes(a) -> dict[str, dict]:
    "The same slices by crews of different kinds."
    size = a.sizes[len(a.sizes) // 2]
    config, masks = shaped(a.variant, a.preset, size), Task(size, 16).mask.numpy()
    crews = {f"{n} process{'es' * (n > 1)}, {threads} thread{'s' * (threads > 1)} each": Crew(n, threads, config, "10") for n, threads in ((1, 1), (2, 1), (1, 2))}
    try:
        pictures = [crew.draw(masks) for crew in crews.values()]
        difference = max(float(np.abs(p - pictures[0]).max()) for p in pictures)
        assert pictures[0].std() > 0 and difference <= 2 / 255, f"crews differ by {difference:g}"
        own = lambda: spent() + sum(crew.spent() for crew in crews.values())
        rows = interleave({k: lambda crew=crew: crew.draw(masks) for k, crew in crews.items()}, a.repeats, a.quiet, a.patience, own=own)
    finally:
        for crew in crews.values(): crew.dismiss()
    return {k: dict(slices_per_second=len(masks) / r["seconds"], times_first=rows[next(iter(rows))]["seconds"] / r["seconds"], difference=difference) | r for k, r in rows.items()}


def main() -> None:
    parser = arguments(__doc__, patience=100)
    parser.add_argument("--variant", choices=("conditional", "mask", "edge"), default="mask")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--part", choices=("all", "batches", "steps", "processes"), default="all")
    a = parser.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    parts = {"one evaluation, one training step": sizes_and_batches} if a.part in ("all", "batches") else {}
    if a.part in ("all", "steps"): parts["a job of so many steps"] = steps
    if a.part in ("all", "processes"): parts["16 slices, 10 steps"] = processes
    report("scaling", {title: part(a) for title, part in parts.items()}, a.out, preset=a.preset, variant=a.variant, params=n_params(build(shaped(a.variant, a.preset, a.sizes[0]))),
        slice="seconds per slice", line="seconds on the straight line through all lengths", times_first="how much faster than the first row")


if __name__ == "__main__": main()
