"""Fair timing on a machine that others use, too: interleaved calls, quiet ones only, a matrix product beside each.

A benchmark hands its competitors to `interleave` and what comes back to `report`:

    rows = interleave({"ours": ours, "theirs": theirs})
    report("one network step", rows, "nbs/results/bench-network.json", batch=8)
"""
import argparse, importlib, json, os, platform, resource, time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ctdiffusion.data.labels import atomic_write
from ctdiffusion.training.folder import environment


def processor() -> str:
    "The name of the CPU, where the system tells it."
    path = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0] if names else platform.processor()


def busy() -> float | None:
    "CPU seconds that the whole machine has worked (or was kept from working by a hypervisor) since it was started; None where nobody counts."
    try: ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError): return None
    user, nice, system, idle, waiting, irq, soft, stolen = (*ticks, *[0] * 8)[:8]
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK") if idle else None


def spent() -> float:
    "CPU seconds of this process, all its threads, and of its children that have ended."
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def rate(reference: Callable[[], float] | None, own: Callable[[], float]) -> tuple[float, float] | tuple[None, None]:
    "What `reference` says, by the clock and by CPU seconds."
    if not reference: return None, None
    start, mine = time.perf_counter(), own()
    by_clock = reference()
    wall, mine = time.perf_counter() - start, own() - mine
    return by_clock, by_clock * wall / mine if mine else by_clock


_SQUARE: list[torch.Tensor] = []

def matmul(n: int = 2048) -> float:
    "GFLOP/s of one float32 matrix product, n x n: what the machine gives at this moment."
    if not _SQUARE or len(_SQUARE[0]) != n: _SQUARE[:] = torch.rand(n, n), torch.rand(n, n), torch.zeros(n, n)
    a, b, c = _SQUARE
    start = time.perf_counter()
    torch.mm(a, b, out=c)
    return 2 * n ** 3 / (time.perf_counter() - start) / 1e9


def measure(
    call: Callable[[], object],
    times: int,  # in a row, so that the machine's clock ticks (10 ms) are fine enough
    sync: Callable[[], object] | None, machine: Callable[[], float | None], own: Callable[[], float],
) -> dict:       # wall and CPU seconds of one call, and others' share of all CPUs meanwhile (None: unknown)
    "One measurement."
    if sync: sync()
    before, mine, start = machine(), own(), time.perf_counter()
    for _ in range(times): call()
    if sync: sync()
    wall, mine, after = time.perf_counter() - start, own() - mine, machine()
    foreign = None if before is None or after is None else max(0.0, after - before - mine) / (wall * (os.cpu_count() or 1))
    return dict(seconds=wall / times, cpu=mine / times, foreign=foreign)


def interleave(
    calls: dict[str, Callable[[], object]],
    repeats: int = 5,         # quiet calls wanted of each
    quiet: float = 0.025,     # largest share of all CPUs that others may use meanwhile
    patience: float = 300,    # seconds for everything, the warm-up apart
    sync: Callable[[], object] | None = None,  # waits for the device
    least: float = 0.5,       # seconds: a shorter call is made several times in a row, and the mean is one measurement
    reference: Callable[[], float] | None = matmul,  # GFLOP/s of something known, measured before and after every call
    machine: Callable[[], float | None] = busy,      # CPU seconds of all processes
    own: Callable[[], float] = spent,                # CPU seconds of the call's processes
) -> dict[str, dict]:
    "Every call once to warm up, then round after round in the same order, until each was quiet `repeats` times or patience is over."
    times = {}
    for name, call in calls.items():
        once = measure(call, 1, sync, machine, own)["seconds"]
        if once < least: once = measure(call, 1, sync, machine, own)["seconds"]  # the first one may have had to fetch and allocate
        times[name] = max(1, round(least / once))
    made, last = {name: [] for name in calls}, rate(reference, own)
    kept = lambda name: [m for m in made[name] if m["foreign"] is None or m["foreign"] <= quiet]
    end = time.perf_counter() + patience
    while (short := [name for name in calls if len(kept(name)) < repeats]) and (time.perf_counter() < end or not made[short[0]]):
        for name in short:
            one, before = measure(calls[name], times[name], sync, machine, own), last
            last = rate(reference, own)
            made[name].append(one | {k: (a + b) / 2 if reference else None for k, a, b in zip(("matmul", "matmul_cpu"), before, last)})
    return {name: _summary(made[name], kept(name), repeats) for name in calls}


def _summary(made: list[dict], kept: list[dict], repeats: int) -> dict:
    "Medians of the quiet calls; where there are too few of them, that the CPU's seconds (medians of all calls) are the ones to read."
    enough, walls = len(kept) >= repeats, kept or made
    middle = lambda key, of: median(m[key] for m in of) if None not in (m[key] for m in of) else None
    wall = [m["seconds"] for m in walls]
    return dict(seconds=median(wall), low=min(wall), high=max(wall), cpu=middle("cpu", kept if enough else made), kept=len(kept), dropped=len(made) - len(kept),
        matmul=middle("matmul", walls), matmul_cpu=middle("matmul_cpu", made), foreign=middle("foreign", walls), read="seconds" if enough else "cpu")


def seconds(row: dict) -> float:
    "The time of a row that is to be read."
    return row[row["read"]]


def share(row: dict, flops: int) -> float | None:
    "The rate of a row's call, as a share of the matrix product's beside it: by the clock, or, where others were busy, by CPU seconds."
    rate = row["matmul" if row["read"] == "seconds" else "matmul_cpu"]
    return flops / seconds(row) / 1e9 / rate if rate else None


# torch's counter does not know the CPU's attention; these take shapes
_KNOWN = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
          torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}

def flops(call: Callable[[], object]) -> int:
    "Floating-point operations of a call (a multiply-add is two), counted while it computes."
    with FlopCounterMode(display=False, custom_mapping=_KNOWN) as counter: call()
    return counter.get_total_flops()


def optional(module: str, package: str | None = None) -> ModuleType | None:
    "A competitor's module, or None and a line that says who is missing."
    try: return importlib.import_module(module)
    except ImportError as e:
        print(f"MISSING: {package or module} ({e}); it is left out. pip install -r bench/requirements.txt")
        return None


def table(rows: dict[str, dict]) -> Iterator[str]:
    "Lines of a table: one row a competitor, its plain values in the order they came."
    keys = list(dict.fromkeys(k for row in rows.values() for k, v in row.items() if not isinstance(v, (dict, list, tuple))))
    say = lambda v: "-" if v is None else f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v)
    cells = [["", *keys], *([name, *(say(row.get(k)) for k in keys)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells: yield "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])


def show(title: str, rows: list[dict] | dict[str, dict]) -> None:
    "A table, and what its figures are worth."
    named = rows if isinstance(rows, dict) else {str(i): row for i, row in enumerate(rows)}
    print(f"\n{title}", *table(named), sep="\n")
    noisy = [n for n, row in named.items() if row.get("read") == "cpu"]
    if noisy: print(f"NOT QUIET ({'all rows' if len(noisy) == len(named) else ', '.join(map(str, noisy))}): others used the CPUs during too many calls. The ratios here are of CPU seconds (they hold with --threads 1); repeat when it is quiet.")
    if any(row.get("read") and row.get("foreign") is None for row in named.values()): print("Nobody counts what others used here: every call was kept.")


def report(
    name: str,                # of the benchmark
    rows: list[dict] | dict,  # one for each competitor; or several such dicts by their titles
    out: str | None,          # JSON file to write
    **about,                  # whatever else belongs to the result
) -> dict:                    # what was written
    "Print the tables; write them with the processor, threads and environment."
    where = dict(processor=processor(), cpus=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__)
    print(f"\n{where['processor']}, {where['threads']} of {where['cpus']} CPUs, torch {where['torch']}")
    several = isinstance(rows, dict) and all(isinstance(v, dict) for row in rows.values() for v in row.values())
    for title, part in rows.items() if several else [(name, rows)]: show(title, part)
    whole = dict(benchmark=name, **about, rows=rows, **where, environment=environment())
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(out), json.dumps(whole, indent=1) + "\n")
    return whole


def arguments(doc: str, **defaults) -> argparse.ArgumentParser:
    "A parser with what all benchmarks understand; `defaults` change those."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="quiet calls of each competitor")
    parser.add_argument("--quiet", type=float, default=0.025, help="largest share of all CPUs that others may use during a call")
    parser.add_argument("--patience", type=float, default=300, help="seconds after which noisy calls are taken, too")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: torch's choice")
    parser.add_argument("--out", help="JSON file")
    parser.set_defaults(**defaults)
    return parser
