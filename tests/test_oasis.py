"OASIS: parameter counts, losses by hand, LabelMix, noise, and batch statistics for averaged weights."
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.models.oasis import (OASIS, OASISDiscriminator, OASISGenerator, blend, class_weights, coin_mask, fake_loss, labelmix_loss, real_loss,
    refresh_batchnorm)
from ctdiffusion.models.spade import perceptual
from ctdiffusion.models.unet import n_params
from near import assert_near

SMALL = dict(channels=4, doublings=2, hidden=6, noise_size=5, judge_channels=8, judge_halvings=3)


def coins(seed=0): return torch.Generator().manual_seed(seed)


def small(seed=0, **kw):
    torch.manual_seed(seed)
    return OASIS(16, **SMALL, **kw)


@pytest.fixture
def data():
    g = coins(7)
    return torch.randint(17, (3, 16, 16), generator=g, dtype=torch.uint8), torch.randn(3, 1, 16, 16, generator=g).tanh(), torch.randn(3, 5, generator=g)


# --- networks ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, count", [
    (lambda: OASISGenerator(out_channels=3), 70_609_859), (lambda: OASISGenerator(classes=151, out_channels=3), 74_314_691),
    (lambda: OASISDiscriminator(in_channels=3), 22_250_194)])
def test_parameters_of_the_reference(make, count):
    with torch.device("meta"): assert n_params(make()) == count


def test_paper_preset_on_one_channel():
    with torch.device("meta"), torch.no_grad():
        game = OASIS()
        assert (n_params(game.net), n_params(game.judge)) == (70_608_705, 22_247_634)
        fake = game.net(game.net.encode(torch.zeros(2, 256, 256, dtype=torch.uint8)), torch.zeros(2, 64))
        assert fake.shape == (2, 1, 256, 256) and game.judge(fake).shape == (2, 18, 256, 256)
    assert game.net.start == 8 and game.net.noise_size == 64


def test_spectral_norm_everywhere_but_the_last():
    game = small()
    bare = {n for n, m in game.judge.named_modules() if isinstance(m, nn.Conv2d) and not hasattr(m, "parametrizations")}
    assert bare == {"last"}
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)) for m in game.judge.modules())


def test_every_normalisation_sees_mask_and_noise():
    convs = [m for m in small().net.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 17 + 5]
    norms = [m for m in small().net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == len(norms) + 1


@pytest.mark.parametrize("size", [18, 20])
def test_sizes_that_do_not_halve(size):
    with pytest.raises(CTDiffusionError, match="a multiple of"): OASIS(size, **SMALL)


def test_eval_is_independent_of_the_batch(data):
    mask, x0, noise = data
    game = small(gain=1.).eval()
    with torch.no_grad():
        fake = game.net(game.net.encode(mask), noise)
        for k in range(3):
            assert_near(game.net(game.net.encode(mask[[k]]), noise[[k]]), fake[[k]])
            assert_near(game.judge(x0[[k]]), game.judge(x0)[[k]])


def test_noise_matters_and_none_is_zero(data):
    mask, _, noise = data
    net = small(gain=1.).net.eval()
    cond = net.encode(mask)
    with torch.no_grad():
        assert torch.equal(net(cond), net(cond, torch.zeros(3, 5)))
        assert (net(cond, noise) - net(cond, -noise)).abs().mean() > 1e-4
        assert net(cond, noise).abs().max() <= 1


# --- losses -----------------------------------------------------------------------------------------------------------

def test_class_weights_by_hand():
    w = class_weights(torch.tensor([[[0, 0], [0, 16]], [[5, 5], [0, 0]]], dtype=torch.uint8))
    assert torch.allclose(w, torch.tensor([[[8 / 15, 8 / 15], [8 / 15, 8 / 3]], [[8 / 6, 8 / 6], [8 / 15, 8 / 15]]]))
    assert w.isfinite().all() and math.isclose(w.mean().item(), 1, rel_tol=1e-6)


def test_background_is_a_class_like_any_other():
    logits = torch.zeros(1, 18, 4, 4, requires_grad=True)
    real_loss(logits, torch.zeros(1, 4, 4, dtype=torch.long)).backward()
    assert torch.allclose(logits.grad[0, 1], torch.full((4, 4), (1 / 18 - 1) / 16))


def test_losses_of_an_ignorant_and_of_a_sure_judge():
    mask = torch.tensor([[[0, 3], [3, 3]]])
    assert math.isclose(real_loss(torch.zeros(1, 18, 2, 2), mask).item(), math.log(18), rel_tol=1e-6)
    assert math.isclose(fake_loss(torch.zeros(1, 18, 2, 2)).item(), math.log(18), rel_tol=1e-6)
    sure = torch.zeros(1, 18, 2, 2); sure[:, 0] = 50
    assert fake_loss(sure) < 1e-6 and math.isclose(real_loss(sure, mask).item(), 50, rel_tol=1e-5)
    right = torch.zeros(1, 18, 2, 2).scatter_(1, mask[:, None] + 1, 50.)
    assert real_loss(right, mask) < 1e-6


def test_half_precision_logits_are_summed_in_float32():
    logits, mask = torch.randn(2, 18, 8, 8, generator=coins()), torch.randint(17, (2, 8, 8), generator=coins())
    half = logits.bfloat16()
    assert real_loss(half, mask).dtype == fake_loss(half).dtype == torch.float32
    assert torch.equal(real_loss(half, mask), real_loss(half.float(), mask))


def test_coins_are_one_per_class_for_the_whole_batch(data):
    mask, draw = data[0], coins()
    tosses = torch.stack([coin_mask(mask, 17, draw) for _ in range(200)])
    assert tosses.shape[1:] == (3, 1, 16, 16) and set(tosses.unique().tolist()) == {0., 1.}
    for k in range(17):
        per_toss = tosses[:, (mask == k)[:, None]]
        assert (per_toss == per_toss[:, :1]).all() and 70 < per_toss[:, 0].sum() < 130


def test_labelmix_by_hand():
    M = torch.tensor([1., 0.]).view(1, 1, 1, 2)
    real, fake, mixed = torch.full((1, 18, 1, 2), 3.), torch.zeros(1, 18, 1, 2), torch.full((1, 18, 1, 2), 1.)
    assert labelmix_loss(mixed, real, fake, M) == (2 ** 2 + 1 ** 2) / 2
    assert blend(M, real, fake)[0, 0, 0].tolist() == [3, 0]
    assert labelmix_loss(blend(M, real, fake), real, fake, M) == 0


# --- the contest ------------------------------------------------------------------------------------------------------

def test_terms_are_weighted_and_complete(data):
    mask, x0, noise = data
    game = small(gain=1.).eval()
    with torch.no_grad():
        fake, M = game.net(game.net.encode(mask), noise), coin_mask(mask, 17, coins())
        real, false, mixed = game.judge(x0), game.judge(fake), game.judge(blend(M, x0, fake))
        bill, own = game.losses("judge", mask, x0, noise, coins()), game.losses("net", mask, x0, noise)
    expected = dict(real=real_loss(real, mask), fake=fake_loss(false), labelmix=10 * labelmix_loss(mixed, real, false, M))
    assert set(bill) == set(expected) and set(own) == {"fool"}
    for name, value in expected.items(): torch.testing.assert_close(bill[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own["fool"], real_loss(false, mask))


def test_vgg_term_is_off_unless_asked_for(data):
    mask, x0, noise = data
    game = small().eval()
    assert game.vgg is None and game.notes["vgg"] == "off, as asked"
    game.vgg = lambda x: [x] * 5
    with torch.no_grad(): own, fake = game.losses("net", mask, x0, noise), game.net(game.net.encode(mask), noise)
    torch.testing.assert_close(own["vgg"], 10 * perceptual(game.vgg, fake, x0))


@pytest.mark.parametrize("who, other", [("net", "judge"), ("judge", "net")])
def test_gradient_reaches_every_parameter(data, who, other):
    game = small(gain=1.)
    getattr(game, other).requires_grad_(False)
    sum(game.losses(who, *data, coins()).values()).backward()
    assert [n for n, p in getattr(game, who).named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in getattr(game, other).parameters())


def test_two_seeded_games_are_one(data):
    def play():
        game, draw = small(), coins()
        optimizers = game.optimizers(1e-4)
        for _ in range(2):
            for who in game.order:
                optimizers[who].zero_grad(); sum(game.losses(who, *data, draw).values()).backward(); optimizers[who].step()
        return game.state_dict()
    one = play()
    torch.rand(1)
    two = play()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_losses_leave_the_global_generator_alone(data):
    game = small()
    before = torch.get_rng_state()
    for who in game.order: game.losses(who, *data, coins())
    assert torch.equal(before, torch.get_rng_state())


def test_recipe():
    game = small()
    assert game.order == ("net", "judge") and {game.lr_factor(e, 300) for e in range(300)} == {1.}
    groups = {who: o.param_groups[0] for who, o in game.optimizers(1e-4).items()}
    assert (groups["net"]["lr"], groups["judge"]["lr"]) == (1e-4, 4e-4) and all(g["betas"] == (0., .999) for g in groups.values())


def test_gain_scales_the_start_and_not_the_spectral_convolutions():
    a, b = small(), small(gain=1.)
    assert_near(a.judge.downs[1].inner[1].weight, b.judge.downs[1].inner[1].weight)
    assert_near(50 * a.net.last.weight, b.net.last.weight)


def test_buffers_travel_in_the_state_dict(data):
    mask, x0, noise = data
    game, other = small(gain=1.), small(seed=1)
    for _ in range(3): game.losses("judge", mask, x0, noise, coins())
    other.load_state_dict(game.state_dict())
    with torch.no_grad():
        assert torch.equal(game.eval().judge(x0), other.eval().judge(x0))
        assert torch.equal(game.net(game.net.encode(mask), noise), other.net(other.net.encode(mask), noise))


# --- statistics for averaged weights ----------------------------------------------------------------------------------

def batches(count):
    draw = coins(3)
    for _ in range(count): yield torch.randint(17, (4, 16, 16), generator=draw), torch.randn(4, 5, generator=draw)


def test_refresh_is_pure_and_repeatable():
    net = small(gain=1.).net.eval()
    before = deepcopy(net.state_dict())
    one, two = refresh_batchnorm(net, batches(3)), refresh_batchnorm(net, batches(3))
    assert set(one) == {k for k, _ in net.named_buffers()} and all(torch.equal(one[k], two[k]) for k in one)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.training and all(m.momentum == .1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_refreshed_statistics_are_those_of_the_batches():
    "The first norm sees the first convolution, whose weights no batch changes: mean and variance can be had directly."
    net = small(gain=1.).net
    fresh, seen = refresh_batchnorm(net, batches(3)), []
    hook = net.first.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    for mask, noise in batches(3): net(net.encode(mask), noise)
    hook.remove()
    name = next(n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(fresh[f"{name}.running_mean"], torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(fresh[f"{name}.running_var"], torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))


def test_refresh_forgets_what_was_collected_before():
    net = small(gain=1.).net
    spoilt = deepcopy(net)
    for m in spoilt.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.fill_(9.); m.running_var.fill_(100.)
    one, two = refresh_batchnorm(net, batches(2)), refresh_batchnorm(spoilt, batches(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    spoilt.load_state_dict(one, strict=False)
    assert all(torch.equal(v, one[k]) for k, v in spoilt.named_buffers())
