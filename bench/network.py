"""One evaluation of the network while sampling, and one training step: ours beside diffusers, MONAI and denoising-diffusion-pytorch.

    python bench/network.py --out nbs/results/bench-network.json     # rows P2 and P4
    python bench/network.py --size 32 --batch 2 --repeats 1 --patience 20

Everybody gets the same task: 1 noisy channel and 17 of a label map in, 2 channels out, width 64 with multipliers 1, 2, 2,
two residual blocks a level, attention at a quarter of the size, float32, batch 8 at 64 x 64. Ours, diffusers' and MONAI's networks have
the same number of parameters and operations (asserted to 2 %) and, given the same weights, the same answers (asserted to 1e-4); denoising-diffusion-pytorch has a network of its own.
Each is used as its documentation shows: ours by `training.state` (hybrid loss, fused AdamW, averaged weights) and, to sample, in
channels_last as `load` does it; diffusers by DDPMScheduler, AdamW, clipping, EMAModel; MONAI by DiffusionInferer(mode="concat");
denoising-diffusion-pytorch by Adam, clipping and EMA, as its Trainer. Only ours pays for the variational bound.
A 3x3 convolution by itself shows what the processor gives beside the matrix product.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import arguments, flops, interleave, optional, report, seconds, share
from steps import Slices

from ctdiffusion.models.conditioning import one_hot_map
from ctdiffusion.models.unet import n_params
from ctdiffusion.models.variants import ModelConfig, TrainConfig, build
from ctdiffusion.training.state import begin
from ctdiffusion.training.step import fetch

CLASSES, CHANNELS, MULT = 17, 64, (1, 2, 2)
SAME = ("ours", "diffusers", "MONAI")  # of these, the networks are the same
REFERENCE = "a 3x3 convolution, 20 times"  # no competitor


def config(variant: str = "conditional", size: int = 64) -> ModelConfig:
    "The network that all competitors build: 6.48 M parameters."
    return ModelConfig(variant=variant, size=size, classes=CLASSES, encoding="onehot", channels=CHANNELS, mult=MULT, blocks=2, attention=(size // 4,))


def awake(net: nn.Module) -> nn.Module:
    "Weights that begin as zeros get values, as training would give them: a network that answers 0 proves nothing."
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in net.parameters():
            if p.ndim > 1 and not p.any(): nn.init.kaiming_uniform_(p, a=5 ** 0.5)
    return net


def diffusers_net(size: int) -> nn.Module | None:
    "UNet2DModel; its option for the time is \"default\", an addition as ours is (\"scale_shift\" has 6.96 M parameters and the same operations)."
    if not (d := optional("diffusers", "diffusers")): return None
    kinds = ["DownBlock2D"] * (len(MULT) - 1) + ["AttnDownBlock2D"]
    return d.UNet2DModel(size, 1 + CLASSES, 2, block_out_channels=tuple(CHANNELS * m for m in MULT), layers_per_block=2, down_block_types=kinds,
        up_block_types=[k.replace("Down", "Up") for k in reversed(kinds)], attention_head_dim=CHANNELS * MULT[-1], norm_num_groups=32, resnet_time_scale_shift="default")


def monai_net() -> nn.Module | None:
    if not (optional("monai.networks.nets", "MONAI") and optional("einops", "MONAI's need of einops")): return None
    from monai.networks.nets import DiffusionModelUNet
    return DiffusionModelUNet(2, 1 + CLASSES, 2, num_res_blocks=2, channels=tuple(CHANNELS * m for m in MULT), attention_levels=(False, False, True),
        norm_num_groups=32, norm_eps=1e-5, num_head_channels=CHANNELS * MULT[-1], use_flash_attention=True)


def lucidrains_net() -> nn.Module | None:
    if not (d := optional("denoising_diffusion_pytorch", "denoising-diffusion-pytorch")): return None
    return d.Unet(CHANNELS, channels=1 + CLASSES, out_dim=2, dim_mults=MULT, flash_attn=False)


class Task:
    "The same slices, masks, noise and steps for everybody."
    def __init__(self, size: int, batch: int):
        self.size, self.batch, self.store = size, batch, Slices(batch, size)
        self.x0, self.mask = fetch(self.store, self.store.rows("train"))
        self.maps, draw = one_hot_map(self.mask.long(), CLASSES), torch.Generator().manual_seed(0)
        self.eps = torch.randn(self.x0.shape, generator=draw)
        self.t = torch.randint(1000, (batch,), generator=draw)


# ------------------------------------------------------------------------------------------ sampling: x_t, t, mask -> eps, v

def sampling(task: Task) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    "Networks, and one evaluation of each."
    def ours(layout: torch.memory_format) -> tuple:
        net = awake(build(config(size=task.size))).requires_grad_(False).eval().to(memory_format=layout)
        cond = net.encode(task.mask.long())
        return net, lambda: net(task.eps, task.t, cond)
    rows = {"ours": ours(torch.channels_last), "ours, contiguous": ours(torch.contiguous_format)}
    if net := diffusers_net(task.size):
        rows["diffusers"] = net.eval(), lambda: net(torch.cat([task.eps, task.maps], 1), task.t).sample
        last = diffusers_net(task.size).eval().to(memory_format=torch.channels_last)
        rows["diffusers, channels_last"] = last, lambda: last(torch.cat([task.eps, task.maps], 1).contiguous(memory_format=torch.channels_last), task.t).sample
    if m := monai_net(): rows["MONAI"] = m.eval(), lambda: m(torch.cat([task.eps, task.maps], 1), timesteps=task.t)
    if u := lucidrains_net(): rows["denoising-diffusion-pytorch"] = u.eval(), lambda: u(torch.cat([task.eps, task.maps], 1), task.t)
    rows[REFERENCE] = convolution(task.batch)
    return rows


def convolution(batch: int) -> tuple[nn.Module, Callable[[], None]]:
    "What the network mostly consists of, alone: how fast this processor convolves."
    conv = nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    return conv, lambda: [conv(x) for _ in range(20)]


def executed(net: nn.Module, call: Callable[[], object]) -> list[tuple[Tensor, Tensor]]:
    "Weights and biases in the order in which an evaluation uses them; query, key and value apart."
    used, hooks = [], []
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.GroupNorm)): hooks.append(m.register_forward_hook(lambda m, *_: used.append((m.weight.data, m.bias.data))))
    call()
    for h in hooks: h.remove()
    three = lambda w: 3 if w.ndim == 4 and w.shape[2:] == (1, 1) and len(w) == 3 * w.shape[1] else 1
    return [pair for w, b in used for pair in zip(w.chunk(three(w)), b.chunk(three(w)))]


def same_answers(rows: dict) -> dict[str, float]:
    "Our weights into a peer's network, each into the first place of its shape that is still free: the largest difference of the answers."
    found, truth = {}, rows["ours"][1]()
    for k in [k for k in rows if k.split(",")[0] in SAME and k != "ours"]:
        free = executed(*rows[k])
        for w, b in executed(*rows["ours"]):
            place = next(i for i, (x, _) in enumerate(free) if (len(x), x.numel()) == (len(w), w.numel()))
            for mine, theirs in zip((w, b), free.pop(place)): theirs.copy_(mine.reshape(theirs.shape))
        found[k] = (rows[k][1]() - truth).abs().max().item()
        print(f"{k}: with our weights it answers as ours does to {found[k]:.1e} (answers up to {truth.abs().max().item():.2f})")
        assert not free and found[k] < 1e-4, f"{k} is another network: it differs by {found[k]:g}"
    return found


# ------------------------------------------------------------------------------------------ training: one step of everything

def learn(net: nn.Module, optimizer: torch.optim.Optimizer, average: Callable[[], object], loss: Callable[[], Tensor]) -> Callable[[], None]:
    "The loop of diffusers' and MONAI's tutorials."
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step(); average()
    return step


def training(task: Task) -> dict[str, tuple[nn.Module, Callable[[], object]]]:
    "Networks, and one training step of each."
    state = begin(config(size=task.size), TrainConfig(batch=task.batch, grad_clip=1.0, ema=0.9999), task.store, device="cpu")
    rows = {"ours": (state.net, state.train_step)}
    if net := diffusers_net(task.size):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel
        walk, ema = DDPMScheduler(1000), EMAModel(net.parameters(), 0.9999)
        def loss() -> Tensor:
            noise, t = torch.randn_like(task.x0), torch.randint(1000, (task.batch,))
            return F.mse_loss(net(torch.cat([walk.add_noise(task.x0, noise, t), task.maps], 1), t).sample[:, :1], noise)
        rows["diffusers"] = net, learn(net.train(), torch.optim.AdamW(net.parameters(), 1e-4), lambda: ema.step(net.parameters()), loss)
    if m := monai_net():
        from diffusers.training_utils import EMAModel as Average
        from monai.inferers import DiffusionInferer
        from monai.networks.schedulers import DDPMScheduler as Walk
        inferer, mean = DiffusionInferer(Walk(1000)), Average(m.parameters(), 0.9999)
        def monai_loss() -> Tensor:
            noise, t = torch.randn_like(task.x0), torch.randint(1000, (task.batch,))
            return F.mse_loss(inferer(task.x0, m, noise, t, condition=task.maps, mode="concat")[:, :1], noise)
        rows["MONAI"] = m, learn(m.train(), torch.optim.AdamW(m.parameters(), 1e-4), lambda: mean.step(m.parameters()), monai_loss)
    if u := lucidrains_net(): rows["denoising-diffusion-pytorch"] = u, lucidrains_step(task, u)
    return rows


def lucidrains_step(task: Task, net: nn.Module) -> Callable[[], None]:
    "Its own schedule and average; its GaussianDiffusion takes no label map, so the noise is added here."
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import linear_beta_schedule
    from ema_pytorch import EMA
    bar, ema = (1 - linear_beta_schedule(1000)).cumprod(0).float(), EMA(net, beta=0.995, update_every=10)
    def loss() -> Tensor:
        noise, t = torch.randn_like(task.x0), torch.randint(1000, (task.batch,))
        a = bar[t][:, None, None, None]
        return F.mse_loss(net(torch.cat([a.sqrt() * task.x0 + (1 - a).sqrt() * noise, task.maps], 1), t)[:, :1], noise)
    return learn(net.train(), torch.optim.Adam(net.parameters(), 1e-4), ema.update, loss)


# ------------------------------------------------------------------------------------------ side by side

def compare(what: str, networks: dict, batch: int, a) -> dict[str, dict]:
    "Times with parameters, operations, their rate, and how much longer than ours each takes."
    about = {k: dict(params=n_params(net), gflop=flops(call) / 1e9 / batch) for k, (net, call) in networks.items()}
    for k in SAME:
        for key in ("params", "gflop"):
            if k in about: assert abs(about[k][key] / about["ours"][key] - 1) < 0.02, f"{what}: {key} of {k}: {about[k][key]}, ours {about['ours'][key]}"
    rows = interleave({k: call for k, (_, call) in networks.items()}, a.repeats, a.quiet, a.patience)
    times = lambda k: seconds(rows[k]) / seconds(rows["ours"]) if k != REFERENCE else None
    return {k: about[k] | dict(times_ours=times(k), of_matmul=share(rows[k], about[k]["gflop"] * 1e9 * batch)) | rows[k] for k in rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--part", choices=("both", "sampling", "training"), default="both")
    a = parser.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    task, parts, difference = Task(a.size, a.batch), {}, {}
    if a.part != "training":
        with torch.no_grad():
            networks = sampling(task)
            difference = same_answers(networks)
            parts["one evaluation while sampling (P2)"] = compare("sampling", networks, a.batch, a)
    if a.part != "sampling": parts["one training step (P4)"] = compare("training", training(task), a.batch, a)
    report("network", parts, a.out, size=a.size, batch=a.batch, difference=difference, times_ours="seconds of a competitor divided by ours: above 1, ours is faster", gflop="of one slice; a multiply-add is 2")


if __name__ == "__main__": main()
