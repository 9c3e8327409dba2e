"Fréchet distance and KID, features, the cache that never lies, and FID through a network that stands in for torch-fidelity's."
import hashlib
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.slices import axial, resize_images, resize_labels, window
from ctdiffusion.evaluation import distance as page
from ctdiffusion.evaluation.distance import Inception, RandomConvolutions, frechet, kid, real_features
from ctdiffusion.evaluation.quality import to_bytes

def rng(seed=0): return np.random.default_rng(seed)

class Means:
    "Three features that are easy to know."
    name, protocol, calls = "means", "means: mean, spread, left minus right", 0
    def __call__(self, slices):
        self.calls += 1
        x = to_bytes(slices) / 255
        half = x.shape[2] // 2
        return np.stack([x.mean((1, 2)), x.std((1, 2)), x[..., :half].mean((1, 2)) - x[..., half:].mean((1, 2))], 1)

@pytest.fixture(autouse=True)
def no_warning_of_few_images():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer than 2,048")
        yield

# ------------------------------------------------------------------------------------------------------- distances

def test_frechet_is_the_formula_with_a_general_root():
    a, b = rng().standard_normal((200, 6)), rng(1).standard_normal((150, 6)) @ np.diag([1, 2, 3, .5, 1, 1]) + 1
    A, B = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * np.real(sqrtm(A @ B)))
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)

def test_frechet_of_one_feature_is_the_difference_of_means_and_spreads():
    a, b = rng().standard_normal((50, 1)), 3 + 2 * rng(1).standard_normal((60, 1))
    assert frechet(a, b) == pytest.approx((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2)

@pytest.mark.parametrize("n", [2, 5, 20])
def test_frechet_is_real_when_covariances_are_singular(n):
    a, b = rng(n).standard_normal((2, n, 40))
    value = frechet(a, b)
    assert isinstance(value, float) and np.isfinite(value) and value > 0
    assert frechet(a, a) == pytest.approx(0, abs=1e-4)
    assert frechet(a, a + 1) == pytest.approx(40, abs=1e-4)

def test_kid_is_the_double_sum():
    a, b = rng().standard_normal((7, 4)), rng(1).standard_normal((5, 4))
    k = lambda x, y: (x @ y / 4 + 1) ** 3
    within = lambda s: np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    assert kid(a, b) == pytest.approx(within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b]), rel=1e-12)

def test_kid_does_not_depend_on_its_blocks(monkeypatch):
    a, b = rng().standard_normal((70, 4)), rng(1).standard_normal((50, 4))
    whole, blocks = kid(a, b), page._kernel_sum
    monkeypatch.setattr(page, "_kernel_sum", lambda x, y: blocks(x, y, rows=9))
    assert kid(a, b) == pytest.approx(whole, rel=1e-12)

def test_the_bias_of_frechet_and_none_of_kid():
    means = {n: np.mean([[frechet(*p), kid(*p)] for p in (rng(k).standard_normal((2, n, 8)) for k in range(60))], 0) for n in (25, 100)}
    assert means[25][0] > 3 * means[100][0] > 0
    spread = np.std([kid(*rng(k).standard_normal((2, 25, 8))) for k in range(60)]) / 60 ** .5
    assert abs(means[25][1]) < 4 * spread

@pytest.mark.parametrize("a, b, message", [
    (np.zeros((5, 3)), np.zeros((5, 4)), "the same d"), (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2"),
    (np.zeros(5), np.zeros(5), r"\(N, d\)"), (np.full((5, 3), np.nan), np.zeros((5, 3)), "not finite")])
@pytest.mark.parametrize("measure", [frechet, kid])
def test_features_that_do_not_fit_are_refused(measure, a, b, message):
    with pytest.raises(CTDiffusionError, match=message): measure(a, b)

# -------------------------------------------------------------------------------------------------- the default features

@pytest.fixture(scope="module")
def population():
    "Slices, labels and owners of eight small patients."
    x, y = zip(*[(resize_images(window(axial(p.hu)), 48), resize_labels(axial(p.labels), 48)) for p in (phantom(seed=s, size=48) for s in range(8))])
    return np.concatenate(x), np.concatenate(y), np.repeat(np.arange(8), [len(s) for s in x])

def test_random_convolutions_are_fixed_and_small():
    first, second = RandomConvolutions(), RandomConvolutions()
    assert all(torch.equal(a, b) for p, q in zip(first.layers, second.layers) for a, b in zip(p, q))
    x = rng().random((5, 32, 48))
    f = first(x)
    assert f.shape == (5, first.d) == (5, 242) and np.isfinite(f).all() and first.d <= 256
    np.testing.assert_array_equal(f, second(to_bytes(x)))
    np.testing.assert_allclose(f, RandomConvolutions(batch=2)(x), rtol=1e-5, atol=1e-6)
    # the very first and last weight, whatever the version of NumPy or torch
    assert [round(float(w), 5) for w in (first.layers[0][0][0, 0, 0, 0], first.layers[-1][1][-1])] == [0.83158, 0.72119]
    names = {RandomConvolutions(*a).name for a in ((0,), (1,), (0, 8), (0, 22, 3))}
    assert len(names) == 4 and "FID" not in first.name

def test_random_convolutions_refuse_tiny_slices():
    with pytest.raises(CTDiffusionError, match="at least 16 x 16"): RandomConvolutions()(np.zeros((2, 12, 40)))

def test_the_distance_rises_with_every_kind_of_damage(population):
    x, y, owner = population
    real, fake, organs = x[::2], x[1::2], y[1::2] > 0
    features, grain, other = RandomConvolutions(), rng().standard_normal(fake.shape), fake[rng(1).permutation(len(fake))]
    share = rng(2).random(len(fake))[:, None, None]
    damages = dict(
        blur=[gaussian_filter(fake, (0, s, s)) for s in (0, .6, 1.2, 2.5)], grain=[(fake + s * grain).clip(0, 1) for s in (0, .03, .08, .2)],
        hu=[(fake + s / 400 * (y[1::2] == AMOS.id("liver"))).clip(0, 1) for s in (0, 30, 60, 120)],
        mirror=[np.where(share < s, fake[..., ::-1], fake) for s in (0, .3, .6, 1)], strange=[np.where((share < s) & organs, other, fake) for s in (0, .3, .6, 1)])
    known = features(real)
    for name, sets in damages.items():
        curve = [frechet(known, features(s)) for s in sets]
        assert curve == sorted(set(curve)), (name, curve)
    patients = frechet(features(x[owner % 2 == 0]), features(x[owner % 2 == 1]))
    assert frechet(known, features(fake)) < patients / 10

# ------------------------------------------------------------------------------------------------------- the cache

def test_the_cache_is_used_and_never_for_something_else(tmp_path):
    x, features = rng().random((6, 8, 8)), Means()
    first = real_features(x, features, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    np.testing.assert_array_equal(real_features(to_bytes(x), features, folder), first)
    assert features.calls == 1
    moved, other = x.copy(), Means()
    moved[3, 4, 4] = 1 - moved[3, 4, 4]
    other.protocol = "means, second version"
    for slices, by in ((moved, features), (x[:5], features), (x[::-1], features), (x.reshape(6, 4, 16), features), (x, other)):
        np.testing.assert_array_equal(real_features(slices, by, folder), Means()(slices))
    assert (features.calls, other.calls, len(list(folder.iterdir()))) == (5, 1, 6)

@pytest.mark.parametrize("damage", [
    lambda b: b[:-7], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b.replace(b"sha256", b"sha255")],
    ids=["cut off", "empty", "one bit", "no hash"])
def test_a_damaged_cache_is_computed_afresh(tmp_path, damage):
    x, features = rng().random((6, 8, 8)), Means()
    first = real_features(x, features, tmp_path)
    file, = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    np.testing.assert_array_equal(real_features(x, features, tmp_path), first)
    np.testing.assert_array_equal(real_features(x, features, tmp_path), first)
    assert features.calls == 2

# ------------------------------------------------------------------------------------------------------------- FID

@pytest.fixture
def network(monkeypatch, tmp_path):
    "A module in the place of torch-fidelity, a file in the place of the weights; what the network was given is kept."
    seen = types.SimpleNamespace(batches=[], weights=tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    seen.weights.write_bytes(b"weights")

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            seen.asked = name, features_list, feature_extractor_weights_path
        def forward(self, x):
            seen.batches.append(x)
            return (x.float().flatten(1)[:, ::3][:, :5] / 255,)

    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    package.__version__, module.FeatureExtractorInceptionV3 = "0.0.test", FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(page, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    return seen

def test_fid_gives_the_network_bytes_in_three_equal_channels(network):
    features = Inception(network.weights, batch=4)
    assert network.asked == ("inception-2015-12-05", ["2048"], str(network.weights))
    x = rng().random((6, 8, 10))
    f = features(x)
    assert [b.shape for b in network.batches] == [(4, 3, 8, 10), (2, 3, 8, 10)] and f.shape == (6, 5)
    for b in network.batches: assert b.dtype == torch.uint8 and torch.equal(b[:, 0], b[:, 1]) and torch.equal(b[:, 0], b[:, 2])
    np.testing.assert_array_equal(torch.cat(network.batches)[:, 0].numpy(), to_bytes(x))

def test_without_torch_fidelity_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(CTDiffusionError, match=r"pip install 'ctdiffusion\[fid\]'"): Inception("nowhere.pth")
