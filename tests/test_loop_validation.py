"""The validation metric: in torchmetrics, Lightning, option files, Hugging Face's Trainer."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import upstream
from PIL import Image
from small_metric import SmallLook, SmallMetric
from torch import Tensor, nn

from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.loop import option_files
from qualiclip_pyiqa.loop.option_files import calculate_quality
from qualiclip_pyiqa.loop.trainer_callback import QualityCallback

torchmetrics = pytest.importorskip("torchmetrics")

from qualiclip_pyiqa.loop.validation import QualityMetric  # noqa: E402


@pytest.fixture(scope="module")
def small() -> SmallMetric:
    return SmallMetric().eval()


@pytest.fixture(scope="module")
def look() -> SmallLook:
    return SmallLook().eval()


@torch.no_grad()
def scores(metric: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = metric(x)
    return found


class TestQualityMetric:
    def test_mean_of_all_images_whatever_the_batches(self, small: SmallMetric) -> None:
        x = upstream.pictures(5, 48, 64)
        quality = QualityMetric(small)
        for batch in x.split(2):
            quality.update(batch)
        found = quality.compute()
        assert found.shape == () and torch.allclose(found, scores(small, x).mean())
        assert torch.equal(quality.compute(), found)
        quality.reset()
        quality.update(x[:1])
        assert torch.allclose(quality.compute(), scores(small, x[:1]).mean())
        assert torch.allclose(quality(x[2:]), scores(small, x[2:]).mean())  # the batch's own
        assert torch.allclose(quality.compute(), scores(small, x[[0, 2, 3, 4]]).mean())

    def test_a_mean_for_each_attribute(self, look: SmallLook) -> None:
        x = upstream.pictures(3, 48, 64)
        quality = QualityMetric(look)
        quality.update(x)
        found = quality.compute()
        assert tuple(found) == look.attributes == quality.attributes
        assert torch.allclose(torch.stack(list(found.values())), scores(look, x).mean(dim=0))
        both = torchmetrics.MetricCollection({"own": QualityMetric(look), "other": QualityMetric(SmallMetric())})
        assert len(both(x)) == 4

    def test_in_a_collection_with_metrics_that_have_a_reference(self, small: SmallMetric) -> None:
        x, target = upstream.pictures(4, 48, 64).split(2)
        psnr = torchmetrics.image.PeakSignalNoiseRatio(data_range=1.0)
        both = torchmetrics.MetricCollection([QualityMetric(small), psnr])
        both.update(x, target)
        both.update(preds=target, target=x)
        found = both.compute()
        assert torch.allclose(found["QualityMetric"], scores(small, torch.cat([x, target])).mean())
        assert torch.allclose(found["PeakSignalNoiseRatio"], psnr(x, target))
        assert torch.allclose(both(x, target)["QualityMetric"], scores(small, x).mean())

    def test_it_is_shown_with_its_metric(self, small: SmallMetric) -> None:
        assert repr(QualityMetric("qualiclip-mini+:look")) == "QualityMetric('qualiclip-mini+:look')"
        assert repr(QualityMetric(small)) == "QualityMetric('small')"

    def test_uint8_grey_and_wrong_images(self, small: SmallMetric) -> None:
        quality = QualityMetric(small)
        x = upstream.pictures(2, 48, 64)
        grey = (x[:, :1] * 255).round().byte()
        quality.update(grey)
        assert torch.allclose(quality.compute(), scores(small, (grey / 255).expand(-1, 3, -1, -1)).mean())
        for wrong, message in ((2 * x, "clamp or rescale it"), (255 * x, "divide by 255"), (x[0, 0, 0], "expected")):
            with pytest.raises(ImageError, match=message):
                quality.update(wrong)

    def test_no_images_have_no_mean(self, small: SmallMetric) -> None:
        quality = QualityMetric(small)
        message = r"QualityMetric has no images, so there is no mean; call update\(images\) before compute\(\)"
        with pytest.warns(UserWarning, match="before the"), pytest.raises(SettingsError, match=message):
            quality.compute()
        quality.update(upstream.pictures(1, 48, 64))
        assert torch.isfinite(quality.compute())
        quality.reset()
        with pytest.warns(UserWarning, match="before the"), pytest.raises(SettingsError, match=message):
            quality.compute()

    def test_direction(self) -> None:
        assert QualityMetric(SmallMetric()).higher_is_better is True
        assert QualityMetric(SmallMetric(lower_better=True)).higher_is_better is False
        assert QualityMetric.is_differentiable is False

    def test_parent_does_not_carry_the_network_whose_precision_stays(self, small: SmallMetric) -> None:
        parent = nn.Module()
        parent.quality = QualityMetric(small)
        assert not parent.state_dict() and not list(parent.parameters()) and not list(parent.buffers())
        x = upstream.pictures(2, 48, 64)
        expected = scores(small, x).mean()
        parent.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parent.quality.update(x)
        assert torch.allclose(parent.quality.compute().float(), expected, atol=1e-6)
        parent.train()
        assert not any(module.training for module in parent.quality.frozen.network.modules())
        for same in (copy.deepcopy(parent.quality), pickle.loads(pickle.dumps(parent.quality))):
            assert torch.equal(same.compute(), parent.quality.compute())

    def test_in_lightning(self, look: SmallLook, tmp_path: Path) -> None:
        lightning = pytest.importorskip("lightning", reason="lightning is not installed")
        x = upstream.pictures(5, 48, 64)

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Conv2d(3, 3, 1)
                self.quality = QualityMetric(look)

            def training_step(self, batch: Tensor) -> Tensor:
                return self.body(batch).square().mean()

            def validation_step(self, batch: Tensor) -> None:
                self.quality.update(batch)

            def on_validation_epoch_end(self) -> None:
                self.log_dict({f"val/{name}": mean for name, mean in self.quality.compute().items()})
                self.quality.reset()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        data = torch.utils.data.DataLoader(x, batch_size=2)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            precision="bf16-mixed",
            callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="val/quality", mode="max")],
        )
        trainer.fit(Module(), data, data)
        expected = dict(zip(look.attributes, scores(look, x).mean(dim=0).tolist(), strict=True))
        for name, mean in expected.items():
            assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(mean, abs=1e-6)
        (file,) = tmp_path.glob("*.ckpt")
        assert set(torch.load(file, weights_only=False)["state_dict"]) == {"body.weight", "body.bias"}


class Shift(nn.Module):
    """A model for Hugging Face's Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (x + self.shift).square().mean()}


def test_trainer_callback_without_images_is_an_error(small: SmallMetric, tmp_path: Path) -> None:
    """The mean of none is NaN, which would be logged and might choose the checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False
    )
    data = [{"x": image} for image in upstream.pictures(2, 48, 64)]
    trainer = transformers.Trainer(Shift(), arguments, eval_dataset=data)
    trainer.add_callback(QualityCallback(trainer, small, lambda model: iter(())))
    with pytest.raises(SettingsError, match="make_images returned no images, so quality has no mean; expected at"):
        trainer.evaluate()
    assert not any("eval_quality" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("trained", [False, True])
def test_trainer_callback(look: SmallLook, tmp_path: Path, trained: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    x = upstream.pictures(3, 48, 64)

    def make_images(model: nn.Module) -> Iterator[object]:
        assert not model.training and not torch.is_grad_enabled()
        yield Image.fromarray((x[0] * 255).byte().permute(1, 2, 0).numpy())
        yield x[1]
        yield (x[2] * 255).byte().permute(1, 2, 0).numpy()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = [{"x": image} for image in x]
    trainer = transformers.Trainer(Shift(), arguments, train_dataset=data, eval_dataset=data)
    trainer.add_callback(QualityCallback(trainer, look, make_images))
    batch = torch.stack([(x[0] * 255).byte() / 255, x[1], (x[2] * 255).byte() / 255])
    expected = dict(zip(look.attributes, scores(look, batch).mean(dim=0).tolist(), strict=True))
    if trained:
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "eval_quality" in entry]
        assert [entry["step"] for entry in logged] == [1, 2]
        assert logged[-1]["eval_sharpness"] == pytest.approx(expected["sharpness"])
        assert trainer.state.best_metric == pytest.approx(expected["quality"])
    else:
        found = trainer.evaluate()
        for name, mean in expected.items():
            assert found[f"eval_{name}"] == pytest.approx(mean)


OPTION_FILE = """
train:
  pixel_opt: {type: L1Loss, loss_weight: 1.0}
  perceptual_opt: {type: QualityPerceptualLoss, metric: qualiclip-mini+, loss_weight: 0.01, relative_to: target}
  quality_opt: {type: QualityLoss, metric: qualiclip-mini+, weight: 0.01, crops: [2, 48], scales: [1, 0.75]}
val:
  metrics:
    quality: {type: calculate_quality, metric: qualiclip-mini+, crop_border: 4, better: higher}
"""


def test_option_files_of_pyiqa_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing but pyiqa is imported: it finds loss and metric by entry points."""
    (tmp_path / "options.yml").write_text(OPTION_FILE)
    program = """
import json, sys, yaml, numpy as np, torch
from pyiqa.losses import build_loss
from pyiqa.metrics import calculate_metric
options = yaml.safe_load(open(sys.argv[1]))
torch.manual_seed(0)
x = torch.rand(1, 3, 64, 64, requires_grad=True)
losses = {name: build_loss(opt) for name, opt in options["train"].items()}
quality = losses["quality_opt"](x, x.detach())
percep, style = losses["perceptual_opt"](x, x.detach())
assert style is None
quality.backward()
image = (x[0].detach() * 255).byte().permute(1, 2, 0).numpy()[:, :, ::-1]
value = calculate_metric([image], options["val"]["metrics"]["quality"])
print(json.dumps([float(quality), float(percep), float(x.grad.abs().max()), value]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "options.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    quality, percep, gradient, value = json.loads(done.stdout.splitlines()[-1])
    assert 0 < quality <= 0.01 and percep == 0 and gradient > 0
    torch.manual_seed(0)
    inner = (torch.rand(1, 3, 64, 64) * 255).byte()[:, :, 4:-4, 4:-4] / 255
    built, _ = option_files._metric("qualiclip-mini+")
    assert value == pytest.approx(float(built.measure(inner)), abs=1e-6)


def test_registries_like_basicsr_s() -> None:
    """Its `calculate_metric` passes the images by name."""
    from pyiqa.utils.registry import Registry

    losses, metrics = Registry("loss"), Registry("metric")
    option_files.register(losses, metrics)
    loss = losses.get("QualityLoss")(metric="qualiclip-mini", loss_weight=0.5)
    x = upstream.pictures(1, 48, 64)
    assert loss.weight == 0.5 and isinstance(loss(x, x), Tensor)
    with pytest.raises(SettingsError, match="weight and loss_weight were given, which mean the same"):
        losses.get("QualityLoss")(metric="qualiclip-mini", loss_weight=0.5, weight=0.5)
    chosen = losses.get("QualityLoss")(metric="qualiclip-mini+:look", attributes=["sharpness", "noisiness"])
    assert chosen.attributes == ("sharpness", "noisiness")
    image = (x[0] * 255).byte().permute(1, 2, 0).numpy()[:, :, ::-1]
    data = {"img": image, "img2": image}
    assert 0 <= metrics.get("calculate_quality")(**data, metric="qualiclip-mini") <= 1


@pytest.mark.parametrize("kind", [option_files.QualityLoss, option_files.QualityPerceptualLoss])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weigth": 1},
            "has no option 'weigth'; expected some of metric, weight, reduction, relative_to, crops, scales, "
            "checkpointing, attributes, loss_weight; did you mean 'weight'",
        ),
        ({"metric": None}, r"has no metric; expected one such as metric: qualiclip-mini\+"),
        ({"loss_weight": "1e-2"}, r"loss_weight is '1e-2'; expected a number of at least 0 \(YAML reads"),
    ],
)
def test_wrong_options_of_a_loss_are_named(kind: type[option_files.QualityLoss], options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        kind(**{"metric": "qualiclip-mini", **options})


def test_options_that_other_metrics_of_option_files_have() -> None:
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    plain = calculate_quality(image, metric="qualiclip-mini", crop_border=10)
    given = {"crop_border": 10, "input_order": "CHW", "test_y_channel": False}
    assert calculate_quality(image.transpose(2, 0, 1), metric="qualiclip-mini", **given) == plain
    assert calculate_quality(image[10:-10, 10:-10], metric="qualiclip-mini", input_order="HWC") == plain
    for border, left in ((40, "10x0"), (100, "0x0"), (25, "40x30")):
        message = f"crop_border is {border}, which leaves {left} pixels of an image of 90x80; the smallest .* is 32x32"
        with pytest.raises(ImageError, match=message):
            calculate_quality(image, metric="qualiclip-mini", crop_border=border)
    with pytest.raises(ImageError, match="image is a NoneType; expected an array"):
        calculate_quality(None, metric="qualiclip-mini")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_y_channel": True}, "test_y_channel is True; expected False: the score is of the colours too"),
        ({"input_order": "WHC"}, "input_order is 'WHC'; expected 'HWC' or 'CHW'"),
        (
            {"crop_boarder": 4},
            "calculate_quality has no option 'crop_boarder'; expected some of metric, crop_border, better, "
            "input_order, test_y_channel; did you mean 'crop_border'",
        ),
        ({"metric": ["qualiclip-mini"]}, r"metric is \['qualiclip-mini'\]; expected a name"),
        ({"better": "lower"}, "better is 'lower'; expected 'higher', as a higher qualiclip-mini is better"),
        ({"metric": "qualiclip-mini:look"}, r"qualiclip-mini:look has 7 scores; expected one"),
        ({"crop_border": -1}, "crop_border is -1; expected an integer of at least 0"),
        ({"metric": "psnr"}, "needs a reference"),
    ],
)
def test_wrong_options_of_a_validation_are_named(options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        calculate_quality(np.zeros((48, 64, 3), np.uint8), **{"metric": "qualiclip-mini", **options})
