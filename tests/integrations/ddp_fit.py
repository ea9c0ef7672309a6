"""Run by a test in two processes: a fit with the callback, and what each rank has at its end.

Arguments: a file of the data and the first weights, and where to write, "{rank}" in it.
"""

import os
import sys

import torch
from torch.utils.data import DataLoader, DistributedSampler

from kfac_laplace.integrations.lightning import MarglikCallback

from integrations.lightning_fits import TUNED, Module, fitted  # isort: skip

if __name__ == "__main__":
    found = torch.load(sys.argv[1], weights_only=False)
    module, tunes = Module().double(), MarglikCallback(**TUNED)
    module.load_state_dict(found["weights"])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = DistributedSampler(found["data"], 2, rank, shuffle=False)  # Lightning's shuffles
    loader = DataLoader(found["data"], batch_size=3, sampler=sampler)
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    trainer = fitted(module, found["data"], tunes, loader=loader, **options)
    state = {
        "weights": module.state_dict(),
        "hyperparameters": tunes.tuner.hyperparameters(),
        "evidence": [record.evidence for record in tunes.tuner.history],
        "n_data": tunes.posterior.n_data,
    }
    torch.save(state, sys.argv[2].format(rank=trainer.global_rank))
