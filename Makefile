# make demo   train on drawn patients, then synthesise a held-out volume (minutes, no GPU, no data)
# make test   run every page, then pytest (also where a page failed), and report both
# make lab    start JupyterLab with the pages; as root: make lab LAB=--allow-root
# make faults  run the tests of the fault table, and print the table
# make bench  time the project beside its peers, quiet calls only (see bench/README.md; best on an idle machine)
# Each sets up .venv on the first call and reuses it afterwards.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
JUDGE  := .venv-judge/bin
PAGES  := ^([0-9]|index)
BENCH  := $(filter-out harness forks steps study gpu soak,$(basename $(notdir $(wildcard bench/*.py))))

# OpenMP threads that wait must sleep. By default they spin, and on a machine that others use, too, that costs a multiple
# of the time. The library reads this when it is loaded, so it must be in the environment before Python starts.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lab faults bench judge export clean readme constraints
.DELETE_ON_ERROR:

demo: $(READY)
	mkdir -p runs/demo
	$(BIN)/papermill nbs/train.ipynb runs/demo/train.ipynb -p variant mask
	@printf '\nThe page with everything on it, its pictures, and the volumes (open them in 3D Slicer):\n'
	@ls -1 runs/demo/train.ipynb runs/mask-demo-s0/figures/*.png runs/mask-demo-s0/*.nii.gz

test: $(READY)
	@pages=passed; tests=passed; \
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --file_re '$(PAGES)' --n_workers 2 --do_print || pages='FAILED, their names stand before the tests'; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile || tests=FAILED; \
	printf '\npages: %s\ntests: %s\n' "$$pages" "$$tests"; \
	test "$$pages $$tests" = 'passed passed'

lab: $(READY)      # with the root of the project as its root, so that a page can be read beside everything else
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs $(LAB)

faults: $(READY)
	$(BIN)/python -m pytest --fault-table

bench: $(READY)    # one after the other: nbs/results/bench-*.json
	for b in $(BENCH); do $(BIN)/python bench/$$b.py --out nbs/results/bench-$$b.json || exit 1; done

judge: $(READY) .venv-judge/.ready   # TotalSegmentator, once for real: 2.6 GB and some minutes the first time, no weights
	OMP_NUM_THREADS=1 CTDIFFUSION_JUDGE=$(JUDGE)/python $(BIN)/python -m pytest tests/test_judge.py -k real_package

export: $(READY)   # notebooks -> ctdiffusion/
	$(BIN)/nbdev_export

clean: $(READY)    # strip what a notebook should not carry into a commit
	$(BIN)/nbdev_clean

readme: $(READY)   # nbs/index.ipynb -> README.md
	$(BIN)/python tests/readme.py

constraints: $(READY)   # what is installed now -> constraints.txt
	{ grep '^#' constraints.txt; $(BIN)/pip freeze --all --exclude-editable --exclude pip --exclude wheel | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

$(READY): settings.ini constraints.txt setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("constraints.txt needs Python >= 3.11: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,dev]'
	$(BIN)/python -m ipykernel install --sys-prefix --env OMP_WAIT_POLICY PASSIVE   # for kernels that make did not start
	touch $@

.venv-judge/.ready: Makefile   # an environment of its own: the package is heavy, and wants a torchvision that fits its torch
	$(PYTHON) -m venv .venv-judge
	$(JUDGE)/python -m pip install --quiet $$(grep '^torch==' constraints.txt) TotalSegmentator==2.18.0
	touch $@
