"The training of the embedded judge: told as it goes, found again by the next run, no longer than the data need; and steps named as they are."
from dataclasses import replace

import pytest

from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.store import PrepareConfig, prepare
from ctdiffusion.evaluation import segmenter as module
from ctdiffusion.evaluation.evaluation import EvaluateJob, judge_of, show_rows
from ctdiffusion.evaluation.results import steps_text
from ctdiffusion.evaluation.segmenter import SegmenterConfig, steps_for, train_segmenter

pytestmark = pytest.mark.fault("F62")
TINY = SegmenterConfig(steps=12, batch=2, channels=(8, 8, 8, 8, 8, 8), neighbours=0)


def quiet(line):
    "Says nothing."


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress")
    make_dataset(folder / "data", 2, 1, size=48)
    return prepare(folder / "data", folder / "store", PrepareConfig(32))


class Clock:
    "A clock that a step of the training moves by ten seconds."
    def __init__(self): self.now = 0.0
    def monotonic(self): return self.now


@pytest.fixture
def slow(monkeypatch):
    clock = Clock()
    advance = module.Training.advance

    def ten_seconds(training):
        clock.now += 10
        return advance(training)

    monkeypatch.setattr(module.Training, "advance", ten_seconds)
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_training_is_announced_and_told_every_half_minute_with_the_time_left(store, tmp_path, slow):
    lines = []
    train_segmenter(store, tmp_path, TINY, "cpu", lines.append, save_seconds=1000)
    assert "12 steps" in lines[0] and "32 x 32 pixels" in lines[0] and str(tmp_path) in lines[0]
    told = [line for line in lines if line.startswith("step ")]
    assert told[0].startswith("step 1 of 12") and "01:50 left" in told[0]
    assert [line.split(",")[0] for line in told[1:]] == [f"step {k} of 12" for k in (4, 7, 10)]
    assert "00:20 left" in told[-1]


def test_a_judge_that_is_there_says_that_it_was_found(store, tmp_path):
    lines = []
    train_segmenter(store, tmp_path, TINY, "cpu", quiet)
    train_segmenter(store, tmp_path, TINY, "cpu", lines.append)
    assert len(lines) == 1 and "found" in lines[0] and str(tmp_path) in lines[0]


def test_the_next_run_of_the_same_data_finds_the_judge(tmp_path, monkeypatch):
    "Two runs, each with a store of its own made from the same patients: one training."
    make_dataset(tmp_path / "data", 2, 1, size=48)
    for run in ("a", "b"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        prepare(tmp_path / "data", tmp_path / "runs" / run / "store", PrepareConfig(32))
    jobs = [EvaluateJob(str(tmp_path / "runs" / run), judge_steps=2, device="cpu") for run in ("a", "b")]
    stores = [prepare(tmp_path / "data", job.folder("store"), PrepareConfig(32)) for job in jobs]
    first = judge_of(jobs[0], stores[0], quiet)
    monkeypatch.setattr(module, "Training", None)
    assert judge_of(jobs[1], stores[1], quiet).protocol == first.protocol
    assert jobs[0].folder("shared") == jobs[1].folder("shared")
    assert jobs[0].folder("shared").is_relative_to(tmp_path / "runs" / "shared")


def test_judges_of_other_data_and_of_other_steps_lie_beside_each_other(tmp_path):
    make_dataset(tmp_path / "data", 2, 1, size=48)
    job = EvaluateJob(str(tmp_path / "run"), judge_steps=2, device="cpu")
    prepare(tmp_path / "data", job.folder("store"), PrepareConfig(32))
    other = replace(job, store=str(tmp_path / "other"))
    stores = [prepare(tmp_path / "data", j.folder("store"), c) for j, c in
              ((job, PrepareConfig(32)), (other, PrepareConfig(32, level=50)))]
    protocols = [judge_of(j, s, quiet).protocol for j, s in
                 ((job, stores[0]), (replace(job, judge_steps=3), stores[0]), (other, stores[1]))]
    assert len(set(protocols)) == 3
    assert judge_of(job, stores[0], quiet).protocol == protocols[0]


@pytest.mark.parametrize("slices, steps", [(1, 1000), (54, 1000), (160, 1000), (300, 1875), (820, 4000), (15489, 4000)])
def test_few_slices_need_fewer_steps_and_those_of_the_demo_all(slices, steps):
    assert steps_for(slices) == steps


# -- steps, named as they are -------------------------------------------------------------------


def row(step, milestone, steps=None):
    "As much of a result as a table needs."
    metrics = dict(distance=None, distance_name=None, psnr=20.0, dice={})
    return dict(variant="mask", step=step, milestone=milestone, steps=steps, metrics=metrics, intervals={})


@pytest.mark.parametrize("step, milestone, steps, text", [
    (600, "150k", 600, "step 600 of 600 (stands for 150k)"),
    (600, "150k", None, "step 600 of 600 (stands for 150k)"),       # a result that does not know the length
    (400, "10k", 6000, "step 400 of 6,000 (stands for 10k)"),
    (150_000, "150k", 150_000, "step 150,000 of 150,000 (150k)"),
    (10_000, "10k", 150_000, "step 10,000 of 150,000 (10k)"),
    (150, None, 600, "step 150 of 600"),
    (150, None, None, "step 150"),
])
def test_steps_are_named_as_they_are(step, milestone, steps, text):
    result = row(step, milestone, steps)
    assert steps_text(result) == text
    assert show_rows([result]).columns.tolist() == [f"mask, {text}"]


def test_a_committed_result_has_a_name_too(root):
    from ctdiffusion.evaluation.results import read_results
    result = read_results(root / "nbs" / "results" / "demo-full" / "mask-s0-50k.json")
    assert steps_text(result) == "step 2,000 of 6,000 (stands for 50k)"
