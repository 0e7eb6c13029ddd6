"The rows of the tables as their public codes have them: what stands still, what is weighted how, what travels along."

import copy
import math

import numpy as np
import pytest
import torch
from fake_data import fake_sources, small_config

from fields.config import load_profile
from fields.data.mixing import MixedData
from fields.head.flame import Head
from fields.models.fields import FieldsModel
from fields.models.masking import paste_pixels, region_weights
from fields.models.perceptual import SmallPerceptual
from fields.training import losses
from fields.training.alternate import Alternating
from fields.training.cycle import famos_templates, templates_of
from fields.training.log import Log
from fields.training.loop import Moment, run_pass, training_only
from fields.training.pretrain import iterations
from fields.training.rows import METHODS, record_of, row_settings
from fields.training.team import Team, TeamNorm, begin_together, choose_precision
from fields.types import HeadParams, Prediction


@pytest.fixture(scope="module")
def head():
    return Head.load("open")


@pytest.fixture(scope="module")
def sources(head):
    return fake_sources(head, count=6)


def build(head, sources, name, **changes):
    "A row's job and one sample, with the same random networks whatever the settings."
    torch.set_num_threads(1)
    method, config = METHODS[name], small_config(**{"train.batch": 4, **changes})
    model = FieldsModel(config.network, head, "teaser" if method.use_tokens else "smirk", method.use_emotion, seed=0)
    torch.manual_seed(0)
    eyes, templates = SmallPerceptual(), templates_of(sources["bp4d"])
    job = Alternating(model, head, copy.deepcopy(model.encoders), method, config, eyes, templates)
    data = MixedData(sources, None, config, config.train.batch, 90)
    moment, samples = iterations(data, 1, Team(), job.prepare)(0)
    return job, moment, samples


@pytest.mark.parametrize("name", ["SMIRK", "TEASER"])
def test_shape_is_the_base_models_to_the_bit(head, sources, name):
    "After two iterations mean (beta - beta_B)^2 is 0, and pose is B's too; the expression has moved."
    job, _, samples = build(head, sources, name)
    passes, model = job.passes(), job.model
    before = copy.deepcopy(model.encoders).eval()
    for step in range(2):
        for one in passes:
            if one.every(step):
                run_pass(model, one, samples, Moment(step), Team())
    with torch.no_grad():
        now, then = model.eval().encode(samples[0].batch.image), before(samples[0].batch.image)
    assert (now.shape - then.shape).square().mean().item() == 0 and torch.equal(now.rotation, then.rotation)
    assert not torch.equal(now.expression, then.expression)


def test_shape_moves_where_the_row_shares_the_other_rows_settings(head, sources):
    job, moment, samples = build(head, sources, "SMIRK", **{"train.rows": "shared"})
    before = [p.clone() for p in job.model.encoders.shape_encoder.parameters()]
    run_pass(job.model, job.passes()[0], samples, moment, Team())
    after = job.model.encoders.shape_encoder.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def expected_first_step(job, sample, teaser):
    "The total of the public trainers' first step, term by term, by plain torch on the job's own networks."
    model, batch = job.model, sample.batch
    params, tokens = model.encode(batch.image), model.tokens(batch.image)
    output = job.head(params, eyelids="posed")

    def flat(which):
        points, camera = job.head.landmarks(output, which), params.camera
        across = camera[:, :1] * (points[..., 0] + camera[:, 1:2])
        return torch.stack([across, -camera[:, :1] * (points[..., 1] + camera[:, 2:3])], -1)

    made = job.paint(batch, params, tokens, Moment(0), output).image
    mse = torch.nn.functional.mse_loss
    fan = batch.has_contour
    total = 100 * mse(flat("mediapipe105"), batch.mediapipe)
    total = total + 100 * mse(flat("contour17")[fan], batch.contour[fan])
    total = total + 10 * (made - batch.image).abs().mean()
    total = total + 10 * sum(
        (a - b).abs().mean() for a, b in zip(job.perceptual(batch.image), job.perceptual(made), strict=True)
    )
    total = total + 1e-3 * params.expression.square().mean() + 1e-2 * params.jaw.square().mean()
    if teaser:
        again = model.tokens(made)
        total = total + 5 * sum(mse(again[k], tokens[k]) for k in range(4))
        total = total + 500 * (sample.regions * (made - batch.image)).abs().mean()
        points, values = flat("points203"), []
        for i in range(len(batch)):
            y = params.rotation[i, 1]
            group = losses.POINT_GROUPS["left" if y < -0.05 else "right" if y > 0.05 else "front"]
            if batch.has_points203[i]:
                values.append(mse(points[i, group], batch.points203[i, group]))
        total = total + 1000 * torch.stack(values).mean()
    return total


@pytest.mark.parametrize("name", ["SMIRK", "TEASER"])
def test_first_step_totals(head, sources, name):
    job, moment, (sample, *_) = build(head, sources, name)
    with torch.no_grad():
        pose = job.model.encoders.pose_encoder.pose_cam_layers[-1]
        pose.bias[:3] = torch.tensor([0.1, 0.12, -0.05])  # a head that is turned, so that groups and lids matter
    with torch.no_grad(), training_only(job.model, []):
        total, _ = job.joint_loss(sample, moment)
        assert total.item() == pytest.approx(expected_first_step(job, sample, name == "TEASER").item(), rel=1e-5)


def test_teasers_cycle_reads_the_deepest_token(head, sources):
    job, moment, (sample, *_) = build(head, sources, "TEASER")
    with torch.no_grad(), training_only(job.model, []):
        job.joint_loss(sample, moment)
        params, tokens, output = sample.read
        whole = job.cycle_loss(True)(sample, moment)[0].item()
        seen = []
        job.model.token_encoder.register_forward_hook(lambda *a: seen.append(a[2]))
        job.cycle_loss(True)(sample, moment)
        job.weights.cycle_token = 0.0
        without = job.cycle_loss(True)(sample, moment)[0].item()
    assert whole - without == pytest.approx((seen[0][0] - tokens[0]).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["SMIRK", "TEASER"])
def test_only_the_cycle_step_is_clipped(head, sources, name):
    "Gradients of the cycle reach the encoders on odd steps; the clip of 0.1 is on the synthesizer's cycle alone."
    joint, even, odd = build(head, sources, name)[0].passes()
    assert (joint.clip_norm, even.clip_norm, odd.clip_norm) == (0.0, 0.1, 0.0)
    assert [p.every(0) for p in (joint, even, odd)] == [True, True, False]
    assert even.trained != odd.trained and build(head, sources, "F1")[0].config.train.passes == "paper"


def test_what_a_row_does_not_list_is_never_drawn():
    "SMIRK's weights: later rows win, unlisted triangles are 0, face_clean and cleaner_lips are 1."
    faces = torch.arange(30).reshape(10, 3)
    masks = {
        "face": torch.arange(24),
        "nose": torch.arange(6),
        "lips": torch.arange(6, 12),
        "scalp": torch.tensor([12]),
    }
    weights = region_weights(faces, masks | {"neck": torch.tensor([29])}, {"cleaner_lips": torch.tensor([3])})
    assert weights.tolist() == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_weights_of_flames_mesh(monkeypatch):
    "Of FLAME's 9,976 triangles SMIRK draws 3,914: 1,070 of weight .5 and 2,844 of weight 1, by 128 of them a list."
    import os
    from pathlib import Path

    folder = os.environ.get("FIELDS_TEST_DATA")
    if not folder:
        pytest.skip("FIELDS_TEST_DATA is not set, so there is no head with FLAME's mesh")
    flame = Head.load(str(Path(folder) / "head/generic_model.pkl"))
    weights = region_weights(flame.faces, flame.masks)
    assert [int((weights == w).sum()) for w in (0, 0.5, 1)] == [6062, 1070 + 128, 2844 - 128]
    half = (weights == 0.5).nonzero()[:128, 0]
    listed = region_weights(flame.faces, flame.masks, {"cleaner_lips": half})
    assert [int((listed == w).sum()) for w in (0, 0.5, 1)] == [6062, 1070, 2844]


def test_pasted_colors_are_not_clamped():
    white, every = torch.ones(1, 3, 32, 32), torch.arange(1024)[None]
    pasted = paste_pixels(white * 0, white, every, every, torch.Generator().manual_seed(0), erase=0.0)
    assert 1.1 < pasted.max() < 1.4 and pasted.std().item() == pytest.approx(0.05, rel=0.1)


def test_lids_travel_from_the_row_to_checkpoint_and_prediction(head, sources, tmp_path):
    job, moment, (sample, *_) = build(head, sources, "SMIRK")
    job.model.save(tmp_path / "m.safetensors")
    loaded = FieldsModel.load(tmp_path / "m.safetensors", head)
    prediction = loaded.predict(sample.batch.image[:1], ["a"])
    prediction.save(tmp_path / "p.npz")
    again = Prediction.load(tmp_path / "p.npz")
    assert (job.lids, loaded.lids, prediction.lids, again.lids) == ("posed",) * 4
    closed = HeadParams.neutral(1)
    closed.eyelids[:], closed.rotation[:, 0] = 1.0, math.radians(20)
    away = (job.pose(closed).vertices - head(closed).vertices).norm(dim=-1).max().item()
    assert 1e-3 < away < 8e-3 and torch.equal(loaded.pose(head, closed).vertices, job.pose(closed).vertices)
    assert build(head, sources, "F1")[0].model.lids == "before"


def test_a_panel_gives_smirks_synthesizer_pixels_of_the_face(head):
    model = FieldsModel(small_config().network, head, "smirk", False, seed=0).eval()
    image, hull, seen = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 1, 64, 64), []
    hull[..., 8:56, 8:56] = 1
    model.synthesizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model.paint(head, image, hull, HeadParams.neutral(1))
    inside = seen[0][..., 8:56, 8:56]
    assert 5 < (inside[0, 0] > 0).sum() < 45  # of 40 points some are erased


def test_famos_draws_a_folder_first(tmp_path):
    def frame(kind, number, value):
        path = tmp_path / "FaMoS_subject_001" / kind
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / f"{number:03d}.npy", np.array({"expression": np.full(100, value)}, object), allow_pickle=True)

    for k in range(9):
        frame("jaw", k, 1.0)
    frame("kissing", 0, 2.0)
    frame("anger", 0, 9.0)  # not one of SMIRK's twelve
    found = famos_templates(tmp_path)
    drawn = found.draw(torch.rand(4000, generator=torch.Generator().manual_seed(0)))[:, 0]
    assert set(drawn.tolist()) == {1.0, 2.0} and (drawn == 2).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_the_initialisations_length_is_teasers(monkeypatch):
    "200 epochs of 50,000 samples, whatever the batch."
    paper = load_profile("paper").train
    assert paper.teaser_steps * paper.batch == 200 * 50_000
    own = row_settings(METHODS["TEASER"], load_profile("paper", {"train.budget": "published"})).train
    assert own.steps * own.batch == 200 * 50_000 and own.batch == 16


class Others:
    "A Fabric of two processes whose other says `value`."

    device, global_rank, world_size = torch.device("cpu"), 1, 2

    def __init__(self, value):
        self.value = value

    def broadcast(self, _):
        return self.value

    def all_reduce(self, tensor, reduce_op):
        return tensor


def test_all_processes_take_the_first_ones_precision(tmp_path):
    def never():
        raise AssertionError("only the first process measures")

    assert choose_precision("auto", tmp_path / "p.json", never, "cpu", Team(fabric=Others("bf16"))) == "bf16"
    assert not (tmp_path / "p.json").exists()


def test_batchnorm_is_synchronised_where_there_are_several_processes():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    team = Team(fabric=Others(None))
    team.share = lambda value: value
    notes = begin_together(net, team)
    assert isinstance(net[1], TeamNorm) and "1 BatchNorm layers" in notes[0]


def test_a_long_log_is_a_short_curve(tmp_path):
    log = Log(None)
    for step in range(30_000):
        log.add(step, {"a": step})
    steps, values = log.curve("a")
    assert len(steps) <= 1002 and (steps[0], steps[-1], values[-1]) == (0, 29_999, 29_999)


def test_every_row_says_what_is_not_its_codes():
    config = load_profile("paper")
    for name in ("SMIRK", "TEASER"):
        said = record_of(METHODS[name], config)
        assert said["settings"]["train.passes"] == "smirk" and any("train.budget" in s for s in said["ours"])
    assert record_of(METHODS["F4"], config) == {"settings": {}, "ours": []}
