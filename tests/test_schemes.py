"Ids of other labelling schemes (row F48): recognised by anatomy, refused by name, converted on request; and no false alarm."
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctdiffusion import load, synthesize
from ctdiffusion.data.cases import Case, find_cases, has_error, read_case
from ctdiffusion.data.labels import AMOS, ClassTable, CTDiffusionError, LabelClass
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.schemes import TITLES, body_share, check_anatomy, convert_labels, counterpart, read_schemes, recognise_scheme
from ctdiffusion.data.store import open_store, prepare
from ctdiffusion.data.volumes import nifti_bytes, read_labels
from ctdiffusion.synthesis.synthesis import complete_labels
from ctdiffusion.training.parameters import TrainJob

pytestmark = pytest.mark.fault("F48")
REAL = Path(os.environ.get("CTDIFFUSION_REAL_CT") or Path(__file__).resolve().parents[2] / "shared" / "data" / "real-ct")

# written down by hand, independent of schemes.csv: spleen, right and left kidney, gallbladder, esophagus, liver, stomach, aorta,
# vena cava, pancreas, right and left adrenal gland, duodenum, bladder, prostate (AMOS ids 1 to 15); 0: the scheme has no such organ
BY_HAND = {
    "totalsegmentator-v2": (1, 2, 3, 4, 15, 5, 6, 52, 63, 7, 8, 9, 19, 21, 22),
    "totalsegmentator-v1": (1, 2, 3, 4, 42, 5, 6, 7, 8, 10, 11, 12, 56, 104, 0),
    "btcv": (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 0, 0, 0),
    "flare22": (3, 2, 13, 9, 10, 1, 11, 5, 6, 4, 7, 8, 12, 0, 0),
}


def written_in(scheme, labels):
    "AMOS labels in the ids of another scheme, and the AMOS labels that come back from it."
    ids = np.array((0, *BY_HAND[scheme]), np.uint8)
    return ids[labels], np.where(ids[labels] > 0, labels, 0).astype(np.uint8)


def case_in(folder, hu, labels, affine):
    case = Case("c", folder / "i.nii.gz", folder / "l.nii.gz", "train")
    for path, data in ((case.image, hu), (case.label, labels)):
        path.write_bytes(nifti_bytes(data, affine))
    return case


def errors(problems):
    return [p for p in problems if p.severity == "error"]


# tables and names

def test_the_ids_of_every_scheme():
    schemes = read_schemes()
    assert {s: len(ids) for s, ids in schemes.items()} == {"amos": 15, "totalsegmentator-v2": 117, "totalsegmentator-v1": 104, "btcv": 13, "flare22": 13}
    for scheme, by_hand in BY_HAND.items():
        found = {counterpart(name, AMOS): value for value, name in schemes[scheme].items()}
        assert tuple(found.get(i, 0) for i in range(1, 16)) == by_hand
        assert sorted(schemes[scheme]) == list(range(1, len(schemes[scheme]) + 1))


def test_any_table_can_be_the_target_also_joined_and_split():
    own = ClassTable("own", (LabelClass(0, "background", (0, 0, 0)), LabelClass(1, "kidneys", (0, 0, 9), ("kidney left", "kidney_right")),
                             LabelClass(2, "Leber", (9, 0, 0), ts_v2="liver"), LabelClass(3, "prostate", (9, 9, 0)), LabelClass(4, "uterus", (9, 0, 9))))
    ids = np.array([0, 2, 3, 5, 22, 1], np.uint8).reshape(1, 2, 3)
    back, notes = convert_labels(ids, "totalsegmentator-v2", own)
    assert back.ravel().tolist() == [0, 1, 1, 2, 3, 0] and "1 spleen; 1 voxels" in notes[1]
    assert counterpart("prostate_uterus", own) is None, "nothing can tell the two"
    male = ClassTable("male", own.classes[:4])
    assert counterpart("prostate_uterus", male) == 3 and counterpart("uterus", male) is None
    assert counterpart("prostate", AMOS) == AMOS.id("prostate/uterus")


def test_what_has_no_class_is_background_and_counted():
    ids = np.array([1, 10, 10, 20, 0, 52], np.uint8).reshape(1, 2, 3)
    back, notes = convert_labels(ids, "totalsegmentator-v2")
    assert back.ravel().tolist() == [1, 0, 0, 0, 0, 8]
    assert notes == ("converted from the ids of TotalSegmentator v2", "ids left out, because the table 'amos' has no such class: 10 lung_upper_lobe_left, 20 colon; 3 voxels")


def test_ids_that_the_scheme_does_not_have_are_refused():
    with pytest.raises(CTDiffusionError, match=r"labels 14 \(2 voxels\).*ids of BTCV"):
        convert_labels(np.array([[[14, 14, 1]]]), "btcv")


def test_a_misspelt_scheme_names_the_nearest(tmp_path, data):
    with pytest.raises(CTDiffusionError, match="Did you mean 'totalsegmentator-v2'"):
        read_labels(data / "labelsTr/amos_0001.nii.gz", label_scheme="totalsegmentator2")
    with pytest.raises(CTDiffusionError, match="Did you mean 'flare22'"):
        prepare(data, tmp_path / "s", PrepareConfig(size=32, label_scheme="flare"))


# recognised, refused, converted

@pytest.mark.parametrize("scheme", BY_HAND)
@pytest.mark.parametrize("seed", (0, 3))
def test_a_foreign_map_is_recognised_and_comes_back_by_name(scheme, seed, tmp_path):
    p = phantom(seed, 48)
    foreign, back = written_in(scheme, p.labels)
    assert recognise_scheme(foreign, p.spacing).schemes == (scheme,)
    case = case_in(tmp_path, p.hu, foreign, p.affine)
    (problem,) = errors(read_case(case)[2])
    assert problem.path == str(case.label) and TITLES[scheme] in problem.found and f"label_scheme='{scheme}'" in problem.do and "mirrored" not in problem.found
    image, label, problems = read_case(case, label_scheme=scheme)
    assert not errors(problems) and (label.data == back).all()
    assert f"converted from the ids of {TITLES[scheme]}" in {q.found for q in problems}


def test_a_selection_of_low_totalsegmentator_ids():
    "roi_subset: liver 5, spleen 1, kidneys 2 and 3, stomach 6, pancreas 7; with AMOS's ids an esophagus of a liter."
    p = phantom(0, 48)
    foreign = written_in("totalsegmentator-v2", p.labels)[0]
    foreign[~np.isin(foreign, (1, 2, 3, 5, 6, 7))] = 0
    with pytest.raises(CTDiffusionError) as caught:
        check_anatomy(foreign, p.spacing, "case.nii.gz")
    assert "id 5 would be esophagus with 1,1" in caught.value.found and "there id 5 is liver" in caught.value.found
    assert "label_scheme='totalsegmentator-v2'" in caught.value.do and "label_scheme='amos' if they are right" in caught.value.do


def test_where_two_schemes_explain_it_both_are_named():
    p = phantom(0, 48)
    foreign = np.where(p.labels == AMOS.id("liver"), 5, 0).astype(np.uint8)
    assert recognise_scheme(foreign, p.spacing).schemes == ("totalsegmentator-v2", "totalsegmentator-v1")
    with pytest.raises(CTDiffusionError, match="'totalsegmentator-v2' or label_scheme='totalsegmentator-v1'"):
        check_anatomy(foreign, p.spacing, "case.nii.gz")


def test_the_trachea_is_no_body(tmp_path):
    p = phantom(1, 48)
    foreign = written_in("totalsegmentator-v2", p.labels)[0]
    foreign[foreign > 15] = 0
    x, y = (n // 2 for n in foreign.shape[:2])
    column = foreign[x:x + 2, y:y + 2, -6:]
    column[column == 0] = 16
    assert (column == 16).any() and body_share(foreign, 16) < 0.05
    path = case_in(tmp_path, p.hu, foreign, p.affine).label
    with pytest.raises(CTDiffusionError, match="id 16 would be the body.*there id 16 is trachea.*totalsegmentator-v2"):
        complete_labels(path)
    v = complete_labels(path, body="estimate", label_scheme="totalsegmentator-v2")
    assert (v.data == AMOS.id("liver")).sum() == (p.labels == AMOS.id("liver")).sum()
    assert any("16 trachea" in note for note in v.notes)


def test_a_body_that_is_none_and_no_scheme(tmp_path):
    p = phantom(1, 48)
    labels = p.labels.copy()
    labels[:3, :3, :3] = 16
    with pytest.raises(CTDiffusionError, match="would be the body, but is only 0% of what touches"):
        complete_labels(case_in(tmp_path, p.hu, labels, p.affine).label)


def test_a_wrong_label_scheme_is_noticed(tmp_path):
    p = phantom(0, 48)
    path = case_in(tmp_path, p.hu, p.labels, p.affine).label
    with pytest.raises(CTDiffusionError, match="Leave label_scheme out"):
        read_labels(path, label_scheme="totalsegmentator-v2")
    path = case_in(tmp_path, p.hu, written_in("totalsegmentator-v2", p.labels)[0], p.affine).label
    with pytest.raises(CTDiffusionError, match="unknown ids|TotalSegmentator v2"):
        read_labels(path, label_scheme="flare22")


def test_the_tables_own_name_confirms_odd_labels(tmp_path):
    p = phantom(0, 48)
    foreign = np.where(p.labels == AMOS.id("liver"), 5, 0).astype(np.uint8)
    case = case_in(tmp_path, p.hu, foreign, p.affine)
    assert errors(read_case(case)[2]) and not errors(read_case(case, label_scheme="amos")[2])


def test_mirrored_labels_stay_mirrored(tmp_path):
    p = phantom(0, 48)
    assert recognise_scheme(p.labels[::-1], p.spacing) is None
    (problem,) = errors(read_case(case_in(tmp_path, p.hu, p.labels[::-1], p.affine))[2])
    assert "left to right" in problem.do
    foreign = written_in("totalsegmentator-v2", p.labels)[0][::-1]
    assert recognise_scheme(foreign, p.spacing).schemes == ("totalsegmentator-v2",)


def test_ids_of_another_scheme_are_named_although_two_organs_are_exchanged(tmp_path):
    p = phantom(0, 48)
    foreign = written_in("totalsegmentator-v2", p.labels)[0]
    exchanged = np.where(foreign == 8, 9, np.where(foreign == 9, 8, foreign))  # the adrenal glands
    (problem,) = errors(read_case(case_in(tmp_path, p.hu, exchanged, p.affine))[2])
    assert "TotalSegmentator v2" in problem.found
    assert "label_scheme='totalsegmentator-v2'" in problem.do


def test_an_impossible_organ_that_no_scheme_explains_is_refused_unless_confirmed(tmp_path):
    p = phantom(0, 48)
    labels = np.where(p.labels == AMOS.id("liver"), AMOS.id("duodenum"), p.labels)
    case = case_in(tmp_path, p.hu, labels, p.affine)
    (problem,) = errors(read_case(case)[2])
    assert "id 13 would be duodenum with" in problem.found
    assert "label_scheme='amos'" in problem.do
    assert not errors(read_case(case, label_scheme="amos")[2])


def test_a_table_of_ones_own(tmp_path):
    own = ClassTable("own", (LabelClass(0, "background", (0, 0, 0)), LabelClass(1, "liver", (9, 0, 0)), LabelClass(2, "spleen", (0, 9, 0)),
                             LabelClass(3, "tumour", (0, 0, 9)), LabelClass(4, "body", (9, 9, 9))))
    p = phantom(0, 48)
    right = np.select([p.labels == 6, p.labels == 1], [1, 2], 0).astype(np.uint8)
    path = case_in(tmp_path, p.hu, right, p.affine).label
    assert read_labels(path, own, anatomy=True).notes == ()
    path = case_in(tmp_path, p.hu, p.labels, p.affine).label
    with pytest.raises(CTDiffusionError, match="AMOS22.*label_scheme='amos'"):
        read_labels(path, own)
    assert (read_labels(path, own, label_scheme="amos").data == right).all()


# through the jobs

def test_prepare_converts_and_records_it(original, tmp_path):
    root, foreign_root = original, tmp_path / "foreign"
    for path in sorted(root.glob("*/*.nii.gz")):
        target = foreign_root / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
        if path.parent.name.startswith("labels"):
            voxels = written_in("totalsegmentator-v2", voxels)[0]
        target.write_bytes(nifti_bytes(voxels, image.affine))
    plain = prepare(root, tmp_path / "plain", PrepareConfig(size=32))
    with pytest.raises(CTDiffusionError, match="label_scheme='totalsegmentator-v2'"):
        prepare(foreign_root, tmp_path / "refused", PrepareConfig(size=32))
    config = PrepareConfig(size=32, label_scheme="totalsegmentator-v2")
    store = prepare(foreign_root, tmp_path / "converted", config)
    assert (store.labels == plain.labels).all() and store.manifest["config"]["label_scheme"] == "totalsegmentator-v2"
    assert open_store(store.path, config).config.label_scheme == "totalsegmentator-v2"
    with pytest.raises(CTDiffusionError, match="label_scheme='totalsegmentator-v2'"):
        open_store(store.path, PrepareConfig(size=32))


def test_a_store_without_the_field_opens(original, tmp_path):
    store = prepare(original, tmp_path / "s", PrepareConfig(size=32))
    assert "label_scheme" not in json.loads((store.path / "manifest.json").read_text())["config"]
    assert open_store(store.path, PrepareConfig(size=32)).config.label_scheme == ""


def test_synthesis_converts_and_records_it(tmp_path):
    p, model = phantom(5, 48), load("pix2pix-demo", device="cpu")
    save_patient(p, tmp_path / "i.nii.gz", tmp_path / "l.nii.gz")
    foreign = written_in("totalsegmentator-v2", p.labels)[0]
    (tmp_path / "ts.nii.gz").write_bytes(nifti_bytes(foreign, p.affine))
    plain = synthesize(model, tmp_path / "l.nii.gz", tmp_path / "a.nii.gz", image=tmp_path / "i.nii.gz", case="p")
    with pytest.raises(CTDiffusionError, match="label_scheme='totalsegmentator-v2'"):
        synthesize(model, tmp_path / "ts.nii.gz", tmp_path / "b.nii.gz", image=tmp_path / "i.nii.gz")
    said = []
    made = synthesize(model, tmp_path / "ts.nii.gz", tmp_path / "b.nii.gz", image=tmp_path / "i.nii.gz", case="p", say=said.append, label_scheme="totalsegmentator-v2")
    assert (nib.load(made).get_fdata() == nib.load(plain).get_fdata()).all()
    assert json.loads((tmp_path / "b.json").read_text())["label_scheme"] == "totalsegmentator-v2" and "converted from" in said[0]


def test_the_jobs_have_the_parameter(root):
    from ctdiffusion.synthesis.processes import SynthesizeJob
    from ctdiffusion.training.parameters import parameters_cell
    assert TrainJob(label_scheme="btcv").label_scheme == SynthesizeJob(label_scheme="btcv").label_scheme == "btcv"
    for name in ("train", "prepare"):
        assert parameters_cell(root / "nbs" / f"{name}.ipynb")["label_scheme"] == ("str", "")


# no false alarm

def variations(labels, spacing, seed):
    "Crops, half of the organs, every second slice, flips."
    rng = np.random.default_rng(seed)
    for _ in range(6):
        low = [int(rng.integers(0, n // 2)) for n in labels.shape]
        high = [a + int(rng.integers(n // 4, n // 2)) for a, n in zip(low, labels.shape)]
        yield labels[tuple(map(slice, low, high))], spacing
        yield np.where(np.isin(labels, rng.permutation(15)[:8] + 1), labels, 0), spacing
    every = max(2, round(5 / spacing[2]))
    yield labels[:, :, ::every], spacing * (1, 1, every)
    yield from ((labels[::i, ::j, ::k], spacing) for i in (1, -1) for j in (1, -1) for k in (1, -1))


def alarms(labels, spacing):
    found = recognise_scheme(labels, spacing)
    return found and (found.schemes or found.body or [c for c in found.why if c.volume])


@pytest.mark.parametrize("seed", range(6))
def test_phantoms_and_their_variations_are_not_suspected(seed):
    p = phantom(100 + seed, 48)
    full = p.labels.copy()
    full[(full == 0) & (p.hu > -300)] = AMOS.body
    assert recognise_scheme(p.labels, p.spacing) is None and recognise_scheme(full, p.spacing) is None
    assert body_share(full, AMOS.body) > 0.6
    assert [s for v, s in variations(p.labels, p.spacing, seed) if alarms(v, s)] == []


@pytest.mark.skipif(not (REAL / "imagesTr").is_dir(), reason=f"no real CT in {REAL}: set CTDIFFUSION_REAL_CT")
def test_real_labels_and_their_variations_are_not_suspected():
    files = [*REAL.glob("labelsTr/*.nii.gz"), *REAL.parent.glob("real-ct-more/**/label*/*.nii.gz")]
    assert files
    for k, path in enumerate(sorted(set(files))):
        v = read_labels(path)
        assert recognise_scheme(v.data, v.spacing) is None, path
        for labels, spacing in list(variations(v.data, v.spacing, k))[:13]:
            assert not alarms(labels, spacing), path


@pytest.mark.skipif(not (REAL / "imagesTr").is_dir(), reason=f"no real CT in {REAL}: set CTDIFFUSION_REAL_CT")
@pytest.mark.parametrize("scheme", BY_HAND)
def test_a_real_patient_in_another_scheme(scheme):
    (case,), _ = find_cases(REAL)
    v = read_labels(case.label)
    foreign, back = written_in(scheme, v.data)
    assert recognise_scheme(foreign, v.spacing).schemes == (scheme,)
    assert (convert_labels(foreign, scheme)[0] == back).all() and not has_error(read_case(case)[2])
