"""Quality against network evaluations: the study of nbs/59_fast.ipynb, for the embedded networks of the three designs.

    papermill nbs/reproduce.ipynb runs/reproduce.ipynb -p budget full     # or any run that left a store and a judge
    python bench/study.py --root runs/reproduce-demo-full --out nbs/results/fast-phantom.json

ROOT holds `store` and `shared/judge`. Slices are kept in ROOT/fast, so a second call goes on where the first one was; several
calls may run side by side (each walk is made by one of them). Two patients, three designs: about two hours and a half on one core, two of them for the yardstick.
"""
import argparse, json
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from ctdiffusion.data.labels import atomic_write
from ctdiffusion.data.store import open_store
from ctdiffusion.evaluation.distance import RandomConvolutions
from ctdiffusion.evaluation.fast import MASKS, WHOLE, evaluations, losses, walk, weaken
from ctdiffusion.evaluation.measure import machine, patients
from ctdiffusion.evaluation.segmenter import load_segmenter
from ctdiffusion.synthesis.synthesis import load
from ctdiffusion.training.folder import environment

DESIGNS = ("conditional-demo", "mask-demo", "edge-demo")
COUNTS, STRIDES, END = (5, 10, 12, 15, 20, 30, 50, 100), (3, 5, 10, 20, 50), 100


def program() -> list[tuple[str, int]]:
    "Samplers and seeds, the yardstick last."
    seeds = [(f"sde{n}", s) for n in (10, 12, 15, 20) for s in range(6)] + [(f"dpm{n}", s) for n in (10, 15, 20) for s in range(3)] + [("sde30", s) for s in range(3)]
    main = [(form.format(n), 0) for n in COUNTS for form in ("{}", "ddim{}", "dpm{}", "sde{}")]
    grids = [(form.format(n), 0) for n in (5, 10, 15, 20, 50) for form in ("{}-logsnr", "dpm{}-time")]
    return list(dict.fromkeys([*seeds, *main, *grids, *[(WHOLE, s) for s in range(3)]]))


def short(value):
    "Five digits of every number: more are noise, and a committed file should be small."
    if isinstance(value, dict): return {k: short(v) for k, v in value.items()}
    if isinstance(value, list): return [short(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder with store and shared/judge")
    parser.add_argument("--patients", type=int, default=2)
    parser.add_argument("--strides", type=int, nargs="*", help="of the walks; default: the whole program")
    parser.add_argument("--masks", type=int, default=16, help="slices whose masks are weakened")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file; without it the slices are only made")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    store, features, folder = open_store(a.root / "store"), RandomConvolutions(), a.root / "fast"
    judge, cases, models, rows = load_segmenter(a.root / "shared/judge"), patients(store, a.patients), [load(d) for d in DESIGNS], []
    for sampler, seed in program():
        for model in models:
            if a.strides and evaluations(model, sampler) not in a.strides: continue
            (folder / model.name).mkdir(parents=True, exist_ok=True)
            with FileLock(folder / model.name / f"{sampler}-{seed}.lock"): rows.append(row := walk(model, sampler, seed, cases, folder, judge, features))
            print(f"{model.name:18s} {sampler:14s} seed {seed}: distance {row['distance']:.3f}, Dice {row['dice_mean']:.1f}, HU {row['hu_error']:.1f}", flush=True)
    if not a.out: return
    masks = np.concatenate([p.masks for p in cases])
    masks = masks[np.linspace(0, len(masks) - 1, a.masks).round().astype(int)]
    strength = [dict(model=m.name, mask=kind, evaluations=n, loss=x) for m in models for kind in MASKS for n, x in zip(STRIDES, losses(m, weaken(masks, kind, store.table), STRIDES, reference=END))]
    about = dict(judge=judge.protocol, features=features.protocol, store=store.hash, patients=[p.id for p in cases], machine=machine(), threads=a.threads, environment=environment())
    lines = ",\n".join(f"{json.dumps(k)}: [\n{chr(10).join(json.dumps(r) + ',' for r in short(v))[:-1]}\n]" for k, v in dict(rows=rows, strength=strength).items())
    atomic_write(a.out, json.dumps(about, indent=1)[:-2] + f",\n{lines}\n}}\n")


if __name__ == "__main__": main()
