"""Preparing a case, and batches for training: ours beside what one would write with nibabel, scikit-image, Pillow and torch.

    python bench/data.py --out nbs/results/bench-data.json           # row P7
    python bench/data.py --size 128 --slices 20 --repeats 1          # a trial

The case is a drawn patient of 512 x 512 x 130 voxels with noise, int16, gzip level 6 (40 MB), and its label map. Both sides read image
and label, window, cut and resize to 256 x 256 uint8. Ours also does what `prepare` is for: it checks headers and checksums, judges the
HU and the sides, finds the body, and hashes files, voxels and slices; `reading, window, resize` is ours without these. scikit-image
smooths with a Gaussian before it picks pixels, ours averages (the triangle filter of Pillow and torch), so the pictures agree in the
mean and are not the same; that ours are torch's (antialias) to a grey value is asserted.

Batches are 16 slices of 256 x 256 with their label maps in the order of `batch_rows`. `bytes` is what `fetch` takes from the store,
`fetch` also has them as numbers in [-1, 1]; the others are PNG pairs through Pillow and a DataLoader, as folders of pictures are trained on,
and the store with one-hot maps made on the CPU. All give the same numbers (asserted). One thread, everything in the disk cache.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch count the processors

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import zoom
from skimage.transform import resize
from torch.utils.data import DataLoader, Dataset

from harness import arguments, interleave, report, seconds

from ctdiffusion.data import preparation, volumes
from ctdiffusion.data.cases import Case
from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.preparation import PrepareConfig, prepare_case
from ctdiffusion.data.slices import axial, resize_images, resize_labels, window
from ctdiffusion.data.volumes import nifti_bytes, read_image, read_labels
from ctdiffusion.training.runs import batch_rows
from ctdiffusion.training.step import fetch

CONFIG = PrepareConfig()


# ------------------------------------------------------------------------------------------ one case

def make_case(folder: Path, size: int, slices: int, seed: int = 0) -> Case:
    "A drawn patient, enlarged, with the noise of a scanner, stored as most scanners do: LPS, int16, gzip level 6."
    p, draw = phantom(seed=seed, size=128), np.random.default_rng(seed)
    factor = size / p.hu.shape[0], size / p.hu.shape[1], slices / p.hu.shape[2]
    larger = lambda v, order: zoom(v, factor, order=order, mode="nearest", grid_mode=True)[::-1, ::-1]
    hu, affine = larger(p.hu.astype(np.float32), 1), np.diag([-360 / size, -360 / size, 3., 1])
    hu += draw.normal(0, 12, hu.shape).astype(np.float32)
    case = Case("case", folder / "image.nii.gz", folder / "label.nii.gz", "train")
    case.image.write_bytes(nifti_bytes(np.rint(hu).clip(-1024, 3000).astype(np.int16), affine))
    case.label.write_bytes(nifti_bytes(larger(p.labels, 0), affine))
    return case


def usual(case: Case) -> tuple[np.ndarray, np.ndarray]:
    "nibabel's get_fdata and scikit-image's resize, by somebody who knows that this file is LPS: its slices lie as they should."
    image, label = (nib.load(f).get_fdata().T for f in (case.image, case.label))
    grey, side = np.clip((image - CONFIG.level) / CONFIG.width + .5, 0, 1), (CONFIG.size,) * 2
    x = [resize(s, side, order=1, anti_aliasing=True) for s in grey]
    y = [resize(s, side, order=0, anti_aliasing=False, preserve_range=True) for s in label]
    return np.rint(255 * np.stack(x)).astype(np.uint8), np.stack(y).astype(np.uint8)


def unchecked(case: Case) -> tuple[np.ndarray, np.ndarray]:
    "Ours without judging, body, hashes of voxels and slices."
    x = [resize_images(window(s[None], CONFIG.level, CONFIG.width), CONFIG.size)[0] for s in axial(read_image(case.image).data)]
    return np.rint(255 * np.stack(x)).astype(np.uint8), resize_labels(axial(read_labels(case.label).data), CONFIG.size)


def whole(case: Case, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    "All that `prepare` does with a case."
    entry, problems = prepare_case(case, CONFIG, AMOS, folder)
    assert entry, problems
    return tuple(np.load(folder / f"{case.id}.{piece}.npy", mmap_mode="r") for piece in "xy")


def same_task(case: Case, folder: Path) -> dict:
    "The results of all sides, compared; how far they are apart."
    (x, y), (bare, ids), (theirs, their_ids) = whole(case, folder), unchecked(case), usual(case)
    assert (x == bare).all() and (np.where(y == AMOS.body, 0, y) == ids).all()
    some = np.ascontiguousarray(window(axial(read_image(case.image).data)[::10], CONFIG.level, CONFIG.width))
    torchs = F.interpolate(torch.from_numpy(some)[None], (CONFIG.size,) * 2, mode="bilinear", antialias=True)[0].numpy()
    far = dict(greys_from_torch=float(np.abs(x[::10] - 255 * torchs).max()), greys_from_skimage=float(np.abs(x.astype(int) - theirs).mean()), labels_unlike_skimage=float((ids != their_ids).mean()))
    assert far["greys_from_torch"] <= 1 and far["greys_from_skimage"] < 4 and far["labels_unlike_skimage"] < .02, far
    return far


PARTS = {  # module, function -> what it is part of
    (volumes, "_load"): "read, inflate, checksum of the file", (preparation, "read_case"): "judge headers, HU, sides; labels",
    (preparation, "body_mask"): "body", (preparation, "resize_images"): "window and resize", (preparation, "window"): "window and resize", (preparation, "resize_labels"): "resize labels",
    (preparation, "digest"): "checksums of voxels and slices", (preparation, "prepare_case"): "the rest: rounding, saving"}


@contextmanager
def clocks(spent: Counter):
    "CPU seconds of the functions above, each without those inside of it."
    stack, kept = [], {(module, name): getattr(module, name) for module, name in PARTS}
    def timed(call: Callable, part: str) -> Callable:
        def run(*args, **kw):
            start = time.process_time()
            stack.append(0.)
            try: return call(*args, **kw)
            finally:
                took, inner = time.process_time() - start, stack.pop()
                spent[part] += took - inner
                if stack: stack[-1] += took
        return run
    for at, call in kept.items(): setattr(*at, timed(call, PARTS[at]))
    try: yield
    finally:
        for at, call in kept.items(): setattr(*at, call)


def parts_of(case: Case, folder: Path, repeats: int) -> dict[str, dict]:
    "Where prepare_case spends its time: medians, in CPU seconds."
    runs = []
    for _ in range(repeats):
        runs.append(Counter())
        with clocks(runs[-1]): preparation.prepare_case(case, CONFIG, AMOS, folder)
    middle = {part: float(np.median([r[part] for r in runs])) for part in dict.fromkeys(PARTS.values())}
    return {part: dict(cpu=s, share=s / sum(middle.values())) for part, s in middle.items()}


def preparing(folder: Path, a) -> dict[str, dict]:
    case = make_case(folder, a.size, a.slices)
    far = same_task(case, folder)
    rows = interleave({"ours": lambda: whole(case, folder), "ours: reading, window, resize": lambda: unchecked(case), "nibabel get_fdata + scikit-image": lambda: usual(case)}, a.repeats, a.quiet, a.patience)
    of_case = {k: dict(slices_per_s=a.slices / seconds(r), times_usual=seconds(rows["nibabel get_fdata + scikit-image"]) / seconds(r)) | r for k, r in rows.items()}
    megabytes = {f.name: f.stat().st_size / 1e6 for f in (case.image, case.label)}
    return {"one case (P7: ours >= 3 times as fast as usual)": of_case, "parts of prepare_case": parts_of(case, folder, a.repeats), "agreement": dict(all=far | megabytes)}


# ------------------------------------------------------------------------------------------ batches

class Pictures(Dataset):
    "A folder of PNG pairs, opened one by one."
    def __init__(self, folder: Path, store, rows: list): self.folder, self.rows = folder, rows
    def __len__(self) -> int: return len(self.rows)
    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (np.asarray(Image.open(self.folder / f"{piece}{self.rows[k]}.png")) for piece in "xy")
        return torch.from_numpy(x.astype(np.float32) / 127.5 - 1)[None], torch.from_numpy(y.copy())


def make_store(folder: Path, slices: int) -> SimpleNamespace:
    "What a store is for `fetch`: the case's slices again and again, moved, on the disk; and each as a PNG pair."
    out = {}
    for piece, name in (("x", "images"), ("y", "labels")):
        made = np.load(folder / f"case.{piece}.npy")
        kept = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, (slices, *made.shape[1:]))
        for k in range(slices):
            kept[k] = np.roll(made[k % len(made)], k // len(made), 1)
            Image.fromarray(kept[k]).save(folder / f"{piece}{k}.png")
        kept.flush()
        out[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return SimpleNamespace(**out)


def batches(folder: Path, a) -> dict[str, dict]:
    store, rows, steps = make_store(folder, a.store), np.arange(a.store), a.store // a.batch
    order = [batch_rows(rows, a.batch, k, 0) for k in range(steps)]
    loader = DataLoader(Pictures(folder, store, np.concatenate(order).tolist()), a.batch)
    bytes_of = lambda r: [torch.from_numpy(x[r]) for x in (store.images, store.labels)]
    def one_hot(r: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = fetch(store, r)
        return x, F.one_hot(y.long(), AMOS.n).permute(0, 3, 1, 2).float()
    calls = {"ours: bytes": lambda: [bytes_of(r) for r in order], "ours: fetch": lambda: [fetch(store, r) for r in order],
        "ours: order and bytes": lambda: [bytes_of(batch_rows(rows, a.batch, k, 0)) for k in range(steps)],
        "PNG pairs, Pillow, DataLoader": lambda: [None for _ in loader], "ours: fetch, one-hot on the CPU": lambda: [one_hot(r) for r in order[:4]]}
    for r, theirs, _ in zip(order, loader, range(3)):
        x, y = fetch(store, r)
        for one, other in ((x, theirs[0]), (y, theirs[1]), (torch.from_numpy(store.images[r])[:, None].float() / 127.5 - 1, x), (one_hot(r)[1].argmax(1), y)): assert torch.equal(one, other)
    found, count = interleave(calls, a.repeats, a.quiet, a.patience), lambda name: (4 if "one-hot" in name else steps) * a.batch
    rate = {k: count(k) / seconds(r) for k, r in found.items()}
    return {"batches (P7: bytes >= 6,000 slices a second)": {k: dict(slices_per_s=rate[k], times_png=rate[k] / rate["PNG pairs, Pillow, DataLoader"]) | r for k, r in found.items()}}


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--size", type=int, default=512, help="of the case's slices")
    parser.add_argument("--slices", type=int, default=130)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--store", type=int, default=1040, help="slices in the store of which batches are made")
    a = parser.parse_args()
    torch.set_num_threads(a.threads or 1)
    with tempfile.TemporaryDirectory() as folder: tables = preparing(Path(folder), a) | batches(Path(folder), a)
    report("data", tables, a.out, size=a.size, slices=a.slices, batch=a.batch, store=a.store, times_usual="seconds of nibabel and scikit-image divided by those of the row", times_png="slices a second divided by those of PNG pairs")


if __name__ == "__main__": main()
