"""Windows, slices, sizes, edges and the body."""
from pathlib import Path
import numpy as np
import pytest
import torch
from scipy import ndimage
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.slices import axial, body_mask, disk, edge_map, fill_slices, largest, opened, resize_images, resize_labels, runs_of, unaxial, unwindow, window, with_body

ORACLE = Path(__file__).parent / "oracles" / "losses_metrics.npz"


def test_window_and_back():
    hu = np.arange(-1024, 3072, dtype=np.int16)
    x = window(hu)
    assert x.dtype == np.float32 and x.min() == 0 and x.max() == 1 and (np.diff(x) >= 0).all()
    inside = (hu >= -160) & (hu <= 240)
    assert np.abs(unwindow(x)[inside] - hu[inside]).max() < 1e-3
    assert np.isclose(window(np.array([40]), 40, 400), .5) and np.isclose(window(np.array([0]), 0, 2000), .5)


def test_axial_is_radiological():
    v = np.zeros((4, 5, 6), int)
    v[3, 4, 0] = 1  # right, front, feet
    s = axial(v)
    assert s.shape == (6, 5, 4) and s[0, 0, 0] == 1
    assert (unaxial(s, v.shape) == v).all()
    with pytest.raises(ValueError, match="resize"): unaxial(s[:, 1:], v.shape)


def test_disc_keeps_its_area_when_squeezed():
    y, x = np.mgrid[:256, :128]  # pixels of 1 x 2 mm: a disc of 60 mm is an ellipse
    picture = (((y - 128) / 60)**2 + ((x - 64) / 30)**2 <= 1).astype(np.float32)[None]
    area = 1 * 2 * picture.sum()
    for out in (resize_images(picture, 64), resize_labels(picture.astype(np.uint8), 64)):
        assert np.isclose(out.sum() * (256 / 64) * (2 * 128 / 64), area, rtol=.02)


def test_resize_agrees_with_torch():
    x = np.random.default_rng(0).random((2, 50, 70)).astype(np.float32)
    for size in (32, 100, (41, 23)):
        other = torch.nn.functional.interpolate(torch.from_numpy(x)[None], size, mode="bilinear", antialias=True)[0].numpy()
        assert np.abs(resize_images(x, size) - other).max() < 1e-5


def test_labels_stay_ids_and_stay_in_place():
    m = np.random.default_rng(0).integers(0, 17, (3, 40, 40)).astype(np.uint8)
    assert (resize_labels(m, 40) == m).all() and (resize_labels(resize_labels(m, 80), 40) == m).all()
    other = torch.nn.functional.interpolate(torch.from_numpy(m)[None].float(), (23, 57), mode="nearest-exact")[0].numpy()
    assert (resize_labels(m, (23, 57)) == other).all()


def test_edges_match_the_oracle():
    o = np.load(ORACLE)
    edge = edge_map(o["label"])
    assert (edge == o["edge"].reshape(edge.shape).astype(bool)).all()
    t = edge_map(torch.from_numpy(o["label"]))
    assert t.dtype == torch.bool and (t.numpy() == edge).all()


def test_body_keeps_lungs_and_drops_the_table():
    p = phantom(seed=2, size=96)
    assert p.info["table"]
    body = body_mask(p.hu, p.spacing, p.labels)
    assert body[p.labels > 0].all() and .2 < body.mean() < .8
    hu = p.hu.copy()
    hu[:, :3] = 200  # a massive table across the whole picture
    assert not body_mask(hu, p.spacing)[:, :3].any()
    middle = body.shape[0] // 2, body.shape[1] // 2
    assert body[middle].all()
    full = with_body(p.labels, body, 16)
    assert (full[p.labels > 0] == p.labels[p.labels > 0]).all() and ((full == 16) == (body & (p.labels == 0))).all()
    assert (full[~body] == 0).all()


def test_body_of_nothing():
    assert not body_mask(np.full((8, 8, 3), -1000), np.ones(3)).any()
    assert fill_slices(np.ones((3, 3, 2), bool)).all()


def test_disk_follows_the_spacing():
    assert disk(np.array([1., 1.]), 2).sum() == 13 and disk(np.array([3., 3.]), 2).sum() == 5 and disk(np.array([1., 2.]), 2).shape == (5, 3)


def filled(mask): return np.stack([ndimage.binary_fill_holes(s) for s in mask.transpose(2, 0, 1)], 2)


def biggest(mask):
    parts, n = ndimage.label(mask)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1 if n else mask


@pytest.mark.parametrize("share", [0, .02, .2, .4, .6, .8, .98, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (1, 9, 4), (17, 1, 5), (13, 14, 6), (40, 33, 9)])
def test_runs_opening_pieces_and_holes_are_scipys(share, shape):
    draw = np.random.default_rng(0)
    for mask in (draw.random(shape) < share, np.asfortranarray(draw.random(shape) < share)[::-1], ndimage.uniform_filter(draw.random(shape), 3) < share):
        slices = axial(mask)
        assert (runs_of(slices, slices.shape).paint() == slices).all()
        assert (fill_slices(mask) == filled(mask)).all()
        sizes = np.bincount(ndimage.label(mask)[0].ravel())[1:]
        if (sizes == sizes.max(initial=0)).sum() <= 1: assert (largest(mask) == biggest(mask)).all()  # else both are right
        assert largest(mask).sum() == sizes.max(initial=0)
        for spacing, radius in (((1., 1.), 1), ((1., 1.), 2.5), ((.7, 1.4), 3), ((3., 3.), 2)):
            foot = disk(np.array(spacing), radius)
            for s in slices: assert (opened(s, foot) == ndimage.binary_opening(s, foot)).all()


@pytest.mark.parametrize("seed, size, kind", [(0, 64, np.int16), (3, 96, np.int16), (5, 96, np.float32), (8, 130, np.int16)])
def test_body_is_that_of_scipy(seed, size, kind):
    p = phantom(seed=seed, size=size)
    for spacing, threshold, radius in ((p.spacing, -300, 2.), (np.array([.8, 1.2, 3]), -250.5, 2.5), (p.spacing, -40_000, 2.), (p.spacing, 40_000, 2.)):
        hu = p.hu.astype(kind)
        old = filled(biggest(ndimage.binary_opening(hu > np.float64(threshold), disk(spacing[:2], radius)[..., None])))
        for order in "CF": assert (body_mask(np.array(hu, order=order), spacing, None, threshold, radius) == old).all()
        assert (body_mask(hu, spacing, p.labels, threshold, radius) == (old | (p.labels > 0))).all()
