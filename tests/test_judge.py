"""Judges: the file contract, the translation by name, and TotalSegmentator as a child, played by a stand-in package.
The real package runs in one slow test: `make judge`, or set CTDIFFUSION_JUDGE to a Python that has it."""
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.slices import axial, resize_labels
from ctdiffusion.data.volumes import read_image, read_labels, sha256_file, write_volume
from ctdiffusion.data.whole import JOBS, sidecar
from ctdiffusion.evaluation import judge as module
from ctdiffusion.evaluation.judge import (MODES, Command, TotalSegmentator, doctor, judge_volume, segment,
                                          square_grid, write_ceiling, write_masks, write_slices)

NEEDED, TESTED = module._NEEDED, module._TESTED
V2 = dict(zip([1, 2, 3, 4, 15, 5, 6, 52, 63, 7, 8, 9, 19, 21, 22], [c.ts_v2 for c in AMOS.organs])) | {90: "heart"}


class Constant:
    "Calls everything liver."
    name, protocol, calls = "constant", "all is liver", 0
    def __call__(self, image, out):
        self.calls += 1
        v = read_image(image)
        write_volume(out, np.full(v.data.shape, 6), v.source, np.uint8)


def changed(change):
    "A judge whose finished file is spoilt by `change(image) -> image`."
    class Spoilt(Constant):
        def __call__(self, image, out): super().__call__(image, out); nib.save(change(nib.load(out)), out)
    return Spoilt()


def as_type(image, value, dtype):
    "The same grid with another value everywhere."
    return nib.Nifti1Image(np.full(image.shape, value, dtype), image.affine)


def shifted(image, mm):
    affine = image.affine.copy(); affine[0, 3] += mm
    return nib.Nifti1Image(np.asanyarray(image.dataobj), affine)


@pytest.fixture
def ct(tmp_path) -> Path:
    save_patient(phantom(0, 40), tmp_path / "ct.nii.gz", orientation="LPI")
    return tmp_path / "ct.nii.gz"


# ------------------------------------------------------------------------------------------------- the file contract

def test_same_grid_bytes_and_sidecar(ct, tmp_path):
    out = judge_volume(Constant(), ct, tmp_path / "o.nii.gz")
    given, made = nib.load(ct), nib.load(out)
    assert made.shape == given.shape and (made.affine == given.affine).all() and made.get_data_dtype() == np.uint8
    side = json.loads((tmp_path / "o.json").read_text())
    job = dict(format=JOBS, judge="constant", protocol="all is liver", settings={}, image=sha256_file(ct), table=AMOS.hash())
    assert side == dict(job=job, file="o.nii.gz", sha256=sha256_file(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii.gz", "o.json", "o.nii.gz"]


def spoil_output(out, ct): out.write_bytes(out.read_bytes()[:-9])
def lose_output(out, ct): out.unlink()
def lose_sidecar(out, ct): sidecar(out).unlink()
def tear_sidecar(out, ct): sidecar(out).write_text('{"judge": ')
def list_sidecar(out, ct): sidecar(out).write_text("[1]")
def add_to_job(out, ct): side = json.loads(sidecar(out).read_text()); side["job"]["more"] = 1; sidecar(out).write_text(json.dumps(side))
def other_ct(out, ct): save_patient(phantom(1, 40), ct)


@pytest.mark.parametrize("fault", [spoil_output, lose_output, add_to_job, other_ct])
def test_resume(ct, tmp_path, fault):
    judge, out = Constant(), tmp_path / "o.nii.gz"
    for _ in range(2): judge_volume(judge, ct, out)
    assert judge.calls == 1
    fault(out, ct)
    for _ in range(2): judge_volume(judge, ct, out)
    assert judge.calls == 2


@pytest.mark.parametrize("fault", [lose_sidecar, tear_sidecar, list_sidecar])
def test_without_its_record_an_answer_may_be_anybody_s(ct, tmp_path, fault):
    judge, out = Constant(), tmp_path / "o.nii.gz"
    judge_volume(judge, ct, out)
    fault(out, ct)
    with pytest.raises(CTDiffusionError, match="overwrite=True"): judge_volume(judge, ct, out)
    for _ in range(2): judge_volume(judge, ct, out, overwrite=True)
    assert judge.calls == 2


def test_another_protocol_judges_again(ct, tmp_path):
    judge, newer = Constant(), Constant()
    newer.protocol = "all is liver, version 2"
    for j in (judge, newer, newer, judge): judge_volume(j, ct, tmp_path / "o.nii.gz")
    assert (judge.calls, newer.calls) == (2, 1)


@pytest.mark.parametrize("change, word", [
    (lambda i: i.slicer[:, :, 1:], "the grid it was given"), (lambda i: i.slicer[::-1], "the grid it was given"),
    (lambda i: shifted(i, 1), "the grid it was given"), (lambda i: i.as_reoriented([[0, -1], [1, 1], [2, 1]]), "the grid it was given"),
    (lambda i: as_type(i, 17, np.uint8), "labels 17"), (lambda i: as_type(i, 1.5, np.float32), "whole numbers")])
def test_wrong_answers_are_refused(ct, tmp_path, change, word):
    with pytest.raises(CTDiffusionError, match=word): judge_volume(changed(change), ct, tmp_path / "o.nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["ct.nii.gz"]


def test_rounding_of_the_affine_is_forgiven(ct, tmp_path):
    out = judge_volume(changed(lambda i: shifted(i, 1e-3)), ct, tmp_path / "o.nii.gz")
    assert (nib.load(out).affine == nib.load(ct).affine).all()


def test_an_earlier_answer_survives_a_failing_judge(ct, tmp_path):
    out = judge_volume(Constant(), ct, tmp_path / "o.nii.gz")
    before = sha256_file(out)
    with pytest.raises(CTDiffusionError, match="exit 3: boom"):
        judge_volume(Command("b", "b", (sys.executable, "-c", "import sys; print('boom', file=sys.stderr); sys.exit(3)")), ct, out)
    assert sha256_file(out) == before
    with pytest.raises(CTDiffusionError, match="no such file"): judge_volume(Command("silent", "s", (sys.executable, "-c", "")), ct, out)
    with pytest.raises(CTDiffusionError, match="did not start"): judge_volume(Command("none", "n", ("no-such-program",)), ct, out)


def test_the_ct_is_never_overwritten(ct):
    before = sha256_file(ct)
    for out in (ct, ct.with_name("ct.nii")):
        with pytest.raises(CTDiffusionError, match="the name of the CT itself"): judge_volume(Constant(), ct, out)
    assert sha256_file(ct) == before and judge_volume(Constant(), ct, ct.with_name("new") / "ct.nii.gz").is_file()


def test_command_words_are_never_a_shell(ct, tmp_path):
    copy = "import shutil, sys; assert sys.argv[3] == '$(touch marker); {other}'; shutil.copy(sys.argv[1], sys.argv[2])"
    labels = tmp_path / "a b'.nii.gz"
    save_patient(phantom(0, 40), labels.with_name("x.nii.gz"), labels, orientation="LPI")
    judge = Command("copy", "c", (sys.executable, "-c", copy, str(labels), "{out}", "$(touch marker); {other}"))
    found = read_labels(judge_volume(judge, ct, tmp_path / "out dir.nii.gz"))
    assert (found.data == phantom(0, 40).labels).all() and not list(tmp_path.glob("marker"))


# ------------------------------------------------------------------------------------------------- the 256 x 256 grid

def test_square_grid_keeps_the_patient_where_it_is(tmp_path):
    p = phantom(2, 40)
    save_patient(p, tmp_path / "ct.nii.gz", tmp_path / "l.nii.gz", orientation="ASL")
    v = read_image(tmp_path / "ct.nii.gz")
    grid = square_grid(v, 120)
    assert grid.shape == (120, 120, v.data.shape[2]) and np.allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), v.spacing / [3, 3, 1])
    centre = lambda shape, affine: affine @ [*(np.array(shape) - 1) / 2, 1]
    assert np.allclose(centre(grid.shape, grid.affine), centre(v.data.shape, v.affine))
    liver = lambda u: (u.affine @ [*np.argwhere(u.data == 6).mean(0), 1])[:3]
    labels = read_labels(tmp_path / "l.nii.gz")
    back = read_labels(write_masks(tmp_path / "m.nii.gz", resize_labels(axial(labels.data), 120), grid))
    assert np.allclose(liver(labels), liver(back), atol=1e-3)


def test_slices_and_ceiling_in_hu(tmp_path):
    p = phantom(2, 40)
    save_patient(p, tmp_path / "ct.nii.gz")
    grid = square_grid(read_image(tmp_path / "ct.nii.gz"), 40)
    n = grid.shape[2]
    masks = np.zeros((n, 40, 40), np.uint8); masks[:, 10:30] = 16
    x = np.full((n, 40, 40), .5, np.float32)
    v = read_image(write_slices(tmp_path / "s.nii.gz", x, grid, masks)).data
    assert set(np.unique(v)) == {-1000, 40} and (v == 40).sum() == (masks > 0).sum()
    same = read_image(write_ceiling(tmp_path / "c.nii.gz", tmp_path / "ct.nii.gz", size=40)).data
    assert np.abs(same - np.clip(p.hu, -160, 240)).max() <= 1, "no resize: only the window is left"


# --------------------------------------------------------------------------------- TotalSegmentator, by a stand-in

API = '''
import json, os, pathlib, nibabel, numpy
def totalsegmentator(input, output=None, **options):
    home = pathlib.Path(os.environ["TOTALSEG_HOME_DIR"])
    seen = dict(config=json.loads((home / "config.json").read_text()), home=str(home), options=options, weights=os.environ["TOTALSEG_WEIGHTS_PATH"], proxy=os.environ["HTTPS_PROXY"], output=output)
    (home / "config.json").write_text("{}")
    pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps(seen))
    image = nibabel.load(input)
    labels = numpy.zeros(image.shape, numpy.uint8)
    labels[0, 0, :5] = 5, 52, 22, 90, 7
    return nibabel.Nifti1Image(labels, image.affine)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A stand-in for TotalSegmentator in a folder that the child will see; its import leaves a mark."
    def install(version=TESTED, api=API, names=V2):
        site = tmp_path / "site"
        for d in ("totalsegmentator", f"TotalSegmentator-{version}.dist-info"): (site / d).mkdir(parents=True, exist_ok=True)
        (site / f"TotalSegmentator-{version}.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: TotalSegmentator\nVersion: {version}\n")
        (site / "totalsegmentator/__init__.py").write_text("import pathlib; pathlib.Path(__file__).with_name('imported').touch()")
        (site / "totalsegmentator/python_api.py").write_text(api)
        (site / "totalsegmentator/map_to_binary.py").write_text(f"class_map = dict(total={names!r})")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
        return site / "totalsegmentator"
    monkeypatch.setenv("HOME", str(tmp_path / "users-home"))
    for name in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH"): monkeypatch.delenv(name, raising=False)
    return install


def fill(weights: Path, mode: str, content: bytes = b"weights"):
    "Folders that look like weights."
    for folder in MODES[mode][1]:
        model = weights / folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        (model / "fold_0").mkdir(parents=True, exist_ok=True)
        for f in ("plans.json", "dataset.json"): (model / f).write_text("{}")
        (model / "fold_0/checkpoint_final.pth").write_bytes(content)
    return weights


@pytest.mark.parametrize("mode, options", [("1.5 mm", {}), ("3 mm", dict(fast=True)), ("6 mm", dict(fastest=True))])
def test_child_is_called_as_the_protocol_says(package, ct, tmp_path, mode, options):
    where, weights = package(), fill(tmp_path / "w", mode)
    judge = TotalSegmentator(mode, "gpu:1", weights=weights)
    found = np.asanyarray(nib.load(judge_volume(judge, ct, tmp_path / "o.nii.gz")).dataobj)
    assert found[0, 0, :5].tolist() == [AMOS.id(n) for n in ("liver", "aorta", "prostate", "background", "pancreas")] and found[1:].sum() == 0
    seen = json.loads((where / "seen.json").read_text())
    assert seen["options"] == dict(ml=True, task="total", quiet=True, device="gpu:1", resampling_order=1) | options
    assert seen["config"]["send_usage_stats"] is False and seen["config"]["statistics_disclaimer_shown"] is True
    assert seen["weights"] == str(weights.resolve()) and seen["output"] is None and seen["proxy"] == "http://127.0.0.1:9"
    assert not Path(seen["home"]).exists() and not (tmp_path / "users-home").exists(), "its home was a temporary folder"
    for part in (TESTED, "task total", mode, "resampling order 1", "gpu:1", "weights "): assert part in judge.protocol
    assert json.loads((tmp_path / "o.json").read_text())["job"]["protocol"] == judge.protocol
    assert doctor(judge).endswith("verdict      ready") and "MISSING" not in doctor(judge)


def test_other_weights_are_another_protocol(package, tmp_path):
    package()
    protocols = [TotalSegmentator("6 mm", weights=fill(tmp_path / "w", "6 mm", c)).protocol for c in (b"a", b"b", b"a")]
    assert protocols[0] == protocols[2] != protocols[1]


def lose_folder(model): model.parent.rename(model.parent.with_name("elsewhere"))
def lose_checkpoint(model): (model / "fold_0/checkpoint_final.pth").unlink()
def lose_plans(model): (model / "plans.json").unlink()


@pytest.mark.parametrize("fault", [lose_folder, lose_checkpoint, lose_plans])
def test_missing_weights_are_refused_before_the_package_is_imported(package, ct, tmp_path, fault):
    where, weights = package(), fill(tmp_path / "w", "1.5 mm")
    folder = MODES["1.5 mm"][1][3]
    fault(next((weights / folder).iterdir()))
    judge = TotalSegmentator(weights=weights)
    for start in (lambda: judge.protocol, lambda: judge(ct, tmp_path / "o.nii.gz"), lambda: judge_volume(judge, ct, tmp_path / "o.nii.gz")):
        with pytest.raises(CTDiffusionError, match=f"no weights in {folder};.*{folder}.zip.*Nothing is downloaded"): start()
    assert not (where / "imported").exists() and not (tmp_path / "o.nii.gz").exists()
    assert f"MISSING    {folder}" in doctor(judge) and doctor(judge).count("present") == 4 and "not ready: no weights" in doctor(judge)


def test_weights_come_from_the_environment(package, tmp_path, monkeypatch):
    package()
    assert TotalSegmentator().root == tmp_path / "users-home/.totalsegmentator/nnunet/results"
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "h"))
    assert TotalSegmentator().root == tmp_path / "h/nnunet/results"
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "w"))
    assert TotalSegmentator().root == tmp_path / "w"


def test_no_package_old_package_no_python(package, tmp_path, monkeypatch):
    weights = fill(tmp_path / "w", "6 mm")
    monkeypatch.setattr(module, "_ASK", "")
    absent = TotalSegmentator("6 mm", weights=weights)
    with pytest.raises(CTDiffusionError, match=r"no such package.*pip install 'ctdiffusion\[judge\]'"): absent.protocol
    assert "MISSING in this Python: python -m venv" in doctor(absent) and doctor(absent).endswith("not ready: no such package")
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    package("2.15.0")
    with pytest.raises(CTDiffusionError, match="version 2.15.0"): TotalSegmentator("6 mm", weights=weights).protocol
    assert TotalSegmentator(python="bin/python").python == os.path.abspath("bin/python") and TotalSegmentator(python="python3").python == "python3"
    with pytest.raises(CTDiffusionError, match="did not start"): TotalSegmentator("6 mm", python=str(tmp_path / "python"), weights=weights).protocol
    assert NEEDED <= tuple(map(int, TESTED.split(".")[:2]))


@pytest.mark.parametrize("api, names, word", [
    (API.replace("image.affine)", "image.affine + numpy.eye(4))"), V2, "the grid it was given"),
    (API.replace("image.shape,", "image.shape[:2] + (9,),"), V2, "the grid it was given"),
    (API.replace("5, 52,", "5, 200,"), V2, r"\[200\] without a name"),
    (API, {k: v for k, v in V2.items() if v != "prostate"}, "no class called prostate"),
    ("raise RuntimeError('operator torchvision::nms does not exist')", V2, "torch and torchvision from the same index"),
    ("def totalsegmentator(input, output): pass", V2, "unexpected keyword")])
def test_what_the_package_may_do_wrong(package, ct, tmp_path, api, names, word):
    package(api=api, names=names)
    with pytest.raises(CTDiffusionError, match=word): judge_volume(TotalSegmentator("6 mm", weights=fill(tmp_path / "w", "6 mm")), ct, tmp_path / "o.nii.gz")
    assert not (tmp_path / "o.nii.gz").exists()


def test_the_child_needs_nothing_of_ours():
    "The source that travels imports the package, nibabel and the standard library only."
    assert "ctdiffusion" not in module._child() and "roi_subset" not in module._child()
    assert module._child().startswith("def segment(job") and segment.__code__.co_freevars == ()
    assert set(segment.__code__.co_names) & set(vars(module)) <= {"json", "Path"}, "no global of the module"


# ------------------------------------------------------------------------------------------------------- for real

MAKE_WEIGHTS = '''
import json, sys, torch
from pathlib import Path
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from totalsegmentator.map_to_binary import class_map
classes = class_map["total"]
dataset = dict(channel_names={"0": "CT"}, labels={"background": 0} | {n: i for i, n in classes.items()}, numTraining=1, file_ending=".nii.gz")
stages, base = 4, "torch.nn.modules."
network = dict(n_stages=stages, features_per_stage=[8, 16, 32, 64], conv_op=base + "conv.Conv3d", kernel_sizes=[[3] * 3] * stages, strides=[[1] * 3] + [[2] * 3] * (stages - 1),
               n_conv_per_stage=[2] * stages, n_conv_per_stage_decoder=[2] * (stages - 1), conv_bias=True, norm_op=base + "instancenorm.InstanceNorm3d",
               norm_op_kwargs=dict(eps=1e-5, affine=True), dropout_op=None, dropout_op_kwargs=None, nonlin="torch.nn.LeakyReLU", nonlin_kwargs=dict(inplace=True))
kind, imports = "dynamic_network_architectures.architectures.unet.PlainConvUNet", ["conv_op", "norm_op", "dropout_op", "nonlin"]
image, other = dict(is_seg=False, order=3, order_z=0, force_separate_z=None), dict(order=1, order_z=0, force_separate_z=None)
function = "resample_data_or_seg_to_shape"
plan = dict(data_identifier="nnUNetPlans_3d_fullres", preprocessor_name="DefaultPreprocessor", batch_size=2, patch_size=[64] * 3, median_image_size_in_voxels=[64.] * 3, spacing=[6.] * 3,
            normalization_schemes=["CTNormalization"], use_mask_for_norm=[False], resampling_fn_data=function, resampling_fn_seg=function, resampling_fn_probabilities=function,
            resampling_fn_data_kwargs=image, resampling_fn_seg_kwargs=other | dict(is_seg=True), resampling_fn_probabilities_kwargs=other | dict(is_seg=False), batch_dice=True,
            architecture=dict(network_class_name=kind, arch_kwargs=network, _kw_requires_import=imports))
folder = Path(sys.argv[1]) / sys.argv[2] / "nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres"
plans = dict(dataset_name=sys.argv[2], plans_name="nnUNetPlans", original_median_spacing_after_transp=[6.] * 3, original_median_shape_after_transp=[64] * 3, image_reader_writer="NibabelIOWithReorient",
             transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2], configurations={"3d_fullres": plan}, experiment_planner_used="ExperimentPlanner", label_manager="LabelManager",
             foreground_intensity_properties_per_channel={"0": dict(max=1500., mean=0., median=0., min=-1024., percentile_00_5=-1000., percentile_99_5=1000., std=300.)})
(folder / "fold_0").mkdir(parents=True)
(folder / "dataset.json").write_text(json.dumps(dataset)); (folder / "plans.json").write_text(json.dumps(plans))
torch.manual_seed(0)
net = get_network_from_plans(kind, network, imports, 1, len(classes) + 1, deep_supervision=False)
torch.save(dict(network_weights=net.state_dict(), trainer_name=folder.name.split("__")[0], init_args=dict(configuration="3d_fullres", fold=0, dataset_json=dataset, plans=plans),
                inference_allowed_mirroring_axes=None), folder / "fold_0/checkpoint_final.pth")
'''
FACTS = '''
import json
from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS as config
from totalsegmentator.map_to_binary import class_map
url = "https://github.com/wasserth/TotalSegmentator/releases/download/{version}/{foldername}.zip"
print(json.dumps(dict(total=class_map["total"], total_v1=class_map["total_v1"], urls=[url.format(**config[i]) for i in (291, 292, 293, 294, 295, 297, 298)])))
'''
# beside a CPU build of torch, PyPI's torchvision cannot register its compiled operators; nothing here calls them, so their names suffice
OPERATORS = '''
from torch import library
for name in ("nms", "qnms"): library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''
REAL = Path(os.environ.get("CTDIFFUSION_REAL_CT") or Path(__file__).resolve().parents[2] / "shared" / "data" / "real-ct")
PYTHON = os.environ.get("CTDIFFUSION_JUDGE")


@pytest.mark.skipif(not PYTHON, reason="slow, needs TotalSegmentator: `make judge`, or set CTDIFFUSION_JUDGE to a Python that has it")
def test_the_real_package_end_to_end(tmp_path, monkeypatch, capsys):
    "Random weights find nonsense on the right grid, offline, on real CT where it is at hand."
    monkeypatch.setenv("HOME", str(tmp_path / "users-home"))
    if subprocess.run([PYTHON, "-c", "import torchvision"], capture_output=True).returncode:
        (tmp_path / "site").mkdir(); (tmp_path / "site/sitecustomize.py").write_text(OPERATORS)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    subprocess.run([PYTHON, "-c", MAKE_WEIGHTS, str(tmp_path / "w"), *MODES["6 mm"][1]], check=True, capture_output=True)
    facts = json.loads(subprocess.run([PYTHON, "-c", FACTS], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert {i: facts["total"][str(i)] for i in V2 if i != 90} == {i: n for i, n in V2.items() if i != 90} and "uterus" not in facts["total"].values()
    assert {c.ts_v1 for c in AMOS.organs if c.ts_v1} <= set(facts["total_v1"].values()) and "prostate" not in facts["total_v1"].values()
    assert [module._URL.format(folder=f) for _, folders in MODES.values() for f in folders] == facts["urls"]
    real, image = REAL / "unlabelled/cptac_pda_c3l00189.nii.gz", tmp_path / "ct.nii.gz"
    if real.is_file(): image.write_bytes(real.read_bytes())
    else: save_patient(phantom(0, 96), image, orientation="LPS")
    judge = TotalSegmentator("6 mm", python=PYTHON, weights=tmp_path / "w")
    assert doctor(judge).endswith("verdict      ready")
    start = time.monotonic()
    out = judge_volume(judge, image, tmp_path / "o.nii.gz")
    took = time.monotonic() - start
    written = out.stat().st_mtime_ns
    given, made = nib.load(image), nib.load(out)
    assert made.shape == given.shape and (made.affine == given.affine).all()
    found = np.unique(np.asanyarray(made.dataobj))
    judge_volume(judge, image, out)
    assert out.stat().st_mtime_ns == written, "a finished file is recognised"
    assert not (tmp_path / "users-home/.totalsegmentator").exists()
    with capsys.disabled(): print(textwrap.dedent(f"""
        {judge.protocol}
        {'real CT' if real.is_file() else 'phantom'} {given.shape}, {''.join(nib.aff2axcodes(given.affine))}: {took:.0f} s, ids {found.tolist()}, geometry equal"""))
