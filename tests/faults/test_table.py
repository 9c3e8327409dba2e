"The fault table itself: every row has tests, and every test has a row."
import pytest
from rows import ROWS


def test_every_row_has_a_test(request):
    tested = {mark.args[0] for item in request.session.items for mark in item.iter_markers("fault")}
    if len(tested) < 20:
        pytest.skip("needs the whole suite")
    assert tested == set(ROWS)
