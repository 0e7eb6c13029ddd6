"Run by test_training in one or two processes: three steps of alternating training in float64, BatchNorm in eval."

import sys
import torch
from pathlib import Path
from fake_data import fake_sources, small_config
from fields.data.mixing import MixedData
from fields.head.flame import Head
from fields.models.fields import FieldsModel
from fields.models.perceptual import SmallPerceptual
from fields.training.alternate import Alternating
from fields.training.cycle import templates_of
from fields.training.loop import run_pass
from fields.training.rows import METHODS
from fields.training.team import begin_together, launch
from fields.training.pretrain import iterations


def main(out, world):
    torch.set_num_threads(1)
    plain = torch.Tensor.float
    torch.Tensor.float = lambda t: (
        t if t.dtype == torch.float64 else plain(t)
    )  # "at least float32" must not round the doubles
    team = launch("cpu", world)
    config = small_config()
    torch.manual_seed(0)
    # one process draws the world in float32; everything after that is float64
    sources = fake_sources(Head.load("open"))
    head = Head.load("open", dtype=torch.float64)
    model = FieldsModel(config.network, head, seed=1).double()
    base = FieldsModel(config.network, head, seed=2).double().encoders
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):  # in eval for good
            m.__class__ = type(
                "Still", (type(m),), {"training": property(lambda self: False, lambda self, value: None)}
            )
    notes = begin_together(model, team)
    data = MixedData(sources, None, config, 8, 90, rank=team.rank, world=team.world)
    job = Alternating(
        model, head, base, METHODS["F4"], config, SmallPerceptual().double(), templates_of(sources["bp4d"]), team=team
    )
    passes = job.passes()
    for one in passes:
        one.optimizers = [
            torch.optim.SGD([{"params": g["params"]} for o in one.optimizers for g in o.param_groups], lr=1e-4)
        ]
        one.clip_norm = 0
    feed, grads = iterations(data, 1, team, lambda b, step: job.prepare(b.to(torch.float64), step)), {}
    for step in range(3):
        moment, samples = feed(step)
        for one in passes:
            if step == 0:
                inner = one.optimizers[0].step

                def keep(*a, inner=inner, one=one, **k):
                    grads.update(
                        {
                            f"{one.name}.{i}.{j}": p.grad.clone()
                            for i, g in enumerate(one.optimizers[0].param_groups)
                            for j, p in enumerate(g["params"])
                            if p.grad is not None
                        }
                    )
                    return inner(*a, **k)

                one.optimizers[0].step = keep
            run_pass(model, one, samples, moment, team)
            if step == 0:
                one.optimizers[0].step = inner
    if team.rank == 0:
        torch.save(
            {
                "grads": grads,
                "params": {k: v for k, v in model.state_dict().items()},
                "ids": [],
                "notes": "; ".join(notes),
            },
            out,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
