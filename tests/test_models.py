"The networks: reference numbers, parameter counts, and what the three designs promise."
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.models.conditioning import Conditional, EdgeGuided, MaskEncoder, MaskGuided, one_hot_map, scalar_map
from ctdiffusion.models.unet import Attention, GroupNorm, ResBlock, UNet, n_params, timestep_embedding
from ctdiffusion.models.variants import SIZES, VARIANTS, ModelConfig, Preset, TrainConfig, Variant, build, cost, preset
from near import assert_near

DESIGNS = [Conditional, MaskGuided, EdgeGuided]
SMALL = dict(size=16, channels=8, mult=(1, 2, 2), blocks=1, attention=(8,), groups=4)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def awake(net):
    "Fill what starts at zero, so that every path carries a signal."
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.1)
    return net


def inputs(n=3, size=16, dtype=torch.uint8):
    return torch.randn(n, 1, size, size), torch.randint(1000, (n,)), torch.randint(17, (n, size, size), dtype=dtype)


# --- reference numbers -------------------------------------------------------------------------------------------

def test_timestep_embedding_of_floats_and_odd_lengths():
    t = torch.tensor([0, 3, 999])
    assert torch.equal(timestep_embedding(t, 32), timestep_embedding(t.double(), 32))
    assert timestep_embedding(t, 7).shape == (3, 7) and not timestep_embedding(t, 7)[:, -1].any()


@pytest.mark.parametrize("make, expected", [
    (lambda: UNet(256, 3, 6), 113_676_678),
    (lambda: UNet(256, 1), 113_669_762),
    (lambda: Conditional(256, encoding="scalar"), 113_670_914),
    (lambda: Conditional(256), 113_689_346),
    (lambda: MaskGuided(256), 137_301_122),
    (lambda: MaskGuided(256).unet, 121_766_018),
    (lambda: MaskGuided(256).encoder, 15_535_104),
    (lambda: EdgeGuided(256, encoding="scalar"), 137_283_842),
    (lambda: EdgeGuided(256, encoding="scalar").encoder, 15_516_672),
    (lambda: EdgeGuided(256), 137_302_274),
], ids=lambda value: f"{value:,}" if isinstance(value, int) else "network")
def test_parameter_counts_of_the_paper(make, expected):
    with torch.device("meta"): assert n_params(make()) == expected


def test_work_of_the_paper():
    assert cost(preset("conditional", "paper").model)["gmac_step"] == pytest.approx(248.36, abs=.01)
    guided = cost(preset("mask", "paper").model)
    assert guided["gmac_step"] == pytest.approx(269.66, abs=.01) and guided["gmac_mask"] == pytest.approx(66.53, abs=.01)


# --- the parts ---------------------------------------------------------------------------------------------------

def test_group_norm_is_float32_inside_and_divides_any_width():
    for width in (4, 20, 32, 48, 96): assert width % GroupNorm(width).num_groups == 0
    x = 100 + torch.randn(2, 8, 6, 6)
    norm = GroupNorm(8, 2)
    expected = F.group_norm(x.bfloat16().float(), 2).bfloat16()
    one_rounding = 2 ** -7  # of bfloat16; statistics in bfloat16 would be wrong by as much as the values
    assert_near(norm(x.bfloat16()), expected, one_rounding)
    assert_near(norm.bfloat16()(x.bfloat16()), expected, one_rounding)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_the_reference_formula(heads):
    attend, x = awake(Attention(16, heads)), torch.randn(2, 16, 6, 5)
    d = 16 // heads
    q, k, v = attend.qkv(attend.norm(x)).reshape(2 * heads, 3 * d, 30).chunk(3, dim=1)
    weight = torch.einsum("bct,bcs->bts", q * d ** -.25, k * d ** -.25).softmax(-1)
    expected = x + attend.out(torch.einsum("bts,bcs->bct", weight, v).reshape(2, 16, 6, 5))
    assert_near(attend(x), expected)


def test_fresh_blocks_are_the_identity():
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 32)
    assert torch.equal(ResBlock(8, 8, 32)(x, emb), x)
    assert torch.equal(Attention(8)(x), x)


def test_time_is_heard():
    "With one channel per group the norm would subtract the time again."
    for name in VARIANTS:
        model = preset(name, "demo").model
        assert all(m.num_groups < m.num_channels for m in build(model).modules() if isinstance(m, GroupNorm) and m.num_channels >= 16)
    net = awake(UNet(16, 1, channels=8, mult=(1, 2), blocks=1, groups=2))
    x = torch.randn(1, 1, 16, 16)
    assert (net(x, torch.tensor([1])) - net(x, torch.tensor([900]))).abs().max() > 1e-3


# --- the U-Net ---------------------------------------------------------------------------------------------------

def test_dtype_and_layout():
    net, (x, t, _) = awake(UNet(16, 1, channels=8, mult=(1, 2), blocks=1)), inputs()
    with torch.no_grad():
        out = net(x, t)
        assert_near(net(x, t.float()), out)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t)
        assert_near(last, out)
        with torch.autocast("cpu", torch.bfloat16): half = net(x, t)
    assert half.dtype == torch.float32
    assert F.mse_loss(half, out) < 1e-2 * out.var()


def test_size_must_be_halved_evenly():
    with pytest.raises(CTDiffusionError, match="multiple of 8"): UNet(60, 1, mult=(1, 1, 2, 2))
    with pytest.raises(CTDiffusionError, match="Use size 64"): UNet(66, 1, mult=(1, 1, 2, 2))


# --- the designs -------------------------------------------------------------------------------------------------

def test_maps_of_a_mask():
    ids = torch.arange(17, dtype=torch.uint8)[None, None]
    torch.testing.assert_close(scalar_map(ids)[0, 0, 0], torch.linspace(-1, 1, 17))
    assert torch.equal(one_hot_map(ids)[0, :, 0], torch.eye(17))
    assert scalar_map(ids, 5).max() == 7 and one_hot_map(ids, 17).dtype == torch.float32


@pytest.mark.parametrize("encoding", ["scalar", "onehot"])
@pytest.mark.parametrize("design", DESIGNS)
def test_one_signature(design, encoding):
    net, (x, t, mask) = design(encoding=encoding, **SMALL), inputs()
    cond = net.encode(mask)
    assert not net(x, t, cond).any()
    eps = torch.randn(3, 1, 16, 16)
    assert F.mse_loss(net(x, t, cond)[:, :1], eps).item() == pytest.approx(eps.square().mean().item())
    awake(net)
    other = net.encode((mask + 1) % 17)
    assert net(x, t, net.encode(mask)).shape == (3, 2, 16, 16)
    assert (net(x, t, net.encode(mask)) - net(x, t, other)).abs().max() > 1e-4


@pytest.mark.parametrize("design", DESIGNS)
def test_a_mask_encoded_once_serves_every_step(design):
    net, (x, t, mask) = awake(design(**SMALL)), inputs()
    with torch.no_grad():
        kept = net.encode(mask)
        for s in (999, 500, 0):
            t = torch.full((3,), s)
            assert torch.equal(net(x, t, kept), net(x, t, net.encode(mask)))
        assert all(torch.equal(a, b) for a, b in zip(kept.guide, net.encode(mask).guide))


@pytest.mark.parametrize("design", DESIGNS)
def test_slices_of_a_batch_do_not_touch(design):
    net, (x, t, mask) = awake(design(**SMALL)), inputs()
    with torch.no_grad():
        together = net(x, t, net.encode(mask))
        alone = torch.cat([net(x[i:i + 1], t[i:i + 1], net.encode(mask[i:i + 1])) for i in range(3)])
    assert_near(together, alone)


def test_the_mask_encoder_gives_one_map_per_downsampling():
    encoder = MaskEncoder(17, 8, (1, 2, 3), blocks=2, groups=4)
    assert [tuple(m.shape) for m in encoder(torch.randn(2, 17, 16, 16))] == [(2, 8, 16, 16), (2, 16, 8, 8)]
    assert not any(isinstance(m, Attention) for m in encoder.modules())


def test_a_silent_mask_encoder_leaves_the_unconditional_network():
    "With one channel per group, so that widening does not regroup the norms."
    alone = {**SMALL, "groups": 9600}
    plain, guided = awake(UNet(in_channels=1, **alone)), MaskGuided(**alone)
    x, t, mask = inputs()
    with torch.no_grad():
        for a, b in zip(plain.parameters(), guided.unet.parameters(), strict=True):
            b.zero_()[tuple(slice(n) for n in a.shape)] = a
        silent = tuple(torch.zeros_like(m) for m in guided.encode(mask).guide)
        assert_near(guided.unet(x, t, silent), plain(x, t))


def test_the_guide_reaches_the_way_down_and_the_way_up():
    net, (x, t, mask) = awake(MaskGuided(**SMALL)), inputs()
    seen = {}
    net.unet.encoder[0].down.register_forward_pre_hook(lambda m, a: seen.update(down=a[0]))
    net.unet.decoder[-1].blocks[0].register_forward_pre_hook(lambda m, a: seen.update(up=a[0]))
    cond = net.encode(mask); net(x, t, cond)
    m0 = cond.guide[0]
    assert torch.equal(seen["down"][:, -m0.shape[1]:], m0) and torch.equal(seen["up"][:, -m0.shape[1]:], m0)


@pytest.mark.parametrize("design", [MaskGuided, EdgeGuided])
def test_the_gradient_reaches_the_mask_encoder_after_one_step(design):
    net, (x, t, mask) = design(**SMALL), inputs()
    opt, eps, norms = torch.optim.Adam(net.parameters(), 1e-3), torch.randn(3, 1, 16, 16), []
    for _ in range(2):
        opt.zero_grad(); F.mse_loss(net(x, t, net.encode(mask))[:, :1], eps).backward(); opt.step()
        norms.append(net.encoder.stem.weight.grad.norm().item())
    assert norms[0] == 0 < norms[1]


def test_the_edge_encoder_sees_edges_only():
    net, (_, _, mask) = EdgeGuided(**SMALL), inputs()
    renamed = (mask + 3) % 17
    a, b = net.encode(mask), net.encode(renamed)
    assert all(torch.equal(m, n) for m, n in zip(a.guide, b.guide)) and not torch.equal(a.beside, b.beside)


# --- variants and presets ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_survive_json(variant, name):
    p = preset(variant, name)
    assert Preset.from_dict(json.loads(json.dumps(p.to_dict()))) == p
    assert p.model.variant == variant and p.name == name


@pytest.mark.parametrize("variant", VARIANTS)
def test_demo_is_small(variant):
    model = preset(variant, "demo").model
    net, (x, t, mask) = build(model), inputs(2, model.size)
    assert n_params(build(model, training=True)) <= 1_000_000  # what is trained fits into 2 MB of half precision
    if VARIANTS[variant].family == "diffusion": assert not net(x, t, net.encode(mask)).any()
    else: assert net(net.encode(mask), torch.randn(2, net.noise_size)).shape == x.shape


def test_paper_is_the_paper():
    for variant in VARIANTS:
        p = preset(variant, "paper")
        if VARIANTS[variant].family == "diffusion": assert p.train == TrainConfig() and (p.train.batch, p.train.lr, p.train.max_steps, p.train.ema) == (16, 1e-4, 150_000, .9999)
        assert (p.model.size, p.model.T, p.model.schedule, p.model.target) == (256, 1000, "linear", "eps")
    rates = {v: {who: o.param_groups[0]["lr"] for who, o in build(preset(v, "demo").model, training=True).optimizers(preset(v, "paper").train.lr).items()} for v in ("pix2pix", "spade", "oasis")}
    for v, (net, judge) in dict(pix2pix=(5e-4, 5e-4), spade=(2.5e-4, 1e-3), oasis=(1e-4, 4e-4)).items(): assert rates[v] == pytest.approx(dict(net=net, judge=judge))
    assert all(preset(v, "paper").train.max_steps == round(300 * 26_069 / 16) for v in rates) and [preset(v, "paper").train.ema for v in rates] == [0, 0, .9999]
    assert [preset(v, "paper").model.encoding for v in ("conditional", "mask", "edge")] == ["scalar", "onehot", "scalar"]


@pytest.mark.parametrize("wrong, near", [
    (lambda: preset("maks"), "mask"), (lambda: preset("mask", "dmo"), "demo"), (lambda: ModelConfig(target="epsilon"), "eps"),
    (lambda: ModelConfig(encoding="one_hot"), "onehot"), (lambda: ModelConfig.from_dict({"chanels": 3}), "channels"),
    (lambda: Preset.from_dict({"train": {"batchsize": 1}}), "batch"),
])
def test_wrong_names_are_answered(wrong, near):
    with pytest.raises(CTDiffusionError, match=f"Did you mean '({near})"): wrong()


def test_a_variant_is_one_line(monkeypatch):
    monkeypatch.setitem(VARIANTS, "tiny", Variant(Conditional, "a test", model={"demo": dict(channels=8)}))
    assert n_params(build(preset("tiny").model)) < n_params(build(preset("conditional").model))


def test_build_reads_every_field_of_the_network():
    base = preset("mask").model
    for change in (dict(heads=2), dict(blocks=2), dict(encoder_channels=4), dict(encoder_blocks=2), dict(encoding="scalar"), dict(classes=5)):
        net = build(replace(base, **change))
        assert n_params(net) != n_params(build(base)) or "heads" in change
    assert build(replace(base, heads=2)).unet.middle[0].attend.heads == 2
