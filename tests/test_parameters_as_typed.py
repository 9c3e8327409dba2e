"""What was typed is what a job gets: no number is taken for a text that was written otherwise."""
from dataclasses import fields
from typing import get_type_hints

import pytest
from papermill.cli import _resolve_type

from ctdiffusion.apps.jobs import ReproduceJob
from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.evaluation.evaluation import EvaluateJob
from ctdiffusion.synthesis.processes import SynthesizeJob, read_words
from ctdiffusion.training.parameters import PrepareJob, TrainJob, check_parameters, parameters_cell

JOBS = (PrepareJob, TrainJob, EvaluateJob, ReproduceJob, SynthesizeJob)
TEXTS = [(job, f.name) for job in JOBS for f in fields(job) if get_type_hints(job)[f.name] is str]


@pytest.mark.fault("F56")
@pytest.mark.parametrize("typed", ["0012", "12", "1_2", "1e3", "nan", "-0"])
@pytest.mark.parametrize("job, name", TEXTS)
def test_a_bare_number_for_text_names_the_remedy(job, name, typed):
    "papermill's -p makes a number of each of these; its -r does not."
    arrived = _resolve_type(typed)
    assert isinstance(arrived, (int, float))
    if name == "sampler" and isinstance(arrived, int):
        return
    with pytest.raises(CTDiffusionError, match=f"a number where text is meant.*-r {name} VALUE"):
        check_parameters({name: arrived}, job)


@pytest.mark.fault("F56")
def test_text_stays_as_it_was_typed():
    "Passed with -r, or as a word of `python -m`."
    assert check_parameters(dict(exclude="0012"), PrepareJob).exclude == "0012"
    assert read_words(["-p", "exclude", "0012", "-p", "max_steps", "0012"], TrainJob) == TrainJob(exclude="0012", max_steps=12)


@pytest.mark.fault("F56")
def test_a_sampler_may_be_a_number():
    "-p sampler 250 is documented, and 0250 is not meant by anybody."
    for job in (TrainJob, EvaluateJob, SynthesizeJob):
        assert check_parameters(dict(sampler=_resolve_type("250")), job).sampler == "250"
        with pytest.raises(CTDiffusionError, match="-r sampler VALUE"):
            check_parameters(dict(sampler=250.5), job)


def test_the_cell_of_each_job_declares_its_class(root):
    for notebook, job in (("prepare", PrepareJob), ("train", TrainJob), ("evaluate", EvaluateJob), ("reproduce", ReproduceJob)):
        declared = parameters_cell(root / "nbs" / f"{notebook}.ipynb")
        assert declared == {f.name: (type(f.default).__name__, f.default) for f in fields(job)}
