"""Models that are divided between processes are refused, and what is said to do instead works."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from kfac_laplace import Laplace
from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.optim import KFAC


@pytest.fixture
def mesh():
    """One process, as a mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def network() -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("make", [Laplace, KFAC], ids=["Laplace", "KFAC"])
@pytest.mark.parametrize("kind", ["fsdp2", "tensor parallel", "fsdp"])
def test_a_divided_model_is_refused(kind, make, mesh):
    model: nn.Module = network()
    if kind == "fsdp2":
        fully_shard(model, mesh=mesh)
    elif kind == "tensor parallel":
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    else:
        model = FullyShardedDataParallel(
            model, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
        )
    with pytest.raises(UnsupportedUse, match="each process has a part"):
        make(model, "classification")


def test_its_weights_in_a_whole_model_are_taken(mesh):
    whole = network()
    divided = copy.deepcopy(whole)
    fully_shard(divided, mesh=mesh)
    state = get_model_state_dict(divided, options=StateDictOptions(full_state_dict=True))
    again = network()
    again.load_state_dict(state)
    batches = [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    got, want = (Laplace(model).fit(batches) for model in (again, whole))
    assert torch.equal(got.log_marginal_likelihood(), want.log_marginal_likelihood())
