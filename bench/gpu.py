"""A graphics card at the paper's size: training, sampling, one slice; beside diffusers, and against what the card can do.

    python bench/gpu.py --out nbs/results/bench-gpu.json   # rows G1 to G5; under ten minutes on an H100, most of them compiling
    python bench/gpu.py --tiny --device cpu                # the same program in a minute, to see that it runs; no figure of it means anything

G1  one training step (batch 16, 256 x 256, the conditional network of the preset `paper`) against diffusers' UNet2DModel with as many parameters
    and operations, bfloat16 autocast, AdamW, clipping, EMAModel, a batch that is already on the card; ours eager and compiled, data included.
G2  operations (counted forwards, times 3) per second, as a share of a bfloat16 matrix product (8192) that is timed around every call.
G3  the same for one evaluation while sampling, batch 64, times 1; and whole volumes of 130 slices, from which 6,559 slices are extrapolated.
G4  one slice with the default sampler, eager and as a CUDA graph.
G5  how long slices and noise take to be there, on their own and waited for, as a share of a step: an upper bound, for in training nobody waits.
Checks: bfloat16 learns as float32 does (2 %), compiled, recorded and eager give the same (1e-2), and so do kept and repeated encodings of the mask.
Bytes are counted, not measured: what every operation reads and writes, if nothing stays in the card's caches. The compiler's are its own estimate.
"""
import gc, time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import arguments, flops, interleave, optional, report
from network import awake
from steps import Slices

from ctdiffusion.data.labels import AMOS
from ctdiffusion.models import gpu
from ctdiffusion.models.unet import n_params
from ctdiffusion.models.variants import ModelConfig, TrainConfig, build, preset
from ctdiffusion.synthesis.synthesis import Model, synthesize_slices
from ctdiffusion.training import step as step_module
from ctdiffusion.training.state import State, begin
from ctdiffusion.training.step import make_slices

TEST_SLICES, VOLUME = 6_559, 130


class Card:
    "The device, and what differs between a graphics card and its stand-in."
    def __init__(self, name: str, tiny: bool):
        self.device, self.tiny = torch.device(name), tiny
        self.cuda = self.device.type == "cuda"
        self.backend = "inductor" if self.cuda else "eager"
        n = 256 if tiny else 8192
        self.square = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        if self.cuda: torch._logging.set_logs(inductor_metrics=True)  # or the compiler counts no bytes
        if not self.cuda:  # the card's way, without the card
            gpu.bfloat16 = step_module.bfloat16 = lambda device: torch.autocast("cpu", torch.bfloat16)
            gpu.Recorded, gpu.Compiled = partial(gpu.Recorded, record=played), partial(gpu.Compiled, backend="eager")

    def sync(self) -> None:
        if self.cuda: torch.cuda.synchronize()

    def matmul(self) -> float:
        "GFLOP/s of a bfloat16 matrix product; the mean of ten."
        a = self.square
        torch.mm(a, a); self.sync()
        start = time.perf_counter()
        for _ in range(10): torch.mm(a, a)
        self.sync()
        return 20 * len(a) ** 3 / (time.perf_counter() - start) / 1e9

    def copy(self) -> float:
        "Bytes per second, read and written, of a copy."
        x = torch.zeros(2 ** 20 if self.tiny else 2 ** 31, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        y.copy_(x); self.sync()
        start = time.perf_counter()
        for _ in range(10): y.copy_(x)
        self.sync()
        return 20 * len(x) / (time.perf_counter() - start)

    def peak(self, call: Callable[[], object]) -> dict:
        "How long the very first call takes, and what a second one holds at most, GB above what was there before it."
        start = time.perf_counter()
        call(); self.sync()
        first = time.perf_counter() - start
        if not self.cuda: return dict(first_s=first, above_gb=None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(); self.sync()
        return dict(first_s=first, above_gb=(torch.cuda.max_memory_allocated() - before) / 1e9)

    def compare(self, calls: dict[str, Callable[[], object]], a) -> dict[str, dict]:
        "Seconds of each, a matrix product around every call."
        return interleave(calls, a.repeats, 1.0 if self.cuda else a.quiet, a.patience, self.sync, 0 if self.tiny else 0.5, self.matmul)


def played(f: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    "A recording where there is no card: computed again, into the same memory."
    out = f()
    return lambda: out.copy_(f()), out


class Bytes(TorchDispatchMode):
    "Bytes that pass through memory if every operation reads its inputs and writes its outputs; views move nothing."
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = lambda tree: [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
        read, own = tensors((args, kwargs)), {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        changed = [x for arg, value in zip(func._schema.arguments, args) if arg.alias_info and arg.alias_info.is_write for x in tensors(value)]
        made = changed if func._schema.is_mutable else tensors(out)
        view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in own for x in made)
        if not view: self.total += sum(x.nbytes for x in (*read, *made))
        return out


def counted(call: Callable[[], object]) -> float:
    "GB of a call."
    with Bytes() as mode: call()
    return mode.total / 1e9


def release() -> None:
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------- one training step

def peer_net(m: ModelConfig) -> nn.Module | None:
    "diffusers' network with the same widths, depth and attention as ours."
    if not (d := optional("diffusers")): return None
    attends = [m.size >> l in m.attention for l in range(len(m.mult))]
    downs = ["AttnDownBlock2D" if x else "DownBlock2D" for x in attends]
    return d.UNet2DModel(m.size, 1 + (1 if m.encoding == "scalar" else m.classes), 2, block_out_channels=tuple(m.channels * x for x in m.mult), layers_per_block=m.blocks, down_block_types=downs,
        up_block_types=[x.replace("Down", "Up") for x in reversed(downs)], attention_head_dim=m.channels * m.mult[-1] // m.heads, norm_num_groups=m.groups, resnet_time_scale_shift="default")


def peer_step(net: nn.Module, m: ModelConfig, batch: int, card: Card) -> Callable[[], None]:
    "A step of diffusers' unconditional training example, the label map beside the slice; its batch is on the card from the start."
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel
    net, walk = net.to(card.device).train(), DDPMScheduler(1000)
    adam, ema = torch.optim.AdamW(net.parameters(), 1e-4), EMAModel(net.parameters(), 0.9999)
    x0 = torch.rand(batch, 1, m.size, m.size, device=card.device) * 2 - 1
    maps = torch.zeros(batch, net.config.in_channels - 1, m.size, m.size, device=card.device)
    def run() -> None:
        noise, t = torch.randn_like(x0), torch.randint(1000, (batch,), device=card.device)
        with gpu.bfloat16(card.device): out = net(torch.cat([walk.add_noise(x0, noise, t), maps], 1), t).sample
        F.mse_loss(out[:, :1].float(), noise).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step(); adam.zero_grad(); ema.step(net.parameters())
    return run


def operations(m: ModelConfig, net: Callable[[], nn.Module]) -> tuple[int, int]:
    "Parameters, and operations of one slice forwards, counted on the meta device."
    with torch.device("meta"), torch.no_grad():
        n = net()
        x, t = torch.zeros(1, 1, m.size, m.size), torch.zeros(1)
        ours = hasattr(n, "encode")
        cond = n.encode(torch.zeros(1, m.size, m.size, dtype=torch.long)) if ours else torch.zeros(1, n.config.in_channels - 1, m.size, m.size)
        return n_params(n), flops(lambda: n(x, t, cond) if ours else n(torch.cat([x, cond], 1), t))


def training(m: ModelConfig, train: TrainConfig, card: Card, a) -> tuple[dict, dict]:
    "G1, G2 and G5."
    store, about, calls = Slices(8 * train.batch, m.size), {}, {}
    make = lambda how: begin(m, train, store, device=str(card.device), keep=True, compile=how)
    states = {"ours, eager": make("off"), "ours, compiled": make(card.backend)}
    for name, state in states.items(): calls[name] = state.train_step
    params, work = operations(m, lambda: build(m))
    if net := peer_net(m):
        theirs, gflop = operations(m, lambda: peer_net(m))
        assert abs(theirs / params - 1) < 0.02 and abs(gflop / work - 1) < 0.02, f"diffusers has {theirs:,} parameters and {gflop:,} operations, ours {params:,} and {work:,}"
        calls["diffusers, bfloat16 autocast"] = peer_step(net, m, train.batch, card)
    for name, call in calls.items():
        about[name] = dict(params=params, tflop=3 * work * train.batch / 1e12) | card.peak(call)
        if "compiled" not in name: about[name]["counted_gb"] = counted(call)
    about["ours, compiled"]["counted_gb"] = compiler_gb() if card.cuda else None
    if why := getattr(states["ours, compiled"].denoise, "why", ""): print(f"NOT COMPILED: {why}")
    rows = {k: about[k] | dict(mfu=about[k]["tflop"] * 1e3 / row["seconds"] / row["matmul"]) | row for k, row in card.compare(calls, a).items()}
    for state in states.values(): assert state.losses().isfinite().all()
    ours = states["ours, eager"]
    data = lambda: (ours.slices(), ours.gaussian(train.batch, 1, m.size, m.size))
    fetching = card.compare({"slices and noise": data}, a)
    return rows, fetching


def compiler_gb() -> float | None:
    "What inductor believes that its code reads and writes, all graphs of this process; None where it does not say, as when the code was compiled earlier and lay in its cache."
    from torch._inductor import metrics
    return getattr(metrics, "num_bytes_accessed", 0) / 1e9 or None


# ------------------------------------------------------------------------------------------------------------ sampling

def network(m: ModelConfig, card: Card, mode: str | None = None, weights: dict[str, Tensor] | None = None) -> nn.Module:
    "A network with these or with random weights; `mode` as in `load`, None for float32 as it is."
    torch.manual_seed(0)
    net = awake(build(m)).eval().requires_grad_(False).to(card.device)
    if weights: net.load_state_dict(weights)
    return gpu.Swift(net, mode) if mode else net


def masks_of(m: ModelConfig, n: int) -> np.ndarray: return Slices(n, m.size).labels


@torch.no_grad()
def evaluating(m: ModelConfig, batch: int, card: Card, a) -> dict:
    "G3: one evaluation of many slices."
    x, t = torch.randn(batch, 1, m.size, m.size, device=card.device), torch.full((batch,), 500, device=card.device)
    ids, (params, work), calls, about = torch.from_numpy(masks_of(m, batch)).long().to(card.device), operations(m, lambda: build(m)), {}, {}
    for mode in ("eager", "compile"):
        net = network(m, card, mode)
        calls[mode] = lambda net=net, cond=net.encode(ids): net(x, t, cond)
        about[mode] = dict(params=params, tflop=work * batch / 1e12) | card.peak(calls[mode])
        if why := getattr(net.step, "why", ""): print(f"NOT COMPILED: {why}")
    about["eager"]["counted_gb"] = counted(calls["eager"])
    with torch.no_grad(): rows = card.compare(calls, a)
    return {k: about[k] | dict(mfu=about[k]["tflop"] * 1e3 / row["seconds"] / row["matmul"]) | row for k, row in rows.items()}


def volumes(m: ModelConfig, sampler: str, slices: int, batch: int, card: Card) -> dict:
    "G3: whole volumes by `synthesize_slices`, the second one timed."
    rows = {}
    for mode in ("eager", "compile"):
        model = Model(network(m, card, mode), m, AMOS, 40, 400, sampler, "bench", "")
        synthesize_slices(model, masks_of(m, batch), batch=batch)
        start = time.perf_counter()
        synthesize_slices(model, masks_of(m, slices), batch=batch)
        seconds = time.perf_counter() - start
        rows[mode] = dict(slices=slices, seconds=seconds, slice_s=seconds / slices, volume_s=seconds / slices * VOLUME, test_set_min=seconds / slices * TEST_SLICES / 60)
        del model; release()
    return rows


@torch.no_grad()
def one_slice(m: ModelConfig, sampler: str, card: Card, a) -> dict:
    "G4: from a mask to its slice."
    ids, calls, about = torch.from_numpy(masks_of(m, 1)).long().to(card.device), {}, {}
    for mode in ("eager", "graph"):
        net, draw = network(m, card, mode), torch.Generator().manual_seed(0)
        noise = lambda k: gpu.upload(torch.randn(1, 1, m.size, m.size, generator=draw), card.device)
        calls[mode] = lambda net=net, noise=noise: make_slices(net, m, net.encode(ids), noise, sampler)
        about[mode] = card.peak(calls[mode])
    return {k: about[k] | row for k, row in card.compare(calls, a).items()}


# -------------------------------------------------------------------------------------------------------------- checks

def losses(m: ModelConfig, train: TrainConfig, store: Slices, card: Card, steps: int, half: bool) -> tuple[Tensor, dict[str, Tensor]]:
    "The loss of every step, on the same slices, noise and times, and the weights after them."
    kept = step_module.bfloat16
    if not half: step_module.bfloat16 = lambda device: nullcontext()
    try:
        state: State = begin(m, train, store, device=str(card.device), compile="off")
        for _ in range(steps): state.train_step()
        return state.losses()[:, 0].double(), {k: v.clone() for k, v in state.net.state_dict().items()}
    finally: step_module.bfloat16 = kept


class Anew:
    "A network that remembers nothing of the mask from one step to the next."
    def __init__(self, net: nn.Module): self.net = net
    def __call__(self, xt: Tensor, t: Tensor, mask: Tensor) -> Tensor: return self.net(xt, t, self.net.encode(mask))


@torch.no_grad()
def same(m: ModelConfig, weights: dict[str, Tensor], card: Card, sampler: str) -> dict[str, float]:
    "Relative differences that should be rounding: of one evaluation with trained weights, and of a slice of the mask-guided network in float32."
    ids, x, t = torch.from_numpy(masks_of(m, 2)).long().to(card.device), torch.randn(2, 1, m.size, m.size, device=card.device), torch.tensor([100, 900], device=card.device)
    answers = {mode: (net := network(m, card, mode, weights))(x, t, net.encode(ids)) for mode in gpu.MODES}
    far = lambda a, b: ((a - b).norm() / b.norm()).item()
    guided = network(g := replace(m, variant="mask"), card)
    noise = lambda k: torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).to(card.device)
    kept, anew = make_slices(guided, g, guided.encode(ids), noise, sampler), make_slices(Anew(guided), g, ids, noise, sampler)
    return dict(compiled=far(answers["compile"], answers["eager"]), recorded=far(answers["graph"], answers["eager"]), cached=far(kept, anew))


def checks(m: ModelConfig, train: TrainConfig, card: Card, steps: int) -> dict:
    "All that must be equal, with the largest difference allowed."
    store, last = Slices(4 * train.batch, m.size), max(1, steps // 5)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    (half, weights), (full, _) = (losses(m, train, store, card, steps, h) for h in (True, False))
    found = dict(bfloat16=abs(half[-last:].mean() / full[-last:].mean() - 1).item(), learned=(full[-last:].mean() / full[0]).item()) | same(m, weights, card, "ddim5")
    allowed = dict(bfloat16=0.02, learned=1.0, compiled=1e-2, recorded=1e-2, cached=1e-4)
    rows = {k: dict(found=v, allowed=allowed[k], holds=bool(v <= allowed[k])) for k, v in found.items()}
    rows["bfloat16"]["curve"] = [[round(x, 5) for x in c.tolist()] for c in (half, full)]
    return rows


# --------------------------------------------------------------------------------------------------------------- goals

def goals(parts: dict, card: Card) -> dict[str, dict]:
    "The rows of the table of goals; on a processor none of them is measured."
    train, volume, one = parts["training step (G1, G2)"], parts["volumes (G3)"], parts["one slice (G4)"]
    best = lambda rows, key, f=min: f(r[key] for r in rows.values())
    ours = {k: r for k, r in train.items() if k.startswith("ours")}
    peer = train.get("diffusers, bfloat16 autocast")
    quickest = best(ours, "seconds")
    rows = {
        "G1 diffusers / ours, training step": (peer["seconds"] / quickest if peer else None, ">= 1.3, stretch 2"),
        "G2 MFU of a training step": (best(ours, "mfu", max), ">= 0.40, stretch 0.50"),
        "G3 MFU of an evaluation": (best(parts["evaluation (G3)"], "mfu", max), ">= 0.40"),
        "G3 6,559 slices, minutes": (best(volume, "test_set_min"), "<= 4"),
        "G4 one slice as a CUDA graph, ms": (one["graph"]["seconds"] * 1e3, "<= 60"),
        "G4 eager / CUDA graph": (one["eager"]["seconds"] / one["graph"]["seconds"], ">= 2"),
        "G5 data, share of a step": (parts["data (G5)"]["slices and noise"]["seconds"] / quickest, "< 0.01"),
    }
    return {k: dict(measured=v if card.cuda and v is not None else "not measured", goal=goal) for k, (v, goal) in rows.items()}


def main() -> None:
    parser = arguments(__doc__, repeats=5, patience=60)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--batch", type=int, default=16, help="slices of a training step")
    parser.add_argument("--sample-batch", type=int, default=64, help="slices of an evaluation; volumes take 65")
    parser.add_argument("--sampler", default=TrainConfig().sampler, help="of volumes and of the one slice; %(default)s, as everywhere")
    parser.add_argument("--check-steps", type=int, default=100, help="of bfloat16 against float32, batch 4")
    parser.add_argument("--tiny", action="store_true", help="a small network, few steps: only to see that everything runs")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available(): return print("No CUDA device: not measured. `--tiny --device cpu` tries the program.")
    if a.threads: torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    m, size = preset("conditional", a.preset).model, dict(slices=VOLUME, batch=65)
    if a.tiny:
        m, size = replace(m, size=16, channels=8, mult=(1, 2), blocks=1, attention=(8,), groups=4), dict(slices=4, batch=2)
        a.batch, a.sample_batch, a.repeats, a.sampler, a.check_steps, a.patience = 2, 3, 1, "sde4", 4, 5
    card, train = Card(a.device, a.tiny), TrainConfig(batch=a.batch, grad_clip=1.0)
    parts = {"card": {"bfloat16 matrix product, TFLOP/s": dict(value=max(card.matmul() for _ in range(3)) / 1e3), "copy, TB/s": dict(value=max(card.copy() for _ in range(3)) / 1e12)}}
    parts["training step (G1, G2)"], parts["data (G5)"] = training(m, train, card, a); release()
    parts["evaluation (G3)"] = evaluating(m, a.sample_batch, card, a); release()
    parts["volumes (G3)"] = volumes(m, a.sampler, size["slices"], size["batch"], card); release()
    parts["one slice (G4)"] = one_slice(m, a.sampler, card, a); release()
    parts["checks"] = checks(m, replace(train, batch=min(4, a.batch)), card, a.check_steps)
    parts["goals"] = goals(parts, card)
    name = torch.cuda.get_device_name() if card.cuda else "no card: a processor stands in, none of this is a measurement"
    report("gpu", parts, a.out, card=name, preset=a.preset, tiny=a.tiny, sampler=a.sampler, compiled_by=card.backend, size=m.size, batch=a.batch, sample_batch=a.sample_batch)
    failed = [k for k, row in parts["checks"].items() if not row["holds"]]
    if failed and not a.tiny: raise SystemExit(f"These checks failed: {', '.join(failed)}")


if __name__ == "__main__": main()
