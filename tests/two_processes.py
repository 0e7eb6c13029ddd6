"Run by test_training in one or two processes: three steps of alternating training in float64, BatchNorm synchronised."

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
    notes = begin_together(model, team)
    data = MixedData(sources, None, config, 8, 90, rank=team.rank, world=team.world)
    job = Alternating(
        model, head, base, METHODS["F4"], config, SmallPerceptual().double(), templates_of(sources["bp4d"]), team=team
    )
    passes = job.passes()
    feed, grads = iterations(data, 1, team, lambda b, step: job.prepare(b.to(torch.float64), step)), {}
    for step in range(3):
        moment, samples = feed(step)
        for one in passes:
            if step == 0:
                # gradients as they are when the optimiser steps: averaged and clipped
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
                "params": dict(model.state_dict()),
                "ids": [],
                "notes": "; ".join(notes),
            },
            out,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
