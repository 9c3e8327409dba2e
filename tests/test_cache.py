"What the mask alone decides: the twin network gives the answers of the original, whatever the widths and groups."
import pytest
import torch
from torch import nn

from ctdiffusion.models.cache import Half, first_known, remember
from ctdiffusion.models.conditioning import Conditional, EdgeGuided, MaskGuided
from ctdiffusion.models.sdm import SDM
from ctdiffusion.models.unet import GroupNorm
from ctdiffusion.synthesis.synthesis import load, synthesize_slices
from ctdiffusion.training import step
from near import assert_near

DESIGNS = dict(conditional=Conditional, mask=MaskGuided, edge=EdgeGuided)

def awake(net):
    "No weight is zero, so that nothing is equal for want of a signal."
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.05)
    return net.requires_grad_(False).eval()

def blobs(n=3, size=32, classes=17):
    g = torch.Generator().manual_seed(n)
    return torch.randint(0, classes, (n, size // 4, size // 4), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)

@pytest.mark.parametrize("groups, encoder_channels", [(1, None), (4, None), (8, 12), (32, None), (8, 20)])
@pytest.mark.parametrize("mult, blocks", [((1, 2), 1), ((1, 1, 3), 2)])
@pytest.mark.parametrize("design", DESIGNS)
def test_the_twin_answers_alike(design, mult, blocks, groups, encoder_channels):
    "In float64 (whose norms round to float32) to 1e-6: a wrong channel, group or bias would show at once."
    torch.manual_seed(0)
    net = awake(DESIGNS[design](32, channels=16, mult=mult, blocks=blocks, attention=(8,), groups=groups, encoder_channels=encoder_channels)).double()
    mask, xt = blobs(), torch.randn(3, 1, 32, 32, dtype=torch.float64)
    cond = net.encode(mask)
    fast, left = remember(net, cond)
    for t in (0, 500, 999):
        out, again = net(xt, torch.full((3,), t), cond), fast(xt, torch.full((3,), t), left)
        assert out.abs().max() > 0.01
        assert_near(again, out, 1e-5)

@pytest.mark.parametrize("style", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["conditional-demo", "mask-demo", "edge-demo"])
def test_embedded_models_to_single_precision(name, style):
    model = load(name, "cpu")
    net, mask, g = model.net.to(memory_format=style), blobs(2, 64), torch.Generator().manual_seed(1)
    cond = net.encode(mask)
    fast, left = remember(net, cond)
    for t in (10, 400, 990):
        xt = torch.randn(2, 1, 64, 64, generator=g)
        at = torch.full((2,), t)
        assert_near(fast(xt, at, left), net(xt, at, cond), 3e-5)

def test_something_is_kept_where_it_can_be():
    "Groups that end where the mask begins leave none of its channels to the steps."
    net = awake(MaskGuided(32, channels=16, mult=(1, 1), blocks=1, attention=(), groups=3))
    fast, left = remember(net, net.encode(blobs()))
    assert left.guide == (None,) and fast.unet.encoder[0].down.weight.shape[1] == 16   # gcd(3, 48) = 3 groups of 16
    first = fast.unet.decoder[1].blocks[0].res
    assert isinstance(first.skip, Half) and first.inner[2].weight.shape[1] == 32 and first.inner[0].num_groups == 2

def test_the_original_keeps_its_parts_and_its_gradients():
    net = awake(EdgeGuided(32, channels=16, mult=(1, 2), blocks=1, attention=()))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    remember(net, net.encode(blobs()))
    assert not any(isinstance(m, Half) for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.requires_grad_(True)
    net(torch.randn(3, 1, 32, 32), torch.zeros(3), net.encode(blobs())).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())

def test_room_is_a_limit():
    net = awake(MaskGuided(32, channels=16, mult=(1, 2, 2), blocks=1, attention=(), groups=8))
    cond = net.encode(blobs())
    sizes = {}
    for room in (0, 300_000, 2**30):
        fast, left = remember(net, cond, room)
        sizes[room] = sum(m.map.nbytes for m in fast.modules() if isinstance(m, Half))
        assert sizes[room] <= room
        xt = torch.ones(3, 1, 32, 32)
        assert_near(fast(xt, torch.zeros(3), left), net(xt, torch.zeros(3), cond))
    assert 0 == sizes[0] < sizes[300_000] < sizes[2**30]

def test_the_border_of_the_groups():
    for n in (24, 40, 96, 384):
        for groups in (1, 4, 8, 32):
            norm = GroupNorm(n, groups)
            size = n // norm.num_groups
            for known in (1, 4, 8, n // 3):
                at = first_known(norm, known)
                assert at % size == 0 and at >= n - known and at - (n - known) < size

def test_other_networks_are_left_alone():
    net = SDM(32, channels=16, mult=(1, 1), blocks=1, attention=(), groups=4, hidden=8)
    cond = net.encode(blobs())
    assert remember(net, cond) == (net, cond)

def test_synthesis_remembers(monkeypatch):
    "The samplers get the twin, and the slices are those of the original to a grey value."
    model, masks, seen = load("mask-demo", "cpu"), blobs(2, 64).byte().numpy(), []
    kept = step.remember
    monkeypatch.setattr(step, "remember", lambda net, cond: seen.append(kept(net, cond)) or seen[-1])
    fast = synthesize_slices(model, masks, sampler="dpm10")
    assert any(isinstance(m, Half) for m in seen[0][0].modules())
    monkeypatch.setattr(step, "remember", lambda net, cond: (net, cond))
    slow = synthesize_slices(model, masks, sampler="dpm10")
    assert abs(fast - slow).max() <= 1.01 / 255
