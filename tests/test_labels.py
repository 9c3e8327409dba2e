"The class table: names of four worlds, refused ids, files for Slicer and ITK-SNAP."
import json
import pickle

import numpy as np
import pytest

from ctdiffusion.data.labels import AMOS, ClassTable, CTDiffusionError, LabelClass, check_labels, colorize, write_ctbl, write_itksnap

OWN = ClassTable("own", (LabelClass(0, "air", (0, 0, 0)), LabelClass(1, "left lung", (9, 9, 9), ("lung l",))))


def test_release_spelling_of_amos():
    released = ("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota", "postcava",
                "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus")
    assert [AMOS.id(name) for name in released] == list(range(16))
    assert [AMOS.id(name) for name in AMOS.names] == list(range(17))


def test_paper_columns():
    columns = "Sple. Liv. Kid_l Kid_r Panc. Stom. Aorta Gall_bld Espo. Adr_r. Adr_l. Duod. Cava. Bladder".split()
    assert {c.column for c in AMOS.organs} == {*columns, None}


def test_totalsegmentator_names():
    assert [c.ts_v2 for c in AMOS.organs if c.name != c.ts_v2] == ["prostate"]
    assert [c.name for c in AMOS.organs if c.ts_v1 is None] == ["prostate_uterus"]
    assert not {AMOS.classes[0].ts_v2, AMOS.classes[16].ts_v2} - {None}


def test_a_table_without_body():
    assert (OWN.n, OWN.body, len(OWN.organs)) == (2, None, 1)
    assert (AMOS.n, AMOS.background, AMOS.body, len(AMOS.organs)) == (17, 0, 16, 15)


def test_json_round_trip_and_hash():
    for table in (AMOS, OWN):
        again = ClassTable.from_json(json.loads(json.dumps(table.to_json())))
        assert again == table and again.hash() == table.hash()
    assert AMOS.hash() != OWN.hash()


@pytest.mark.parametrize("ids", [(0, 2), (1, 2), (1, 0), (0, 0)])
def test_ids_have_no_gaps(ids):
    with pytest.raises(CTDiffusionError, match="without gaps"): ClassTable("x", tuple(LabelClass(i, f"c{k}", (0, 0, 0)) for k, i in enumerate(ids)))


def test_names_are_unique():
    with pytest.raises(CTDiffusionError, match="two classes called lung_l"): ClassTable("x", (*OWN.classes, LabelClass(2, "Lung-L", (1, 1, 1))))


def test_unknown_name_lists_the_known():
    with pytest.raises(CTDiffusionError, match="air, left lung"): OWN.id("heart")


@pytest.mark.parametrize("ids, found", [([255, 255, 1], "255 (2 voxels)"), ([-1, 0], "-1 (1 voxels)"), ([2.5, 1], "2.5 (1 voxels)"), ([np.nan, 0], "nan")])
def test_undeclared_ids_are_counted(ids, found):
    with pytest.raises(CTDiffusionError) as caught: check_labels(np.array(ids), "case.nii.gz")
    assert caught.value.path == "case.nii.gz" and found in caught.value.found and "amos" in str(caught.value)


def test_hundreds_of_strange_ids_stay_readable():
    with pytest.raises(CTDiffusionError) as caught: check_labels(np.arange(1000), "x")
    assert len(str(caught.value)) < 400


def test_declared_ids_pass():
    check_labels(np.zeros((0,), np.uint8), "empty")
    check_labels(np.arange(17, dtype=np.float64), "floats that are whole")


def test_errors_survive_another_process():
    error = CTDiffusionError("f", "a", "b", "Do c.")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "f: found a; expected b. Do c." and again.do == "Do c."


def test_colours():
    assert colorize(np.array([[0, 6]])).tolist() == [[[0, 0, 0], [139, 0, 0]]]
    assert colorize(np.array([1]), OWN).tolist() == [[9, 9, 9]] and AMOS.colors.dtype == np.uint8


def test_files_for_viewers(tmp_path):
    ctbl = write_ctbl(tmp_path / "a.ctbl", OWN).read_text().splitlines()
    assert ctbl[1:] == ["0 air 0 0 0 0", "1 left_lung 9 9 9 255"]
    snap = write_itksnap(tmp_path / "a.txt", OWN).read_text().splitlines()
    assert [line.split()[:7] for line in snap[1:]] == [["0"] * 7, ["1", "9", "9", "9", "1", "1", "1"]] and snap[2].endswith('"left lung"')
