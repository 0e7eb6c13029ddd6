"What only a GPU can show: the rasteriser, the head, one iteration of each pass, processes and resume on CUDA."

import copy

import pytest
import torch
from fake_data import fake_sources, small_config

from fields.data.mixing import MixedData
from fields.head.flame import Head
from fields.models.fields import FieldsModel
from fields.models.perceptual import SmallPerceptual
from fields.render.shade import geometry_image
from fields.training.alternate import Alternating
from fields.training.cycle import templates_of
from fields.training.loop import Moment, Pass, Setting, run_pass, train
from fields.training.losses import Terms
from fields.training.pretrain import iterations
from fields.training.rows import METHODS
from fields.training.team import Team, begin_together, launch
from fields.types import HeadParams

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA has not been tried on this machine"),
]


def posed(count=4):
    g = torch.Generator().manual_seed(0)
    params = HeadParams.neutral(count, scale=6.0)
    params.expression[:, :5] = torch.randn(count, 5, generator=g)
    params.rotation[:] = 0.2 * torch.randn(count, 3, generator=g)
    return params


def test_head_and_picture_are_those_of_the_cpu():
    head, params = Head.load("open"), posed()
    here = head(params).vertices
    picture, mask = geometry_image(here, head.mask_faces("face"), params.camera, 96)
    far = copy.deepcopy(head).cuda()
    there = far(params.to("cuda")).vertices
    assert (there.cpu() - here).abs().max() < 1e-5
    drawn, covered = geometry_image(there, far.mask_faces("face"), params.camera.cuda(), 96)
    assert (covered.cpu() != mask).float().mean() < 0.002
    both = (covered.cpu() * mask).expand_as(picture) > 0
    assert (drawn.cpu() - picture)[both].abs().median() < 1e-4


def one_iteration(name, precision, device="cuda"):
    "Terms of the passes of one iteration."
    head = Head.load("open")
    sources = fake_sources(head, count=6)
    method, config = METHODS[name], small_config(**{"train.batch": 4})
    head = head.to(device)
    model = FieldsModel(config.network, head, "teaser" if method.use_tokens else "smirk", method.use_emotion, seed=0)
    model = model.to(device)
    torch.manual_seed(0)
    eyes, templates = SmallPerceptual().to(device), templates_of(sources["bp4d"]).to(device)
    base = copy.deepcopy(model.encoders)
    job = Alternating(model, head, base, method, config, eyes, templates, precision=precision, team=Team(device))
    data = MixedData(sources, None, config, 4, 90, torch.device(device))
    moment, samples = iterations(data, 1, Team(device), job.prepare)(0)
    found = {}
    for one in job.passes():
        if one.every(0):
            names, values = run_pass(model, one, samples, moment, Team(device))
            found |= dict(zip(names, values.tolist(), strict=True))
    return found


@pytest.mark.parametrize("name", ["F4", "SMIRK", "TEASER"])
@pytest.mark.parametrize("precision, close", [("32", 2e-2), ("bf16", 0.2)])
def test_one_iteration_of_each_pass(name, precision, close):
    "Sparse pixels are drawn by another generator on CUDA, so what depends on them is only finite."
    there, here = one_iteration(name, precision), one_iteration(name, "32", "cpu")
    assert set(there) == set(here) and all(torch.isfinite(torch.tensor(v)) for v in there.values())
    for key in ("landmark", "expression_reg"):
        first = next(k for k in here if k.endswith(f".{key}"))
        assert there[first] == pytest.approx(here[first], rel=close, abs=1e-4)


def test_one_process_of_fabric_on_one_gpu():
    team = launch("cuda", 1)
    net = torch.nn.BatchNorm1d(3).cuda()
    assert team.device.type == "cuda" and begin_together(net, team) == []


def test_resume_is_exact_and_deterministic(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        results = []
        for folder, stops in ((tmp_path / "a", (0,)), (tmp_path / "b", (3, 0))):
            for stop in stops:
                torch.manual_seed(0)
                net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).cuda()

                def loss(x, moment, net=net):
                    value = (net(x) - x.sum(1, keepdim=True)).square().mean()
                    return value, Terms(landmark=value)

                adam = torch.optim.Adam([{"params": list(net.parameters()), "base": 0.01}])

                def feed(step):
                    return Moment(step), [torch.rand(8, 4, generator=torch.Generator().manual_seed(step)).cuda()]

                setting = Setting(6, folder, checkpoint_every=3, stop_at=stop)
                train(net, [Pass("fit", [net], loss, [adam])], feed, setting, Team("cuda"))
            results.append(net.state_dict())
        assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    finally:
        torch.use_deterministic_algorithms(False)
