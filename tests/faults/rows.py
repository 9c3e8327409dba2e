"The rows of the fault table, and what every refusal must have: the path at fault, what was found and expected, and what to do."
import csv
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from ctdiffusion.data.labels import CTDiffusionError

ROWS = {r["row"]: r for r in csv.DictReader((Path(__file__).parent / "rows.csv").open(encoding="utf-8"))}


def row_of(name: str) -> str | None:
    "test_F07_shapes_differ[x] -> F07."
    return m[1] if (m := re.match(r"test_(F\d\d)_", name)) else None


@contextmanager
def refused(path: object, *words: str):
    "The block raises the project's own error, which names `path`, says what to do, and contains `words`."
    with pytest.raises(CTDiffusionError) as e: yield e
    error, text = e.value, str(e.value)
    assert str(path) in text, text
    assert error.found and error.expected and error.do, text
    for w in words: assert w in text, f"{w!r} is not in: {text}"
