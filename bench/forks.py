"Kill a piece of work at random moments, over and over, without paying for a start of Python each time."
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object], patience: int = 0) -> int:
    "The process number of a child that does `work` and leaves with 0, or with 1 and a traceback; SIGALRM ends it after so many seconds."
    sys.stdout.flush(); sys.stderr.flush()
    if pid := os.fork(): return pid
    code = 1
    try: signal.alarm(patience); work(); code = 0
    except BaseException: traceback.print_exc()
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)


def ended(pid: int) -> int:
    "Exit code of a child; minus the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def life(work: Callable[[], object], patience: int = 60) -> int:
    "Exit code of a child that does `work`."
    return ended(forked(work, patience))


def killed_at_random(work: Callable[[], object], kills: int, longest: float, seed: int = 0, between: Callable[[], object] = lambda: None) -> int:
    """SIGKILL children that do `work` at random moments up to `longest` seconds until `kills` were hit alive or the work is done, then let it end.

    `between` looks at what is left after each kill. Returns how many were hit; a child that fails on its own raises."""
    rng, hit = random.Random(seed), 0
    while hit < kills:
        pid = forked(work)
        time.sleep(rng.random() * longest)
        os.kill(pid, signal.SIGKILL)  # a child that has ended is a zombie until we wait for it: the signal does nothing
        if (code := ended(pid)) not in (0, -signal.SIGKILL): raise RuntimeError(f"the work failed by itself, exit code {code}")
        if code == 0: return hit
        hit += 1; between()
    if code := ended(forked(work)): raise RuntimeError(f"the work failed after {hit} kills, exit code {code}")
    return hit
