"""What the guards cost: the share of a job's time that is spent in what protects it.

    python bench/guards.py --out nbs/results/guards.json   # two minutes
    python bench/guards.py --size 128 --slices 20 --steps 20     # a trial

Three jobs run as users run them: `prepare` with two drawn patients of 512 x 512 x 130 voxels, the demo's training, and one volume of
that size. While they run, each guard's calls are timed by the clock; a guard that calls another one is charged for both, and the sum counts
each second once. What cannot be taken apart is named and not counted: gzip's own checksum (inside of the decompression) and the
rules for label values (inside of `read_labels`)."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch count the processors

import hashlib
import importlib
import pkgutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch

from harness import arguments, report

import ctdiffusion
from data import make_case


class Clock:
    "Seconds of each guard, and of all of them together."
    def __init__(self): self.seconds, self.calls, self.depth, self.all = defaultdict(float), defaultdict(int), 0, 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, outer = time.perf_counter(), self.depth == 0
        self.depth += 1
        try: yield
        finally:
            took = time.perf_counter() - start
            self.depth -= 1; self.seconds[name] += took; self.calls[name] += 1
            if outer: self.all += took

    def around(self, function: Callable, name: str) -> Callable:
        @wraps(function)
        def timed(*args, **kw):
            with self(name): return function(*args, **kw)
        return timed


class Sums:
    "`hashlib` whose SHA-256 is timed."
    def __init__(self, clock: Clock): self.clock = clock

    def sha256(self, data: bytes = b""):
        clock, h = self.clock, hashlib.sha256()
        class Timed:
            def update(self, block):
                with clock("sha256 of what is read"): h.update(block)
            def hexdigest(self): return h.hexdigest()
        timed = Timed(); timed.update(data)
        return timed


def modules() -> list:
    "Every module of the package that is loaded."
    for m in pkgutil.walk_packages(ctdiffusion.__path__, "ctdiffusion."): importlib.import_module(m.name)
    return [m for name, m in sys.modules.items() if name.startswith("ctdiffusion.")]


@contextmanager
def watched(clock: Clock, guards: list[str]) -> Iterator[None]:
    "Within the block calls of `module.function` and `module.Class.method` are timed, wherever the function was imported to."
    with ExitStack() as stack:
        for guard in guards:
            module, _, rest = guard.partition(":")
            owner, _, name = rest.rpartition(".")
            home = importlib.import_module(f"ctdiffusion.{module}")
            where = getattr(home, owner) if owner else home
            old = getattr(where, name)
            for place in [where] if owner else [m for m in modules() if getattr(m, name, None) is old]: stack.enter_context(patch.object(place, name, clock.around(old, rest)))
        stack.enter_context(patch("ctdiffusion.data.volumes.hashlib", Sums(clock)))
        stack.enter_context(patch.object(torch.Tensor, "isfinite", clock.around(torch.Tensor.isfinite, "isfinite of weights and losses")))
        yield


def share(job: Callable[[], object], guards: list[str]) -> dict:
    "The job's seconds, and what of them was spent in its guards."
    clock, start = Clock(), time.perf_counter()
    with watched(clock, guards): job()
    whole = time.perf_counter() - start
    parts = {name: dict(calls=clock.calls[name], seconds=s, share=s / whole) for name, s in sorted(clock.seconds.items(), key=lambda x: -x[1])}
    return dict(seconds=whole, guards=clock.all, share=clock.all / whole, parts=parts)


DATA = ["data.volumes:check_header", "data.foreign:read_json", "data.cases:hu_fault", "data.cases:pair_fault", "data.cases:side_fault", "data.labels:check_labels", "data.cases:check_case_id", "data.cases:inside",
        "data.preparation:duplicates", "data.preparation:digest", "data.store:content_hash", "data.store:_present"]
TRAIN = ["training.parameters:check_parameters", "data.store:open_store", "training.folder:RunLock.__enter__", "training.folder:RunLock.__exit__", "training.folder:RunLock.beat", "training.folder:Stop.__call__",
         "training.folder:claim_run", "data.whole:check_space", "training.runs:damage", "training.runs:sha256_file", "training.runs:cut_metrics", "training.folder:read_run", "data.foreign:read_json", "training.trainer:Trainer.losses", "data.labels:_sync"]
VOLUME = ["data.whole:finished", "data.whole:sha256_file", "data.whole:write_summed", "data.whole:read_summed", "data.foreign:read_json", "training.folder:agree", "synthesis.synthesis:_check_masks", "data.labels:_sync", "data.volumes:check_header", "data.labels:check_labels"]


def main() -> None:
    p = arguments(__doc__)
    for name, value, words in (("size", 512, "pixels of a volume's side"), ("slices", 130, "of a volume"), ("steps", 200, "of the training")): p.add_argument(f"--{name}", type=int, default=value, help=words)
    args = p.parse_args()
    from ctdiffusion.data.phantom import make_dataset
    from ctdiffusion.data.preparation import PrepareConfig
    from ctdiffusion.data.store import prepare
    from ctdiffusion.synthesis.processes import train_job
    from ctdiffusion.synthesis.synthesis import load, synthesize
    from ctdiffusion.training.parameters import TrainJob, check_parameters
    with tempfile.TemporaryDirectory() as there:
        folder, rows = Path(there), {}
        for n in range(2):
            case = make_case(folder, args.size, args.slices, seed=n)
            for path, kind in ((case.image, "imagesTr"), (case.label, "labelsTr")):
                (folder / kind).mkdir(exist_ok=True)
                path.rename(folder / kind / f"amos_{n + 1:04}.nii.gz")
        make_dataset(folder / "drawn", 4, 2)
        rows["prepare two patients"] = share(lambda: prepare(folder, folder / "store"), DATA)

        def training():
            job = check_parameters(dict(variant="mask", run_dir=str(folder / "run"), max_steps=args.steps, threads=1), TrainJob)
            train_job(job, prepare(folder / "drawn", folder / "small", PrepareConfig(size=64)), lambda line: None)
        rows[f"train {args.steps} steps of the demo"] = share(training, TRAIN)
        label = folder / "labelsTr" / "amos_0001.nii.gz"
        image = folder / "imagesTr" / "amos_0001.nii.gz"
        rows["synthesise a volume"] = share(lambda: synthesize(load("mask-demo", "cpu"), label, folder / "out.nii.gz", image=image), VOLUME)
        for job, row in rows.items():
            print(f"\n{job}: {row['seconds']:.1f} s, guards {row['guards']:.3f} s = {row['share']:.2%}")
            for name, part in row["parts"].items(): print(f"  {part['share']:7.2%} {part['seconds']:8.4f} s {part['calls']:6} calls  {name}")
    report("what the guards cost", rows, args.out, size=args.size, slices=args.slices)


if __name__ == "__main__": main()
