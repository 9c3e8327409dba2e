"What the tests of the fault table share: the rows, and the helpers of the benchmarks."
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "bench")]  # rows.py, forks.py
