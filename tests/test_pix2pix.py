"Pix2Pix and the rules that every GAN of the project keeps: counts, losses by hand, gradients, seeds."
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.models.pix2pix import Adversarial, Pix2Pix, Pix2PixDiscriminator, Pix2PixGenerator, bce, drop
from ctdiffusion.models.unet import n_params
from near import assert_near

TINY = dict(size=32, channels=4, widest=4, judge_channels=4)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture
def method(): return Pix2Pix(64, channels=4, widest=4, judge_channels=4)


def cards(method, n=3, size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(17, (n, size, size), generator=g, dtype=torch.uint8), torch.rand(n, 1, size, size, generator=g) * 2 - 1, torch.randn(n, method.net.noise_size, generator=g)


# --- the networks ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, expected", [
    (lambda: Pix2PixGenerator(), 54_424_193),
    (lambda: Pix2PixGenerator(classes=1), 54_407_809),
    (lambda: Pix2PixDiscriminator(), 2_780_993),
    (lambda: Pix2PixDiscriminator(classes=1), 2_764_609),
    (lambda: Pix2PixDiscriminator(classes=5), 2_768_705),
], ids=["17 to 1", "1 to 1", "18 in", "2 in", "6 in"])
def test_parameter_counts_of_the_original(make, expected):
    with torch.device("meta"): assert n_params(make()) == expected


@pytest.mark.parametrize("size, widths, coins", [
    (256, [64, 128, 256, 512, 512, 512, 512, 512], 512 * (16 + 64 + 256)),
    (128, [64, 128, 256, 512, 512, 512, 512], 512 * (16 + 64)),
    (64, [64, 128, 256, 512, 512, 512], 512 * 16),
    (16, [64, 128, 256, 512], 0),
])
def test_levels_and_coins_follow_the_size(size, widths, coins):
    with torch.device("meta"):
        net = Pix2PixGenerator(size)
        assert net(net.encode(torch.zeros(2, size, size)), torch.zeros(2, coins)).shape == (2, 1, size, size)
    assert [layer[0 if k == 0 else 1].out_channels for k, layer in enumerate(net.downs)] == widths
    assert net.noise_size == coins


def test_norms_and_biases_are_where_the_original_has_them():
    with torch.device("meta"): net, judge = Pix2PixGenerator(), Pix2PixDiscriminator()
    has_norm = [[any(isinstance(m, nn.BatchNorm2d) for m in layer) for layer in part] for part in (net.downs, net.ups)]
    assert has_norm == [[False, *[True] * 6, False], [*[True] * 7, False]]
    assert [name for name, p in net.named_parameters() if name.endswith("bias") and p.dim() == 1 and "ups.7" in name] == ["ups.7.1.bias"]
    convs = [m for m in judge if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.stride[0], c.bias is not None) for c in convs] == [(64, 2, True), (128, 2, False), (256, 2, False), (512, 1, False), (1, 1, True)]


@pytest.mark.parametrize("size", [96, 4, 0, 100])
def test_a_size_that_cannot_be_halved_to_one_pixel_is_refused(size):
    with pytest.raises((CTDiffusionError, ValueError)): Pix2PixGenerator(size)


def test_the_start_is_small_and_normal():
    net = Pix2PixGenerator(64)
    weights = torch.cat([m.weight.detach().flatten() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))])
    scales = torch.cat([m.weight.detach() for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert weights.std().item() == pytest.approx(.02, rel=.01) and abs(weights.mean()) < 1e-4
    assert scales.std().item() == pytest.approx(.02, rel=.1) and scales.mean().item() == pytest.approx(1, abs=.01)


def test_output_is_in_range_and_follows_the_mask(method):
    mask, _, noise = cards(method)
    out = method.net(method.net.encode(mask), noise)
    assert out.shape == (3, 1, 64, 64) and out.abs().max() <= 1
    assert not torch.equal(out, method.net(method.net.encode(mask.flip(0)), noise))


# --- dropout is the noise ------------------------------------------------------------------------------------------

def test_drop_agrees_with_dropout_in_mean_and_scale():
    x, noise = torch.ones(1, 10, 100, 100), torch.randn(1, 100_000)
    kept = drop(x, noise)
    assert set(kept.unique().tolist()) == {0., 2.} and kept.mean().item() == pytest.approx(1, abs=.02)
    assert torch.equal(kept.flatten() > 0, noise.flatten() > 0)


def test_noise_decides_and_nothing_else(method):
    mask, _, noise = cards(method)
    net, cond = method.net.eval(), method.net.encode(mask)
    with torch.no_grad():
        first, state = net(cond, noise), torch.get_rng_state()
        assert torch.equal(net(cond, noise), first) and torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(net(cond, noise.flip(0)), first) and not torch.equal(net(cond), first)
        assert torch.equal(net(cond, torch.ones_like(noise)), net(cond, 2 * torch.ones_like(noise)))


def test_a_slice_does_not_depend_on_its_batch(method):
    mask, _, noise = cards(method, n=4)
    net = method.net
    net(net.encode(mask), noise)  # batch norms collect something
    with torch.no_grad():
        together = net.eval()(net.encode(mask), noise)
        for k in range(4): assert_near(net(net.encode(mask[k:k + 1]), noise[k:k + 1])[0], together[k])


# --- losses --------------------------------------------------------------------------------------------------------

def test_bce_by_hand():
    logits = torch.tensor([0., math.log(3), -math.log(3)])
    assert bce(logits, True).item() == pytest.approx(-(math.log(.5) + math.log(.75) + math.log(.25)) / 3, rel=1e-6)
    assert bce(logits, False).item() == pytest.approx(bce(-logits, True).item(), rel=1e-6)
    assert bce(torch.tensor([1000.]), False).item() == pytest.approx(1000) and bce(torch.tensor([1000.]), True).item() == 0


def test_losses_are_the_terms_of_the_paper(method):
    mask, x0, noise = cards(method)
    method.eval()
    cond = method.net.encode(mask)
    fake = method.net(cond, noise)
    judged, terms = method.losses("judge", mask, x0, noise), method.losses("net", mask, x0, noise)
    assert list(judged) == ["real", "fake"] and list(terms) == ["fool", "l1"]
    real_logits, fake_logits = method.judge(x0, cond), method.judge(fake, cond)
    torch.testing.assert_close(judged["real"], -F.logsigmoid(real_logits).mean() / 2)
    torch.testing.assert_close(judged["fake"], -F.logsigmoid(-fake_logits).mean() / 2)
    torch.testing.assert_close(terms["fool"], -F.logsigmoid(fake_logits).mean())
    torch.testing.assert_close(terms["l1"], 100 * (fake - x0).abs().mean())


def test_the_fake_is_the_same_for_both_players(method):
    mask, x0, noise = cards(method)
    seen = []
    method.judge.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for who in method.order: method.losses(who, mask, x0, noise)
    assert torch.equal(seen[0], x0) and torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("who, other", [("net", "judge"), ("judge", "net")])
def test_gradient_reaches_every_parameter_of_the_mover(method, who, other):
    mask, x0, noise = cards(method)
    sum(method.losses(who, mask, x0, noise).values()).backward(inputs=list(getattr(method, who).parameters()))
    assert [n for n, p in getattr(method, who).named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in getattr(method, other).parameters())


def test_the_judge_does_not_teach_the_net(method):
    losses = method.losses("judge", *cards(method))
    assert torch.autograd.grad(sum(losses.values()), list(method.net.parameters()), allow_unused=True) == (None,) * len(list(method.net.parameters()))


# --- the rules -----------------------------------------------------------------------------------------------------

def test_order_optimizers_and_schedule(method):
    assert method.order == ("judge", "net") and method.notes == {}
    opts = method.optimizers(5e-4)
    assert list(opts) == ["net", "judge"] and all(isinstance(o, torch.optim.Adam) for o in opts.values())
    assert all((o.defaults["lr"], o.defaults["betas"]) == (5e-4, (.5, .999)) for o in opts.values())
    for who, o in opts.items(): assert [id(p) for p in o.param_groups[0]["params"]] == [id(p) for p in getattr(method, who).parameters()]
    factors = [method.lr_factor(e, 300) for e in range(300)]
    assert factors[:150] == [1] * 150 and factors[150] == pytest.approx(1 - 1 / 151) and factors[299] == pytest.approx(1 / 151)
    assert all(a >= b for a, b in zip(factors, factors[1:])) and method.lr_factor(0, 1) > 0


def test_adversarial_asks_its_children():
    base = Adversarial(nn.Linear(1, 1), nn.Linear(1, 1))
    assert base.lr_factor(7, 10) == 1
    for who in ("net", "judge"):
        with pytest.raises(NotImplementedError): base.losses(who, None, None)


def test_same_seed_same_game():
    def game():
        torch.manual_seed(5)
        method = Pix2Pix(**TINY)
        opts = method.optimizers(1e-3)
        for step in range(3):
            for who in method.order:
                opts[who].zero_grad()
                sum(method.losses(who, *cards(method, size=32, seed=step)).values()).backward(inputs=list(getattr(method, who).parameters()))
                opts[who].step()
        return method.state_dict()
    a, b = game(), game()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_is_exact(method):
    def step(method, opts, seed):
        for who in method.order:
            opts[who].zero_grad()
            sum(method.losses(who, *cards(method, seed=seed)).values()).backward(inputs=list(getattr(method, who).parameters()))
            opts[who].step()
    opts = method.optimizers(1e-3)
    step(method, opts, 0)
    again = Pix2Pix(64, channels=4, widest=4, judge_channels=4)
    again.load_state_dict(method.state_dict())
    more = again.optimizers(1e-3)
    for who in more: more[who].load_state_dict(deepcopy(opts[who].state_dict()))
    step(method, opts, 1); step(again, more, 1)
    assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), again.state_dict().values()))
