"The museum: every exhibit is really poisoned and really answered."
import csv
import json
import re

import numpy as np
import pytest

from ctdiffusion.apps.museum import EXHIBITS, careful, examine, exported, healthy, naive, poisoned, tour
from ctdiffusion.data import cases
from ctdiffusion.data.cases import find_cases, has_error, read_case
from ctdiffusion.data.phantom import phantom
from ctdiffusion.data.volumes import read_labels

exhibits = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda e: e.name)
RIGHTED = {"almost_whole"}  # not refused: nobody can doubt what was meant


@pytest.fixture(scope="module")
def good(tmp_path_factory): return healthy(tmp_path_factory.mktemp("museum") / "healthy")


def test_the_healthy_patient_is_the_phantom_and_nothing_is_found(good):
    patient, (hu, ids, weights) = phantom(5), naive(good)
    assert np.array_equal(hu, patient.hu) and np.array_equal(ids, patient.labels) and weights
    assert careful(good) == []


def test_twelve_exhibits_under_twelve_names():
    assert len(EXHIBITS) == len({e.name for e in EXHIBITS}) == 12


def test_rows_and_reports_exist(root):
    rows = {r["row"] for r in csv.DictReader((root / "tests/faults/rows.csv").open(encoding="utf-8"))}
    page = "".join("".join(c["source"]) for c in json.loads((root / "nbs/62_museum.ipynb").read_text(encoding="utf-8"))["cells"])
    for e in EXHIBITS:
        repository, number = re.fullmatch(r"([\w.-]+/[\w.-]+)#(\d+)", e.seen).groups()
        assert e.row in rows and e.story.endswith(".")
        assert re.search(rf"https://github\.com/{repository}/(issues|pull)/{number}\)", page), f"{e.name}: {e.seen} is not linked on its page"


@exhibits
def test_a_naive_reader_is_deceived_or_dies(exhibit, good):
    right = naive(good)
    path = poisoned(exhibit, good)
    assert path.is_file()
    try: hu, ids, weights = naive(path.parents[1])
    except (EOFError, MemoryError, OSError): return
    same = np.array_equal(hu, right[0]) and np.array_equal(ids, right[1]) and all(w.equal(right[2][k]) for k, w in weights.items())
    assert not same


@exhibits
def test_ours_names_the_file_and_a_remedy(exhibit, good):
    finding = examine(exhibit, good)
    at_fault = [p for p in finding.problems if p.path == str(finding.path)]
    assert at_fault and all(p.found and p.do for p in at_fault)
    assert all(line.startswith(("REFUSED", "PUT RIGHT")) for line in str(finding).splitlines())
    assert finding.refused == (exhibit.name not in RIGHTED)
    if finding.refused: assert all(p.severity == "error" and p.expected for p in at_fault)
    else: assert np.array_equal(read_labels(finding.path).data, phantom(5).labels)


@pytest.mark.parametrize("exhibit", [e for e in EXHIBITS if e.guard.__name__.endswith("_fault")], ids=lambda e: e.name)
def test_it_is_the_guard_that_answers(exhibit, good, monkeypatch):
    said = {p.found for p in examine(exhibit, good).problems}
    monkeypatch.setattr(cases, exhibit.guard.__name__, lambda *args: None)
    assert not said & {p.found for p in examine(exhibit, good).problems}, "another guard may answer, with other words"


def test_a_tour_tells_three_outcomes_apart(good):
    def ours(folder):
        image, label, problems = read_case(find_cases(folder)[0][0])
        if has_error(problems): raise ValueError(problems[0])
        return image.data, label.data, exported(folder / "model")[1]
    assert tour(ours, good) == {e.name: "right" if e.name in RIGHTED else f"stops: {'CTDiffusionError' if e.name == 'flipped_bit' else 'ValueError'}" for e in EXHIBITS}
    assert set(tour(lambda folder: 0, good).values()) == {"right"}
    assert set(tour(lambda folder: folder.name == "healthy", good).values()) == {"wrong, in silence"}
    assert set(tour(lambda folder: [0] * (1 + (folder.name == "healthy")), good).values()) == {"wrong, in silence"}
