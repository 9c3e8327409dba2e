"PSNR and SSIM against scikit-image, Dice against sets and by hand, the rules of what is left out, and every refusal."
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ctdiffusion.data.labels import AMOS, ClassTable, CTDiffusionError, LabelClass
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.slices import axial, resize_images, window
from ctdiffusion.evaluation.quality import bootstrap, dice, hu_errors, paired_difference, paired_scores, psnr, ssim, ssim_map, to_bytes

def slices(n=6, h=24, w=31, seed=0): return np.random.default_rng(seed).random((n, h, w))

def pair(kind):
    "Two sets that differ: noise, a shift, a constant, or bytes."
    x = slices()
    if kind == "shift": return x, np.roll(x, 2, 2)
    if kind == "flat": return np.full_like(x, .25), np.full_like(x, .75)
    if kind == "bytes": return to_bytes(x), to_bytes(slices(seed=1))
    if kind == "float32": return x.astype(np.float32), np.clip(x + .05, 0, 1).astype(np.float32)
    return x, np.clip(x + .1 * np.random.default_rng(2).standard_normal(x.shape), 0, 1)

KINDS = ["noise", "shift", "flat", "bytes", "float32"]
floats = lambda x: x / 255 if x.dtype == np.uint8 else x.astype(float)

# ------------------------------------------------------------------------------------------ against scikit-image

@pytest.mark.parametrize("kind", KINDS)
def test_psnr_is_scikit_images(kind):
    real, fake = pair(kind)
    theirs = [peak_signal_noise_ratio(floats(r), floats(f), data_range=1) for r, f in zip(real, fake)]
    np.testing.assert_allclose(psnr(real, fake), theirs, rtol=1e-6)

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 7), (8, 40), (64, 64)])
def test_ssim_is_scikit_images(kind, shape):
    real, fake = (np.resize(x, (3, *shape)) for x in pair(kind))
    theirs = [structural_similarity(floats(r), floats(f), data_range=1) for r, f in zip(real, fake)]
    np.testing.assert_allclose(ssim(real, fake), theirs, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8])
def test_ssim_of_ct_slices_is_scikit_images_window_by_window(dtype):
    p = phantom(seed=4, size=64)
    real = resize_images(window(axial(p.hu)[::9]), (61, 84))
    fake = np.clip(resize_images(resize_images(real, 20), (61, 84)) + .04 * np.random.default_rng(0).standard_normal(real.shape), 0, 1)
    real, fake = (to_bytes(x) if dtype == np.uint8 else x.astype(dtype) for x in (real, fake))
    both = [structural_similarity(floats(r), floats(f), data_range=1, full=True) for r, f in zip(real, fake)]
    np.testing.assert_allclose(ssim(real, fake), [value for value, _ in both], atol=1e-12)
    for r, f, (_, whole) in zip(real, fake, both): np.testing.assert_allclose(ssim_map(floats(r), floats(f)), whole[3:-3, 3:-3], atol=1e-11)
    np.testing.assert_array_equal(ssim(real, fake), np.concatenate([ssim(real[k:k + 1], fake[k:k + 1]) for k in range(len(real))]))

def test_both_are_their_formulas():
    "PSNR from the mean squared error, SSIM window by window with unbiased variances."
    a, b = slices()[0], slices(seed=3)[0]
    assert psnr(a[None], b[None])[0] == pytest.approx(-10 * np.log10(np.square(a - b).mean()), rel=1e-9)
    u, v = (np.lib.stride_tricks.sliding_window_view(s, (7, 7)).reshape(-1, 49) for s in (a, b))
    covariance = ((u - u.mean(1, keepdims=True)) * (v - v.mean(1, keepdims=True))).sum(1) / 48
    s = (2 * u.mean(1) * v.mean(1) + 1e-4) * (2 * covariance + 9e-4) / ((u.mean(1) ** 2 + v.mean(1) ** 2 + 1e-4) * (u.var(1, ddof=1) + v.var(1, ddof=1) + 9e-4))
    np.testing.assert_allclose(ssim_map(a, b).ravel(), s, atol=1e-9)
    assert ssim(a[None], b[None])[0] == pytest.approx(s.mean(), rel=1e-9)

# ------------------------------------------------------------------------------------------------ what is left out

def test_body_psnr_looks_at_the_body_alone():
    real, fake = pair("noise")
    labels = np.zeros(real.shape, np.uint8)
    labels[:, 5:15, 5:15] = AMOS.body
    labels[0] = 0
    inside = psnr(real, fake, labels > 0)
    np.testing.assert_allclose(inside[1:], psnr(real[1:, 5:15, 5:15], fake[1:, 5:15, 5:15]))
    assert np.isnan(inside[0])
    scores = paired_scores(real, fake, labels)
    assert (scores["psnr"].n, scores["body_psnr"].n, scores["body_psnr"].left_out, scores["ssim"].n) == (6, 5, 1, 6)
    assert "body only" in scores["body_psnr"].protocol

def test_hu_errors_are_the_shift_of_each_organ_and_no_other():
    labels = np.zeros((2, 20, 20), np.uint8)
    labels[:, :5], labels[:, 5:10], labels[0, 12, :3] = 6, 1, 4
    hu = np.where(labels == 6, 100., 20.)
    fake = np.where(labels == 6, hu - 30, hu)
    errors = hu_errors(window(hu), window(fake), labels)
    assert set(errors) == {"liver", "spleen"}  # three pixels of gallbladder have no median
    assert errors["liver"] == pytest.approx(-30, abs=.01) and errors["spleen"] == 0

# ------------------------------------------------------------------------------------------------------------ Dice

@pytest.mark.parametrize("table", [AMOS, ClassTable("many", tuple(LabelClass(k, f"c{k}", (0, 0, 0)) for k in range(300)))], ids=["17 classes", "300 classes"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_dice_is_exactly_that_of_boolean_masks(dtype, table):
    "Runs and noise, more voxels than one piece of the count, a last piece of one voxel."
    draw, n = np.random.default_rng(0), min(table.n, 256)
    truth = np.repeat(draw.integers(0, n, 2048), 64 + draw.integers(0, 3, 2048))
    truth = np.resize(truth, 2 ** 17 + 1).astype(dtype)
    prediction = np.where(draw.random(truth.shape) < .3, draw.integers(0, n, truth.shape), np.roll(truth, 5)).astype(dtype)
    expected = {c.name: float(200 * ((truth == c.id) & (prediction == c.id)).sum() / ((truth == c.id).sum() + (prediction == c.id).sum())) if (truth == c.id).any() else np.nan for c in table.organs}
    np.testing.assert_equal(dice(truth, prediction, table), expected)

@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_dice_is_the_definition_with_sets_to_the_last_bit(dtype):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 15, (9, 8, 7)).astype(dtype)
    prediction = np.where(rng.random(truth.shape) < .6, truth, rng.integers(0, 17, truth.shape)).astype(dtype)
    found = dice(truth, prediction)
    assert set(found) == {c.name for c in AMOS.organs}
    for c in AMOS.organs:
        t, p = truth == c.id, prediction == c.id
        expected = 200 * (t & p).sum() / (t.sum() + p.sum()) if t.any() else np.nan
        assert found[c.name] == expected or np.isnan([found[c.name], expected]).all()

def test_dice_works_for_another_table():
    table = ClassTable("two", (LabelClass(0, "background", (0, 0, 0)), LabelClass(1, "a", (1, 1, 1)), LabelClass(2, "b", (2, 2, 2))))
    assert dice(np.array([1, 2]), np.array([1, 1]), table) == {"a": pytest.approx(200 / 3), "b": 0}
    with pytest.raises(CTDiffusionError, match="labels 3"): dice(np.array([1, 3]), np.array([1, 1]), table)

# ------------------------------------------------------------------------------------------------------- bootstrap

def test_bootstrap_is_seeded_and_does_not_know_the_order():
    values = {f"p{k}": list(v) for k, v in enumerate(slices(8, 1, 5)[:, 0])}
    first = bootstrap(values, seed=3)
    assert first == bootstrap(dict(reversed(values.items())), seed=3) != bootstrap(values, seed=4)
    assert first.value == pytest.approx(np.mean(list(values.values()))) and first.low < first.value < first.high
    assert first.patients == 8 and "8 patients" in str(first) and "seed 3" in str(first)

def test_bootstrap_weighs_slices_and_leaves_out_what_has_no_value():
    odd = bootstrap({"a": [1., 1., 1.], "b": [5.], "c": [np.nan], "d": [np.inf, 1.]})
    assert odd.value == pytest.approx(9 / 5) and odd.patients == 3
    assert bootstrap({"a": 1., "b": 3.}).value == 2

def test_bootstrap_covers_about_95_percent():
    rng = np.random.default_rng(0)
    intervals = [bootstrap(dict(enumerate(rng.standard_normal(40))), seed=k, draws=400) for k in range(300)]
    assert .85 < np.mean([i.low <= 0 <= i.high for i in intervals]) < .98

def test_differences_of_pairs_are_narrower_than_those_of_means():
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(20) * 5
    a, b = ({k: [h + m + e for e in .1 * rng.standard_normal(3)] for k, h in enumerate(hard)} for m in (1, 0))
    apart, alone = paired_difference(a, b), bootstrap(a)
    assert apart.low > 0 and apart.value == pytest.approx(1, abs=.1)
    assert apart.high - apart.low < (alone.high - alone.low) / 10

# -------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("call, message", [
    (lambda x: psnr(x, x[:-1]), "as many slices"),
    (lambda x: ssim(x, x[:, 1:]), "same size"),
    (lambda x: ssim(x[:, :6], x[:, :6]), "7 x 7"),
    (lambda x: psnr(x, x, x[:1] > .5), "bool of shape"),
    (lambda x: psnr(x, x, np.ones(x.shape, int)), "bool of shape"),
    (lambda x: dice(np.array([1, 2]), np.array([1])), "one grid"),
    (lambda x: dice(np.array([1.]), np.array([1.])), "integer ids"),
    (lambda x: dice(np.array([], int), np.array([], int)), "at least one"),
    (lambda x: dice(np.array([17]), np.array([1])), "labels 17"),
    (lambda x: dice(np.array([1]), np.array([-1])), "labels -1"),
    (lambda x: bootstrap({"a": [1., 2.], "b": np.nan}), "at least 2"),
    (lambda x: bootstrap({}), "at least 2"),
    (lambda x: paired_difference({"a": 1., "b": 1.}, {"a": 1., "c": 1.}), "same patients"),
    (lambda x: paired_difference({"a": [1., 2.], "b": 1.}, {"a": [1.], "b": 1.}), "same slices"),
])
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(CTDiffusionError, match=message): call(slices())
