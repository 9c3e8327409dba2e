"SDM: parameter counts, the reference layer by hand, kept against recomputed maps, label drop and guidance."
import json
from dataclasses import replace
from itertools import repeat

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.slices import edge_map
from ctdiffusion.diffusion.solvers import sample
from ctdiffusion.diffusion.schedule import make_schedule
from ctdiffusion.models.conditioning import one_hot_map
from ctdiffusion.models.sdm import NOTHING, SDM, AdmBlock, Guided, Modulation, SpadeGroupNorm, drop_labels, guide, keep_labels
from ctdiffusion.models.unet import Attention, GroupNorm, n_params
from ctdiffusion.models.variants import TrainConfig, preset
from ctdiffusion.synthesis.synthesis import load, synthesize_slices
from ctdiffusion.training.runs import latest_checkpoint, read_checkpoint
from ctdiffusion.training.trainer import train
from test_models import awake, inputs
from little_runs import STORE
from near import assert_near

SMALL = dict(size=16, channels=8, mult=(1, 2, 2), blocks=1, attention=(8,), hidden=8, groups=4)
DEMO = dict(size=64, channels=16, mult=(1, 1, 2, 3), blocks=1, attention=(8,), hidden=16, groups=8)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


# --- counts and shapes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels, expected", [(128, 188_813_826), (256, 652_876_290)])
def test_parameter_counts_at_paper_size(channels, expected):
    with torch.device("meta"): net = SDM(256, channels=channels)
    assert n_params(net) == expected
    assert len(net.norms()) == 50


@pytest.mark.parametrize("channels, gigabytes", [(128, 1.019215872), (256, 2.038431744)])
def test_memory_of_the_kept_maps_is_what_it_says(channels, gigabytes):
    with torch.device("meta"):
        net = SDM(256, channels=channels, cache_bytes=2**40)
        cond = net.encode(torch.zeros(2, 256, 256, dtype=torch.long))
    held = sum(m.numel() * m.element_size() for pair in cond.maps for m in pair)
    assert held == sum(norm.nbytes(cond.labels) for norm in net.norms()) == pytest.approx(2 * gigabytes * 1e9)


def test_edges_add_one_label_channel():
    without, with_edges = SDM(**SMALL), SDM(edges=True, **SMALL)
    assert n_params(with_edges) - n_params(without) == len(without.norms()) * 9 * SMALL["hidden"]
    mask = inputs()[2]
    labels = with_edges.encode(mask).labels
    assert torch.equal(labels[:, :17], one_hot_map(mask)) and torch.equal(labels[:, 17], edge_map(mask).float())


def test_demo_size_and_structure():
    net = SDM(**DEMO)
    assert n_params(net) <= 950_000
    attended = [b for b in [*net.encoder, *net.middle, *net.decoder] if isinstance(b.attend, Attention)]
    assert len(attended) == 1 + 1 + 2  # the 8 px level down, the middle, the 8 px level up
    assert not any(isinstance(m, SpadeGroupNorm) for m in net.encoder.modules())
    assert all(isinstance(b.inner, SpadeGroupNorm) and isinstance(b.outer, SpadeGroupNorm) for b in [*net.middle, *net.decoder])


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(CTDiffusionError, match="multiple of 4"): SDM(**SMALL | dict(size=18))


@pytest.mark.parametrize("size, channels", [(16, 20), (24, 12), (16, 8)])
def test_widths_that_nothing_divides(size, channels):
    net = awake(SDM(size, channels=channels, mult=(1, 3), blocks=1, attention=(8,), head_channels=16, hidden=4))
    xt, t, mask = inputs(2, size)
    assert net(xt, t, net.encode(mask)).shape == (2, 2, size, size)


# --- the layers ----------------------------------------------------------------------------------------------------

def test_spade_group_norm_is_the_formula():
    norm, x, labels = SpadeGroupNorm(8, 5, hidden=6, groups=4, level=1), torch.randn(2, 8, 6, 6), torch.rand(2, 5, 12, 12)
    m = norm.modulation
    h = F.relu(m.shared[0](labels[..., ::2, ::2]))  # nearest: the upper left pixel of four
    gamma, beta = m.gamma(h), m.beta(h)
    for got, expected in zip(norm.maps(labels), (gamma, beta)): torch.testing.assert_close(got, expected)
    grouped = x.reshape(2, 4, -1)
    x_hat = ((grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    assert_near(norm(x, gamma, beta), x_hat * (1 + gamma) + beta)


def test_modulation_by_hand():
    "One class, one hidden unit, kernels of ones: gamma of a full 3x3 map counts pixels twice."
    m = Modulation(1, 1, hidden=1)
    for p in m.parameters(): nn.init.ones_(p) if p.ndim > 1 else nn.init.zeros_(p)
    gamma, _ = m(torch.ones(1, 1, 3, 3), (3, 3))
    assert gamma[0, 0].tolist() == [[25, 35, 25], [35, 49, 35], [25, 35, 25]]


def test_block_by_hand():
    emb, x = torch.randn(2, 12), torch.randn(2, 8, 6, 6)
    block = awake(AdmBlock(GroupNorm(8, 4), GroupNorm(4, 2), 8, 4, emb=12))
    h = block.conv1(F.silu(block.inner(x)))
    scale, shift = block.emb[1](F.silu(emb)).chunk(2, dim=1)
    h = block.outer(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert_near(block(x, emb), block.skip(x) + block.conv2[2](F.silu(h)))


@pytest.mark.parametrize("resize", [nn.Identity(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)])
def test_fresh_blocks_only_resize(resize):
    x, emb, silent = torch.randn(2, 8, 6, 6), torch.randn(2, 12), (torch.zeros(()), torch.zeros(()))
    block = AdmBlock(SpadeGroupNorm(8, 3, 4), SpadeGroupNorm(8, 3, 4), 8, 8, emb=12, resize=resize)
    assert torch.equal(block(x, emb, repeat(silent)), resize(x))


# --- the network ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("edges", [False, True])
def test_first_answer_is_zero_then_everything_is_heard(edges):
    net, (xt, t, mask) = SDM(edges=edges, **SMALL), inputs()
    assert not net(xt, t, net.encode(mask)).any()
    awake(net)
    with torch.no_grad():
        out = net(xt, t, net.encode(mask))
        for other in (net(xt, t, net.encode((mask + 1) % 17)), net(xt, (t + 400) % 1000, net.encode(mask)), net(xt + .1, t, net.encode(mask))):
            assert (other - out).abs().max() > 1e-4
        assert_near(net(xt, t.float(), net.encode(mask.long())), out)


def test_the_encoder_is_label_free():
    net, (xt, t, mask) = awake(SDM(**SMALL)), inputs()
    seen = net.look(xt, t)
    assert len(seen.features) == 1 + len(net.encoder)
    net.draw(seen, net.encode(mask))
    assert all(torch.equal(a, b) for a, b in zip(seen.features, net.look(xt, t).features))
    assert torch.equal(net.draw(seen, net.encode(mask)), net(xt, t, net.encode(mask)))


@pytest.mark.parametrize("share", [0, .3, .7])
def test_kept_and_recomputed_maps_agree(share):
    net, (xt, t, mask) = awake(SDM(edges=True, **SMALL)), inputs()
    with torch.no_grad():
        kept = net.encode(mask)
        whole = sum(norm.nbytes(kept.labels) for norm in net.norms())
        net.cache_bytes = int(share * whole)
        some = net.encode(mask)
        held = sum(m.numel() * m.element_size() for pair in some.maps if pair for m in pair)
        assert None not in kept.maps and held <= net.cache_bytes and (share == 0) == (held == 0)
        for s in (999, 500, 0):
            assert_near(net(xt, torch.full((3,), s), some), net(xt, torch.full((3,), s), kept), 1e-5)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_gradients_reach_every_parameter(cache_bytes):
    net, (xt, t, mask) = awake(SDM(cache_bytes=cache_bytes, **SMALL)), inputs()
    net(xt, t, net.encode(mask)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_do_not_depend_on_where_maps_are_made():
    grads, (xt, t, mask) = [], inputs()
    net = awake(SDM(**SMALL))
    for net.cache_bytes in (2**30, 0):
        net.zero_grad(); net(xt, t, net.encode(mask)).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_slices_of_a_batch_do_not_touch():
    net, (xt, t, mask) = awake(SDM(**SMALL)), inputs()
    with torch.no_grad():
        together = net(xt, t, net.encode(mask))
        alone = torch.cat([net(xt[i:i + 1], t[i:i + 1], net.encode(mask[i:i + 1])) for i in range(3)])
    assert_near(together, alone)


def test_dtype_and_layout():
    net, (xt, t, mask) = awake(SDM(**SMALL)), inputs()
    with torch.no_grad():
        out = net(xt, t, net.encode(mask))
        with torch.autocast("cpu", torch.bfloat16): half = net(xt, t, net.encode(mask))
        net = net.to(memory_format=torch.channels_last)
        assert_near(net(xt, t, net.encode(mask)), out)
    assert half.dtype == torch.float32 and F.mse_loss(half, out) < 1e-2 * out.var()


def test_same_seed_same_weights():
    def make(): torch.manual_seed(5); return SDM(**SMALL).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(make().values(), make().values()))


# --- label drop and guidance ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_dropped_maps_are_empty(dtype):
    net, (_, _, mask) = SDM(edges=True, **SMALL), inputs(dtype=dtype)
    before, dropped = mask.clone(), drop_labels(mask, torch.tensor([True, False, True]))
    assert dropped.dtype == dtype and torch.equal(mask, before) and (dropped[1] == NOTHING).all()
    labels, full = net.encode(dropped).labels, net.encode(mask).labels
    assert not labels[1].any() and torch.equal(labels[[0, 2]], full[[0, 2]])


def test_drop_is_drawn_from_the_generator_alone():
    def draw(n=5000, **kw): return keep_labels(n, torch.Generator().manual_seed(3), **kw)
    assert torch.equal(draw(), draw()) and draw().float().mean().item() == pytest.approx(.8, abs=.02)
    assert draw(drop=0.).all() and not draw(drop=1.).any()


def test_guidance_leaves_the_variance_alone():
    given, empty = torch.randn(2, 3, 2, 4, 4)
    for s in (0., 1., 1.5, 4.):
        out = guide(given, empty, s)
        assert torch.equal(out[:, 1], given[:, 1])
        assert_near(out[:, 0], empty[:, 0] + s * (given[:, 0] - empty[:, 0]))
    assert torch.equal(guide(given, empty, 0)[:, 0], empty[:, 0])


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_guided_equals_two_whole_passes(edges, cache_bytes):
    net, (xt, t, mask) = awake(SDM(edges=edges, cache_bytes=cache_bytes, **SMALL)), inputs()
    guided = Guided(net, 2.)
    with torch.no_grad():
        empty = net(xt, t, net.encode(drop_labels(mask, torch.zeros(3, dtype=torch.bool))))
        expected = guide(net(xt, t, net.encode(mask)), empty, 2.)
        assert_near(guided(xt, t, guided.encode(mask)), expected)


def test_guidance_one_is_no_guidance_bit_for_bit():
    net, (xt, t, mask) = awake(SDM(**SMALL)), inputs()
    calls = []
    net.head.register_forward_hook(lambda *a: calls.append(1))
    guided = Guided(net, 1)
    with torch.no_grad():
        assert torch.equal(guided(xt, t, guided.encode(mask)), net(xt, t, net.encode(mask)))
    assert len(calls) == 2 and guided.encode(mask).empty is None


@pytest.mark.parametrize("target", ["eps", "velocity"])
@pytest.mark.parametrize("sampler", ["ddim5", "4"])
def test_guided_sampling(target, sampler):
    net, (_, _, mask), schedule = awake(SDM(**SMALL)), inputs(2), make_schedule()
    def draw(model):
        g = torch.Generator().manual_seed(1)
        with torch.no_grad(): return sample(model, model.encode(mask), lambda k: torch.randn(2, 1, 16, 16, generator=g), schedule, sampler, target)
    assert torch.equal(draw(Guided(net, 1.)), draw(net))
    assert torch.equal(draw(Guided(net, 3.)), draw(Guided(net, 3.))) and not torch.equal(draw(Guided(net, 3.)), draw(net))


def test_official_recipe_drops_masks_and_guides(tmp_path):
    "`label_drop` empties masks in training, `guidance` of the run's recipe is applied by `load`."
    model = replace(preset("sdm", "demo").model, size=16, channels=8, mult=(1, 2), groups=4, attention=(8,), hidden=4, head_channels=8)
    config = TrainConfig(batch=4, lr=1e-3, max_steps=3, ema=0.5, milestones=(), sampler="ddim5", label_drop=0.5, guidance=3.0)
    run = train(model, config, STORE, tmp_path / "run", say=None, val_every=0, device="cpu").run_dir
    guided, masks = load(run, "cpu"), STORE.labels[30:32]
    assert isinstance(guided.net, Guided) and guided.net.scale == 3
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | dict(train=about["train"] | dict(guidance=1.0))))
    plain = load(run, "cpu")
    assert isinstance(plain.net, SDM) and not np.array_equal(synthesize_slices(guided, masks), synthesize_slices(plain, masks))
    whole = train(model, replace(config, label_drop=0.0), STORE, tmp_path / "whole", say=None, val_every=0, device="cpu").run_dir
    first, other = (read_checkpoint(latest_checkpoint(r, lambda line: None))["model"] for r in (run, whole))
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_official_preset_is_for_sdm_only():
    train_config = preset("sdm", "sdm-official").train
    assert (train_config.lr, train_config.label_drop, train_config.guidance) == (2e-5, 0.2, 1.5)
    with pytest.raises(CTDiffusionError, match="the one method"): preset("mask", "sdm-official")
