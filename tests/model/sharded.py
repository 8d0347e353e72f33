"""A process of its own: a model whose weights FSDP2 has sharded answers as it did before."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cet

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
model = cet.EarlyExit(net, ["1"], (torch.randn(4, 6),))
model.policy = cet.ExitPolicy("confidence", (0.3,))
x = torch.randn(9, 6)
expected = model(x)
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
for _ in range(2):
    torch.testing.assert_close(model(x), expected)
model.reshard()
with pytest.raises(RuntimeError, match=r"call model\(x\)"):  # predict gathers no weights
    model.predict(x)
dist.destroy_process_group()
print("finished")
