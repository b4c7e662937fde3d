"""What the loss is: values, options, gradients."""

from __future__ import annotations

import logging
from pathlib import Path

import pyiqa
import pytest
import torch
import torch.nn.functional as F
import upstream
from small_metric import SmallLook, SmallMetric
from torch import Tensor, nn

from qualiclip_pyiqa import OpenQualiCLIP, QualityLoss, load_image
from qualiclip_pyiqa.degradations.bank import degrade
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.loop.range import clamp_keeping_gradient

PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "lighthouse.jpg"


@pytest.fixture(scope="module")
def metric() -> nn.Module:
    return pyiqa.create_metric("qualiclip-mini", device="cpu")


@pytest.fixture(scope="module")
def small() -> SmallMetric:
    return SmallMetric().eval()


def score(metric: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = metric(x)
    return found.mean(dim=1)


def test_lower_is_better_and_differentiable(metric: nn.Module) -> None:
    loss = QualityLoss(metric)
    x = upstream.pictures(3, 64, 64)
    assert torch.allclose(loss(x), 1 - metric(x).mean())
    x.requires_grad_()
    loss(x).backward()
    with torch.no_grad():
        step = 1e-3 / x.grad.abs().max()
        assert loss(x - step * x.grad) < loss(x)


def test_a_name_a_metric_its_network_and_its_use_as_a_loss_are_one(metric: nn.Module, tmp_path: Path) -> None:
    x = upstream.pictures(2, 64, 64)
    expected = QualityLoss(metric)(x)
    as_loss = pyiqa.create_metric("qualiclip-mini", device="cpu", as_loss=True)
    for same in ("qualiclip-mini", metric.net, as_loss):
        assert torch.equal(QualityLoss(same)(x), expected)
    sharpness = OpenQualiCLIP("qualiclip-mini", prompts="sharpness").eval()
    assert torch.equal(QualityLoss("qualiclip-mini:sharpness")(x), 1 - score(sharpness, x).mean())
    with pytest.raises(SettingsError, match=r"none.safetensors does not exist"):
        QualityLoss(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(WeightsError):
        QualityLoss(tmp_path / "bad.safetensors")


def test_weight_and_reduction(small: SmallMetric) -> None:
    x = upstream.pictures(3, 48, 64)
    each = QualityLoss(small, reduction="none")(x)
    assert each.shape == (3,) and torch.equal(each, 1 - score(small, x))
    assert torch.equal(QualityLoss(small, reduction="sum")(x), each.sum())
    assert torch.equal(QualityLoss(small, weight=0.25)(x), 0.25 * each.mean())
    assert torch.equal(QualityLoss(small, weight=0)(x), torch.tensor(0.0))
    assert torch.allclose(QualityLoss(small)(x[:1]), each[0])  # one image


def test_several_attributes_count_alike() -> None:
    look = SmallLook().eval()
    x = upstream.pictures(2, 48, 64)
    for chosen in (("quality", "sharpness"), ["contrast"], ("contrast", "quality", "sharpness")):
        columns = [look.attributes.index(name) for name in chosen]
        loss = QualityLoss(look, reduction="none", attributes=chosen)
        assert torch.allclose(loss(x), 1 - look(x)[:, columns].mean(dim=1))
    relative = QualityLoss(look, relative_to="target", attributes=("contrast",))
    assert torch.allclose(relative(x, x.flip(0)), (look(x.flip(0)) - look(x))[:, 2].relu().mean())


def test_attributes_that_describe_are_a_choice() -> None:
    """More brightness is not better."""
    message = (
        r"qualiclip-mini\+:look has attributes of which more is not better \(brightness, colorfulness, contrast\); "
        r"expected attributes=\[...\] with all or some of quality, sharpness, noisiness, compression, "
        r"or one of them in the metric: qualiclip-mini\+:quality"
    )
    with pytest.raises(SettingsError, match=message):
        QualityLoss("qualiclip-mini+:look")
    with pytest.raises(SettingsError, match=r"small has attributes of which more is not better \(contrast\)"):
        QualityLoss(SmallLook())  # a metric without prompts: by its attributes' names
    x = upstream.pictures(2, 64, 64)
    judging = ("quality", "sharpness", "noisiness", "compression")
    found = QualityLoss("qualiclip-mini+:look", attributes=judging)(x)
    each = [QualityLoss(f"qualiclip-mini+:{name}")(x) for name in judging]
    assert torch.allclose(found, torch.stack(each).mean())

    def of(prompts: dict) -> OpenQualiCLIP:
        return OpenQualiCLIP("qualiclip-mini+", prompts=prompts)

    dark, dull = ("Bright photo.", "Dark photo."), ("Colorful photo.", "Dull photo.")
    with pytest.raises(
        SettingsError, match=r"not better \(a, b\); expected attributes=\[...\] with those that the loss"
    ):
        QualityLoss(of({"a": dark, "b": dull}))
    # The only attribute is chosen, and so are pairs of one's own.
    QualityLoss("qualiclip-mini+:contrast")
    QualityLoss(of({"own": ("Bright photo.", "Dull photo."), "quality": ("Good photo.", "Bad photo.")}))


@pytest.mark.parametrize("relative_to", ["target", "input"])
def test_relative_is_how_much_worse_and_rewards_nothing_beyond(small: SmallMetric, relative_to: str) -> None:
    x = torch.cat([upstream.pictures(4, 48, 64), torch.full((1, 3, 48, 64), 0.5)])
    other = x.flip(0)
    loss = QualityLoss(small, reduction="none", relative_to=relative_to)
    given = {"target": {"target": other}, "input": {"input": other}}[relative_to]
    expected = (score(small, other) - score(small, x)).clamp(min=0)
    assert (expected > 0).any() and (expected == 0).any()
    x.requires_grad_()
    other.requires_grad_()
    found = loss(x, **given)
    assert torch.allclose(found, expected)
    found.sum().backward()
    assert other.grad is None
    assert torch.equal(x.grad.abs().amax(dim=(1, 2, 3)) > 0, expected > 0)


def test_an_input_may_have_another_size_and_a_target_not(small: SmallMetric) -> None:
    """In super-resolution the input is smaller; passed as the target by mistake, it must not go unnoticed."""
    x = upstream.pictures(2, 96, 128)
    half = F.avg_pool2d(x.flip(0), 2)
    expected = (score(small, half) - score(small, x)).clamp(min=0)
    assert torch.allclose(QualityLoss(small, reduction="none", relative_to="input")(x, input=half), expected)
    message = "target is 64x48 pixels and x is 128x96; expected the ground truth in the size of the network's output"
    for options in ({}, {"crops": (1, 32)}):
        with pytest.raises(ImageError, match=message):
            QualityLoss(small, relative_to="target", **options)(x, half)
    with pytest.raises(ImageError, match="input is 64x48 pixels and x is 128x96; crops need equal sizes"):
        QualityLoss(small, relative_to="input", crops=(1, 32))(x, input=half)


@pytest.mark.parametrize(
    ("height", "count", "message"), [(48, 2, "target is 64x48 pixels"), (64, 1, "target has 1 images and x has 2")]
)
def test_a_compiled_loss_checks_its_target(small: SmallMetric, height: int, count: int, message: str) -> None:
    x = upstream.pictures(2, 64, 64)
    compiled = torch.compile(QualityLoss(small, relative_to="target"), backend="eager")
    assert torch.isfinite(compiled(x, x.flip(0)))
    with pytest.raises(ImageError, match=message):
        compiled(x, x[:count, :, :height])


def test_relative_needs_its_image(small: SmallMetric) -> None:
    x = upstream.pictures(2, 48, 64)
    assert torch.equal(QualityLoss(small)(x, x), QualityLoss(small)(x))  # called like a pixel loss
    with pytest.raises(SettingsError, match=r"relative_to='target' needs the target: call loss\(restored, target\)"):
        QualityLoss(small, relative_to="target")(x, input=x)
    with pytest.raises(SettingsError, match=r"'input' needs the input: call loss\(restored, input=degraded\)"):
        QualityLoss(small, relative_to="input")(x, x)
    with pytest.raises(ImageError, match="target has 1 images and x has 2; expected as many"):
        QualityLoss(small, relative_to="target")(x, x[:1])


def test_crops_are_of_the_image_and_of_torch_s_generator(small: SmallMetric) -> None:
    x = upstream.pictures(2, 50, 70)
    loss = QualityLoss(small, reduction="none", crops=(3, 33))
    torch.manual_seed(1)
    first, second = loss(x), loss(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(loss(x), first)
    torch.manual_seed(1)
    tops, lefts = torch.randint(50 - 32, (2, 3)), torch.randint(70 - 32, (2, 3))
    for image in range(2):
        places = zip(tops[image].tolist(), lefts[image].tolist(), strict=True)
        each = torch.stack([x[image, :, top : top + 33, left : left + 33] for top, left in places])
        assert torch.allclose(first[image], 1 - score(small, each).mean())
    # Of a side that is shorter, the whole.
    assert torch.allclose(QualityLoss(small, crops=(2, 100))(x), QualityLoss(small)(x))


def test_every_place_can_be_cropped(small: SmallMetric) -> None:
    x = torch.full((1, 3, 34, 35), 0.5, requires_grad=True)
    torch.manual_seed(0)
    QualityLoss(small, crops=(60, 32))(x).backward()
    assert (x.grad.abs().sum(dim=1) > 0).all()


def test_crops_of_the_target_are_those_of_the_image(small: SmallMetric) -> None:
    x = upstream.pictures(3, 50, 70)
    loss = QualityLoss(small, reduction="none", relative_to="target", crops=(4, 32), scales=(1.0, 0.7))
    assert torch.equal(loss(x, x), torch.zeros(3))
    assert (loss(x, x.flip(3)) > 0).any()


def test_scales_are_means_of_resized_images(small: SmallMetric) -> None:
    x = upstream.pictures(2, 80, 100)
    half = F.interpolate(x, size=(40, 50), mode="bilinear", antialias=True)
    expected = 1 - (score(small, x) + score(small, half)) / 2
    assert torch.allclose(QualityLoss(small, reduction="none", scales=[1, 0.5])(x), expected)
    with pytest.raises(ImageError, match=r"image at scale 0.25 is 25x20 pixels; the smallest .* is 32x32"):
        QualityLoss(small, scales=(0.25,))(x)


def test_a_better_scale_or_crop_does_not_make_up_for_a_worse_one(small: SmallMetric) -> None:
    """Otherwise one resolution could be fooled for the other."""
    x, target = upstream.pictures(2, 80, 100).split(1)
    full = (score(small, target) - score(small, x)).clamp(min=0)
    halves = [F.interpolate(each, size=(40, 50), mode="bilinear", antialias=True) for each in (x, target)]
    half = (score(small, halves[1]) - score(small, halves[0])).clamp(min=0)
    loss = QualityLoss(small, reduction="none", relative_to="target", scales=(1, 0.5))
    assert torch.allclose(loss(x, target), (full + half) / 2)
    both = loss(x, target) + loss(target, x)
    assert both > 0


def test_values_outside_count_as_the_nearest_inside(small: SmallMetric) -> None:
    x = 3 * upstream.pictures(2, 48, 64) - 1
    assert x.min() < -0.5 and x.max() > 1.5
    for relative_to in (None, "target"):
        loss = QualityLoss(small, relative_to=relative_to)
        assert torch.equal(loss(x, x.flip(0)), loss(x.clamp(0, 1), x.flip(0).clamp(0, 1)))


def test_gradient_outside_leads_back_or_is_zero(small: SmallMetric) -> None:
    x = (3 * upstream.pictures(2, 48, 64) - 1).requires_grad_()
    inside = x.detach().clamp(0, 1).requires_grad_()
    loss = QualityLoss(small)
    loss(x).backward()
    loss(inside).backward()
    below, above = x.detach() < 0, x.detach() > 1
    expected = inside.grad.clone()
    expected[below] = expected[below].clamp(max=0)
    expected[above] = expected[above].clamp(min=0)
    assert torch.equal(x.grad, expected)
    for outside in (below, above):  # some of it is kept, and some is cut
        assert (x.grad[outside] != 0).any() and (x.grad[outside] == 0).any()


def test_a_descent_brings_pixels_back_and_takes_none_away() -> None:
    x = torch.tensor([-2.0, -2.0, 3.0, 3.0], requires_grad=True)
    aim = torch.tensor([0.25, -9.0, 0.75, 9.0])  # two aims cannot be reached
    for _ in range(200):
        (gradient,) = torch.autograd.grad((clamp_keeping_gradient(x) - aim).square().sum(), x)
        with torch.no_grad():
            x -= 0.05 * gradient
    assert torch.allclose(x, torch.tensor([0.25, -2.0, 0.75, 3.0]), atol=1e-3)


def test_values_far_outside_are_told_once(small: SmallMetric, caplog: pytest.LogCaptureFixture) -> None:
    x = upstream.pictures(2, 48, 64)

    def told(*images: Tensor, **options: str) -> list[str]:
        caplog.clear()
        loss = QualityLoss(small, **options)
        for image in images:
            loss(image, image)
        return [record.message for record in caplog.records if record.levelno == logging.WARNING]

    (message,) = told(255 * x, 255 * x, 255 * x)
    assert message.startswith("QualityLoss: x has values from ") and message.endswith("; divide by 255")
    infinite = x.clone()
    infinite[0, 0, 0, 0] = torch.inf
    assert "to inf, which count as 0 or 1" in told(infinite)[0]
    normalised = 2 * x - 1
    assert told(x, normalised)[0].endswith("for images in -1..1 pass (x + 1) / 2")
    one = torch.cat([255 * x[:1], x.repeat(4, 1, 1, 1)])
    assert len(told(one, relative_to="target")) == 1
    caplog.clear()
    QualityLoss(small, relative_to="target")(x, 255 * x)
    assert "target has values" in caplog.text
    # What a network returns: a little outside, or little of it.
    lone = x.clone()
    lone[:, :, :4] = -2
    with_nan = x.clone()
    with_nan[0, 0, 0, 0] = torch.nan
    assert not told(1.2 * x - 0.1, lone, with_nan)
    # Later calls do not wait for a GPU to be told its values.
    assert not told(x, x, x, 255 * x)


def test_values_are_not_looked_at_where_they_cannot_be(small: SmallMetric) -> None:
    loss = QualityLoss(small)
    x = upstream.pictures(2, 48, 64)
    each = torch.func.vmap(lambda image: loss(image[None]))(x)
    assert torch.allclose(each, 1 - score(small, x), atol=1e-6)

    class Mean(nn.Module):
        score_range = "0, 1"

        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(1, 2, 3))

    assert QualityLoss(Mean()).to("meta")(x.to("meta")).is_meta


def test_crops_that_are_no_crops_are_told_once(small: SmallMetric, caplog: pytest.LogCaptureFixture) -> None:
    x = upstream.pictures(2, 97, 131)
    loss = QualityLoss(small, crops=(4, 200))
    assert torch.equal(loss(x), QualityLoss(small)(x))
    loss(x)
    (record,) = caplog.records
    assert (
        "an image of 131x97 pixels is not larger than a crop of crops=(4, 200), so it is scored whole" in record.message
    )
    caplog.clear()
    QualityLoss(small, crops=(4, 100))(x)
    assert not caplog.records
    # The whole image is scored once, not once for each crop.
    sizes = []
    loss.metric.network.tower.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    loss(x)
    assert sizes == [(2, 3, 97, 131)]


def test_it_is_shown_with_its_metric_and_options() -> None:
    loss = QualityLoss("qualiclip-mini:sharpness", weight=0.1, crops=(2, 64))
    assert repr(loss).startswith("QualityLoss('qualiclip-mini:sharpness', weight=0.1, ") and "crops=(2, 64)" in repr(
        loss
    )


def test_nan_is_not_hidden(metric: nn.Module) -> None:
    x = upstream.pictures(2, 48, 64)
    x[0, 0, 5, 5] = torch.nan
    x.requires_grad_()
    loss = QualityLoss(metric, reduction="none")(x)
    assert loss[0].isnan() and loss[1].isfinite()


@pytest.mark.parametrize("options", [{}, {"relative_to": "target", "scales": (1.0, 0.8)}, {"checkpointing": True}])
def test_gradient_equals_finite_differences(metric: nn.Module, options: dict) -> None:
    loss = QualityLoss(metric, **options).double()
    x, target = upstream.pictures(2, 40, 48).double().split(1)
    if score(metric, target.float()) < score(metric, x.float()):
        x, target = target, x
    x.requires_grad_()
    assert loss(x, target) > 0
    assert torch.autograd.gradcheck(lambda image: loss(image, target), x, eps=1e-6, atol=1e-7, fast_mode=True)


def test_second_derivatives_exist(small: SmallMetric) -> None:
    loss = QualityLoss(small).double()
    x = upstream.pictures(1, 32, 32).double().requires_grad_()
    assert torch.autograd.gradgradcheck(loss, x, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("fault", ["gaussian_blur", "white_noise", "jpeg"])
def test_ten_steps_on_a_degraded_photograph_raise_its_score(metric: nn.Module, fault: str) -> None:
    photo = load_image(PHOTO)[None, :, 100:228, 100:228]
    degraded = degrade(photo, fault, 3, 0)
    loss = QualityLoss(metric)
    x = degraded.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.004)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(loss(x))
        losses[-1].backward()
        optimizer.step()
    assert score(metric, x.detach().clamp(0, 1)) > score(metric, degraded) + 0.05
    assert losses[-1] < losses[0]


def test_refuses_what_it_cannot_be() -> None:
    with pytest.raises(SettingsError, match="needs a reference"):
        QualityLoss(pyiqa.create_metric("psnr", device="cpu"))

    class Unbounded(nn.Module):
        score_range: str | None = None

    for score_range in (None, "0", "0, inf", "0, nan", "low, high", "1, 0"):
        Unbounded.score_range = score_range
        with pytest.raises(SettingsError, match=f"score_range is {score_range!r}; expected .* finite"):
            QualityLoss(Unbounded())
    with pytest.raises(SettingsError, match=r"metric is 3; expected a name or a metric, such as 'qualiclip-mini'"):
        QualityLoss(3)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"unknown metric 'qualiclip-mni'.*did you mean 'qualiclip-mini'"):
        QualityLoss("qualiclip-mni")

    class Whole(nn.Module):
        score_range = "0, 1"

        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    with pytest.raises(SettingsError, match=r"returned a tensor of shape \(\) for 2 images; expected a score for each"):
        QualityLoss(Whole())(torch.rand(2, 3, 32, 32))
    with pytest.raises(SettingsError, match="Whole cannot recompute its activations; expected a metric of this pack"):
        QualityLoss(Whole(), checkpointing=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "1e-2"}, r"weight is '1e-2'; expected a number of at least 0 \(YAML reads 1e-2 as text"),
        ({"weight": -1}, "weight is -1; expected a number of at least 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"reduction": "max"}, "reduction is 'max'; expected one of mean, sum, none"),
        ({"relative_to": "gt"}, "relative_to is 'gt'; expected None, 'input' or 'target'"),
        ({"crops": 4}, r"crops is 4; expected None or \(n, size\), n at least 1 and size at least 32"),
        ({"crops": (4, 31)}, r"crops is \(4, 31\)"),
        ({"crops": (0, 64)}, r"crops is \(0, 64\)"),
        ({"crops": (1, 64.0)}, r"crops is \(1, 64.0\)"),
        ({"scales": 0.5}, r"scales is 0.5; expected numbers above 0 and at most 4, such as \(1.0, 0.5\)"),
        ({"scales": ()}, r"scales is \(\)"),
        ({"scales": (1, 0)}, r"scales is \(1, 0\)"),
        ({"scales": (100.0,)}, r"scales is \(100.0,\); expected numbers above 0 and at most 4"),
        ({"scales": (float("nan"),)}, r"scales is \(nan,\)"),
        ({"checkpointing": "yes"}, "checkpointing is 'yes'; expected True or False"),
        ({"checkpointing": 1}, "checkpointing is 1; expected True or False"),
        ({"attributes": "quality"}, "attributes is 'quality'; expected a list of some of quality, each once"),
        ({"attributes": ()}, r"attributes is \(\); expected"),
        ({"attributes": ["sharpness"]}, r"attributes is \['sharpness'\]; expected a list of some of quality"),
        ({"attributes": ["quality", "quality"]}, "attributes is .* each once"),
        ({"attributes": [["quality"]]}, "attributes is .* each once"),
    ],
)
def test_wrong_options_are_named(small: SmallMetric, options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        QualityLoss(small, **options)


def test_wrong_images_are_named(small: SmallMetric) -> None:
    loss = QualityLoss(small)
    with pytest.raises(ImageError, match=r"expected \(N, 3, H, W\)"):
        loss(torch.rand(3, 48, 64))
    with pytest.raises(
        ImageError, match=r"image is a str; .* \(N, 3, H, W\), which qualiclip_pyiqa.as_batch makes of a"
    ):
        loss("photos/hats.jpg")
    with pytest.raises(ImageError, match="expected floating point"):
        loss(torch.zeros(1, 3, 48, 64, dtype=torch.uint8))
    with pytest.raises(ImageError, match=r"image tensor has shape \(0, 3, 48, 64\); expected at least one image"):
        loss(torch.rand(0, 3, 48, 64))


def test_metrics_of_other_ranges_and_directions() -> None:
    class Distance(nn.Module):
        score_range, lower_better = "0, 10", True

        def forward(self, x: Tensor) -> Tensor:
            return 10 * x.mean(dim=(1, 2, 3))[:, None]

    assert float(QualityLoss(Distance())(torch.full((2, 3, 32, 32), 0.25))) == 0.25

    class Percent(nn.Module):
        score_range = "~0, ~100"

        def forward(self, x: Tensor) -> Tensor:
            return 100 * x.mean(dim=(1, 2, 3))  # (N,), as some of pyiqa's metrics

    loss = QualityLoss(Percent(), reduction="none")
    assert loss(torch.full((2, 3, 32, 32), 0.25)).tolist() == [0.75, 0.75]
