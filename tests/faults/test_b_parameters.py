"""Part B of the fault table: what comes in as a parameter, and what a notebook may hold.

A real papermill run costs seconds; most rows play one in this process: papermill's own function writes the inserted cell, and
IPython runs the notebook's cells up to the one that takes the job."""
import json
import resource
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import nbformat
import pytest
import test_house as house
from forks import ended, forked
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from papermill import PapermillExecutionError, execute_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from rows import refused
from test_house import copy  # noqa: F401, the fixture: the notebooks exported and cleaned by nbdev
from traitlets.config import Config

from ctdiffusion.apps import launch
from ctdiffusion.apps.jobs import WHERE, ReproduceJob, Task, plan
from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.preparation import PrepareConfig, choose
from ctdiffusion.evaluation.evaluation import JUDGES, EvaluateJob
from ctdiffusion.evaluation.judge import MODES
from ctdiffusion.models.variants import PRESETS, VARIANTS
from ctdiffusion.training.parameters import Job, TrainJob, check_parameters, coerce, parameters_cell

JOBS = ("train", "evaluate", "prepare", "reproduce")


def begin(notebook: Path, given: dict):
    "The error that stops a job notebook at its beginning, or the job, as it would be below papermill."
    nb = parameterize_notebook(load_notebook_node(str(notebook)), given)
    shell = InteractiveShell(config=Config(HistoryManager=dict(enabled=False)))
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        result = shell.run_cell(cell.source)
        if error := result.error_before_exec or result.error_in_exec: return error
        if ".take(" in cell.source: return shell.user_ns["job"]


def job_notebook(path: Path, tagged: bool = True) -> str:
    "A job notebook of five cells."
    code = nbformat.v4.new_code_cell
    parameters = code('variant: str = "mask"\nmax_steps: int = 0', metadata=dict(tags=["parameters"] if tagged else []))
    take = code("from ctdiffusion.training.parameters import TrainJob\njob = TrainJob.take(before, globals())\nprint(job.variant, job.max_steps)")
    nb = nbformat.v4.new_notebook(cells=[code("import os\nimport numpy as np\nfrom ctdiffusion.training.parameters import guarded"), code("before = guarded(globals())"), parameters, take],
                                  metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nbformat.write(nb, path)
    return str(path)


def papermill(folder: Path, notebook: Path, *given: str) -> subprocess.CompletedProcess:
    "The command, as people type it."
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(folder / "out.ipynb"), *given]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------- F21: names and values

@pytest.mark.parametrize("name, near", [("stepz", "max_steps"), ("varient", "variant"), ("max_step", "max_steps"), ("Seed", "seed"), ("rundir", "run_dir"), ("data", "data_root")])
def test_F21_misspelt_name(name, near):
    with refused("parameters", f"{name}=1 (did you mean {near}?)", "Correct them and run again; nothing was done yet"): check_parameters({name: 1}, TrainJob)


@pytest.mark.parametrize("given, where, said", [(dict(variant="maks"), "variant", "'mask'"), (dict(preset="dmeo"), "preset", "'demo'"), (dict(sampler="ddim51"), "ddim51", "ddim50"),
    (dict(max_steps="many"), "parameters", "whole number"), (dict(seed=0.5), "parameters", "whole number"), (dict(batch=-4), "batch", "0 or more"), (dict(lr="fast"), "parameters", "finite"),
    (dict(run_dir=["a"]), "parameters", "text"), (dict(variant="mask; import os"), "variant", "'mask; import os'"), (dict(device="cdua:0"), "device", "'cuda'"),
    (dict(batch=10**9), "batch", "100,000 or less"), (dict(processes=10**6), "processes", "1,000 or less"), (dict(max_steps=10**15), "max_steps", "or less"), (dict(sampler="ddim" + "9" * 3000), "sampler", "no such sampler")])
def test_F21_wrong_value(given, where, said):
    with refused(where, said): check_parameters(given, TrainJob)


def test_F21_missing_parameter():
    "The only one that has no default that would do."
    with refused("data_root", "the folder of AMOS22", "-p data_root PATH"): check_parameters(dict(preset="paper"), ReproduceJob)


def test_F21_all_is_said_at_once():
    with refused("parameters") as e: check_parameters(dict(stepz=1, lr="fast", seed=None, batch="", run_dir="../x", sampler="a\nb"), TrainJob)
    assert e.value.found == ("stepz=1 (did you mean max_steps?), lr='fast' (not a finite number), run_dir='../x' (outside of the working folder: give its absolute path if it is meant), "
                             "sampler='a\\nb' (not text without control characters)")


@pytest.mark.parametrize("name", JOBS)
def test_F21_every_job_checks_first(root, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "did you mean" in str(begin(root / "nbs" / f"{name}.ipynb", dict(stepz=10))) and not list(tmp_path.iterdir())
    assert isinstance(begin(root / "nbs" / f"{name}.ipynb", {}), Job) and not list(tmp_path.iterdir())


def test_F21_through_papermill(root, tmp_path):
    done = papermill(tmp_path, root / "nbs" / "train.ipynb", "-p", "run_dir", str(tmp_path / "run"), "-p", "stepz", "10")
    assert done.returncode == 1 and "CTDiffusionError" in done.stderr and "stepz=10 (did you mean max_steps?)" in done.stderr
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- F22: the tag

def test_F22_a_cleaned_notebook_keeps_its_tag(root, copy, tmp_path):  # noqa: F811
    "nbdev_clean with our settings leaves one tag in each job; without them it takes it, and the rule of the house sees that."
    house.test_job_notebooks_keep_their_parameters(copy)
    (tmp_path / "nbs").mkdir()
    for name in JOBS: shutil.copy(root / "nbs" / f"{name}.ipynb", tmp_path / "nbs")
    (tmp_path / "settings.ini").write_text((root / "settings.ini").read_text().replace("allowed_cell_metadata_keys = tags", "allowed_cell_metadata_keys ="))
    house.run("nbdev_clean", cwd=tmp_path)
    with pytest.raises(pytest.fail.Exception, match="train.ipynb: 0 cells tagged .parameters., expected 1"): house.test_job_notebooks_keep_their_parameters(tmp_path)
    for name in JOBS:
        with refused(tmp_path / "nbs" / f"{name}.ipynb", "0 cells tagged `parameters`"): parameters_cell(tmp_path / "nbs" / f"{name}.ipynb")


@pytest.mark.parametrize("name", JOBS)
def test_F22_a_job_without_its_tag_stops(root, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    nb = nbformat.read(root / "nbs" / f"{name}.ipynb", 4)
    for cell in nb.cells: cell.metadata.pop("tags", None)
    nbformat.write(nb, tmp_path / "lost.ipynb")
    error = begin(tmp_path / "lost.ipynb", dict(data_root="somewhere"))
    assert isinstance(error, CTDiffusionError) and "data_root assigned before the parameters cell" in str(error) and "Give the parameters cell its tag" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == ["lost.ipynb"]


@pytest.mark.parametrize("given, tagged, said", [(dict(variant="edge", max_steps="500"), True, "edge 500"), (dict(variant="edge"), False, "tag")])
def test_F22_through_papermill(tmp_path, given, tagged, said):
    "A right job runs with what was given; one that lost its tag stops, though papermill itself would not mind."
    execute = lambda: execute_notebook(job_notebook(tmp_path / "in.ipynb", tagged), str(tmp_path / "out.ipynb"), given, progress_bar=False)
    if tagged: assert "".join(execute().cells[-1].outputs[0]["text"]).strip() == said; return
    with pytest.raises(PapermillExecutionError, match=said): execute()


# ------------------------------------------------------------------------------------------------ F23: values on the way

@pytest.mark.parametrize("name, value, result", [("init", "0007", "0007"), ("init", 7, "text"), ("sampler", 250, "250"), ("max_steps", "1_000", 1000), ("max_steps", 1e3, 1000), ("max_hours", "1e-3", 1e-3), ("max_hours", 1, 1.0),
    ("milestones", "True", True), ("milestones", 0, False), ("seed", None, 0), ("seed", "", 0), ("seed", "123456789012345678", 123456789012345678), ("store", "'; rm -rf /'", "'; rm -rf /'"), ("store", "[1, 2]", "[1, 2]"),
    ("max_steps", float("nan"), "whole number"), ("max_steps", "nan", "whole number"), ("max_hours", float("inf"), "finite number"), ("max_hours", "-inf", "finite number"), ("lr", 10**400, "finite number"),
    ("max_steps", 10**400, "whole number"), ("seed", True, "whole number"), ("seed", 0.5, "whole number"), ("seed", "None", "whole number"), ("seed", "1" * 19, "whole number"), ("seed", "9" * 5000, "whole number"), ("batch", "[1,2]", "whole number"),
    ("batch", [1, 2], "whole number"), ("batch", b"12", "whole number"), ("store", [1, 2], "not text"), ("store", dict(a=1), "not text"), ("store", True, "not text"), ("milestones", 2, "true or false"), ("milestones", "maybe", "true or false")])
def test_F23_values_changed_on_the_way(name, value, result):
    "What papermill, YAML or a form made of a value becomes what the job declares, or is refused; there are no lists among parameters, only names between commas."
    kind, wrong = type(getattr(TrainJob(), name)), isinstance(result, str) and any(w in result for w in ("number", "text", "true or false"))
    if wrong:
        with refused("parameters", name, result): check_parameters({name: value}, TrainJob)
    else:
        found = getattr(check_parameters({name: value}, TrainJob), name)
        assert found == result and type(found) is kind


def test_F23_an_id_that_became_a_number_is_no_other_id(tmp_path):
    "-p exclude 0007 arrives as 7, which is refused; as text it is patient 0007, and patient 7 is unknown."
    for kind in ("images", "labels"):
        (tmp_path / f"{kind}Tr").mkdir()
        for id in ("0007", "0008"): (tmp_path / f"{kind}Tr" / f"{id}.nii.gz").touch()
    cases, _ = choose(tmp_path, PrepareConfig(64, exclude=(coerce("0007", str),)))
    assert [c.id for c in cases] == ["0008"]
    with refused(tmp_path, "['7']", "exclude"): choose(tmp_path, PrepareConfig(64, exclude=("7",)))
    with pytest.raises(ValueError): coerce(7, str)


# -------------------------------------------------------------------------------------------------------- F24: no code

NAMES = ["x=1;import os;os.system('touch OWNED');y", "x=__import__('os').system('touch OWNED') #", "x = 1\n__import__('os').system('touch OWNED')\ny", "!touch OWNED #", "%system touch OWNED #",
         "x, y = __import__('os').system('touch OWNED'), 1; z", "x[__import__('os').system('touch OWNED')]", "variant: __import__('os').system('touch OWNED')", "print", "before", "_taken", "x.y", "globals"]
VALUES = ['"; __import__("os").system("touch OWNED") #', "'''\"\"\"\\", "{variant} {pm[run_uuid]} {0.__class__}", "$(touch OWNED)", "`touch OWNED`", "x\\\"; y", "%system touch OWNED", "\N{GREEK SMALL LETTER PI} \N{CJK UNIFIED IDEOGRAPH-8179}"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("job", JOBS)
def test_F24_no_job_runs_a_name(root, tmp_path, monkeypatch, job, name):
    monkeypatch.chdir(tmp_path)
    error = begin(root / "nbs" / f"{job}.ipynb", {name: 5})
    assert isinstance(error, CTDiffusionError) and "papermill pastes as code; nothing of it was run" in str(error)
    assert not list(tmp_path.iterdir())


def test_F24_through_papermill(root, tmp_path):
    "The command itself: the cell is not run, and the exit code is 1."
    done = papermill(tmp_path, root / "nbs" / "evaluate.ipynb", "-p", NAMES[0], "5", "-r", "data_root", VALUES[0])
    assert done.returncode == 1 and "CTDiffusionError" in done.stderr and "papermill pastes as code" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_F24_the_launcher_starts_nothing(root, tmp_path, monkeypatch, name):
    "Neither here nor in the lines for a cluster; a notebook without its tag is refused as well."
    def never(*args, **options): raise AssertionError("a process was started")
    monkeypatch.setattr(launch.subprocess, "Popen", never)
    job = ReproduceJob(root=str(tmp_path / "root"), variants="mask", device="cpu")
    first, *rest = plan(job)
    tasks = [replace(first, parameters=first.parameters | {name: 5}), *rest]
    for start in (lambda: launch.run_tasks(tasks, 1, lambda line: None, root / "nbs"), lambda: launch.write_matrix(tasks, job, root / "nbs")):
        with refused(root / "nbs" / "prepare.ipynb", repr(name), "nothing was started"): start()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [*VALUES, "a\nb", "a\r\n; touch OWNED", "nul\0", "\x1b[2J", "\ud800"])
def test_F24_values_stay_text(root, tmp_path, monkeypatch, value):
    "Quotes and braces arrive as they are; a line end or another control character arrives as text as well, and as text it is refused."
    monkeypatch.chdir(tmp_path)
    found = begin(root / "nbs" / "train.ipynb", dict(init=value, run_dir="runs/" + value))
    if value in VALUES: assert found.init == value and found.folder() == Path("runs/" + value)
    else: assert isinstance(found, CTDiffusionError) and "not text without control characters" in str(found) and str(found).isprintable() and str(found).encode()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job, name", [(TrainJob, "run_dir"), (TrainJob, "store"), (EvaluateJob, "run_dir"), (EvaluateJob, "shared"), (ReproduceJob, "root")])
def test_F24_folders_stay_below_the_working_folder(job, name):
    for outside in ("..", "../x", "./../x", "a/../../x", "runs//../../x/.."):
        with refused("parameters", f"{name}={outside!r}", "absolute path"): check_parameters({name: outside}, job)
    for inside in ("runs/x", "a/../b", "..x/y", "/data/../runs", "runs/{variant}"): assert getattr(check_parameters({name: inside}, job), name) == inside


def test_F24_braces_in_a_path_are_no_template(tmp_path):
    "papermill fills in `{variant}` where it finds it in the name of a file; run here, and in a line for a cluster."
    nbs, root, made = tmp_path / "nbs {variant}", tmp_path / "{variant}", tmp_path / "{variant}" / "made"
    nbs.mkdir(); root.mkdir()
    code = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[code('variant: str = ""\nrun_dir: str = ""', metadata=dict(tags=["parameters"])), code("from pathlib import Path\nPath(run_dir, 'made').write_text(variant)")],
                                  metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nbformat.write(nb, nbs / "evaluate.ipynb")
    task = Task("evaluate-x-s0", "evaluate.ipynb", root / "jobs", dict(variant=VALUES[0] + VALUES[2], run_dir=str(root)), (made,))
    lines = launch.write_matrix([task], ReproduceJob(root=str(root)), nbs)[2].read_text().split("\t")
    assert [x.format(**task.parameters) for x in lines[2:4]] == [str(nbs / "evaluate.ipynb"), str(root / "jobs" / "evaluate-x-s0.ipynb")]
    assert launch.run_tasks([task], 1, lambda line: None, nbs) == {"evaluate-x-s0": "done"} and made.read_text() == VALUES[0] + VALUES[2]
    assert {p.name for p in tmp_path.iterdir()} == {nbs.name, root.name} and (root / "jobs" / "evaluate-x-s0.ipynb").exists()


def test_F24_a_line_of_the_matrix_is_one_line(root, tmp_path):
    for name in ("a\tb", "a\nb", "a\rb"):
        job = ReproduceJob(root=str(tmp_path / name), variants="mask", device="cpu")
        with refused("prepare", "no tabs or line ends"): launch.write_matrix(plan(job), job, root / "nbs")


# ------------------------------------------------------------------------------------- F21, F23, F24: anything at all

WORDS = st.sampled_from(["", "..", "a/../../b", "None", "nan", "1e999", "0007", "1_000", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT ONE}", "5,,5", "1" * 5000, "cuda:", "\0", "'; import os #", "x" * 3000, "x" * 5000])
LEAVES = st.none() | st.booleans() | st.integers() | st.sampled_from([18, 63, 400, 5000]).map(lambda n: 10**n) | st.floats() | st.text(st.characters(), max_size=12) | st.binary(max_size=6) | WORDS
ANYTHING = st.one_of(LEAVES, LEAVES, st.lists(LEAVES, max_size=2), st.dictionaries(st.text(max_size=2), st.lists(LEAVES, max_size=2), max_size=2))
SAMPLERS = ["ddim50", "250", "sde12", "dpm15-time", "10,15,25", "ancestral", "1000", "dpm1000", "ddim999999999999", "999999", "2," * 500 + "2"]
CHOICES = dict(variant=list(VARIANTS), preset=list(PRESETS), judge=JUDGES, judge_mode=list(MODES), where=WHERE, device=["cpu", "auto", "cuda:1", "cuda:x"], budget=["quick", "full"], variants=["mask", "edge, oasis", ",,"], sampler=SAMPLERS)
SANE = dict(str=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12), int=st.integers(0, 20) | st.integers(0, 10**13), float=st.floats(0, 1e13), bool=st.booleans())


@st.composite
def asked(draw):
    "A job, and parameters most of which it has."
    job = draw(st.sampled_from([TrainJob, EvaluateJob, ReproduceJob]))
    some = draw(st.lists(st.sampled_from(fields(job)), max_size=4))
    sane = lambda f: st.sampled_from(CHOICES[f.name]) if f.name in CHOICES else SANE[f.type.__name__]
    given = {f.name: draw(ANYTHING if draw(st.integers(0, 5)) == 0 else sane(f)) for f in some}
    return job, given | ({draw(st.text(st.characters(), max_size=8)): draw(ANYTHING)} if draw(st.integers(0, 5)) == 0 else {})


def anything(passed: list) -> None:
    "Only our own error may come of any of 5,000 inquiries, and its text can be printed."
    @settings(max_examples=5000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(asked())
    @example((TrainJob, {"\ud800": 1}))
    def try_them(inquiry):
        job, parameters = inquiry
        try:
            made = check_parameters(parameters, job)
            passed.append(job)
            for v in parameters.values(): assert v is None or isinstance(v, (str, int, float))
            for v in vars(made).values(): assert v.encode() is not None if isinstance(v, str) else -1e18 < v < 1e18
            if job is TrainJob: made.config(), made.folder()
            if job is EvaluateJob: made.data(), made.folder("shared")
            if job is ReproduceJob: made.data, made.crew, made.seeds > 2 or plan(made)
        except CTDiffusionError as e: assert str(e).encode() and len(str(e)) < 50_000
    try_them()


def test_F23_whatever_is_given(tmp_path, monkeypatch):
    "In a process of its own with half a gigabyte to spare."
    monkeypatch.chdir(tmp_path)
    def work():
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
        if pages: resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, resource.RLIM_INFINITY))
        passed = []
        anything(passed)
        assert len(passed) > 1000 and set(passed) == {TrainJob, EvaluateJob, ReproduceJob}, len(passed)
    assert ended(forked(work)) == 0
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ F25: what a notebook may hold

def spoilt(root: Path, there: Path, monkeypatch, change) -> None:
    "The rules of the house look at one page of a copy, `change`d."
    (there / "nbs").mkdir(exist_ok=True)
    page = shutil.copy(root / "nbs" / "35_parameters.ipynb", there / "nbs" / f"{len(list((there / 'nbs').iterdir())):02}_page.ipynb")
    nb = json.loads(page.read_text(encoding="utf-8"))
    change(nb, next(c for c in nb["cells"] if c.get("outputs")))
    page.write_text(json.dumps(nb), encoding="utf-8")
    monkeypatch.setattr(house, "ROOT", there)
    monkeypatch.setattr(house, "NOTEBOOKS", [page]); monkeypatch.setattr(house, "PAGES", [page])
    house.test_outputs_are_for_readers()


def shows(kind: str, text: str):
    "An output of this kind."
    return lambda nb, cell: cell["outputs"].append(dict(output_type="display_data", metadata={}, data={kind: [text]}))


FOREIGN = {"a script": shows("text/html", "<b>fine</b><ScRiPt src=//x></script>"), "a script ": shows("text/html", "<img src=x onerror='alert(1)'>"), "a script  ": shows("image/svg+xml", "<svg onload=\"x()\"/>"),
           "a script   ": shows("application/javascript", "alert(1)"), "a script    ": shows("text/html", "<a href='javascript:x'>"), "a widget": shows("application/vnd.jupyter.widget-view+json", "{}"),
           "widget state": lambda nb, cell: nb["metadata"].update(widgets={"application/vnd.jupyter.widget-state+json": {}}),
           "an error": lambda nb, cell: cell["outputs"].append(dict(output_type="error", ename="E", evalue="", traceback=[])), "stderr": lambda nb, cell: cell["outputs"].append(dict(output_type="stream", name="stderr", text="x"))}


@pytest.mark.parametrize("what", FOREIGN)
def test_F25_foreign_outputs_are_seen(root, tmp_path, monkeypatch, what):
    spoilt(root, tmp_path, monkeypatch, lambda nb, cell: None)
    with pytest.raises(pytest.fail.Exception, match=what.strip()): spoilt(root, tmp_path, monkeypatch, FOREIGN[what])


def test_F25_a_module_edited_by_hand_is_seen(root, copy, tmp_path, monkeypatch):  # noqa: F811
    "One character more, one module too many, one lost; a notebook in which a cell was left dirty."
    house.test_export_in_sync(copy)
    package = tmp_path / "ctdiffusion"
    shutil.copytree(root / "ctdiffusion", package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    monkeypatch.setattr(house, "PACKAGE", package)
    module = package / "training" / "parameters.py"
    text = module.read_text()
    for change, said in ((lambda: module.write_text(text + "\n"), "training/parameters.py: differs from its notebook"), (lambda: module.with_name("extra.py").touch(), "training/extra.py: no notebook makes it"),
                         (module.unlink, "training/parameters.py: missing")):
        change()
        with pytest.raises(pytest.fail.Exception, match=said): house.test_export_in_sync(copy)
        module.with_name("extra.py").unlink(missing_ok=True); module.write_text(text)
    house.test_export_in_sync(copy)


def test_F25_a_notebook_that_was_not_cleaned_is_seen(root, copy, tmp_path, monkeypatch):  # noqa: F811
    dirty = tmp_path / "train.ipynb"
    dirty.write_text((root / "nbs" / "train.ipynb").read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    monkeypatch.setattr(house, "ROOT", tmp_path); monkeypatch.setattr(house, "NOTEBOOKS", [dirty])
    with pytest.raises(pytest.fail.Exception, match="train.ipynb: not clean"): house.test_notebooks_clean(copy)
