"""Everything that decides a result is in its job (fault F44): one input changed makes a new result, none changed finds the old one."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctdiffusion import CTDiffusionError, load
from ctdiffusion.apps.jobs import ReproduceJob, plan, state
from ctdiffusion.apps.launch import is_current
from ctdiffusion.data.labels import AMOS, ClassTable
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.store import PrepareConfig, Store, prepare
from ctdiffusion.data.volumes import Source
from ctdiffusion.data.whole import fingerprint, finished, once
from ctdiffusion.evaluation import measure, references
from ctdiffusion.evaluation.distance import real_features
from ctdiffusion.evaluation.judge import Command, judge_volume
from ctdiffusion.evaluation.measure import Patient, measured_job, patients, synthesize_patient
from ctdiffusion.evaluation.references import reference
from ctdiffusion.evaluation.results import write_results
from ctdiffusion.evaluation.segmenter import SegmenterConfig, train_segmenter
from ctdiffusion.synthesis import synthesis
from ctdiffusion.synthesis.synthesis import synthesize

pytestmark = [pytest.mark.fault("F44"), pytest.mark.filterwarnings("ignore:.*images are fewer than.*")]

OTHER_COLOUR = ClassTable("amos", (*AMOS.classes[:6], replace(AMOS.classes[6], color=(1, 2, 3)), *AMOS.classes[7:]))


@pytest.fixture(scope="module")
def model():
    return load("pix2pix-demo", "cpu")


# -------------------------------------------------------------------------------------------------------- synthesize

def volume(path: Path, data: np.ndarray, affine: np.ndarray, qform: int = 1, sform: int = 1) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    nib.save(image, path)
    return path


def given_files(folder: Path) -> dict:
    "Labels with organs alone, and the CT that shows the body around them."
    ids = np.zeros((24, 20, 2), np.uint8)
    ids[8:14, 8:14] = AMOS.id("liver")
    hu = np.full(ids.shape, -1000, np.int16)
    hu[3:21, 3:17] = 40
    return dict(ids=ids, hu=hu, affine=np.diag([-5.0, -5.0, 5.0, 1.0]), qform=1, sform=1, folder=folder, dtype=np.uint8)


def ask(model, files: dict, options: dict) -> Path:
    "Write both files and ask for the volume."
    folder, geometry = files["folder"], (files["affine"], files["qform"], files["sform"])
    labels = volume(folder / "l.nii.gz", files["ids"].astype(files["dtype"]), *geometry)
    image = volume(folder / "i.nii.gz", files["hu"], *geometry)
    return synthesize(model, labels, folder / "ct.nii.gz", image=image, **options)


def a_voxel(model, files, options):
    files["ids"] = files["ids"].copy()
    files["ids"][8, 8, 0] = AMOS.id("spleen")
    return model


def the_shape_with_the_same_bytes(model, files, options):
    files["ids"], files["hu"] = (x.reshape(20, 24, 2) for x in (files["ids"], files["hu"]))
    return model


def the_type(model, files, options): files["dtype"] = np.int16; return model
def the_affine(model, files, options): files["affine"] = np.diag([-5.0, -5.0, 4.0, 1.0]); return model


def the_origin(model, files, options):
    files["affine"] = files["affine"].copy()
    files["affine"][0, 3] = 7
    return model


def the_orientation(model, files, options): files["affine"] = np.diag([5.0, -5.0, 5.0, 1.0]); return model
def the_qform(model, files, options): files["qform"] = 0; return model
def the_sform(model, files, options): files["sform"] = 2; return model


def the_image(model, files, options):
    files["hu"] = files["hu"].copy()
    files["hu"][20:22, 3:17] = 40
    return model


def the_seed(model, files, options): options["seed"] = 1; return model
def the_sampler(model, files, options): options["sampler"] = "ddim5"; return model
def the_case(model, files, options): options["case"] = "another"; return model
def the_batch(model, files, options): options["batch"] = 1; return model
def the_air(model, files, options): options["air"] = -900; return model
def the_weights(model, files, options): return replace(model, sha256="1" * 64)
def the_level(model, files, options): return replace(model, level=50.0)
def the_width(model, files, options): return replace(model, width=300.0)
def the_guidance(model, files, options): return replace(model, guidance=1.5)
def the_network(model, files, options): return replace(model, config=replace(model.config, T=999))
def the_class_table(model, files, options): options["overwrite"] = True; return replace(model, table=OTHER_COLOUR)
def the_threads(model, files, options): torch.set_num_threads(2); return model


CHANGES = [a_voxel, the_shape_with_the_same_bytes, the_type, the_affine, the_origin, the_orientation, the_qform, the_sform, the_image, the_seed, the_sampler,
           the_case, the_batch, the_air, the_weights, the_level, the_width, the_guidance, the_network, the_class_table, the_threads]


@pytest.fixture
def work(monkeypatch):
    "Counts how often slices are made."
    before, made, real = torch.get_num_threads(), [], synthesis.pieces
    torch.set_num_threads(1)
    monkeypatch.setattr(synthesis, "pieces", lambda *args: made.append(1) or real(*args))
    yield made
    torch.set_num_threads(before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_makes_a_new_volume(model, tmp_path, work, change):
    files, options = given_files(tmp_path), {}
    ask(model, files, options)
    ask(model, files, options)
    assert len(work) == 1, "the same inputs are found again"
    changed = change(model, files, options)
    ask(changed, files, options)
    assert len(work) == 2
    ask(changed, files, options)
    assert len(work) == 2


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([c for c in CHANGES if c is not the_threads]), min_size=1, max_size=4, unique=True))
def test_any_changes_together_give_what_a_fresh_folder_gives(model, tmp_path, work, changes):
    "Made over an older result or in an empty folder: the same bytes and the same geometry."
    old, fresh = tmp_path / "old", tmp_path / "fresh"
    for folder in (old, fresh):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    ask(model, given_files(old), {})
    results = []
    for folder in (old, fresh):
        changed, files, options = model, given_files(folder), {}
        for change in changes: changed = change(changed, files, options)
        results.append(ask(changed, files, options).read_bytes())
    assert results[0] == results[1]


def test_a_repaired_header_is_not_answered_with_the_old_affine(model, tmp_path):
    files = given_files(tmp_path)
    good = files["affine"]
    ask(model, files | dict(affine=np.eye(4)), {})
    assert np.array_equal(nib.load(ask(model, files, {})).affine, good)


def test_another_shape_of_the_same_bytes_is_another_volume(model, tmp_path):
    "A patient without air: all voxels are 16, whatever the shape."
    for shape in ((24, 20, 2), (20, 24, 2), (24, 20, 2)):
        labels = volume(tmp_path / "l.nii.gz", np.full(shape, AMOS.body, np.uint8), np.diag([5.0, 5.0, 5.0, 1.0]))
        assert nib.load(synthesize(model, labels, tmp_path / "ct.nii.gz")).shape == shape


# --------------------------------------------------------------------------------------------------- the idea itself

def test_a_fingerprint_differs_with_type_shape_and_values():
    x = np.arange(6, dtype=np.uint8)
    arrays = [x, x.reshape(2, 3), x.reshape(3, 2), x.astype(np.int8), x[::-1], x.reshape(2, 3).T]
    jobs = [fingerprint(x=a, nested=[dict(table=AMOS)]) for a in arrays]
    assert len({json.dumps(j) for j in jobs}) == len(arrays)
    assert fingerprint(x=np.asfortranarray(arrays[1])) == fingerprint(x=arrays[1]) and fingerprint(t=AMOS) != fingerprint(t=OTHER_COLOUR)
    assert json.loads(json.dumps(jobs[0])) == jobs[0] and fingerprint(n=np.float32(0.5)) == fingerprint(n=0.5)
    with pytest.raises(TypeError): fingerprint(x=object())


def test_another_version_of_the_recipe_is_another_job(monkeypatch, tmp_path):
    job = fingerprint(a=1)
    once(tmp_path / "r", job, lambda parts: (parts / "r").write_text("x") and {})
    assert finished(tmp_path / "r", fingerprint(a=1))
    monkeypatch.setattr("ctdiffusion.data.whole.JOBS", 10**6)
    assert not finished(tmp_path / "r", fingerprint(a=1))


# ------------------------------------------------------------------------------------- patients, judges and features

def drawn_patient(id: str = "p") -> Patient:
    masks = np.full((2, 64, 64), AMOS.body, np.uint8)
    masks[:, 20:40, 20:40] = 6
    return Patient(id, masks, masks, Source("drawn", (64, 64, 2), np.eye(4), "0" * 64))


@pytest.mark.parametrize("change", [
    lambda m, p, o: (m, replace(p, masks=np.roll(p.masks, 1, 1))), lambda m, p, o: (replace(m, sha256="1" * 64), p), lambda m, p, o: (replace(m, guidance=2.0), p),
    lambda m, p, o: (replace(m, config=replace(m.config, T=999)), p), lambda m, p, o: o.update(seed=1) or (m, p), lambda m, p, o: o.update(sampler="ddim5") or (m, p),
    lambda m, p, o: o.update(batch=1) or (m, p)], ids=["masks", "weights", "guidance", "network", "seed", "sampler", "batch"])
def test_the_slices_of_a_test_patient(model, tmp_path, monkeypatch, change):
    made, real = [], measure.pieces
    monkeypatch.setattr(measure, "pieces", lambda *args: made.append(1) or real(*args))
    options = {}
    for _ in range(2): synthesize_patient(model, drawn_patient(), tmp_path, **options)
    assert len(made) == 1
    m, p = change(model, drawn_patient(), options)
    for _ in range(2): synthesize_patient(m, p, tmp_path, **options)
    assert len(made) == 2


COPY = ("python", "-c", "pass", "{image}", "{out}")


class Counting(Command):
    "A program that is only counted."
    def __call__(self, image, out):
        Path(out).write_bytes(Path(image).read_bytes())
        CALLS.append(1)


CALLS = []


@pytest.mark.parametrize("change", [dict(protocol="2"), dict(name="b"), dict(argv=(*COPY, "more")), dict(names={1: "liver"}), dict(key="ts_v1"), dict(table=OTHER_COLOUR)], ids=lambda c: next(iter(c)))
def test_what_a_judge_found(tmp_path, change):
    CALLS.clear()
    image = volume(tmp_path / "ct.nii.gz", np.zeros((4, 4, 2), np.int16), np.diag([2.0, 2, 2, 1]))
    judge = Counting("a", "1", COPY)
    for _ in range(2): judge_volume(judge, image, tmp_path / "o.nii.gz")
    assert len(CALLS) == 1
    for _ in range(2): judge_volume(replace(judge, **change), image, tmp_path / "o.nii.gz")
    assert len(CALLS) == 2
    volume(image, np.full((4, 4, 2), 1, np.int16), np.diag([2.0, 2, 2, 1]))
    judge_volume(replace(judge, **change), image, tmp_path / "o.nii.gz")
    judge_volume(replace(judge, **change), image, tmp_path / "o.nii.gz", OTHER_COLOUR)
    assert len(CALLS) == 4


class Means:
    name, protocol = "means", "one number"
    calls = 0

    def __call__(self, slices):
        Means.calls += 1
        return np.asarray(slices, float).reshape(len(slices), -1)[:, :2]


@pytest.mark.parametrize("change", ["values", "shape", "name", "protocol"])
def test_features_of_the_real_slices(tmp_path, change):
    x, features = np.arange(64, dtype=np.uint8).reshape(4, 4, 4), Means()
    real_features(x, features, tmp_path)
    before = Means.calls
    real_features(x, features, tmp_path)
    assert Means.calls == before
    y = dict(values=x + 1, shape=x.reshape(4, 2, 8)).get(change, x)
    if change in ("name", "protocol"): setattr(features, change, "another")
    real_features(y, features, tmp_path)
    assert Means.calls == before + 1


# ------------------------------------------------------------------------------------------ evaluations and references

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder / "data", 2, 2, size=48)
    return folder, prepare(folder / "data", folder / "store", PrepareConfig(64))


class Judged:
    name, protocol = "judged", "1"


def changed_store(store: Store, **changes) -> Store:
    "A store that says something else, with the same slices."
    other = Store(store.path)
    for name, value in changes.items(): setattr(other, name, value)
    return other


def moved(store: Store) -> Store:
    "The headers of the patients were repaired: the same slices, another spacing."
    cases = [c | dict(affine=(np.array(c["affine"]) @ np.diag([1, 1, 2, 1])).tolist()) for c in store.cases]
    return changed_store(store, cases=cases)


MEASURED = {
    "content": lambda s: (changed_store(s, hash="f" * 16), {}), "headers": lambda s: (moved(s), {}), "class table": lambda s: (changed_store(s, table=OTHER_COLOUR), {}),
    "level": lambda s: (changed_store(s, config=replace(s.config, level=50)), {}), "width": lambda s: (changed_store(s, config=replace(s.config, width=300)), {}),
    "first patients": lambda s: (s, dict(first=1)), "name of the data": lambda s: (s, dict(name="other")), "judge": lambda s: (s, dict(judge="2")), "features": lambda s: (s, dict(features="2")),
}


def the_job(store: Store, first: int = 0, name: str = "phantom", judge: str = "1", features: str = "1") -> dict:
    one, other = Judged(), Means()
    one.protocol, other.protocol = judge, features
    return fingerprint(**measured_job(store, patients(store, first), name, one, other))


@pytest.mark.parametrize("change", MEASURED)
def test_what_a_row_is_measured_on(data, change):
    store, options = MEASURED[change](data[1])
    assert the_job(data[1]) == the_job(Store(data[1].path))
    assert the_job(store, **options) != the_job(data[1])


@pytest.mark.parametrize("change", MEASURED)
def test_a_reference_is_measured_again(data, tmp_path, monkeypatch, change):
    "All but the measuring itself."
    measured, real = [], references._row
    monkeypatch.setattr(references, "_row", lambda kind, store, judge, features, *rest: measured.append(1) or real(kind, store, None, None, *rest))
    def ask(store, first=0, name="phantom", judge="1", features="1"):
        one, other = Judged(), Means()
        one.protocol, other.protocol = judge, features
        return reference("paint", store, one, other, tmp_path, first=first, name=name, say=lambda line: None)
    for _ in range(2): ask(data[1])
    assert len(measured) == 1
    store, options = MEASURED[change](data[1])
    for _ in range(2): ask(store, **options)
    assert len(measured) == 2


@pytest.mark.parametrize("change", ["steps", "batch", "lr", "channels", "neighbours", "seed", "store"])
def test_a_judge_of_something_else_is_refused(data, tmp_path, change):
    config = SegmenterConfig(steps=1, batch=2, channels=(4,) * 6, neighbours=1)
    train_segmenter(data[1], tmp_path, config, "cpu", lambda line: None)
    train_segmenter(data[1], tmp_path, config, "cpu", lambda line: None)
    other = dict(steps=2, batch=3, lr=1e-3, channels=(8,) * 6, neighbours=2, seed=1)
    store = changed_store(data[1], hash="f" * 16) if change == "store" else data[1]
    config = config if change == "store" else replace(config, **{change: other[change]})
    with pytest.raises(CTDiffusionError, match="a judge of another"):
        train_segmenter(store, tmp_path, config, "cpu", lambda line: None)


# ------------------------------------------------------------------------------------------------- stores and the plan

def a_header(root: Path) -> None:
    path = next((root / "labelsVa").glob("*.nii.gz"))
    image = nib.load(path)
    volume(path, np.asanyarray(image.dataobj), image.affine @ np.diag([1, 1, 1.01, 1]))


def a_label(root: Path) -> None:
    path = next((root / "labelsTr").glob("*.nii.gz"))
    image = nib.load(path)
    ids = np.asanyarray(image.dataobj).copy()
    ids[ids == 1] = 0
    volume(path, ids, image.affine)


def a_patient_less(root: Path) -> None:
    for kind in ("images", "labels"): sorted((root / f"{kind}Tr").glob("*.nii.gz"))[0].unlink()


DATA = [a_header, a_label, a_patient_less]
PARAMETERS = dict(size=32, level=50, width=300, exclude=("phantom_0001",))


@pytest.fixture
def own(data, tmp_path) -> tuple[Path, Path]:
    "The data and their store, to be changed."
    for name in ("data", "store"): shutil.copytree(data[0] / name, tmp_path / name)
    return tmp_path / "data", tmp_path / "store"


@pytest.mark.parametrize("change", DATA)
def test_a_store_of_other_data_is_refused(own, change):
    root, store = own
    prepare(root, store, PrepareConfig(64))
    change(root)
    with pytest.raises(CTDiffusionError, match="other data"): prepare(root, store, PrepareConfig(64))


@pytest.mark.parametrize("change", PARAMETERS)
def test_a_store_of_other_parameters_is_refused(own, change):
    root, store = own
    with pytest.raises(CTDiffusionError, match=change): prepare(root, store, replace(PrepareConfig(64), **{change: PARAMETERS[change]}))
    with pytest.raises(CTDiffusionError, match="class table"): prepare(root, store, PrepareConfig(64), OTHER_COLOUR)


@pytest.mark.parametrize("change", [*DATA, "another folder", "size"])
def test_a_plan_sees_that_its_store_is_another(own, tmp_path, change):
    "The preparation of a reproduction is done only if the store is that of these data and parameters."
    root, store = own
    task = lambda folder, name="demo": plan(ReproduceJob(root=str(tmp_path), data_root=str(folder), variants="mask", preset=name))[0]
    assert state(task(root)) == "done"
    if change == "another folder":
        root = shutil.copytree(root, tmp_path / "other")
        a_label(root)
    elif change != "size": change(root)
    assert state(task(root, "small" if change == "size" else "demo")).startswith("another store: ")
    assert (store / "manifest.json").exists()


# --------------------------------------------------------------------------------------------------------- the report

def a_result(path: Path, **changes) -> Path:
    "A sealed result of a method, step 20 of its run."
    metrics = dict(distance=1.0, distance_name="blocks", kid=None, psnr=20.0, ssim=0.5, psnr_body=None, dice={}, dice_mean=None)
    about = dict(format=1, variant="mask", milestone=None, preset="demo", seed=0, step=20, start="scratch", checkpoint="a" * 64, config="0", sampler="ddim25",
                 data=dict(name="phantom", hash="b" * 16), judge=None, features="random", n=dict(patients=1, slices=2), intervals={}, cases={}, versions={}, hours={}, machine="a test", metrics=metrics)
    return write_results(path, about | changes)


@pytest.mark.parametrize("changes, current", [({}, True), (dict(data=dict(name="phantom", hash="c" * 16)), False), (dict(checkpoint="d" * 64), False), (dict(step=40), True)])
def test_a_report_takes_no_result_of_other_data_or_weights(tmp_path, changes, current):
    "Of a step whose weights are no longer kept, the result is all that is left, and is taken."
    side = tmp_path / "run" / "checkpoints" / "step_00000020.json"
    side.parent.mkdir(parents=True)
    side.write_text(json.dumps(dict(sha256="a" * 64)))
    assert is_current(a_result(tmp_path / "results.json", **changes), "b" * 16, tmp_path / "run") == current
