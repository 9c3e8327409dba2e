"SPADE: counts, the norm that hears the mask, losses by hand, VGG19's weights, exact resume with spectral norm."
import hashlib
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.models.conditioning import one_hot_map
from ctdiffusion.models.pix2pix import Adversarial
from ctdiffusion.models.spade import (SPADE, VGG19, VGG_URL, PatchCritic, SPADEBlock, SPADEDiscriminator, SPADEGenerator, SpatialNorm,
    digest_of, hinge, load_vgg, matching, perceptual, spectral)
from ctdiffusion.models.unet import conv3, n_params
from near import assert_near

TINY = dict(size=16, channels=2, doublings=2, hidden=4, judge_channels=2, vgg="off")


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(scope="module")
def paper():
    "Generator and judge at the size of the paper; shapes only."
    with torch.device("meta"): return SPADEGenerator(), SPADEDiscriminator()


def cards(n=3, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(17, (n, size, size), generator=g, dtype=torch.uint8), torch.rand(n, 1, size, size, generator=g) * 2 - 1


def vgg_weights(width=2, scale=1.):
    "Random weights in the shape of torchvision's file, but narrow, with a key that is not wanted."
    weights, i = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for n in sum(VGG19.plan, ()):
        weights |= {f"features.{n}.weight": scale * torch.randn(width, i, 3, 3), f"features.{n}.bias": torch.rand(width)}
        i = width
    return weights


def vgg_file(folder, weights, name=None):
    path = folder / "vgg.pth"
    torch.save(weights, path)
    return path.rename(folder / (name or f"vgg19-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


# --- the networks ------------------------------------------------------------------------------------------------

def test_parameter_counts_of_the_original(paper):
    with torch.device("meta"): (net, judge), rgb = paper, SPADEDiscriminator(classes=19)
    assert n_params(net) == 92_477_761 == 92_478_915 - 2 * (64 * 9 + 1)
    assert n_params(rgb) == 5_562_498 and n_params(judge) == 5_558_402


def test_shapes_at_256(paper):
    net, judge = paper
    with torch.device("meta"):
        mask = torch.zeros(2, 256, 256)
        image = net(net.encode(mask))
        maps = judge(image, net.encode(mask))
    assert image.shape == (2, 1, 256, 256) and net.start == 8
    assert [tuple(scale[-1].shape) for scale in maps] == [(2, 1, 35, 35), (2, 1, 19, 19)]
    assert [[m.shape[1] for m in scale] for scale in maps] == [[64, 128, 256, 512, 1]] * 2


def test_widths_doublings_and_shortcuts(paper):
    with torch.device("meta"): net, small = paper[0], SPADEGenerator(64, channels=8, doublings=3)
    assert [b.convs[1].out_channels for b in net.blocks] == [1024, 1024, 1024, 512, 256, 128, 64]
    assert [b.convs[1].out_channels for b in small.blocks] == [32, 32, 32, 16, 8]
    assert [b.short is not None for b in net.blocks] == [False, False, False, True, True, True, True]
    assert net.blocks[3].convs[0].out_channels == 512 and net.blocks[3].short[1].bias is None
    with pytest.raises(CTDiffusionError): SPADEGenerator(100)


def test_spectral_norm_is_where_the_original_has_it():
    net, judge = SPADEGenerator(16, channels=2, doublings=2, hidden=4), SPADEDiscriminator(channels=2)
    normed = {n.split(".parametrizations")[0] for n, _ in [*net.named_parameters(), *judge.named_parameters()] if "parametrizations" in n}
    assert {n for n in normed if n.startswith("blocks")} == {f"blocks.{k}.{c}" for k, b in enumerate(net.blocks) for c in ("convs.0", "convs.1", *(["short.1"] if b.short else []))}
    assert {n for n in normed if n.startswith("critics")} == {f"critics.{s}.layers.{k}.0" for s in (0, 1) for k in (1, 2, 3)}


def test_a_normed_layer_stretches_by_one():
    layer = spectral(conv3(6, 6))
    for _ in range(50): layer(torch.zeros(1, 6, 4, 4))
    assert torch.linalg.svdvals(layer.weight.flatten(1))[0].item() == pytest.approx(1, abs=1e-3)


def test_a_slice_does_not_depend_on_its_batch():
    net, (mask, _) = SPADE(**TINY).net, cards(4)
    net(net.encode(mask))
    with torch.no_grad():
        together = net.eval()(net.encode(mask))
        assert torch.equal(net(net.encode(mask), torch.zeros(4, net.noise_size)), together) and together.abs().max() <= 1
        for k in range(4): assert_near(net(net.encode(mask[k:k + 1]))[0], together[k])


# --- the norm ------------------------------------------------------------------------------------------------------

def test_plain_label_maps_are_washed_away_by_a_norm_and_told_apart_by_spade():
    masks = torch.stack([torch.full((16, 16), 6), torch.full((16, 16), 1)])
    conv = nn.Conv2d(17, 4, 3, padding=1, padding_mode="replicate")
    with torch.no_grad():
        washed = nn.InstanceNorm2d(4)(conv(one_hot_map(masks)))
        out = SpatialNorm(4, 17, 8)(washed, one_hot_map(masks))[..., 2:-2, 2:-2]
    assert washed.abs().max() < 1e-3 and (out[0] - out[1]).abs().mean() > .01


def test_the_norm_is_batch_norm_times_one_plus_gamma_plus_beta():
    norm, x, cond = SpatialNorm(4, 17, 8), 3 + 2 * torch.randn(3, 4, 8, 8), one_hot_map(cards(3, 16)[0])
    gamma, beta = norm.modulation(cond, (8, 8))
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(norm(x, cond), (x - mean) / (var + 1e-5).sqrt() * (1 + gamma) + beta, rtol=1e-4, atol=1e-5)
    assert not any("norm." in n for n, _ in norm.named_parameters())


def test_block_shortcut_is_the_identity_where_widths_agree():
    block, x, cond = SPADEBlock(4, 4, 17, 8), torch.randn(2, 4, 8, 8), one_hot_map(cards(2, 8)[0])
    for conv in block.convs: nn.init.zeros_(conv.bias)
    block.convs[1] = nn.Conv2d(4, 4, 3, padding=1)
    nn.init.zeros_(block.convs[1].weight); nn.init.zeros_(block.convs[1].bias)
    assert torch.equal(block(x, cond), x)


# --- losses --------------------------------------------------------------------------------------------------------

def test_hinge_by_hand():
    scores = torch.tensor([[3., .25], [-.5, -2.]])
    assert hinge(scores, True).item() == pytest.approx((0 + .75 + 1.5 + 3) / 4)
    assert hinge(scores, False).item() == pytest.approx((4 + 1.25 + .5 + 0) / 4)


def test_matching_by_hand_and_without_gradient_into_the_real():
    fake, real = torch.full((2, 2), 1., requires_grad=True), torch.full((2, 2), 4., requires_grad=True)
    scores = torch.tensor([100.])
    loss = matching([[fake, fake, scores], [fake, scores]], [[real, real * 0, -scores], [real, -scores]])
    assert loss.item() == pytest.approx((3 + 1 + 3) / 2)
    loss.backward()
    assert real.grad is None and fake.grad is not None


def test_losses_are_the_terms_of_the_paper():
    method, (mask, x0) = SPADE(**TINY).eval(), cards()
    cond = method.net.encode(mask)
    image = method.net(cond)
    fake, real = method.judge(image, cond), method.judge(x0, cond)
    terms, judged = method.losses("net", mask, x0), method.losses("judge", mask, x0)
    assert list(terms) == ["fool", "features"] and list(judged) == ["real", "fake"]
    close = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["fool"], -(fake[0][-1].mean() + fake[1][-1].mean()) / 2, **close)
    torch.testing.assert_close(terms["features"], 10 * sum((a - b).abs().mean() for f, r in zip(fake, real) for a, b in zip(f[:4], r[:4])) / 2, **close)
    torch.testing.assert_close(judged["real"], sum((1 - r[-1]).clamp(min=0).mean() for r in real) / 2, **close)
    torch.testing.assert_close(judged["fake"], sum((1 + f[-1]).clamp(min=0).mean() for f in fake) / 2, **close)


@pytest.mark.parametrize("who", ["net", "judge"])
@pytest.mark.parametrize("with_vgg", [False, True])
def test_gradient_reaches_every_parameter_of_the_mover(who, with_vgg):
    method, (mask, x0) = SPADE(**TINY), cards()
    if with_vgg: method.vgg = VGG19(vgg_weights())
    names, params = zip(*getattr(method, who).named_parameters())
    # term by term: at the start real and fake pull a last bias with equal force, and the sum of both is nothing
    grads = [torch.autograd.grad(term, params, retain_graph=True, allow_unused=True) for term in method.losses(who, mask, x0).values()]
    assert [n for n, *g in zip(names, *grads) if not any(x is not None and x.any() for x in g)] == []
    assert all(p.grad is None for p in method.parameters())


# --- the recipe ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ttur, expected", [
    (True, dict(net=(2.5e-4, (0., .9)), judge=(1e-3, (0., .9)))),
    (False, dict(net=(5e-4, (.5, .999)), judge=(5e-4, (.5, .999)))),
], ids=["ttur", "no_ttur"])
def test_optimizers_and_schedule(ttur, expected):
    method = SPADE(**TINY, ttur=ttur)
    assert isinstance(method, Adversarial) and method.order == ("net", "judge") and method.net.noise_size == 0
    assert {who: (o.defaults["lr"], o.defaults["betas"]) for who, o in method.optimizers(5e-4).items()} == expected
    assert {method.lr_factor(e, 300) for e in range(300)} == {1.}
    assert SPADE(**TINY).pace == dict(net=.5, judge=2.) and Adversarial.pace == dict(net=1., judge=1.)


def test_resume_is_exact_and_a_copy_is_a_copy():
    def step(method, opts, seed):
        for who in method.order:
            opts[who].zero_grad()
            sum(method.losses(who, *cards(seed=seed)).values()).backward(inputs=list(getattr(method, who).parameters()))
            opts[who].step()
    torch.manual_seed(1)
    method = SPADE(**TINY)
    opts = method.optimizers(1e-3)
    for seed in range(3): step(method, opts, seed)
    assert set(deepcopy(method).state_dict()) == set(method.state_dict())
    torch.manual_seed(2)
    again = SPADE(**TINY)
    again.load_state_dict(deepcopy(method.state_dict()))
    more = again.optimizers(1e-3)
    for who in more: more[who].load_state_dict(deepcopy(opts[who].state_dict()))
    for seed in range(3, 6): step(method, opts, seed); step(again, more, seed)
    a, b = method.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and any(k.endswith("_u") for k in a)


# --- VGG19 ---------------------------------------------------------------------------------------------------------

def test_vgg_has_the_first_thirteen_convolutions_and_five_taps():
    widths = {0: 64, 5: 128, 10: 256, 19: 512, 28: 512}
    weights, i = {}, 3
    with torch.device("meta"):
        for block in VGG19.plan:
            for n in block:
                o = widths[block[0]]
                weights |= {f"features.{n}.weight": torch.zeros(o, i, 3, 3), f"features.{n}.bias": torch.zeros(o)}
                i = o
        taps = VGG19(weights)(torch.zeros(2, 1, 256, 256))
    assert len(sum(VGG19.plan, ())) == 13 and sum(w.numel() for w in weights.values()) == 12_944_960
    assert [tuple(t.shape[1:]) for t in taps] == [(64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32), (512, 16, 16)]


def test_vgg_agrees_with_plain_layers():
    weights, x = vgg_weights(), torch.randn(2, 1, 32, 32)
    layers = {n: nn.Sequential(nn.Conv2d(3 if n == 0 else 2, 2, 3, padding=1), nn.ReLU()) for n in sum(VGG19.plan, ())}
    for n, layer in layers.items(): layer[0].load_state_dict(dict(weight=weights[f"features.{n}.weight"], bias=weights[f"features.{n}.bias"]))
    h, expected = x.repeat(1, 3, 1, 1), []
    for n in range(29):
        if n in layers: h = layers[n](h)
        elif n in (4, 9, 18, 27): h = nn.MaxPool2d(2)(h)
        if n in (0, 5, 10, 19, 28): expected.append(h)
    for ours, theirs in zip(VGG19(weights)(x), expected, strict=True): torch.testing.assert_close(ours, theirs)


def test_perceptual_weights():
    class Eyes(nn.Module):
        def forward(self, x): return [x * k for k in (1, 2, 4, 8, 16)]
    loss = perceptual(Eyes(), torch.full((1, 1, 4, 4), 3.), torch.full((1, 1, 4, 4), 1.))
    assert loss.item() == pytest.approx(2 * (1 / 32 + 2 / 16 + 4 / 8 + 8 / 4 + 16))


def test_a_file_becomes_the_term_and_stays_out_of_checkpoints(tmp_path):
    path = vgg_file(tmp_path, vgg_weights(scale=.1))
    with_file, without = SPADE(**TINY | dict(vgg=path)), SPADE(**TINY)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert with_file.notes == dict(vgg=f"{path.name}, SHA-256 {digest}") and without.notes == dict(vgg="off, as asked")
    assert with_file.state_dict().keys() == without.state_dict().keys()
    assert sum(p.numel() for p in with_file.parameters()) == sum(p.numel() for p in without.parameters())
    assert list(with_file.losses("net", *cards(size=16))) == ["fool", "features", "vgg"]
    assert with_file.to(torch.float64).vgg.weight0.dtype == torch.float64


@pytest.mark.parametrize("name", ["vgg19-dcbb9e9d.pth", "vgg19.pth", "vgg19-.pth", "vgg19-ab.pth"])
def test_a_file_under_a_false_name_is_refused(tmp_path, name):
    path = vgg_file(tmp_path, vgg_weights(), name)
    with pytest.raises(CTDiffusionError, match="SHA-256"): SPADE(**TINY | dict(vgg=path))


def test_no_file_no_training(tmp_path):
    with pytest.raises(CTDiffusionError, match="vgg='off'"): digest_of(tmp_path / "vgg19-dcbb9e9d.pth")


def test_offline_the_term_is_off_with_one_loud_line():
    def unreachable(): raise ConnectionError("no network")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vgg, note = load_vgg("download", "OASIS", unreachable)
    assert vgg is None and note == "off: no weights (ConnectionError)"
    (line,) = (str(w.message) for w in caught)
    assert "\n" not in line and "OASIS TRAINS WITHOUT ITS VGG TERM" in line and VGG_URL in line and "vgg='off'" in line


def test_a_critic_keeps_what_it_saw():
    maps = PatchCritic(3, 2)(torch.randn(2, 3, 16, 16))
    assert [m.shape[1] for m in maps] == [2, 4, 8, 16, 1] and maps[-1].isfinite().all()
