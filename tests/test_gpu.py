"What a graphics card would be made to do, counted without one: copies, waits, compiled and recorded steps, slices in its memory."
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.store import PrepareConfig
from ctdiffusion.diffusion.schedule import gather, make_schedule
from ctdiffusion.models import gpu
from ctdiffusion.models.gpu import MODES, Compiled, Recorded, Swift, Traffic, backend_for, cannot_compile, rounded, saved
from ctdiffusion.models.sdm import Guided
from ctdiffusion.models.unet import GroupNorm
from ctdiffusion.models.variants import ModelConfig, TrainConfig, build
from ctdiffusion.training import state as state_module
from ctdiffusion.training.runs import read_checkpoint, write_checkpoint
from ctdiffusion.training.state import Denoising, begin
from ctdiffusion.training.step import fetch, make_slices, resident

MODEL = ModelConfig("conditional", size=16, channels=8, mult=(1, 2), blocks=1, attention=(8,), groups=4, encoder_blocks=1, hidden=4, head_channels=8)
CONFIG = TrainConfig(batch=4, lr=1e-3, warmup=10, max_steps=60, ema=0.99, ema_warmup=True, grad_clip=1.0)
DIFFUSION = ("conditional", "mask", "edge", "sdm")


class Slices:
    "A store in memory: 30 slices to train on, 10 held out."
    hash, table, config = "in memory", AMOS, PrepareConfig(size=16)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.labels = np.kron(rng.integers(0, 17, (40, 4, 4), np.uint8), np.ones((1, 4, 4), np.uint8))
        self.images = (self.labels * 12 + rng.integers(0, 20, self.labels.shape)).astype(np.uint8)

    def rows(self, split: str) -> np.ndarray: return np.arange(30) if split == "train" else np.arange(30, 40)
    def case_of(self, row: int) -> dict: return dict(id=f"case_{row // 10}")


STORE = Slices()


@pytest.fixture(autouse=True)
def fresh():
    "No test meets what another one has compiled."
    torch._dynamo.reset()
    yield


def trained(steps: int, variant: str = "conditional", config: TrainConfig = CONFIG, **options) -> Denoising:
    state = begin(replace(MODEL, variant=variant), config, STORE, device=options.pop("device", "cpu"), **options)
    for _ in range(steps): state.train_step()
    return state


def tensors(state: Denoising) -> dict: return {f"{g}/{k}": v for g, group in state.groups().items() for k, v in group.items()}


def farthest(a: Denoising, b: Denoising, *groups: str) -> float:
    "The largest difference of any two numbers of these groups."
    x, y = a.groups(), b.groups()
    return max((x[g][k] - y[g][k]).abs().max().item() for g in groups for k in x[g])


# ------------------------------------------------------------------------------------------------------ waits and copies

@pytest.mark.parametrize("variant", DIFFUSION)
def test_a_training_step_sends_three_small_things_and_waits_for_nothing(variant):
    "Slice numbers, noise and times; the meta device, which has no numbers, stands in for the card."
    config = replace(CONFIG, label_drop=0.2) if variant == "sdm" else CONFIG
    state = trained(1, variant, config, device="meta", keep=True)
    with Traffic() as traffic: state.train_step()
    assert traffic.counts == {"cpu->meta": 4 if variant == "sdm" else 3}


def test_slices_from_the_file_are_two_copies_of_bytes():
    state = trained(1, device="meta")
    with Traffic() as traffic: state.train_step()
    assert traffic.counts == {"cpu->meta": 4}
    with Traffic() as traffic: x0, mask = fetch(STORE, np.arange(4), torch.device("meta"))
    assert traffic.counts == {"cpu->meta": 2} and mask.dtype == torch.uint8 and x0.device.type == "meta"


def test_dropout_sends_nothing_more():
    state = begin(replace(MODEL, dropout=0.1), CONFIG, STORE, device="meta", keep=True)
    state.train_step()
    with Traffic() as traffic: state.train_step()
    assert traffic.counts == {"cpu->meta": 3}


def test_a_network_step_in_sampling_sends_nothing():
    "Once the mask is encoded, whatever the design."
    for variant in DIFFUSION:
        with torch.device("meta"), torch.no_grad():
            net = build(replace(MODEL, variant=variant))
            cond = net.encode(torch.zeros(2, 16, 16, dtype=torch.long))
            with Traffic() as traffic: net(torch.zeros(2, 1, 16, 16), torch.zeros(2), cond)
        assert traffic.counts == {}, variant


def test_the_counter_counts():
    "A detector that finds nothing must have been able to find something."
    far, here = torch.device("meta"), torch.ones(3)
    with Traffic() as traffic:
        there = here.to(far)
        there.copy_(here)
        there.to(far, torch.float64)
        there[:2].copy_(there[1:])
        torch.empty(3).copy_(here)
    assert traffic.counts == {"cpu->meta": 2}
    with Traffic() as traffic, pytest.raises(RuntimeError): there.sum().item()
    with Traffic() as traffic, pytest.raises(NotImplementedError): there[there > 0]


def test_tables_are_sent_once_and_never_stale():
    schedule, t, x = make_schedule(), torch.tensor([0, 500, 999]), torch.zeros(3, 1, 2, 2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got, wide = gather(schedule.posterior_mean_coef1, t, x.to(dtype)), torch.float64 if dtype == torch.float64 else torch.float32
        assert got.dtype == wide and torch.equal(got.flatten(), torch.as_tensor(schedule.posterior_mean_coef1, dtype=wide)[t])
    far = t.to("meta")
    gather(schedule.betas, far, x)
    with Traffic() as traffic:
        for _ in range(3): gather(schedule.betas, far, x)
        gather(make_schedule().betas, far, x)
    assert traffic.counts == {}
    table = np.arange(1000.0)
    assert gather(table, t, x)[1].item() == 500
    table += 1
    assert gather(table, t, x)[1].item() == 501


# --------------------------------------------------------------------------------------------------- slices that stay there

@pytest.mark.parametrize("variant", ["mask", "oasis"])
def test_slices_in_memory_give_the_same_run(variant):
    "Bit by bit, held-out losses and settled statistics included."
    gan = replace(MODEL, variant=variant, channels=4, doublings=2, judge_channels=4, judge_halvings=2, noise_size=4, hidden=4)
    states = [begin(gan if variant == "oasis" else replace(MODEL, variant=variant), CONFIG, STORE, device="cpu", keep=keep) for keep in (None, True)]
    assert states[0].bytes is STORE and isinstance(states[1].bytes.images, torch.Tensor)
    for state in states:
        for _ in range(2): state.train_step()
    assert states[0].held_out() == states[1].held_out()
    a, b = map(tensors, states)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_set_is_kept_where_it_takes_an_eighth_of_what_is_free(monkeypatch):
    need = STORE.images.nbytes + STORE.labels.nbytes
    card, free = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 10 ** 12))
    free.append(8 * need - 1)
    assert resident(STORE, card) is STORE and resident(STORE, card, keep=False) is STORE
    assert resident(STORE, torch.device("cpu")) is STORE
    far = resident(STORE, torch.device("meta"), keep=True)
    assert far.images.shape == STORE.images.shape and far.labels.dtype == torch.uint8
    monkeypatch.setattr(torch, "empty", lambda *shape, device, dtype: torch.zeros(*shape, dtype=dtype))
    free.append(8 * need)
    assert torch.equal(resident(STORE, card).labels, torch.from_numpy(STORE.labels))


# -------------------------------------------------------------------------------------------------------------- compiled

@pytest.mark.parametrize("variant,backend", [("conditional", "eager"), ("mask", "aot_eager"), ("edge", "eager"), ("sdm", "eager")])
def test_compiled_or_not_is_the_same_training(variant, backend, tmp_path):
    "Weights after three steps agree, checkpoints carry the same names, and either goes on from the other's."
    plain, fast = trained(3, variant), trained(3, variant, compile=backend)
    assert isinstance(fast.denoise, Compiled) and fast.denoise.shape == (4, 1, 16, 16) and not fast.denoise.why
    assert not isinstance(plain.denoise, Compiled)
    assert farthest(plain, fast, "model", "ema") < 1e-6
    assert tensors(plain).keys() == tensors(fast).keys() and not [k for k in tensors(fast) if "_orig_mod" in k or "/f." in k]
    for donor, options in ((plain, dict(compile=backend)), (fast, {})):
        heir = trained(0, variant, **options)
        heir.restore(read_checkpoint(write_checkpoint(tmp_path / str(len(options)), donor.step, donor.groups(), {})), tmp_path)
        heir.train_step(); donor.train_step()
        assert heir.step == 4 and farthest(heir, donor, "model", "ema") < 1e-6


def test_compiled_dropout_is_drawn_by_the_step():
    "The trial of the first call takes nothing from the stream of random numbers."
    model = replace(MODEL, dropout=0.3)
    a, b = (begin(model, CONFIG, STORE, device="cpu", compile=c) for c in ("off", "eager"))
    for state in (a, b): state.train_step()
    assert torch.allclose(a.losses(), b.losses(), rtol=1e-5)


def failing(where: str):
    "A backend of torch.compile that cannot write code for one of the two directions."
    def fail(graph, inputs): raise OSError("Failed to find C compiler.")
    good = lambda graph, inputs: graph.forward
    return aot_autograd(fw_compiler=fail if where == "forward" else good, bw_compiler=fail if where == "backward" else good)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_without_a_compiler_the_training_goes_on(where, monkeypatch):
    "Found out at the first step, also where only the gradient's code cannot be written; said once."
    make = state_module.Compiled
    monkeypatch.setattr(state_module, "Compiled", lambda f, backend: make(f, failing(where)))
    fast = trained(0, compile="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3): fast.train_step()
    assert sum("Going on without it" in str(w.message) for w in said) == 1 and "C compiler" in fast.denoise.why
    plain = trained(3)
    assert farthest(plain, fast, "model", "ema") == 0


def test_running_out_of_memory_is_no_reason_to_go_on():
    "More memory is what the plain code would want."
    def full(graph, inputs):
        def run(*args): raise torch.OutOfMemoryError("out of memory")
        return run
    net = nn.Linear(2, 2)
    with pytest.raises(torch.OutOfMemoryError): Compiled(net, full)(torch.ones(1, 2))


def test_another_shape_is_not_compiled_again():
    "The last batch of a volume is smaller."
    seen = []
    def count(graph, inputs): seen.append(1); return graph.forward
    net, x = nn.Linear(2, 2), torch.randn(4, 2)
    fast = Compiled(net, count)
    for n in (4, 3, 2, 4): assert torch.equal(fast(x[:n]), net(x[:n]))
    assert len(seen) == 1


def test_when_to_compile(monkeypatch):
    card, long, short = torch.device("cuda"), saved(256, 128, 16, 150_000), saved(64, 16, 16, 200)
    monkeypatch.setattr(gpu, "cannot_compile", lambda device: None)
    assert backend_for("auto", card, long)[0] == "inductor" and backend_for("auto", card, short)[0] is None
    assert backend_for("auto", torch.device("cpu"), long)[0] is None and backend_for("off", card, long)[0] is None
    assert backend_for("inductor", card, short)[0] == "inductor"
    monkeypatch.setattr(gpu, "cannot_compile", lambda device: "no C compiler")
    assert backend_for("auto", card, long) == (None, "not compiled: no C compiler")
    with pytest.raises(CTDiffusionError, match="aot_eager"): trained(0, compile="inductr")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert cannot_compile(torch.device("cuda")) == "triton is not installed"
    def broken(f): raise RuntimeError("Python.h: No such file")
    monkeypatch.setattr(torch, "compile", broken)
    assert "Python.h" in cannot_compile(torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda f: f)
    assert cannot_compile(torch.device("cpu")) is None


def test_a_checkpoint_has_no_layout(tmp_path, monkeypatch):
    "Channels last, as compiled training keeps its weights, reads what channels first has written, and the other way round; Adam's moments lie like their weights."
    monkeypatch.setattr(state_module, "Compiled", lambda f, backend: f)
    last, first = trained(2, "mask", compile="inductor"), trained(2, "mask")
    conv = lambda s: s.net.unet.encoder[0].blocks[0].res.inner[2].weight
    assert conv(last).is_contiguous(memory_format=torch.channels_last) and not conv(last).is_contiguous() and conv(first).is_contiguous()
    for donor, options in ((last, {}), (first, dict(compile="inductor"))):
        heir = trained(0, "mask", **options)
        heir.restore(read_checkpoint(write_checkpoint(tmp_path / str(len(options)), donor.step, donor.groups(), {})), tmp_path)
        for p, s in heir.moments().items(): assert p.stride() == s["exp_avg"].stride() == s["exp_avg_sq"].stride()
        a, b = tensors(donor), tensors(heir)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        heir.train_step(); donor.train_step()
        assert farthest(heir, donor, "model") < 1e-4


# --------------------------------------------------------------------------------------------------------------- sampling

def actor(f):
    "A recording without a card: computed again, the result in the same place."
    out = f()
    return lambda: out.copy_(f()), out


def network(variant: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = build(replace(MODEL, variant=variant)).eval().requires_grad_(False)
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1)
    return (Guided(net, 1.5) if variant == "sdm" else net), torch.from_numpy(STORE.labels[:3]).long()


@pytest.mark.parametrize("variant", DIFFUSION)
def test_recorded_steps_make_the_same_slices(variant):
    "A whole walk, three masks and then two others; guided, for SDM."
    net, mask = network(variant)
    recorded, config = Recorded(net, actor), replace(MODEL, variant=variant)
    for m in (mask, mask[:2].flip(0)):
        noise = lambda k: torch.randn(len(m), 1, 16, 16, generator=torch.Generator().manual_seed(k))
        for sampler in ("ddim5", "7"):
            plain, again = (make_slices(f, config, net.encode(m), noise, sampler) for f in (lambda x, t, cond: net(x, t, cond), recorded))
            assert torch.equal(plain, again)


def test_many_slices_are_not_recorded():
    net, mask = network("conditional")
    def never(f): raise AssertionError
    recorded = Recorded(net, never, largest=2)
    x, t = torch.randn(3, 1, 16, 16), torch.tensor([1, 2, 3])
    assert torch.equal(recorded(x, t, net.encode(mask)), net(x, t, net.encode(mask)))


@pytest.mark.parametrize("variant", DIFFUSION)
def test_rounding_weights_once_changes_no_answer(variant):
    "Under autocast, which a processor has too."
    net, mask = network(variant)
    x, t = torch.randn(3, 1, 16, 16), torch.tensor([1, 500, 900])
    with torch.autocast("cpu", torch.bfloat16): before = net(x, t, net.encode(mask))
    with torch.autocast("cpu", torch.bfloat16): after = rounded(net)(x, t, net.encode(mask))
    assert torch.equal(before, after)


@pytest.fixture
def without_card(monkeypatch):
    "A processor's autocast, a recording by an actor, and a compiler that compiles nothing."
    monkeypatch.setattr(gpu, "bfloat16", lambda device: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(gpu, "Recorded", lambda net: Recorded(net, actor))
    monkeypatch.setattr(gpu, "Compiled", lambda net: Compiled(net, "eager"))


@pytest.mark.parametrize("mode", MODES)
def test_swift_networks_make_slices(mode, without_card):
    "From a mask to its slice, with what the mask decides remembered where that is done: within bfloat16 of the plain network's."
    for variant in ("mask", "edge"):
        net, mask = network(variant)
        noise, config = lambda k: torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(k)), replace(MODEL, variant=variant)
        plain = make_slices(net, config, net.encode(mask), noise, "ddim5")
        swift = Swift(net, mode)
        step, _ = swift.remember(swift.encode(mask))
        assert (step is swift) == (mode != "eager")
        got = make_slices(swift, config, swift.encode(mask), noise, "ddim5")
        assert got.dtype == torch.float32 and 0 < (got - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("mode", MODES)
def test_swift_networks_on_the_way_to_a_slice(mode, without_card):
    "All three modes, with a processor's autocast and a recording without a card: within bfloat16 of the plain network."
    net, mask = network("mask")
    x, t = torch.randn(3, 1, 16, 16), torch.tensor([1, 500, 900])
    plain = net(x, t, net.encode(mask))
    swift = Swift(net, mode)
    with torch.no_grad(): got = [swift(x, t, swift.encode(mask)) for _ in range(2)]
    assert torch.equal(*got) and 0 < (got[0] - plain).norm() < 0.03 * plain.norm()
    assert next(swift.parameters()).device == x.device


def test_a_norm_without_a_float32_copy_is_the_same_norm():
    "Values and gradients in float32; in bfloat16 no further from the truth than two roundings, also where the mean is large."
    norm = GroupNorm(8, 2)
    nn.init.normal_(norm.weight, 1, .3); nn.init.normal_(norm.bias)
    for like in (torch.contiguous_format, torch.channels_last):
        x = (20 + 3 * torch.randn(3, 8, 6, 6)).contiguous(memory_format=like).requires_grad_()
        g, grads = torch.randn(3, 8, 6, 6), []
        for f in (norm.forward, norm.by_layer_norm):
            y = f(x)
            grads.append([y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], g)])
        for a, b in zip(*grads): assert (a - b).abs().max() <= 1e-3 * b.abs().max().clamp(min=1)
    half = x.detach().bfloat16()
    truth = norm(half.float())
    assert ((norm.by_layer_norm(half).float() - truth).abs() <= 2 ** -7 * (truth.abs() + norm.bias.abs()[:, None, None] + 1)).all()
