"Part A of the fault table: data that come in."
import pytest
from rows import refused

from ctdiffusion.data.volumes import read_image


@pytest.mark.guard("ctdiffusion/data/volumes.py", 'if not head: return "an empty file"', 'if not head: return "nothing"')
def test_F05_not_a_volume(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"")
    with refused(path, "an empty file"): read_image(path)
