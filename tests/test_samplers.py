"The samplers against diffusers' schedulers on the same draws, and against distributions that are known exactly."
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.diffusion.reverse import predict_eps, predict_x0, velocity
from ctdiffusion.diffusion.samplers import eps_model, sample_ancestral, sample_ddim
from ctdiffusion.diffusion.schedule import gather, keep_steps, kept_steps, make_schedule, respace
from ctdiffusion.diffusion.solvers import half_log_snr, log_snr_steps, parse_sampler, sample, sample_dpm, sample_sde
from near import assert_near

SHAPE = (3, 1, 8, 8)
SCHEDULE = make_schedule("linear", 1000)
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")

def noise(k): return torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))

def net(xt, t, cond=None):
    "Some smooth function of xt and t in the range of a network's answers: eps and v."
    t = t.float().reshape(-1, 1, 1, 1) / 1000
    return torch.cat([0.8 * torch.tanh(xt) + 0.2 * t * xt.roll(1, -1), torch.sin(5 * xt + t)], dim=1)

def on_same_draws(scheduler, module, monkeypatch, steps, channels, **options):
    "x0 as a diffusers scheduler gets there from noise(T), its draws replaced by ours."
    scheduler.set_timesteps(steps)
    x = noise(steps)
    for k, t in zip(range(steps - 1, -1, -1), scheduler.timesteps):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, k=k, **kw: noise(k))
        out = net(x, t.expand(len(x)))[:, :channels]
        x = scheduler.step(out, t, x, **options).prev_sample
    return x

@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", ["50", "1000"])
def test_ancestral_is_diffusers_ddpm(monkeypatch, steps, clip):
    theirs = scheduling_ddpm.DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=clip, timestep_spacing="linspace")
    walk = respace(SCHEDULE, steps)
    expected = on_same_draws(theirs, scheduling_ddpm, monkeypatch, walk.T, channels=2)
    assert theirs.timesteps.tolist() == walk.timesteps[::-1].tolist()
    ours = sample_ancestral(eps_model(net, None, walk), noise, walk, clip=clip)
    assert_near(ours, expected, 1e-3)   # their tables are float32: rounding over 1000 steps

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_is_diffusers_ddim(monkeypatch, eta, clip):
    theirs = scheduling_ddim.DDIMScheduler(**BETAS, clip_sample=clip, set_alpha_to_one=True, timestep_spacing="leading")
    walk = respace(SCHEDULE, "ddim50")
    expected = on_same_draws(theirs, scheduling_ddim, monkeypatch, 50, channels=1, eta=eta, use_clipped_model_output=True)
    assert theirs.timesteps.tolist() == walk.timesteps[::-1].tolist()
    ours = sample_ddim(eps_model(net, None, walk), noise, walk, eta=eta, clip=clip)
    assert_near(ours, expected)

@pytest.mark.parametrize("grid", ["logsnr", "time"])
@pytest.mark.parametrize("steps", [2, 10, 15, 25, 50])
@pytest.mark.parametrize("ours, algorithm", [(sample_dpm, "dpmsolver++"), (sample_sde, "sde-dpmsolver++")])
def test_dpm_is_diffusers_dpm(monkeypatch, ours, algorithm, steps, grid):
    "On the same steps, and the same answers of a network; diffusers' own spacings are not used (they differ from each other)."
    kept = log_snr_steps(SCHEDULE, steps) if grid == "logsnr" else kept_steps(1000, str(steps))
    walk, x = keep_steps(SCHEDULE, kept), noise(steps)
    theirs = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler(**BETAS, algorithm_type=algorithm, solver_order=2, final_sigmas_type="zero")
    theirs.set_timesteps(timesteps=kept[::-1])
    for k, t in zip(range(steps - 1, -1, -1), theirs.timesteps):
        monkeypatch.setattr(scheduling_dpmsolver_multistep, "randn_tensor", lambda *a, k=k, **kw: noise(k))
        x = theirs.step(net(x, t.expand(len(x)))[:, :1], t, x).prev_sample
    assert_near(ours(eps_model(net, None, walk), noise, walk, clip=False), x)

def test_log_snr_grid():
    lam = half_log_snr(SCHEDULE.alpha_bar)
    for count in (2, 3, 7, 20, 100, 500, 999, 1000):
        kept = log_snr_steps(SCHEDULE, count)
        assert len(kept) == count and kept[0] == 0 and kept[-1] == 999 and (np.diff(kept) > 0).all()
    for schedule in (make_schedule("cosine", 1000), make_schedule("linear", 50)):
        assert log_snr_steps(schedule, 20)[::19] == [0, schedule.T - 1]
    gaps = -np.diff(lam[log_snr_steps(SCHEDULE, 15)])
    assert gaps.max() < 1.2 * gaps.min()   # as even as whole steps allow
    assert log_snr_steps(SCHEDULE, 20) == [0, 1, 4, 10, 19, 35, 61, 103, 166, 253, 353, 454, 546, 629, 704, 772, 834, 893, 947, 999]

@pytest.mark.parametrize("draw", [sample_dpm, sample_sde])
def test_clipping_keeps_the_guess_in_range(draw):
    walk, seen = keep_steps(SCHEDULE, log_snr_steps(SCHEDULE, 10)), []
    end = draw(eps_model(net, None, walk), noise, walk, callback=seen.append)
    assert all(s["x0"].abs().max() <= 1 for s in seen) and end.abs().max() <= 1   # the last stride ends in the guess itself
    assert [s["t"] for s in seen] == walk.timesteps[::-1].tolist()
    free = draw(eps_model(net, None, walk), noise, walk, clip=False)
    assert free.abs().max() > 1

# --- a world in which everything is known: independent pixels of N(mean, spread^2) ------------------------------------

MEAN, SPREAD, N = 0.3, 0.25, 40_000

def gaussian_model(walk, v=None):
    "The best eps and, unless `v` is given, the v of the exact variance, for data N(MEAN, SPREAD^2)."
    def model(xt, t):
        a = gather(walk.alpha_bar, t, xt.double())
        gain = a.sqrt() * SPREAD ** 2 / (a * SPREAD ** 2 + 1 - a)
        eps = predict_eps(xt.double(), t, MEAN + gain * (xt - a.sqrt() * MEAN), walk)
        room = gather(np.log(walk.betas) - walk.posterior_log_variance_clipped, t, a)
        unknown = SPREAD ** 2 / (a * SPREAD ** 2 + 1 - a)
        best = 2 * torch.log1p(unknown * torch.expm1(room)) / room - 1
        return torch.cat([eps, (best if v is None else torch.full_like(best, v)).expand_as(eps)], dim=1).float()
    return model

def pixels(k): return torch.randn(N, 1, 1, 1, generator=torch.Generator().manual_seed(k))

@pytest.mark.parametrize("steps", ["5", "25", "1000"])
def test_exact_variance_samples_the_exact_distribution(steps):
    "For Gaussian data the step back is Gaussian whatever its size: even five ancestral steps are right."
    walk = respace(SCHEDULE, steps)
    x = sample_ancestral(gaussian_model(walk), pixels, walk, clip=False)
    assert abs(x.mean() - MEAN) < 4 * SPREAD / N ** 0.5 + 1e-3
    assert abs(x.std() / SPREAD - 1) < 0.015

def test_fixed_variances_are_wrong_in_few_steps():
    walk = respace(SCHEDULE, "10")
    spread = {v: sample_ancestral(gaussian_model(walk, v), pixels, walk, clip=False).std().item() for v in (-1.0, 1.0)}
    assert spread[-1.0] < 0.97 * SPREAD and spread[1.0] > 1.03 * SPREAD, spread

def test_ddim_converges_to_the_distribution():
    errors = []
    for steps in ("10", "50", "1000"):
        walk = respace(SCHEDULE, steps)
        x = sample_ddim(gaussian_model(walk), pixels, walk, clip=False)
        errors.append(abs(x.std().item() / SPREAD - 1))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01, errors

# --- contracts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", ["250", "50", "ddim50", "dpm15", "sde15", "15-logsnr"])
def test_a_slice_does_not_depend_on_its_batch(sampler):
    together = sample(net, None, noise, SCHEDULE, sampler)
    for i in range(3):
        alone = sample(net, None, lambda k: noise(k)[i:i + 1], SCHEDULE, sampler)
        assert_near(alone, together[i:i + 1])
    assert together.abs().max() <= 1

@pytest.mark.parametrize("sampler, asked", [("25", list(range(25, 0, -1))), ("ddim25", [25]), ("dpm15", [15]), ("sde15", list(range(15, 0, -1)))])
def test_the_last_step_draws_nothing(sampler, asked):
    heard = []
    sample(net, None, lambda k: heard.append(k) or noise(k), SCHEDULE, sampler)
    assert heard == asked

@pytest.mark.parametrize("draw", [sample_ancestral, sample_ddim])
def test_callback_sees_original_steps(draw):
    walk, seen = respace(SCHEDULE, "10"), []
    end = draw(eps_model(net, None, walk), noise, walk, callback=seen.append)
    assert [s["t"] for s in seen] == walk.timesteps[::-1].tolist() and [s["k"] for s in seen] == list(range(9, -1, -1))
    assert torch.equal(seen[0]["xt"], noise(10)) and torch.allclose(seen[-1]["x0"], end, atol=1e-6)

def test_velocity_networks_sample_the_same():
    def velocity_net(xt, t, cond):
        eps, v = net(xt, t).double().chunk(2, dim=1)
        return torch.cat([velocity(predict_x0(xt.double(), t, eps, SCHEDULE), eps, t, SCHEDULE), v], dim=1)
    a, b = (sample(n, None, noise, SCHEDULE, "ddim50", target) for n, target in ((net, "eps"), (velocity_net, "velocity")))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)

@pytest.mark.parametrize("name", ["ddim37", "1001", "0", "fast", "10,2000", "ddim5,5", ""])
def test_impossible_walks_say_what_is_possible(name):
    with pytest.raises(CTDiffusionError, match="expected"): parse_sampler(name, SCHEDULE)

@pytest.mark.parametrize("T", [10, 400, 1000])
def test_kept_steps_round_like_iddpm(T):
    "Against the running sum written out, for every count."
    for count in range(1, T + 1):
        at, expected = 0.0, []
        for _ in range(count):
            expected.append(round(at)); at += 1.0 if count == 1 else (T - 1) / (count - 1)
        assert kept_steps(T, str(count)) == expected
