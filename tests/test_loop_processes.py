"""The loss under DistributedDataParallel and FSDP2, and the validation metric, in two processes."""

from __future__ import annotations

import json
from pathlib import Path

import forks
import loop_processes
import pytest
import torch
from small_metric import SmallLook


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    processes = [forks.CONTEXT.Process(target=loop_processes.run, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_one_image_in_each_process_is_a_batch_of_two(results: list[dict], wrapper: str) -> None:
    parent = loop_processes.Parent()
    parent(loop_processes.images()[:2]).backward()
    for result in results:
        for found, parameter in zip(result[wrapper], parent.body.parameters(), strict=True):
            assert torch.allclose(torch.tensor(found), parameter.grad.flatten(), rtol=1e-4, atol=1e-8)
        prefix = "module." if wrapper == "ddp" else ""
        assert result[f"{wrapper} keys"] == [f"{prefix}body.bias", f"{prefix}body.weight"]


def test_the_validation_metric_is_the_mean_over_both(results: list[dict]) -> None:
    with torch.no_grad():
        expected = SmallLook().eval()(loop_processes.images()).mean(dim=0)
    for result in results:
        assert list(result["means"]) == ["quality", "sharpness", "contrast"]
        assert torch.allclose(torch.tensor(list(result["means"].values())), expected)
