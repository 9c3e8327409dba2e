"Every number in tests/oracles/ against ours: float64 tables to 1e-11, float32 results to 1e-5, likelihood terms to 1e-4, distances of features to 1e-9, all relative."
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ctdiffusion.data.slices import edge_map
from ctdiffusion.diffusion.objective import discretized_gaussian_log_likelihood, hybrid_loss, normal_kl, prior_bpd
from ctdiffusion.diffusion.reverse import p_mean_variance, q_posterior
from ctdiffusion.diffusion.samplers import ddim_step
from ctdiffusion.diffusion.schedule import Schedule, make_schedule, q_sample, respace
from ctdiffusion.evaluation.distance import frechet, kid
from ctdiffusion.models.conditioning import one_hot_map
from ctdiffusion.models.oasis import class_weights, fake_loss, real_loss
from ctdiffusion.models.unet import timestep_embedding

ORACLES = Path(__file__).parent / "oracles"
DIFFUSION = dict(np.load(ORACLES / "diffusion.npz"))
LOSSES = dict(np.load(ORACLES / "losses_metrics.npz"))
TABLE, RESULT, LIKELIHOOD = 1e-11, 1e-5, 1e-4
PHASE = dict(rtol=0, atol=1e-4)  # t x frequency is a float32 up to 999: its last place is 6e-5 of a radian, and processors differ there

def tensor(name): return torch.from_numpy(DIFFUSION[name])

@cache
def case_schedule(case: str) -> Schedule:
    name, T, steps = case.split("_")
    schedule = make_schedule(name, int(T))
    return schedule if steps == "full" else respace(schedule, steps)

@cache
def case_results(case: str) -> dict:
    "Everything the oracle stores about one schedule, computed by us; with the tolerance of each."
    schedule, t = case_schedule(case), tensor(f"{case}/t")
    x0, noise, out = tensor("x0"), tensor("noise"), torch.cat([tensor("eps"), tensor("v")], 1)
    xt = q_sample(x0, t, noise, schedule)
    posterior = q_posterior(x0, xt, t, schedule)
    loss = hybrid_loss(out, x0, xt, noise, t, schedule)
    tables = dict(
        timesteps_used=schedule.timesteps, t_model=schedule.timesteps[t.numpy()],
        betas=schedule.betas, alphas_cumprod=schedule.alpha_bar,
        posterior_variance=schedule.posterior_variance,
        posterior_log_variance_clipped=schedule.posterior_log_variance_clipped,
        posterior_mean_coef1=schedule.posterior_mean_coef1, posterior_mean_coef2=schedule.posterior_mean_coef2)
    results = dict(
        x_t=xt, q_posterior_mean=posterior[0], q_posterior_log_variance=posterior[2].expand_as(x0),
        loss_mse=loss["mse"], ddim_eta0=ddim_step(out, xt, t, 0.0, schedule)[0], prior_bpd=prior_bpd(x0, schedule))
    for clip in (True, False):
        names = [f"p_{name}_{'clip' if clip else 'noclip'}" for name in ("mean", "variance", "log_variance", "pred_xstart")]
        results.update(zip(names, p_mean_variance(out, xt, t, schedule, clip)))
    likelihood = dict(loss_vb=loss["vb"], loss_loss=loss["loss"])
    return ({k: (v, TABLE) for k, v in tables.items()} | {k: (v, RESULT) for k, v in results.items()}
            | {k: (v, LIKELIHOOD) for k, v in likelihood.items()})

@cache
def shared_results() -> dict:
    "The entries of diffusion.npz that belong to no schedule."
    kl = normal_kl(*[tensor(f"kl_{name}") for name in ("mean1", "logvar1", "mean2", "logvar2")])
    dg = discretized_gaussian_log_likelihood(*[tensor(f"dg_{name}") for name in ("x", "mean", "log_scale")])
    return dict(kl=(kl, RESULT), dg_loglik=(dg, LIKELIHOOD), temb_64=(timestep_embedding(tensor("temb_t"), 64), PHASE))

def close(ours, theirs, tolerance):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, **(tolerance if isinstance(tolerance, dict) else dict(rtol=tolerance, atol=0)))

CASES = [str(case) for case in DIFFUSION["cases"]]
INPUTS = {"x0", "noise", "eps", "v", "cases", "kl_mean1", "kl_logvar1", "kl_mean2", "kl_logvar2",
          "dg_x", "dg_mean", "dg_log_scale", "temb_t"} | {f"{case}/t" for case in CASES}

@pytest.mark.parametrize("key", sorted(set(DIFFUSION) - INPUTS))
def test_diffusion(key):
    case, _, name = key.rpartition("/")
    ours, tolerance = (case_results(case) if case else shared_results())[name]
    close(ours, DIFFUSION[key], tolerance)

def test_diffusion_is_complete():
    "Both ways: nothing stored stays unchecked, nothing we compute is missing from the file."
    ours = {f"{case}/{name}" for case in CASES for name in case_results(case)} | set(shared_results())
    assert ours == set(DIFFUSION) - INPUTS

# --- losses_metrics.npz -----------------------------------------------------------------------------------------------
LABEL, LOGITS = (torch.from_numpy(LOSSES[key]) for key in ("label", "logits"))
OURS: dict[str, Callable] = dict(
    edge=lambda: edge_map(LABEL)[:, None].float(), onehot=lambda: one_hot_map(LABEL, 17),
    oasis_class_weights=lambda: class_weights(LABEL, 17)[:, None],
    oasis_real=lambda: real_loss(LOGITS, LABEL), oasis_fake=lambda: fake_loss(LOGITS),
    fid=lambda: frechet(LOSSES["fid_feat_a"], LOSSES["fid_feat_b"]), kid_full=lambda: kid(LOSSES["fid_feat_a"], LOSSES["fid_feat_b"]))
METRICS = {"fid": 1e-9, "kid_full": 1e-9}

@pytest.mark.parametrize("key", OURS)
def test_losses(key): close(OURS[key](), LOSSES[key], METRICS.get(key, RESULT))

def test_losses_are_complete():
    assert set(OURS) == set(LOSSES) - {"label", "logits", "fid_feat_a", "fid_feat_b"}

@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_edge_map_of_both_kinds(kind): close(edge_map(kind(LOSSES["label"])), LOSSES["edge"][:, 0].astype(bool), 0)
