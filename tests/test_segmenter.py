"The embedded judge: neighbours that stay with their patient, a training that survives a kill, folders that are refused, and the ceiling."
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctdiffusion.data.labels import AMOS, ClassTable, CTDiffusionError, LabelClass
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.slices import axial, window
from ctdiffusion.data.volumes import read_image, read_labels, sha256_file, write_volume
from ctdiffusion.evaluation import segmenter as module
from ctdiffusion.evaluation.judge import judge_volume, write_slices
from ctdiffusion.evaluation.quality import dice
from ctdiffusion.evaluation.segmenter import (SegmenterConfig, Segmenter, Training, around, augment, ceiling, ceiling_table, class_weights, count_classes,
                                              fetch_stacks, load_segmenter, loss_of, network, organ_voxels, slice_odds, train_segmenter)
from ctdiffusion.training.runs import generator

FEW = ClassTable("few", (LabelClass(0, "background", (0, 0, 0)), LabelClass(1, "liver", (9, 0, 0), column="Liv."), LabelClass(2, "cyst", (0, 9, 0)), LabelClass(3, "body", (9, 9, 9))))
TINY = SegmenterConfig(steps=5, batch=4, channels=(8, 8, 8, 8, 8, 8), neighbours=1)
silent = lambda line: None


class FakeStore:
    "Three patients of coloured squares; the first two are for training."
    path, held_out_is_train = "fake", False

    def __init__(self, table: ClassTable = FEW, size: int = 32, seed: int = 0, hash: str = "0123456789abcdef"):
        rng = np.random.default_rng(seed)
        self.table, self.hash, self.config = table, hash, SimpleNamespace(size=size, level=40, width=400)
        bounds, splits = [0, 5, 9, 15], ("train", "train", "val")
        self.cases = [dict(id=f"p{i}", split=s, start=a, stop=b) for i, (s, a, b) in enumerate(zip(splits, bounds, bounds[1:]))]
        self.splits = {"train": ["p0", "p1"], "val": ["p2"]}
        blocks = rng.integers(0, table.n, (15, 4, 4)).astype(np.uint8)
        self.labels = np.kron(blocks, np.ones((1, size // 4, size // 4), np.uint8))
        self.images = (self.labels * (200 // table.n) + rng.integers(0, 20, self.labels.shape)).astype(np.uint8)

    def rows(self, split: str) -> np.ndarray: return np.concatenate([np.arange(c["start"], c["stop"]) for c in self.cases if c["split"] == split])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store() -> FakeStore: return FakeStore()


@pytest.fixture(scope="module")
def judge(store, tmp_path_factory) -> Segmenter: return train_segmenter(store, tmp_path_factory.mktemp("judge"), TINY, "cpu", silent)


# --------------------------------------------------------------------------------------------------- slices and draws

@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_neighbours_stay_with_their_patient(store, k):
    "Whatever k: the middle one is the slice itself, all belong to its patient, and consecutive ones are at most one apart."
    for case in store.cases:
        rows = np.arange(case["start"], case["stop"])
        near = around(rows, case["start"], case["stop"], k)
        assert near.shape == (len(rows), 2 * k + 1) and (near[:, k] == rows).all()
        assert near.min() >= case["start"] and near.max() < case["stop"] and set(np.diff(near).ravel()) <= {0, 1}


def test_stacks_come_from_their_own_patient_in_any_order(store):
    rows = np.array([8, 0, 9, 4, 5, 14])
    x, ids = fetch_stacks(store, rows, 2)
    for row, stack, labels in zip(rows, x, ids):
        case = next(c for c in store.cases if c["start"] <= row < c["stop"])
        near = np.clip(np.arange(row - 2, row + 3), case["start"], case["stop"] - 1)
        assert np.array_equal((stack * 255).round().numpy(), store.images[near]) and np.array_equal(labels.numpy(), store.labels[near])


def test_odds_and_weights_by_hand():
    "Class 1 is in one of two slices, class 2 in none: it must not divide by zero, and an error in it costs nothing."
    counts = np.array([[12, 4, 0], [16, 0, 0]])
    assert slice_odds(counts).tolist() == [1 + 2, 1]
    w = class_weights(counts)
    assert w[2] == 0 and torch.isclose(w[1] / w[0], torch.tensor((28 / 4) ** 0.5)) and torch.isclose(w.mean(), torch.tensor(1.0))
    assert torch.equal(class_weights(counts, 0.8)[:2], torch.tensor([1.5, 1.5]))


def test_counting(store):
    counts = count_classes(store, np.arange(15))
    assert (counts.sum(1) == 32 * 32).all() and (counts[:, 1] == (store.labels == 1).sum((1, 2))).all()


def test_air_is_added_after_noise_and_nothing_is_mirrored():
    "An empty mask gives an empty slice; a ramp that rises to the right rises to the right in every draw."
    ramp = torch.linspace(0.2, 0.8, 32).expand(6, 3, 32, 32)
    empty, _ = augment(ramp, torch.zeros(6, 3, 32, 32, dtype=torch.uint8), generator(0, 0, "test"))
    assert (empty == 0).all()
    halves = torch.ones(6, 3, 32, 32, dtype=torch.uint8); halves[..., 16:] = 2
    for step in range(20):
        x, y = augment(ramp, halves, generator(0, step, "test"))
        assert (x[:, 1, 8:24, 20:24].mean((1, 2)) > x[:, 1, 8:24, 8:12].mean((1, 2)) + 0.1).all() and set(y.unique().tolist()) <= {0, 1, 2}
        assert (y[:, 0, 16, 8] == 1).all() and (y[:, 0, 16, 23] == 2).all()


def test_the_whole_network_is_sized_from_the_class_table(store):
    logits = network(TINY, FEW.n)(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 4, 32, 32) and loss_of(logits, torch.zeros(2, 1, 32, 32).long(), torch.ones(4)).isfinite()


# ------------------------------------------------------------------------------------------- killed, finished, refused

class Killed(BaseException): pass


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(store, judge, tmp_path):
    "Checkpoints after every step; killed after the third; the second call does two steps and no more, and not a bit differs."
    def until_three(line):
        if line.startswith("step 3"): raise Killed
    with pytest.raises(Killed): train_segmenter(store, tmp_path, TINY, "cpu", until_three, save_seconds=0)
    assert not (tmp_path / "segmenter.json").exists()
    lines = []
    again = train_segmenter(store, tmp_path, TINY, "cpu", lines.append, save_seconds=0)
    assert lines[0] == "going on at step 3 of 5" and [line.split(",")[0] for line in lines[1:]] == ["step 4 of 5", "step 5 of 5"]
    assert again.about["sha256"] == judge.about["sha256"]
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"segmenter.json", "weights.safetensors"}


@pytest.mark.parametrize("point", ["weights", "described"])
def test_killed_at_the_very_end(store, judge, tmp_path, monkeypatch, point):
    "Between the weights and their description, and between the description and the clean-up."
    def die(name, step):
        if name == point: raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(module, "crash_point", die)
        with pytest.raises(Killed): train_segmenter(store, tmp_path, TINY, "cpu", silent, save_seconds=0)
    assert train_segmenter(store, tmp_path, TINY, "cpu", silent).about["sha256"] == judge.about["sha256"]


def test_seed_decides(store, judge, tmp_path):
    other = train_segmenter(store, tmp_path, SegmenterConfig(**TINY.to_dict() | dict(seed=1)), "cpu", silent)
    assert other.about["sha256"] != judge.about["sha256"] and other.protocol != judge.protocol


def test_a_finished_judge_is_loaded_not_trained(store, tmp_path, monkeypatch):
    first = train_segmenter(store, tmp_path, TINY, "cpu", silent)
    monkeypatch.setattr(module, "Training", None)
    assert train_segmenter(store, tmp_path, TINY, "cpu", silent).about == first.about == load_segmenter(tmp_path, "cpu").about
    assert first.about["sha256"] == sha256_file(tmp_path / "weights.safetensors") and np.isfinite(first.about["held_out_loss"])


def test_folders_that_are_refused(store, tmp_path):
    "Another store, another configuration, half-trained by another one, a flipped bit, no description, one that is no JSON."
    train_segmenter(store, tmp_path / "a", TINY, "cpu", silent)
    other = SegmenterConfig(**TINY.to_dict() | dict(steps=6))
    with pytest.raises(CTDiffusionError, match="another store"): train_segmenter(FakeStore(hash="f" * 16), tmp_path / "a", TINY, "cpu", silent)
    with pytest.raises(CTDiffusionError, match="another config"): train_segmenter(store, tmp_path / "a", other, "cpu", silent)
    def kill(line):
        if line.startswith("step"): raise Killed
    with pytest.raises(Killed): train_segmenter(store, tmp_path / "b", TINY, "cpu", kill, save_seconds=0)
    with pytest.raises(CTDiffusionError, match="another config"): train_segmenter(store, tmp_path / "b", other, "cpu", silent)
    weights = tmp_path / "a/weights.safetensors"
    data = bytearray(weights.read_bytes()); data[-5] ^= 4; weights.write_bytes(data)
    for load in (lambda: load_segmenter(tmp_path / "a"), lambda: train_segmenter(store, tmp_path / "a", TINY, "cpu", silent)):
        with pytest.raises(CTDiffusionError, match="damaged or missing weights"): load()
    weights.unlink()
    with pytest.raises(CTDiffusionError, match="damaged or missing weights"): load_segmenter(tmp_path / "a")
    (tmp_path / "a/segmenter.json").write_text("{")
    with pytest.raises(CTDiffusionError, match="segmenter.json: found no"): load_segmenter(tmp_path / "a")
    with pytest.raises(CTDiffusionError, match="segmenter.json: found no"): load_segmenter(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------- the judge's contract

def test_protocol_names_all_that_the_numbers_depend_on(store, judge):
    for word in ("MONAI", "BasicUNet 8-8-8-8-8-8", "3 slices of 32 px", "window 40/400", "5 steps of 4", "seed 0", store.hash[:8], judge.about["sha256"][:12], "sliding window 32x32, overlap 0.25", "cpu"): assert word in judge.protocol
    assert judge.name == "embedded-segmenter" and judge.table == FEW


@pytest.fixture(scope="module")
def amos_judge(tmp_path_factory) -> Segmenter: return train_segmenter(FakeStore(AMOS), tmp_path_factory.mktemp("amos"), TINY, "cpu", silent)


@pytest.mark.parametrize("orientation", ["LPI", "RAS"])
def test_any_grid_comes_back_as_it_was(amos_judge, tmp_path, orientation):
    "48 x 48 pixels, a judge of 32: the answer has the grid of the file, and is what the arrays give."
    save_patient(phantom(0, 48), tmp_path / "ct.nii.gz", orientation=orientation)
    out = read_labels(judge_volume(amos_judge, tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz"))
    ct = read_image(tmp_path / "ct.nii.gz")
    assert out.data.shape == ct.data.shape and out.source.axcodes == orientation
    assert np.array_equal(axial(out.data), amos_judge.slices(window(axial(ct.data))))


def test_a_field_that_is_not_square(amos_judge):
    ids = amos_judge.slices(np.random.default_rng(0).random((3, 40, 56), np.float32))
    assert ids.shape == (3, 40, 56) and ids.dtype == np.uint8 and ids.max() < AMOS.n


def test_files_and_arrays_say_the_same(amos_judge, tmp_path):
    fake = FakeStore(AMOS)
    x, y = fake.images[9:15] / np.float32(255), fake.labels[9:15]
    grid = read_image(write_volume(tmp_path / "grid.nii.gz", np.zeros((32, 32, 6), np.int16), SimpleNamespace(shape=(32, 32, 6), affine=np.diag([5., 5, 5, 1]), axcodes="RAS", path="g"))).source
    write_slices(tmp_path / "ct.nii.gz", x, grid, y)
    amos_judge(tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz")
    found = axial(read_labels(tmp_path / "out.nii.gz").data)
    assert (found == amos_judge.slices(x * (y != 0))).mean() > 0.98


def test_bytes_and_floats_and_batches(judge, store):
    x = store.images[:5]
    whole = judge.slices(x)
    assert np.array_equal(whole, judge.slices(x / np.float32(255))) and np.array_equal(whole, judge.slices(x, batch=2))
    with pytest.raises(CTDiffusionError, match="0 to 1"): judge.slices(x.astype(np.float32))


# ----------------------------------------------------------------------------------------------------------- the ceiling

class Oracle:
    "Knows the masks, but calls every cyst liver; remembers what it was shown."
    table = FEW
    def __init__(self, store): self.store, self.seen = store, []
    def slices(self, x):
        self.seen.append(x)
        y = self.store.labels[9:15]
        return np.where(y == 2, 1, y)


def test_ceiling_by_hand(store):
    "One held-out patient; air around the mask; the overlooked organ is 0, not left out."
    oracle, y = Oracle(store), store.labels[9:15]
    scores = ceiling(oracle, store)
    assert list(scores) == ["p2"] and scores["p2"]["cyst"] == 0
    liver, cyst = (y == 1).sum(), (y == 2).sum()
    assert np.isclose(scores["p2"]["liver"], 200 * liver / (2 * liver + cyst))
    assert (oracle.seen[0][y == 0] == 0).all() and np.array_equal(oracle.seen[0][y != 0], store.images[9:15][y != 0])
    assert organ_voxels(store) == dict(liver=liver, cyst=cyst)


def test_table_names_the_small_and_the_uncounted(store):
    lines = ceiling_table({"p2": dict(liver=80.0, cyst=10.0)}, store).splitlines()
    assert lines[1].split() == ["liver", "80.0", "1", str((store.labels[9:15] == 1).sum())]
    assert lines[2].endswith("outside of the mean") and lines[3].split()[-1] == "80.0" and lines[3].startswith("mean of 1 columns")
    assert ceiling_table({"p2": dict(liver=80.0, cyst=10.0)}, store, small=1e9).splitlines()[1].endswith("too small")


def test_another_class_table_is_refused(judge):
    with pytest.raises(CTDiffusionError, match="class table 'amos'"): ceiling(judge, FakeStore(AMOS))


@pytest.mark.parametrize("seed", range(3))
def test_our_dice_is_monais(seed):
    "On organs that the mask has; where it has none, both say nothing."
    from monai.metrics import DiceMetric
    rng = np.random.default_rng(seed)
    truth, found = (rng.integers(0, 14, (4, 16, 16)).astype(np.uint8) for _ in range(2))
    one_hot = lambda v: F.one_hot(torch.from_numpy(v).long(), AMOS.n).permute(3, 0, 1, 2)[None]
    theirs = 100 * DiceMetric(include_background=True, reduction="none")(one_hot(found), one_hot(truth))[0].numpy()
    ours = dice(truth, found)
    assert np.allclose([ours[c.name] for c in AMOS.organs], [theirs[c.id] for c in AMOS.organs], equal_nan=True) and np.isnan(ours["urinary_bladder"])


def test_settings_survive_a_file():
    assert SegmenterConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(CTDiffusionError, match="neighbours"): SegmenterConfig.from_dict(dict(neighbors=2))


def test_training_is_reproducible_from_its_step(store):
    "The same step gives the same loss, whatever was computed before."
    a, b = Training(store, TINY), Training(store, TINY)
    a.step = b.step = 3
    torch.rand(7)
    assert torch.equal(a.loss(), b.loss())
