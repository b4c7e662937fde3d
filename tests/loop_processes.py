"""What each of two processes does in `test_loop_processes`; apart, so that they import little."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import upstream
from small_metric import SmallLook, SmallMetric
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qualiclip_pyiqa import QualityLoss
from qualiclip_pyiqa.loop.validation import QualityMetric


class Parent(nn.Module):
    """Its loss is a part of it, so that wrappers see it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.quality = QualityLoss(SmallMetric().eval())

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.quality(x + 0.1 * self.body(x))
        return loss


def images() -> Tensor:
    return upstream.pictures(5, 48, 64)


def run(rank: int, folder: str) -> None:
    """Train with one image in each process, and score three images in one and two in the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        found: dict[str, object] = {}
        own = images()[rank : rank + 1]
        parallel = DistributedDataParallel(Parent())
        parallel(own).backward()
        found["ddp"] = [parameter.grad.flatten().tolist() for parameter in parallel.module.body.parameters()]
        found["ddp keys"] = sorted(parallel.state_dict())

        sharded = Parent()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        sharded(own).backward()
        assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
        whole = [parameter.grad.full_tensor() for parameter in sharded.body.parameters()]
        found["fsdp"] = [gradient.flatten().tolist() for gradient in whole]
        found["fsdp keys"] = sorted(sharded.state_dict())
        assert not any(isinstance(value, DTensor) for value in sharded.quality.metric.network.buffers())

        quality = QualityMetric(SmallLook().eval())
        for image in images()[rank::2]:
            quality.update(image[None])
        found["means"] = {name: float(mean) for name, mean in quality.compute().items()}
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()
