"Work in a forked child with a bound on memory, so that a claim of 2 GB kills the child and not the machine."
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from forks import ended, forked

MB = 2**20


def within(more: int, work: Callable[[], object]) -> bool:
    "Did `work` succeed in a child that may take `more` bytes, address space and memory, than it is born with?"
    def limited():
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
        if pages: resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more + 64 * MB,) * 2)  # 64: the arenas of threads
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
        assert grown < more, f"{grown:,} bytes more than at birth"
    return ended(forked(limited)) == 0
