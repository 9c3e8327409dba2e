"""A whole sampling job per slice, and what remembering the mask is worth: ours beside itself as it was, and beside diffusers.

    python bench/sampling.py --out nbs/results/bench-sampling.json     # rows P1, P1c and P3
    python bench/sampling.py --size 32 --batch 2 --repeats 1 --patience 20 --no-paper

P1   `synthesize_slices` with the default sampler, against the same network that takes all 1000 ancestral steps and computes everything anew
     at every step. Of those 1000 steps each measurement makes a few (10 of the large networks, 50 of the small ones); its time is scaled to 1000
     (all steps cost the same), so that five measurements have seen at least 50.
P1c  the same against diffusers' UNet2DModel and DDIMScheduler with 50 steps, equal parameters and operations; its steps are scaled in the same way.
P3   one evaluation with everything that depends on the mask alone kept, against one that encodes the mask again, and one that
     keeps the encoder's output only (SDM has no encoder of masks: its channels); at 64 x 64, and for the mask-guided network of the preset `paper`. All three must answer the same: to 1e-5 in float32 and to 1e-6 in float64, or the script fails.

The embedded models answer for the small size; networks with random weights for 6.48 M parameters at 64 x 64 (`network.py`): time does not depend on weights.
"""
import argparse, copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from harness import arguments, flops, interleave, report, seconds
from network import Task, awake, config, diffusers_net

from ctdiffusion.data.labels import AMOS
from ctdiffusion.models.cache import Half, remember
from ctdiffusion.models.unet import n_params
from ctdiffusion.models.variants import SIZES, ModelConfig, build, preset
from ctdiffusion.synthesis.synthesis import Model, load, slice_noise, synthesize_slices
from ctdiffusion.training.step import make_slices

TRAINED = 1000  # steps of the schedule


class Anew:
    "A network that remembers nothing of the mask from one step to the next, or its encoder's output only."
    def __init__(self, net: nn.Module, every_step: bool): self.net, self.every_step = net, every_step
    def encode(self, mask: Tensor): return mask if self.every_step else self.net.encode(mask)
    def __call__(self, xt: Tensor, t: Tensor, cond) -> Tensor: return self.net(xt, t, self.net.encode(cond) if self.every_step else cond)


class Enough(Exception):
    "As many steps as were to be measured."


def some_steps(net, model: Model, masks: np.ndarray, steps: int) -> Callable[[], None]:
    "The first `steps` of the 1000 ancestral steps, made as `synthesize_slices` makes them."
    def job() -> None:
        left = iter(range(steps - 1))
        def count(_: dict) -> None:
            if next(left, None) is None: raise Enough
        noise = slice_noise(0, "bench", range(len(masks)), model.config.size)
        try: make_slices(net, model.config, net.encode(torch.from_numpy(masks).long()), noise, "ancestral", count)
        except Enough: return
        raise AssertionError(f"a walk of fewer than {steps} steps")
    return torch.no_grad()(job)


def evaluations(model: Model, masks: np.ndarray, sampler: str) -> int:
    "How often a sampler asks the network."
    asked = []
    synthesize_slices(model, masks[:1], sampler=sampler, callback=asked.append)
    return len(asked)


def ddim50(task: Task, steps: int) -> tuple[nn.Module, Callable[[], None]] | None:
    "The first `steps` of 50 DDIM steps, as in diffusers' pipelines."
    if not (net := diffusers_net(task.size)): return None
    from diffusers import DDIMScheduler
    net, walk = net.eval(), DDIMScheduler(TRAINED)
    @torch.no_grad()
    def job() -> None:
        walk.set_timesteps(50)
        x = torch.randn(task.eps.shape)
        for t in walk.timesteps[:steps]: x = walk.step(net(torch.cat([x, task.maps], 1), t).sample[:, :1], t, x).prev_sample
    return net, job


def jobs(model: Model, masks: np.ndarray, sampler: str, steps: int, a, peer: Task | None = None) -> dict[str, dict]:
    "P1, and P1c where there is a peer of equal size: seconds per slice."
    ours, once, anew = f"{sampler}, default", f"{TRAINED} ancestral, mask encoded once", f"{TRAINED} ancestral, all anew"
    calls = {ours: lambda: synthesize_slices(model, masks, sampler=sampler, batch=len(masks)), anew: some_steps(Anew(model.net, True), model, masks, steps)}
    scale, params = {ours: 1, anew: TRAINED / steps, once: TRAINED / steps}, dict.fromkeys((ours, anew, once), n_params(model.net))
    if model.net.encoder: calls[once] = some_steps(Anew(model.net, False), model, masks, steps)
    if peer and (found := ddim50(peer, steps)):
        params["diffusers, DDIM-50"], calls["diffusers, DDIM-50"], scale["diffusers, DDIM-50"] = n_params(found[0]), found[1], 50 / steps
    rows = interleave(calls, a.repeats, a.quiet, a.patience)
    per = {k: scale[k] / len(masks) for k in rows}
    measured = {k: steps for k in rows} | {ours: evaluations(model, masks, sampler)}
    return {k: dict(params=params[k], evaluations=round(measured[k] * scale[k]), measured=measured[k], slice=seconds(row) * per[k],
        times_ours=seconds(row) * per[k] / (seconds(rows[ours]) * per[ours])) | row for k, row in rows.items()}


def embedded(name: str) -> tuple[Model, np.ndarray]:
    "An embedded model and a batch of its masks."
    model = load(name, "cpu")
    return model, Task(model.config.size, 16).mask.numpy()


def random_model(c: ModelConfig) -> Model:
    "Random parameters, laid out as `load` does it."
    net = awake(build(c)).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return Model(net, c, AMOS, 40, 400, preset(c.variant).train.sampler, f"{c.variant}, random", "")


def tensors(x, f: Callable[[Tensor], object]):
    "`f` of every tensor within named and other tuples, lists and dicts."
    if isinstance(x, Tensor): return f(x)
    if isinstance(x, dict): return {k: tensors(v, f) for k, v in x.items()}
    if isinstance(x, (tuple, list)): return type(x)(*(tensors(v, f) for v in x)) if hasattr(x, "_fields") else type(x)(tensors(v, f) for v in x)
    return x


def forget(cond):
    "What a step must begin with that remembers nothing: SDM's condition without its maps."
    return cond._replace(maps=(None,) * len(cond.maps)) if hasattr(cond, "maps") else cond


def differ(net: nn.Module, task: Task, dtype: torch.dtype) -> tuple[float, float]:
    "The largest difference between what is answered from memory and what is computed anew, and the largest answer."
    net = copy.deepcopy(net).to(dtype)
    for m in net.modules():  # a mask and a clock come in float32
        if isinstance(m, (nn.Conv2d, nn.Linear)): m.register_forward_pre_hook(lambda _, given: tensors(given, lambda x: x.to(dtype)))
    cond = tensors(net.encode(task.mask.long()), lambda x: x.to(dtype))
    truth, remembered = (n(task.eps.to(dtype), task.t, c) for n, c in ((net, forget(cond)), remember(net, cond)))
    return (remembered - truth).abs().max().item(), truth.abs().max().item()


def kept_bytes(net: nn.Module, cond) -> int:
    "Memory of all tensors of a condition, and of the maps within a network that remembers it."
    sizes = {}
    for x in (cond, [m.map for m in net.modules() if isinstance(m, Half)]): tensors(x, lambda x: sizes.setdefault(x.data_ptr(), x.nbytes))
    return sum(sizes.values())


@torch.no_grad()
def check(name: str, net: nn.Module, task: Task, allowed: dict[torch.dtype, float]) -> float:
    "The largest difference in float32; an error where the answers differ."
    for dtype, most in allowed.items():
        difference, answer = differ(net, task, dtype)
        print(f"{name}, {dtype}: answers up to {answer:.3g}, difference of the cached ones at most {difference:.2g} (allowed {most:g})", flush=True)
        assert answer > 1e-2 and difference <= most, f"{name}: a cached mask changes the answer by {difference:g} in {dtype}"
    return difference


@torch.no_grad()
def memory(name: str, net: nn.Module, difference: float, task: Task, a) -> dict[str, dict]:
    "P3: one evaluation with and without memory."
    mask = task.mask.long()
    cond = net.encode(mask)
    knowing, rest = remember(net, cond)
    calls = {"cached": lambda: knowing(task.eps, task.t, rest), "encoder's output kept": lambda: net(task.eps, task.t, forget(cond)),
             "all anew": lambda: net(task.eps, task.t, net.encode(mask))}
    rows, count = interleave(calls, a.repeats, a.quiet, a.patience), {k: flops(call) / 1e9 / task.batch for k, call in calls.items()}
    held = {"cached": kept_bytes(knowing, rest), "encoder's output kept": kept_bytes(net, forget(cond))}
    return {f"{name}, {k}": dict(times_ours=seconds(row) / seconds(rows["cached"]), gflop=count[k], megabytes=held.get(k, 0) / 1e6 / task.batch, difference=difference) | row for k, row in rows.items()}


def remembering(task: Task, a) -> dict[str, dict]:
    "All designs are checked; mask-guided and SDM are timed, the former also as the paper has it, one slice at a time."
    rows, single = {}, {torch.float32: 1e-5}
    for variant in ("mask", "edge", "conditional", "sdm"):
        name, net = f"{variant}, {task.size} x {task.size}", random_model(config(variant, task.size)).net
        difference = check(name, net, task, {torch.float64: 1e-6} | single)
        if variant in ("mask", "sdm"): rows |= memory(name, net, difference, task, a)
    if a.paper:
        net, one = random_model(preset("mask", "paper").model).net, Task(256, 1)
        rows |= memory("mask, paper", net, check("mask, paper", net, one, single), one, a)
    return rows


@torch.no_grad()
def counted(variant: str, name: str) -> dict:
    "GFLOP of a slice's evaluation at a preset's size, with and without memory; counted on the meta device, nothing is computed."
    with torch.device("meta"):
        net, s = build(preset(variant, name).model), preset(variant, name).model.size
        x, t, mask = torch.zeros(1, 1, s, s), torch.zeros(1), torch.zeros(1, s, s, dtype=torch.long)
        cond = net.encode(mask)
        knowing, rest = remember(net, cond)
        calls = dict(cached=lambda: knowing(x, t, rest), encoder_kept=lambda: net(x, t, forget(cond)), anew=lambda: net(x, t, net.encode(mask)))
        gflop = {k: flops(call) / 1e9 for k, call in calls.items()}
    return gflop | dict(anew_by_cached=gflop["anew"] / gflop["cached"])


def main() -> None:
    parser = arguments(__doc__, patience=100)
    parser.add_argument("--size", type=int, default=64, help="of the networks with random weights")
    parser.add_argument("--batch", type=int, default=8, help="slices at a time, of those")
    parser.add_argument("--steps", type=int, default=10, help="of the 1000 in a measurement, of those")
    parser.add_argument("--sampler", help="default: each model's own")
    parser.add_argument("--paper", action=argparse.BooleanOptionalAction, default=True, help="P3 also for the network of the preset `paper`")
    parser.add_argument("--part", choices=("all", "embedded", "random", "memory"), default="all")
    a = parser.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    task, parts = Task(a.size, a.batch), {}
    if a.part in ("all", "memory"):
        parts["one evaluation, the mask remembered (P3)"] = remembering(task, a)
        parts["operations of one evaluation at the presets' sizes, counted"] = {f"{v}, {p}": counted(v, p) for v in ("mask", "edge", "sdm") for p in SIZES}
    if a.part in ("all", "embedded"):
        for name in ("conditional-demo", "mask-demo"):
            model, masks = embedded(name)
            parts[f"a slice by {name} (P1)"] = jobs(model, masks, a.sampler or model.sampler, 50, a)
    if a.part in ("all", "random"):
        for variant in ("conditional", "mask"):
            model = random_model(config(variant, a.size))
            parts[f"a slice at {a.size} x {a.size}, {variant} (P1{', P1c' * (variant == 'conditional')})"] = jobs(model, task.mask.numpy(), a.sampler or model.sampler, a.steps, a, task if variant == "conditional" else None)
    report("sampling", parts, a.out, size=a.size, batch=a.batch, slice="seconds per slice, scaled from `measured` evaluations to `evaluations`",
        times_ours="seconds of a row divided by those of the first: above 1, the first is faster", megabytes="that a slice's mask keeps in memory")


if __name__ == "__main__": main()
