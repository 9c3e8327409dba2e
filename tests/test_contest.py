"""Generator and judge in the trainer: several processes, and what is saved of them."""
import functools, json
from dataclasses import replace

import pytest
import torch
from little_runs import GANS, WIDE, game, play, silent, small, torchrun
from little_runs import one_thread  # noqa: F401, equal bytes need it

from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.models.pix2pix import Adversarial
from ctdiffusion.models.variants import VARIANTS, build
from ctdiffusion.synthesis.synthesis import export, exported, load, synthesize_slices
from ctdiffusion.training.runs import latest_checkpoint, read_checkpoint, read_metrics
from ctdiffusion.training.state import Contest


@pytest.fixture(scope="module", params=GANS)
def variant(request): return request.param


@pytest.fixture(scope="module")
def whole(variant, tmp_path_factory):
    where = tmp_path_factory.mktemp(variant)
    assert play(where, variant).done
    return where


def test_checkpoint_knows_both_players(variant, whole):
    c = read_checkpoint(latest_checkpoint(whole, silent))
    players = build(small(variant), training=True)
    assert isinstance(players, Adversarial) and set(c["model"]) == set(players.state_dict())
    assert set(c["optim"]["exp_avg"]) == {k for k, _ in players.named_parameters()}
    assert set(c["ema"]) == set(players.net.state_dict())
    same = all(torch.equal(c["ema"][k], c["model"][f"net.{k}"]) for k, _ in players.net.named_parameters())
    assert same is (variant != "oasis")  # only OASIS averages


def test_what_is_saved_of_an_average_has_statistics_of_its_own(tmp_path):
    "In the middle of a run, too: batch statistics that were measured with the averaged weights, not averaged or copied."
    play(tmp_path, "oasis", max_steps=9, save_every=5)
    path = tmp_path / "checkpoints/step_00000005.safetensors"
    saved, state = read_checkpoint(path), Contest(small("oasis"), game("oasis"), WIDE, device="cpu")
    state.restore(saved, path)
    state.settled = None; state.settle()
    names = [k for k in saved["ema"] if "running_var" in k]
    for k in names: torch.testing.assert_close(saved["ema"][k], state.ema.weights[k], rtol=1e-2, atol=1e-4)
    trained = [not torch.allclose(saved["ema"][k], saved["model"][f"net.{k}"], rtol=1e-2, atol=1e-4) for k in names]
    assert sum(trained) > len(names) / 2


def test_metrics_name_every_term(variant, whole):
    m = read_metrics(whole)
    assert list(m["step"]) == [5, 10] and {"loss", "judge real", "judge fake", "lr", "val_loss"} <= set(m)
    assert all(abs(v) < 1e4 for k in m for v in m[k])


def test_exported_weights_load_and_train_on(variant, whole, tmp_path):
    "Generator and judge travel in half precision; synthesis takes the generator, training both."
    folder = export(whole, tmp_path / "weights")
    run_json, weights = exported(folder)
    assert set(weights) == set(build(small(variant), training=True).state_dict()) and run_json["variant"] == variant
    x = synthesize_slices(load(folder, "cpu"), WIDE.labels[30:34], batch=4)
    alone = synthesize_slices(load(folder, "cpu"), WIDE.labels[31:32], rows=[1], batch=4)
    assert x.shape == (4, 32, 32) and 0 <= x.min() and x.max() <= 1 and abs(x[1] - alone[0]).max() <= 1.01 / 255
    assert play(tmp_path / "on", variant, init=weights, max_steps=2).done
    assert json.loads((tmp_path / "on/run.json").read_text())["init"].startswith("weights ")
    assert play(tmp_path / "from run", variant, init=whole, max_steps=2).done


def test_each_player_pays_for_itself(variant):
    "A move changes the mover's parameters, all of them, and nobody else's."
    state = Contest(small(variant), game(variant), WIDE, device="cpu")
    x0, mask = state.slices()
    noise = state.gaussian(len(x0), state.net.noise_size) if state.net.noise_size else None
    for who, other in (("net", "judge"), ("judge", "net")):
        before = {k: p.clone() for k, p in state.whole.named_parameters()}
        state.move(who, x0, mask, noise)
        moved = {k for k, p in state.whole.named_parameters() if not torch.equal(p, before[k])}
        assert not {k for k in moved if k.startswith(other)} and moved


def test_diffusion_weights_are_no_start_for_a_gan(variant, tmp_path):
    with pytest.raises(CTDiffusionError, match="another network"): play(tmp_path, variant, init=build(replace(small(variant), variant="mask", mult=(1, 2), groups=4, attention=())).state_dict())


def test_two_processes_have_one_set_of_weights(tmp_path):
    "Gradients are averaged and statistics shared: both processes end with the same bytes."
    program = """
import torch
from little_runs import WIDE, game, small
from ctdiffusion.training.state import Contest
from ctdiffusion.training.step import weights_hash
state = Contest(small("oasis"), game("oasis"), WIDE, device="cpu")
for _ in range(3): state.train_step()
mine, other = [weights_hash({k: v for k, v in state.whole.state_dict().items()})], [None, None]
torch.distributed.all_gather_object(other, mine[0])
assert state.world == 2 and other[0] == other[1], other
torch.distributed.barrier(); torch.distributed.destroy_process_group()  # who leaves first must not abort the other
import os; os._exit(0)  # gloo's threads can abort a Python that takes itself apart
"""
    done = torchrun(tmp_path / "two", program, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_loss_term_does_not_come_or_go_when_a_run_goes_on(tmp_path, monkeypatch):
    "What a method notes of itself (SPADE: with or without VGG) belongs to the run's identity."
    play(tmp_path, "spade", max_steps=2)
    real = VARIANTS["spade"].contest.__init__
    def noted(self, *args, **kwargs): real(self, *args, **kwargs); self.notes["vgg"] = "another"
    monkeypatch.setattr(VARIANTS["spade"].contest, "__init__", functools.wraps(real)(noted))
    with pytest.raises(CTDiffusionError, match="notes.vgg='off, as asked' .now 'another'"): play(tmp_path, "spade", max_steps=4)
