"""Training and volumes, killed at random moments over and over: what is lost, and whether the end is the same.

    python bench/soak.py --kills 120 --out nbs/results/soak.json

Three pieces of work, each first undisturbed: a small diffusion model and a GAN with an average are trained, and an embedded network draws volumes.
Then each is killed with SIGKILL, begun again with the same call, and killed again, until it is done; and all of that again until there were enough kills
(half of them in each training, and a quarter as many in the volumes). A counter in shared memory says how far a process was when it was killed.
At the end every file must be there that the undisturbed work left, with the same bytes, and no other. If anything is lost that was saved, if a byte differs
or a file is left lying about, the script ends with an error.
"""
import argparse, mmap, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from forks import killed_at_random, life
from harness import report

from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.store import PrepareConfig, Store, prepare
from ctdiffusion.data.volumes import sha256_file, write_volume
from ctdiffusion.data.whole import sidecar
from ctdiffusion.models.variants import ModelConfig, TrainConfig, preset
from ctdiffusion.synthesis.processes import synthesize_many
from ctdiffusion.synthesis.synthesis import complete_labels, load
from ctdiffusion.training.runs import damage, latest_checkpoint, read_checkpoint
from ctdiffusion.training.state import State
from ctdiffusion.training.step import sample_grid
from ctdiffusion.training.trainer import train

SAVE_EVERY, BATCH = 10, 4  # steps; slices of a volume at a time
DATED = ("train.log", "run.json")  # they tell the time of day


class Counter:
    "A number that a child writes and its parent reads."
    def __init__(self): self.shared = mmap.mmap(-1, 8)
    def set(self, n: int) -> None: self.shared[:] = n.to_bytes(8, "little")
    def get(self) -> int: return int.from_bytes(self.shared[:], "little")


class Training:
    "A run of `train`; progress is counted in steps."
    unit, allowed = "steps", SAVE_EVERY  # that one kill may cost

    def __init__(self, model: ModelConfig, config: TrainConfig, store: Store):
        self.model, self.config, self.store, self.counter, self.total = model, config, store, Counter(), config.max_steps
        self.grid = sample_grid(model, store.labels[store.rows("val")[:2]], config.sampler)

    def work(self, where: Path) -> None:
        real = State.end_step
        def end_step(state: State, losses: torch.Tensor) -> None: real(state, losses); self.counter.set(state.step)
        State.end_step = end_step  # in this child
        train(self.model, self.config, self.store, where, device="cpu", grid=self.grid, say=None, val_every=50, save_every=SAVE_EVERY)

    def kept(self, where: Path) -> int:
        "Steps that the next process begins with."
        path = latest_checkpoint(where, lambda line: None)
        return read_checkpoint(path)["step"] if path else 0

    def damaged(self, where: Path) -> int: return sum(damage(f) is not None for f in where.glob("checkpoints/*.safetensors"))


class Volumes:
    "Volumes by `synthesize_many`; progress is counted in batches of slices."
    unit, allowed = "batches", 0  # a batch is counted when it is on the disk

    def __init__(self, labels: dict[Path, int], name: str):
        self.model, self.counter, self.batches = load(name, "cpu"), Counter(), {f: -(-n // BATCH) for f, n in labels.items()}
        self.total = sum(self.batches.values())

    def work(self, where: Path) -> None:
        where.mkdir(exist_ok=True)
        self.counter.set(self.kept(where))
        made = lambda line: self.counter.set(self.counter.get() + 1)
        synthesize_many(self.model, [dict(labels=f, out=where / f.name, say=made) for f in self.batches], say=lambda line: None, sampler="ddim5", batch=BATCH)

    def kept(self, where: Path) -> int:
        "Batches that nobody makes again."
        return sum(n if sidecar(where / f.name).exists() else len(list(where.glob(f".{f.name}.*/[0-9]*.part"))) for f, n in self.batches.items())

    def damaged(self, where: Path) -> int: return 0


def tree(where: Path) -> dict[str, str]:
    "Every file below a folder and its checksum, hidden ones, too."
    return {str(f.relative_to(where)): "" if f.name in DATED else sha256_file(f) for f in sorted(where.rglob("*")) if f.is_file()} | {f"{f.relative_to(where)}/": "" for f in where.rglob("*") if f.is_dir()}


def soak(name: str, what: Training | Volumes, kills: int, folder: Path, seed: int) -> dict:
    "The work undisturbed, then killed so many times; what was found."
    start, whole = time.monotonic(), folder / f"{name} undisturbed"
    if life(lambda: what.work(whole), 600): sys.exit(f"{name}: the undisturbed work failed")
    expected, seconds = tree(whole), time.monotonic() - start
    longest = max(0.5, 4 * seconds / what.total * (SAVE_EVERY if what.unit == "steps" else 1))
    row = dict(unit=what.unit, work=what.total, kills=0, repeats=0, made=0, lost=0, most_lost=0, allowed=what.allowed, damaged=0, torn=0, differ=0, missing=0, left=0)
    while row["kills"] < kills:
        where, before = folder / f"{name} {row['repeats']}", [0]
        def look() -> None:
            reached, kept = max(what.counter.get(), before[0]), what.kept(where)
            row["made"] += reached - before[0]; row["lost"] += reached - kept; row["most_lost"] = max(row["most_lost"], reached - kept)
            row["damaged"] += what.damaged(where); row["torn"] += sum(".tmp" in f.name for f in where.rglob(".*"))
            if kept < before[0]: sys.exit(f"{name}: went back from {before[0]} to {kept} {what.unit}")
            before[0] = kept; what.counter.set(kept)
        what.counter.set(0)
        row["kills"] += killed_at_random(lambda: what.work(where), kills - row["kills"], longest, seed + row["repeats"], look)
        row["made"] += what.total - before[0]; row["repeats"] += 1
        found = tree(where)
        row["differ"] += sum(found[f] != sha for f, sha in expected.items() if f in found); row["missing"] += len(expected.keys() - found.keys()); row["left"] += len(found.keys() - expected.keys())
        if found != expected: print(f"{name}: {sorted(f for f in found.keys() | expected.keys() if found.get(f) != expected.get(f))}", flush=True)
    print(f"{name}: {row['kills']} kills in {time.monotonic() - start:.0f} s", flush=True)
    return row | dict(files=len(expected), longest_life=round(longest, 2), seconds=round(time.monotonic() - start))


def subjects(folder: Path) -> dict[str, Training | Volumes]:
    "What is killed."
    store = prepare(make_dataset(folder / "data", 2, 2, size=40), folder / "store", PrepareConfig(32))
    few = TrainConfig(batch=4, lr=1e-3, max_steps=300, ema=0.9, grad_clip=1.0, log_every=5, grid_every=100, milestones=(20,), sampler="ddim5")
    diffusion = replace(preset("mask", "demo").model, size=32, channels=8, mult=(1, 2, 2), groups=4, attention=(8,), encoder_channels=4, dropout=0.1)
    gan = replace(preset("oasis", "demo").model, size=32, channels=4, widest=2, doublings=3, hidden=4, noise_size=3, judge_channels=4, judge_halvings=2)
    labels = {}
    for case in (c for c in store.cases if c["split"] == "val"):
        full = complete_labels(*(folder / "data" / case[k]["path"] for k in ("label", "image")))
        (folder / "labels").mkdir(exist_ok=True)
        labels[write_volume(folder / "labels" / f"{case['id']}.nii.gz", full.data, full.source, np.uint8, "label map")] = case["slices"]
    return {"diffusion model": Training(diffusion, few, store), "GAN": Training(gan, replace(few, max_steps=150, grad_clip=None), store), "volumes": Volumes(labels, "mask-demo")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120, help="that must hit a training")
    parser.add_argument("--folder", help="where the files go (a folder in memory is quickest); default: a temporary one")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", help="JSON file")
    a = parser.parse_args()
    torch.set_num_threads(1)  # equal bytes need equal threads, and a forked process has one
    with tempfile.TemporaryDirectory(dir=a.folder) as there:
        shares = zip((-(-a.kills // 2), a.kills // 2, -(-a.kills // 4)), subjects(Path(there)).items())
        rows = {name: soak(name, what, kills, Path(there), a.seed) for kills, (name, what) in shares}
    report("killed and continued", rows, a.out, save_every=SAVE_EVERY, kills=sum(r["kills"] for r in rows.values()))
    bad = [name for name, r in rows.items() if r["most_lost"] > r["allowed"] or any(r[k] for k in ("damaged", "differ", "missing", "left"))]
    if bad: sys.exit(f"{', '.join(bad)}: not as if nothing had happened")


if __name__ == "__main__": main()
