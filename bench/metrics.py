"""Dice, SSIM and the Fréchet distance: ours beside MONAI, scikit-image and scipy.linalg.sqrtm.

    python bench/metrics.py --out nbs/results/bench-metrics.json     # row P6
    python bench/metrics.py --features 256 --slices 10 --repeats 1   # a trial
    python bench/metrics.py --part distance

Dice of 15 organs between two label maps of 256 x 256 x 130 voxels: ours from one count of label pairs, run by run, so also with a prediction full of noise; MONAI's DiceMetric on one-hot maps
of 17 classes, made by its own `one_hot` as its documentation shows, and on maps that lie ready; SSIM of 16 noisy slices of 256 x 256; the Fréchet
distance of two sets of 2,048 features, with the trace of the root of the product of covariances by symmetric eigenvalues, and by sqrtm.
The results are asserted to be equal: Dice to the last bit (of MONAI's float32), SSIM to 1e-6, the distance to 1e-5. One thread.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch count the processors

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity

from harness import arguments, interleave, optional, report, seconds

from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.slices import axial, resize_images, resize_labels, window
from ctdiffusion.evaluation.distance import frechet, root_trace
from ctdiffusion.evaluation.quality import dice, ssim


def patient(size: int, slices: int) -> tuple[np.ndarray, np.ndarray]:
    "Slices in [0, 1] and ids of a drawn patient."
    p = phantom(seed=0, size=128)
    pick = np.linspace(0, p.hu.shape[2] - 1, slices).round().astype(int)
    return resize_images(window(axial(p.hu)[pick]), size), resize_labels(axial(p.labels)[pick], size)


def dices(labels: np.ndarray, noise: float) -> tuple[dict[str, Callable], Callable]:
    "A mask, and a prediction whose borders lie two pixels aside; a share `noise` of all voxels is wrong besides."
    draw, organs = np.random.default_rng(0), [c.id for c in AMOS.organs]
    other = np.where(draw.random(labels.shape) < noise, draw.integers(0, AMOS.n, labels.shape), np.roll(labels, (1, 2), (1, 2))).astype(np.uint8)
    def loop() -> list[float]:
        return [float(200 * ((labels == k) & (other == k)).sum() / ((labels == k).sum() + (other == k).sum())) for k in organs]
    calls = {"ours": lambda: list(dice(labels, other).values()), "boolean loop": loop}
    if monai := optional("monai.metrics", "monai"):  # a second or more to import, so only here
        from monai.networks.utils import one_hot
        hot = lambda ids: one_hot(torch.from_numpy(ids)[None, None], AMOS.n)
        metric, ready = monai.DiceMetric(include_background=False, reduction="none"), (hot(other), hot(labels))
        calls["MONAI one_hot, DiceMetric"] = lambda: metric(hot(other), hot(labels))[0, :len(organs)].numpy()
        calls["MONAI DiceMetric, one-hot maps ready"] = lambda: metric(*ready)[0, :len(organs)].numpy()
    def check() -> dict:
        ours = np.array(calls["ours"]())
        assert (ours == loop()).all()
        if monai:
            both, size = (np.array([f(k) for k in organs], np.float32) for f in (lambda k: ((labels == k) & (other == k)).sum(), lambda k: (labels == k).sum() + (other == k).sum()))
            assert (2 * both / size == calls["MONAI one_hot, DiceMetric"]()).all() and np.allclose(ours, 200 * both / size, rtol=1e-6)
        return dict(mean_dice=float(ours.mean()))
    return calls, check


def ssims(x: np.ndarray) -> tuple[dict[str, Callable], Callable]:
    x = x.astype(np.float64)
    y = np.clip(x + .05 * np.random.default_rng(1).standard_normal(x.shape), 0, 1)
    one_by_one = lambda: np.concatenate([ssim(x[k:k + 1], y[k:k + 1]) for k in range(len(x))])
    calls = {"ours": lambda: ssim(x, y), "ours, one by one": one_by_one, "scikit-image": lambda: np.array([structural_similarity(r, f, data_range=1) for r, f in zip(x, y)])}
    def check() -> dict:
        far = float(np.abs(calls["ours"]() - calls["scikit-image"]()).max())
        assert far < 1e-6 and (calls["ours"]() == one_by_one()).all(), far
        return dict(largest_difference=far)
    return calls, check


def distances(d: int) -> tuple[dict[str, Callable], Callable]:
    "Features like those of a network: not negative, many of them alike."
    draw = np.random.default_rng(2)
    mix = draw.standard_normal((d, d)) * np.exp(-np.arange(d) / (d / 6))[:, None]
    a, b = (np.maximum(draw.standard_normal((2 * d, d)) @ mix + shift, 0) for shift in (0, .1))
    def by_sqrtm() -> float:
        A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A) + np.trace(B) - 2 * np.trace(sqrtm(A @ B)).real)
    calls = {"ours": lambda: frechet(a, b), "scipy.linalg.sqrtm": by_sqrtm}
    def check() -> dict:
        one, other = calls["ours"](), by_sqrtm()
        assert abs(one / other - 1) < 1e-5, (one, other)
        return dict(distance=one, relative_difference=abs(one / other - 1))
    return calls, check


def traces(d: int) -> tuple[dict[str, Callable], Callable]:
    "The term of the distance that costs: two covariances, full rank."
    draw = np.random.default_rng(3)
    A, B = (np.cov(draw.standard_normal((2 * d, d)) * np.exp(-np.arange(d) / (d / 6)), rowvar=False) for _ in range(2))
    calls = {"ours": lambda: root_trace(A, B), "scipy.linalg.sqrtm": lambda: float(np.trace(sqrtm(A @ B)).real)}
    def check() -> dict:
        one, other = calls["ours"](), calls["scipy.linalg.sqrtm"]()
        assert abs(one / other - 1) < 1e-5, (one, other)
        return dict(trace=one, relative_difference=abs(one / other - 1))
    return calls, check


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--slices", type=int, default=130)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--part", choices=("all", "dice", "ssim", "distance"), default="all")
    a = parser.parse_args()
    torch.set_num_threads(a.threads or 1)
    x, labels = patient(a.size, a.slices)
    jobs = {}
    if a.part in ("all", "dice"): jobs |= {"Dice (P6: ours >= 100 times as fast as MONAI)": dices(labels, 0), "Dice, 5 % of all voxels wrong": dices(labels, .05)}
    if a.part in ("all", "ssim"): jobs["SSIM of 16 slices (P6: >= 1.8)"] = ssims(x[::max(1, a.slices // 16)][:16])
    if a.part in ("all", "distance"): jobs |= {"trace term of the Fréchet distance (P6: >= 4)": traces(a.features), "Fréchet distance, means and covariances included": distances(a.features)}
    tables = {}
    for name, (calls, check) in jobs.items():
        agreement, rows = check(), interleave(calls, a.repeats, a.quiet, a.patience)
        tables[name] = {k: dict(times_ours=seconds(r) / seconds(rows["ours"])) | r | (agreement if k == "ours" else {}) for k, r in rows.items()}
    report("metrics", tables, a.out, size=a.size, slices=a.slices, features=a.features, times_ours="seconds of a competitor divided by ours: above 1, ours is faster")


if __name__ == "__main__": main()
