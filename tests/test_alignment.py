"""Label maps that do not lie on their organs, and pairs that are turned together: what is found, what is said, and that right data are left alone.

Real CT is looked for in `real-ct` and `real-ct-more`, beside each other in `shared/data` next to the repository, or where CTDIFFUSION_REAL_CT says `real-ct` is.
"""
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

from ctdiffusion.data.alignment import NOTE, organ_interior, outside_share, placement_fault, sample_pair, side_fault, turned_fault
from ctdiffusion.data.cases import Case, check_pair, read_case
from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.store import PrepareError, prepare
from ctdiffusion.data.volumes import Source, Volume, nifti_bytes, read_image, read_labels

REAL = Path(os.environ.get("CTDIFFUSION_REAL_CT") or Path(__file__).resolve().parents[2] / "shared" / "data" / "real-ct")
MORE = REAL.with_name("real-ct-more")
FILES = {"real_0001": (REAL / "imagesTr/real_0001.nii.gz", REAL / "labelsTr/real_0001.nii.gz"),
         "amos_0018": (MORE / "test/imagesTr/amos_0018.nii.gz", MORE / "test/labelsTr/amos_0018.nii.gz")}
for name in ("lidc_0001", "c3l00189_partial", "lidc0004_partial", "lidc0005_partial", "tcgacoad_partial"):
    FILES[name] = (MORE / f"train/images/{name}.nii.gz", MORE / f"train/labels/{name}.nii.gz")

needs_real = pytest.mark.skipif(not all(f.is_file() for pair in FILES.values() for f in pair), reason=f"no real CT in {REAL} and {MORE}: set CTDIFFUSION_REAL_CT")
REAL_CASE = "real_0001"
THOROUGH = ("real_0001", "lidc_0001")  # without contrast medium, and arterial
AXES = [axes for n in (1, 2, 3) for axes in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]) if len(axes) == n]
FLIPS = ("left to right", "front to back", "head to foot")
WAYS = (("left", "right"), ("back", "front"), ("feet", "head"))


def volume(data, affine): return Volume(data, affine, Source("file.nii", data.shape, affine, ""))


def drawn(seed, size=64, phase=None):
    p = phantom(seed=seed, size=size, phase=phase)
    return volume(p.hu, p.affine), volume(p.labels, p.affine)


_READ = {}


def real(name):
    if name not in _READ:
        image, label = FILES[name]
        _READ[name] = read_image(image), read_labels(label)
    return _READ[name]


def samples(image, label): return sample_pair(image.data, label.data, image.spacing)


def moved(data, axis, mm, spacing, fill=0):
    "Moved along an axis; what leaves the array is lost."
    n = round(mm / spacing[axis])
    out = np.full_like(data, fill)
    source = [slice(None)] * 3
    target = [slice(None)] * 3
    source[axis] = slice(max(0, -n), data.shape[axis] - max(0, n))
    target[axis] = slice(max(0, n), data.shape[axis] - max(0, -n))
    out[tuple(target)] = data[tuple(source)]
    return out


def with_data(v, data): return replace(v, data=data)


def everything(image, label):
    "All that is found, as one would read it."
    return [f"{p.severity}: {p.found}. {p.do}" for p in check_pair("c", image, label)]


def written(folder, image, label, affine=None):
    "The two files of a case; the label file may have another affine."
    folder.mkdir(exist_ok=True)
    (folder / "i.nii.gz").write_bytes(nifti_bytes(image.data, image.affine))
    (folder / "l.nii.gz").write_bytes(nifti_bytes(label.data, image.affine if affine is None else affine))
    return Case("c", folder / "i.nii.gz", folder / "l.nii.gz", "train")


# ---------------------------------------------------------------------------------------- the label map alone

def flips_are_found_and_named(image, label):
    for axes in AXES:
        (p,) = check_pair("c", image, with_data(label, np.flip(label.data, axes)))
        assert p.severity == "error" and p.found.startswith("labels beside their organs"), (axes, p)
        assert f"Flip the voxels of the label map {' and '.join(FLIPS[a] for a in axes)}:" in p.do, (axes, p.do)


def shifts_are_found_and_named(image, label):
    for axis, mm in product(range(3), (-60, 60)):
        (p,) = check_pair("c", image, with_data(label, moved(label.data, axis, mm, image.spacing)))
        assert p.severity == "error" and p.found.startswith("labels beside their organs"), (axis, mm, p)
        way = WAYS[axis][int(mm < 0)]
        words = p.do.split(" to the ")
        far = float(words[0].removeprefix("Move the label map by about ").removesuffix(" mm"))
        assert words[1].startswith(f"{way}:") and abs(far - 60) <= max(5, 1.2 * samples(image, label).spacing[axis]), (axis, mm, p.do)


@pytest.mark.fault("F46")
def test_a_flipped_label_map_is_found_and_the_flip_is_named(): flips_are_found_and_named(*drawn(0))


@pytest.mark.fault("F46")
def test_a_shifted_label_map_is_found_and_the_shift_is_named(): shifts_are_found_and_named(*drawn(0))


@needs_real
@pytest.mark.fault("F46")
@pytest.mark.parametrize("name", [n for n in FILES if n != "amos_0018"])
def test_real_label_maps_flipped_or_shifted(name):
    flips_are_found_and_named(*real(name))
    if name in THOROUGH: shifts_are_found_and_named(*real(name))


def saved_with_the_affine_of_the_image(folder, image, label):
    "The image is stored as LPS, the label map as RAS or LAS, and both say LPS."
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("LPS"))
    affine = image.affine @ np.diag([-1, -1, 1, 1])
    affine[:2, 3] = image.affine[:2, 3] + image.spacing[:2] * (np.array(image.data.shape[:2]) - 1)
    stored = volume(apply_orientation(image.data, turn), affine)
    for data, words in ((label.data, "left to right and front to back"), (label.data[::-1], "front to back")):
        case = written(folder, stored, with_data(label, data))
        problems = read_case(case)[2]
        assert [p.severity for p in problems] == ["error"] and problems[0].path == str(case.label), problems
        assert f"Flip the voxels of the label map {words}:" in problems[0].do and "affine of another file" in problems[0].do


@pytest.mark.fault("F46")
def test_a_label_map_saved_with_the_affine_of_the_image(tmp_path): saved_with_the_affine_of_the_image(tmp_path, *drawn(3))


@needs_real
@pytest.mark.fault("F46")
def test_a_real_label_map_saved_with_the_affine_of_the_image(tmp_path): saved_with_the_affine_of_the_image(tmp_path, *real(REAL_CASE))


def resampled(data, shape):
    at = [(np.arange(n) * old // n) for n, old in zip(shape, data.shape)]
    return data[np.ix_(*at)]


@needs_real
@pytest.mark.fault("F46")
def test_the_label_map_of_another_real_patient_is_refused():
    names = [n for n in FILES if n != "amos_0018"]
    for name, other in zip(names, names[1:] + names[:1]):
        image, label = real(name)
        found = everything(image, with_data(label, resampled(real(other)[1].data, image.data.shape)))
        assert found and found[0].startswith("error: labels beside their organs"), (name, other, found)


@pytest.mark.fault("F46")
def test_the_message_names_the_worst_organ_and_its_values():
    image, label = drawn(0)
    low = with_data(image, np.where(label.data == AMOS.id("spleen"), -900, image.data).astype(np.int16))
    found, expected, do, severity = placement_fault(samples(low, label))
    assert "spleen 100% (median -900 HU)" in found and "kidney" not in found and "-50 to 300 HU" in expected
    assert severity == "error" and outside(low, label) < .1 and "No flip and no shift" in do


def outside(image, label):
    from ctdiffusion.data.alignment import mean_hu, organ_values
    pair = samples(image, label)
    points, organ = organ_interior(pair.labels)
    return outside_share(organ_values(organ, mean_hu(pair.hu, points)))


@pytest.mark.fault("F46")
def test_between_two_and_ten_percent_it_is_a_note_unless_a_repair_proves_it():
    image, label = drawn(0)
    liver = np.argwhere(label.data == AMOS.id("liver"))
    for share, severity in ((.01, None), (.08, "note"), (.3, "error")):
        hu = image.data.copy()
        lowest = liver[liver[:, 2].argsort()][:int(share * len(liver))]
        hu[tuple(lowest.T)] = -900
        spoiled = with_data(image, hu)
        fault = placement_fault(samples(spoiled, label))
        assert (fault and fault[3]) == severity, (share, outside(spoiled, label), fault)
        if severity == "note": assert NOTE < outside(spoiled, label) < .1


@pytest.mark.fault("F46")
def test_an_aorta_on_the_spine_is_found_though_contrast_medium_is_not():
    image, label = drawn(0)
    aorta = label.data == AMOS.id("aorta")
    alone = with_data(label, np.where(aorta, label.data, 0))
    bright = with_data(image, np.where(aorta, image.data + 350, image.data).astype(np.int16))
    assert everything(bright, alone) == []
    rng = np.random.default_rng(0)
    bone = np.kron(rng.choice([120, 700], size=[n // 3 + 1 for n in aorta.shape], p=[.7, .3]), np.ones((3, 3, 3)))[tuple(slice(n) for n in aorta.shape)]
    spine = with_data(image, np.where(aorta, bone, image.data).astype(np.int16))
    pair = sample_pair(np.repeat(spine.data, 3, 2), np.repeat(alone.data, 3, 2), image.spacing / [1, 1, 3])
    fault = placement_fault(pair)
    assert fault and "aorta" in fault[0]


@pytest.mark.fault("F46")
def test_who_has_looked_confirms_by_id(tmp_path):
    image, label = drawn(1, 48)
    case = written(tmp_path / "x", image, with_data(label, label.data[:, ::-1]))
    (p,) = read_case(case)[2]
    assert "confirm with allow_misplaced" in p.do and p.path == str(case.label)
    assert read_case(case, allow_misplaced=["c"])[2] == [] and read_case(case, allow_misplaced=["another"])[2] == [p]
    for part, data in (("images", image.data), ("labels", label.data[:, ::-1])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "p1.nii.gz").write_bytes(nifti_bytes(data, image.affine))
    config = PrepareConfig(size=32)
    with pytest.raises(PrepareError, match="allow_misplaced"): prepare(tmp_path, tmp_path / "s", config)
    store = prepare(tmp_path, tmp_path / "s", replace(config, allow_misplaced=["p1"]))
    assert len(store) == image.data.shape[2] and store.config.allow_misplaced == ("p1",)


def test_a_mirrored_label_map_is_not_taken_for_situs_inversus():
    "Confirming situs inversus does not help where only the label map is mirrored."
    image, label = drawn(1, 48)
    flipped = with_data(label, label.data[::-1])
    for mirrored in (False, True):
        (p,) = check_pair("c", image, flipped, mirrored=mirrored)
        assert "Flip the voxels of the label map left to right" in p.do and "allow_mirrored" not in p.do
    assert [p.found for p in check_pair("c", image, flipped, misplaced=True)] == ["liver left of spleen"]


# ---------------------------------------------------------------------------------------- both files together

def pairs_are_found(image, label, spine=True, hounsfield=True):
    "Every flip of the pair says which of the three directions are wrong, and no other."
    for axes in AXES:
        turned = [with_data(v, np.flip(v.data, axes)) for v in (image, label)]
        pair = samples(*turned)
        assert placement_fault(pair) is None, axes
        side, other = side_fault(turned[1].data, AMOS, pair), turned_fault(pair)
        found = other[0] if other else ""
        assert (side is not None) == (0 in axes), (axes, side)
        assert ("in front of" in found) == (1 in axes) and (" below " in found) == (2 in axes), (axes, found)
        if hounsfield: assert {p.severity for p in check_pair("c", *turned)} == {"error"}


@pytest.mark.fault("F47")
@pytest.mark.parametrize("seed, size", [(0, 64), (1, 64), (2, 48), (8, 48), (16, 48)])
def test_a_pair_turned_together_is_found(seed, size): pairs_are_found(*drawn(seed, size))


@needs_real
@pytest.mark.fault("F47")
@pytest.mark.parametrize("name", FILES)
def test_a_real_pair_turned_together_is_found(name): pairs_are_found(*real(name), hounsfield=name != "amos_0018")


def only(label, *names): return with_data(label, np.where(np.isin(label.data, [AMOS.id(n) for n in names]), label.data, 0))


def single_organs(image, label, contrast=False):
    "An organ alone is compared with the spine and the body; a bowel or a heart as bright as bone, and not labelled, may leave front and back undecided."
    for name in ("liver", "spleen", "kidney_right", "kidney_left"):
        alone = only(label, name)
        assert everything(image, alone) == [], name
        for axes, words in (([0], "of the spine"), ([1], "the spine")):
            if axes == [1] and contrast: continue
            found = everything(*(with_data(v, np.flip(v.data, axes)) for v in (image, alone)))
            assert found and words in found[0], (name, axes, found)


@pytest.mark.fault("F47")
@pytest.mark.parametrize("seed", range(4))
def test_a_single_organ_is_enough(seed): single_organs(*drawn(seed))


@needs_real
@pytest.mark.fault("F47")
@pytest.mark.parametrize("name", [n for n in FILES if n != "amos_0018"])
def test_a_single_real_organ_is_enough(name): single_organs(*real(name), contrast=name in ("lidc_0001", "tcgacoad_partial"))


@needs_real
@pytest.mark.fault("F47")
def test_lungs_tell_head_from_foot_where_the_liver_is_alone():
    image, label = real("lidc_0001")
    found = everything(*(with_data(v, v.data[..., ::-1]) for v in (image, only(label, "liver"))))
    assert len(found) == 1 and "of lung below the organs of the abdomen" in found[0], found


@pytest.mark.fault("F47")
def test_a_patient_on_his_belly_on_the_table_is_right():
    "Table below, belly down: the header says so, and the spine is behind all the same."
    for seed in range(6):
        p = phantom(seed=seed, size=48)
        if not p.info["table"]: continue
        hu = np.where((p.labels == 0) & (np.arange(p.hu.shape[1]) < 3)[:, None], -1000, p.hu).astype(np.int16)
        hu[:, -3:] = np.maximum(hu[:, -3:], 60)  # a slab in front
        assert check_pair("c", volume(hu, p.affine), volume(p.labels, p.affine)) == [], seed


# ---------------------------------------------------------------------------------------- no false alarms

@pytest.mark.fault("F46")
@pytest.mark.parametrize("size, seeds", [(48, range(0, 12)), (64, range(12, 22))])
def test_drawn_patients_give_no_alarm(size, seeds):
    for seed in seeds: assert everything(*drawn(seed, size)) == [], seed


def contrast(image, label, hu, *names):
    ids = [AMOS.id(n) for n in names]
    return with_data(image, np.where(np.isin(label.data, ids), image.data + hu, image.data).astype(np.int16))


def coarse(v, n): return replace(v, data=np.ascontiguousarray(v.data[..., ::n]), affine=v.affine @ np.diag([1, 1, n, 1]))


def part(image, label, *cut):
    at = tuple(slice(int(a * n), int(b * n)) for (a, b), n in zip(cut, image.data.shape))
    return tuple(with_data(v, v.data[at]) for v in (image, label))


def metal(image, label):
    "Two screws in the vertebrae with streaks, and a clip in the liver."
    hu = image.data.astype(np.float32)
    x, y, z = (np.arange(n) for n in hu.shape)
    rng = np.random.default_rng(0)
    middle = np.argwhere(label.data == AMOS.id("liver")).mean(0).astype(int)
    hu[middle[0] - 1:middle[0] + 2, middle[1], middle[2] - 2:middle[2] + 2] = 3000
    level = slice(middle[2] - 3, middle[2] + 3)
    streaks = np.cos(np.arctan2(*np.meshgrid(x - middle[0], y - middle[1], indexing="ij")) * 12)[..., None]
    hu[:, :, level] += 60 * streaks * rng.random()
    return with_data(image, np.clip(hu, -1024, 3071).astype(np.int16)), label


VESSELS = ("aorta", "inferior_vena_cava")
KIDNEYS = ("kidney_right", "kidney_left")
FULL = (0, 1)
VARIATIONS = {
    "as it is": lambda i, l: (i, l),
    "slices of 5 mm or more": lambda i, l: (coarse(i, max(2, round(5 / i.spacing[2]))), coarse(l, max(2, round(5 / i.spacing[2])))),
    "upper half": lambda i, l: part(i, l, FULL, FULL, (.5, 1)),
    "lower half": lambda i, l: part(i, l, FULL, FULL, (0, .5)),
    "middle third": lambda i, l: part(i, l, FULL, FULL, (.33, .67)),
    "upper quarter": lambda i, l: part(i, l, FULL, FULL, (.75, 1)),
    "lower quarter": lambda i, l: part(i, l, FULL, FULL, (0, .25)),
    "right half": lambda i, l: part(i, l, (.5, 1), FULL, FULL),
    "left half": lambda i, l: part(i, l, (0, .5), FULL, FULL),
    "narrow field": lambda i, l: part(i, l, (.2, .8), (.2, .8), FULL),
    "front cut off": lambda i, l: part(i, l, FULL, (0, .7), FULL),
    "back cut off": lambda i, l: part(i, l, FULL, (.3, 1), FULL),
    "every other organ": lambda i, l: (i, with_data(l, np.where(l.data % 2, l.data, 0).astype(np.uint8))),
    "the others": lambda i, l: (i, with_data(l, np.where(l.data % 2, 0, l.data).astype(np.uint8))),
    "kidneys alone": lambda i, l: (i, only(l, *KIDNEYS)),
    "vessels alone": lambda i, l: (i, only(l, *VESSELS)),
    "pelvic organs alone": lambda i, l: (i, only(l, "urinary_bladder", "prostate_uterus")),
    "arterial": lambda i, l: (contrast(contrast(i, l, 250, "aorta"), l, 150, *KIDNEYS), l),
    "late arterial, strong": lambda i, l: (contrast(i, l, 250, *VESSELS, *KIDNEYS), l),
    "portal": lambda i, l: (contrast(i, l, 100, *VESSELS, *KIDNEYS, "liver", "spleen"), l),
    "noise of 60 HU": lambda i, l: (with_data(i, np.clip(i.data + np.random.default_rng(1).normal(0, 60, i.data.shape), -1024, 3071).astype(np.int16)), l),
    "metal": metal,
    "cropped and every other organ": lambda i, l: part(i, with_data(l, np.where(l.data % 2, l.data, 0).astype(np.uint8)), FULL, FULL, (.4, .9)),
    "surgery: no spleen, no left kidney": lambda i, l: (i, with_data(l, np.where(np.isin(l.data, (1, 3)), 0, l.data).astype(np.uint8))),
}


CUTS = ("as it is", "upper half", "lower half", "middle third", "upper quarter", "lower quarter", "right half", "left half", "front cut off", "back cut off")


def alarms(image, label):
    "What these checks find; the question of Hounsfield units is another one."
    pair = samples(image, label)
    return [f for f in (placement_fault(pair), side_fault(label.data, AMOS, pair), turned_fault(pair)) if f]


@needs_real
@pytest.mark.fault("F46")
@pytest.mark.parametrize("name", FILES)
def test_right_real_data_give_no_alarm(name):
    for what, change in VARIATIONS.items():
        if name not in THOROUGH and what not in CUTS: continue
        found = alarms(*change(*real(name)))
        assert found == [], (what, found)


@pytest.mark.fault("F46")
def test_varied_drawn_patients_give_no_alarm():
    for seed, (what, change) in enumerate(VARIATIONS.items()):
        found = alarms(*change(*drawn(seed, 48, "none" if "arterial" in what or what == "portal" else None)))
        assert found == [], (what, seed, found)
