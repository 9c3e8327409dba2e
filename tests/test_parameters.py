"What papermill injects is checked before anything is done: names, types, and that it was injected at all."
from dataclasses import fields

import nbformat
import papermill
import pytest

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.training.parameters import TrainJob, check_parameters, coerce, parameters_cell


def test_train_notebook_and_class_agree(root):
    "The cell that people edit and the class that checks it: the same names, types, defaults, in the same order."
    assert parameters_cell(root / "nbs/train.ipynb") == {f.name: (f.type if isinstance(f.type, str) else f.type.__name__, f.default) for f in fields(TrainJob)}


@pytest.mark.parametrize("name,near", [("stepz", "max_steps"), ("varient", "variant"), ("max_step", "max_steps"), ("Seed", "seed"), ("rundir", "run_dir"), ("data", "data_root")])
def test_misspelt_name(name, near):
    with pytest.raises(CTDiffusionError, match=f"{name}=1 .did you mean {near}"): check_parameters({name: 1}, TrainJob)


@pytest.mark.parametrize("given,found", [(dict(variant="maks"), "mask"), (dict(preset="dmeo"), "demo"), (dict(sampler="ddim51"), "ddim50"), (dict(max_steps="many"), "whole number"),
    (dict(max_steps=float("nan")), "whole number"), (dict(max_hours=float("inf")), "finite"), (dict(seed=0.5), "whole number"), (dict(seed=True), "whole number"),
    (dict(batch=-4), "0 or more"), (dict(lr="fast"), "finite"), (dict(run_dir=["a"]), "text"), (dict(variant="mask; import os"), "variant")])
def test_wrong_value(given, found):
    with pytest.raises(CTDiffusionError, match=found): check_parameters(given, TrainJob)


def test_all_faults_are_said_at_once():
    with pytest.raises(CTDiffusionError) as error: check_parameters(dict(stepz=1, lr="fast", seed=None, batch=""), TrainJob)
    assert error.value.found == "stepz=1 (did you mean max_steps?), lr='fast' (not a finite number)"


@pytest.mark.parametrize("value,kind,result", [(7, str, "7"), ("0007", str, "0007"), (250, str, "250"), ("1_000", int, 1000), (1e3, int, 1000), ("1e-3", float, 1e-3),
    (1, float, 1.0), ("True", bool, True), (0, bool, False), ("2" * 20, int, int("2" * 20)), ("'; rm -rf /'", str, "'; rm -rf /'")])
def test_coerced_as_declared(value, kind, result): assert coerce(value, kind) == result and type(coerce(value, kind)) is kind


def job(path, tagged: bool = True) -> str:
    "A job notebook of four cells."
    code = nbformat.v4.new_code_cell
    parameters = code('variant: str = "mask"\nmax_steps: int = 0', metadata=dict(tags=["parameters"] if tagged else []))
    take = code("from ctdiffusion.training.parameters import TrainJob\njob = TrainJob.take(before, globals())\nprint(job.variant, job.max_steps)")
    nb = nbformat.v4.new_notebook(cells=[code("import os\nimport numpy as np"), code("before = set(globals())"), parameters, take],
                                  metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nbformat.write(nb, path)
    return str(path)


@pytest.mark.parametrize("given,tagged,said", [(dict(variant="edge", max_steps="500"), True, "edge 500"), (dict(variant="edge", stepz=5), True, "did you mean max_steps"), (dict(variant="edge"), False, "tag")])
def test_papermill(tmp_path, given, tagged, said):
    "A right job runs with what was given; a misspelt one and one that lost its tag stop, though papermill itself would not mind."
    source, out = job(tmp_path / "in.ipynb", tagged), str(tmp_path / "out.ipynb")
    execute = lambda: papermill.execute_notebook(source, out, given, progress_bar=False)
    if said == "edge 500": assert "".join(execute().cells[-1].outputs[0]["text"]).strip() == said; return
    with pytest.raises(papermill.PapermillExecutionError, match=said): execute()
