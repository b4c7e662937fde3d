"""pyiqa's own trainer takes our networks, on a CPU: the option files of `docs/options` on a toy data set."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyiqa
import pytest
import torch
import upstream
import yaml
from forks import Fork
from pyiqa.archs.arch_util import load_pretrained_network
from pyiqa.data import build_dataloader
from pyiqa.losses import build_loss
from torch import Tensor
from torchvision.utils import save_image

from qualiclip_pyiqa.metrics.prompt_iqa import PromptIQA
from qualiclip_pyiqa.training.tuning import rating_losses

PACKAGE = Path(pyiqa.__file__).parent
FILES = Path(__file__).parents[1] / "docs" / "options"
OPTIONS = {
    metric: yaml.safe_load((FILES / f"train_{name}.yml").read_text())
    for metric, name in (("clipiqa+", "CLIPIQA+"), ("qualiclip+", "QualiCLIP+"))
}
KEYS = {"prompt_learner.ctx", "prompt_learner.token_prefix", "prompt_learner.token_suffix"}
CROP, BATCH, EPOCHS, TRAINING = 64, 4, 2, 8


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a toy data set in the places that the option files name, and a link to pyiqa.

    pyiqa writes `experiments` beside the package that it runs from, so the link keeps them out of site-packages.
    """
    (tmp_path / "pyiqa").symlink_to(PACKAGE)
    rows = ["img_name,mos,official_split"]
    for number, picture in enumerate(upstream.pictures(TRAINING + 4, 72, 80)):
        for size in ("512x384", "1024x768"):
            path = tmp_path / "datasets" / "koniq10k" / size / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(picture, path)
        rows.append(f"{number}.png,{20 + 5 * number},{'train' if number < TRAINING else 'val'}")
    (tmp_path / "datasets" / "meta_info").mkdir()
    (tmp_path / "datasets" / "meta_info" / "meta_info_KonIQ10kDataset.csv").write_text("\n".join(rows))
    return tmp_path


def toy(metric: str) -> dict[str, Any]:
    """The option file as it is, but for sizes and times."""
    options = copy.deepcopy(OPTIONS[metric])
    options["datasets"]["train"].update(num_worker_per_gpu=0, batch_size_per_gpu=BATCH)
    options["datasets"]["train"]["augment"]["random_crop"] = CROP
    options["datasets"]["val"]["num_worker_per_gpu"] = 0
    options["train"]["total_epoch"] = options["train"]["scheduler"]["T_max"] = EPOCHS
    options["logger"]["print_freq"] = 1
    return options


ARGUMENTS = ["-opt", "toy.yml", "--force_yml", "num_gpu=0"]


def train_in_a_fork(workplace: Path, options: dict[str, Any]) -> str:
    """As `train`, without the seconds in which everything is imported again."""
    (workplace / "toy.yml").write_text(yaml.safe_dump(options, sort_keys=False))
    file = str(workplace / "pyiqa" / "train.py")
    start = f"import os, runpy\nos.chdir({str(workplace)!r})\nrunpy.run_path({file!r}, run_name='__main__')"
    said = workplace / "said"
    status = Fork(ARGUMENTS, before=start, command=False, stdout=said, stderr=said).wait()
    printed = said.read_text()
    assert status == 0, printed[-3000:]
    assert "End of training" in printed
    return printed


def train(workplace: Path, options: dict[str, Any], **environment: str) -> str:
    """Run pyiqa's trainer on a CPU as `docs/training.md` says; what it prints."""
    (workplace / "toy.yml").write_text(yaml.safe_dump(options, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "pyiqa.train", *ARGUMENTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=workplace,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "End of training" in done.stdout
    return done.stdout


def params(workplace: Path, options: dict[str, Any], name: str) -> dict[str, Tensor]:
    return torch.load(workplace / "experiments" / options["name"] / "models" / name)["params"]


@torch.no_grad()
def check_result(metric: str, network: dict[str, Any], file: Path, weights: Path) -> None:
    """Our metric and pyiqa's loader take the file, strictly, and pyiqa's own network scores alike."""
    ours = pyiqa.create_metric(metric, device="cpu", pretrained=str(file)).net
    theirs = upstream.oracle(metric, weights, pretrained=False)
    # And the option file is pyiqa's own but for the type: its network takes every other option that there is.
    assert network["type"] == f"Open{type(theirs).__name__}"
    assert set(network) - {"type"} <= set(inspect.signature(type(theirs)).parameters)
    load_pretrained_network(theirs, str(file), True, "params")
    x = upstream.pictures(2, 64, 64, seed=3)
    found = ours(x)
    assert (found - theirs(x)).abs().max() < 1e-5  # as in tests/test_parity.py
    ours.prompt_learner.ctx.zero_()
    load_pretrained_network(ours, str(file), True, "params")
    assert torch.equal(ours(x), found)


def test_clipiqa_plus(workplace: Path, upstream_weights: Path) -> None:
    options = toy("clipiqa+")
    options["val"]["val_freq"] = 2
    # Not even the start-up hook: pyiqa finds the class by the entry point when it looks for its name.
    said = train(workplace, options, QUALICLIP_PYIQA_AUTOLOAD="0")
    assert "Network [OpenCLIPIQA] is created" in said and "with parameters: 16,384" in said
    parts = [float(value) for value in re.findall(r"l_(?:mos|metric): (\S+)", said)]
    assert len(parts) == 2 * EPOCHS * TRAINING // BATCH and all(map(math.isfinite, parts))
    assert "# srcc: " in said
    assert not (PACKAGE.parent / "experiments" / options["name"]).exists()

    fresh = pyiqa.create_metric("clipiqa+", device="cpu", pretrained=False).net.state_dict()
    for name in ("net_latest.pth", "net_best.pth"):
        learned = params(workplace, options, name)
        assert set(learned) == KEYS
        assert not torch.equal(learned["prompt_learner.ctx"], fresh["prompt_learner.ctx"])
        for key in KEYS - {"prompt_learner.ctx"}:
            assert torch.equal(learned[key], fresh[key])
    file = workplace / "experiments" / options["name"] / "models" / "net_latest.pth"
    # With the positional table on, as in pyiqa's options, it is this metric's context.
    check_result("clipiqa+_rn50_512", options["network"], file, upstream_weights)


def test_qualiclip_plus_from_an_earlier_context(workplace: Path, upstream_weights: Path) -> None:
    """The way around resuming, which needs CUDA: begin from a context that was saved."""
    options = toy("qualiclip+")
    options["path"]["pretrain_network"] = str(upstream_weights / "QualiCLIP+_koniq.pth")
    options["train"]["total_epoch"] = 1
    options["datasets"]["train"]["batch_size_per_gpu"] = TRAINING
    said = train_in_a_fork(workplace, options)
    assert "Loading OpenQualiCLIP model from" in said
    learned = params(workplace, options, "net_latest.pth")
    begun = torch.load(upstream_weights / "QualiCLIP+_koniq.pth")["params"]
    assert set(learned) == KEYS
    moved = (learned["prompt_learner.ctx"] - begun["prompt_learner.ctx"]).abs().max()
    assert 0 < moved < 1.1 * 2e-3  # one step of Adam, which is hardly longer than the learning rate
    file = workplace / "experiments" / options["name"] / "models" / "net_latest.pth"
    check_result("qualiclip+", options["network"], file, upstream_weights)


def test_a_step_equals_that_of_pyiqas_own_network(upstream_weights: Path) -> None:
    theirs = upstream.oracle("clipiqa+", upstream_weights, pretrained=False).train()
    ours: PromptIQA = pyiqa.create_metric("clipiqa+", device="cpu", pretrained=False).net
    ours.load_state_dict(theirs.state_dict())
    ours.train()
    x, y = upstream.pictures(4, 64, 64), torch.tensor([[0.1], [0.8], [0.4], [0.6]])
    train_options = OPTIONS["clipiqa+"]["train"]
    criteria = [build_loss(train_options[name]) for name in ("mos_loss_opt", "metric_loss_opt")]
    expected = sum(criterion(theirs(x), y) for criterion in criteria)
    # A correlation of scores that hardly differ makes ten times as much of their rounding.
    found = rating_losses(ours(x)[:, 0], y[:, 0], "mse+plcc")["loss"]
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    expected.backward()
    found.backward()
    gradient = theirs.prompt_learner.ctx.grad
    # float32 through twelve layers in two orders of summation.
    assert (ours.prompt_learner.ctx.grad - gradient).abs().max() < 1e-3 * gradient.abs().max()


def test_a_batch_of_all_images_is_a_step() -> None:
    """The advice of docs/pyiqa-trainer.md for small data sets, whose incomplete batches pyiqa drops."""
    options = {**OPTIONS["clipiqa+"]["datasets"]["train"], "phase": "train", "num_worker_per_gpu": 0}
    for count in (1, 7, 8):
        smaller = {**options, "batch_size_per_gpu": min(count, options["batch_size_per_gpu"])}
        assert len(build_dataloader([0] * count, smaller, num_gpu=0)) == 1
