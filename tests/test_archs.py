"""CLIP-IQA and QualiCLIP: the contract of a metric, for each kind of tower, and what prompts and contexts do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import open_clip
import pyiqa
import pytest
import torch
import torch.distributed as dist
import upstream
from contract import MetricContract
from kornia.filters import gaussian_blur2d
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.errors import PromptError, SettingsError, WeightsError
from qualiclip_pyiqa.metrics.prompt_iqa import OpenCLIPIQA, OpenQualiCLIP, PromptIQA
from qualiclip_pyiqa.pretrained.find import find
from qualiclip_pyiqa.towers.backbones import MEAN, STD
from qualiclip_pyiqa.towers.text import TextTower

ROOT = Path(__file__).parents[1]
NETWORKS = ["tiny-resnet", "tiny-vit", "tiny-resnet-pos", "tiny-context", "qualiclip-mini"]


def build(kind: str, folder: Path, **more: object) -> PromptIQA:
    if kind == "qualiclip-mini":
        return OpenQualiCLIP("qualiclip-mini", **more).eval()
    if kind == "tiny-context":
        opts = {"pretrained": False, "backbone": "tiny-resnet", "weights": folder / "tiny-resnet.pt"}
        return OpenCLIPIQA("clipiqa+", **{**opts, **more}).eval()
    backbone = kind.removesuffix("-pos")
    opts = {"backbone": backbone, "weights": folder / f"{backbone}.pt", "pos_embedding": kind.endswith("-pos")}
    return OpenCLIPIQA("clipiqa", **{**opts, **more}).eval()


@pytest.mark.parametrize("kind", NETWORKS, scope="class")
class TestPromptIQA(MetricContract):
    @pytest.fixture(autouse=True)
    def network(self, kind: str, tiny_folder: Path) -> None:
        self.kind, self.folder = kind, tiny_folder

    def build(self, **options: object) -> PromptIQA:
        return build(self.kind, self.folder, **options)

    def test_state_dict_holds_a_context_and_nothing_else(self, metric: PromptIQA) -> None:
        context = {"prompt_learner.ctx", "prompt_learner.token_prefix", "prompt_learner.token_suffix"}
        learned = metric.prompt_learner is not None
        assert set(metric.state_dict()) == (context if learned else set())
        assert [name for name, _ in metric.named_parameters()] == (["prompt_learner.ctx"] if learned else [])


def test_attributes(tiny_folder: Path) -> None:
    pairs = {"light": ("Bright photo.", "Dark photo."), "sharp": [("Sharp photo.", "Blurry photo."), ("a", "b")]}
    net = build("tiny-resnet", tiny_folder, prompts=pairs)
    x = upstream.pictures(3, 64, 64)
    with torch.no_grad():
        scores = net(x)
        assert net.attributes == ("light", "sharp") and scores.shape == (3, 2)
        light = build("tiny-resnet", tiny_folder, prompts=[pairs["light"]])(x)
        assert (scores[:, :1] - light).abs().max() < 1e-6
        singles = [build("tiny-resnet", tiny_folder, prompts=[pair])(x) for pair in pairs["sharp"]]
        assert (scores[:, 1:] - sum(singles) / 2).abs().max() < 1e-6
        net.set_prompts([pairs["light"]])
        assert torch.equal(net(x), light)
        net.half().set_prompts("look")
        assert net(x).shape == (3, 7) and net.prompt_features.dtype == torch.float16


def test_score_is_the_formula(tiny_folder: Path) -> None:
    """Against the formula of CLIP-IQA written out with open_clip's own model (224 x 224, positional table on)."""
    from qualiclip_pyiqa.towers.text import tokenize

    model = open_clip.CLIP(**upstream.TINY_RESNET).eval()
    model.load_state_dict(torch.load(tiny_folder / "tiny-resnet.pt"))
    x = upstream.pictures(3, 224, 224)
    texts = ["Good photo.", "Bad photo.", "Sharp photo.", "Blurry photo."]
    with torch.no_grad():
        pixels = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokenize(texts), normalize=True)
        logits = model.logit_scale.exp() * image @ text.T / 3
        expected = logits.view(3, 2, 2).softmax(-1)[..., 0].mean(dim=1, keepdim=True)
        net = build("tiny-resnet-pos", tiny_folder, temperature=3, prompts=[texts[:2], texts[2:]])
        assert (net(x) - expected).abs().max() < 1e-5


def test_pyiqa_metric_and_loss(tiny_folder: Path) -> None:
    metric = pyiqa.create_metric("qualiclip-mini", device="cpu")
    assert metric.score_range == "0, 1" and metric.lower_better is False and metric.metric_mode == "NR"
    x = upstream.pictures(2, 64, 64)
    assert not metric(x).requires_grad
    loss = pyiqa.create_metric("qualiclip-mini", device="cpu", as_loss=True)
    x.requires_grad_()
    loss(x).backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_describe_says_what_decides_a_score(tiny_folder: Path) -> None:
    said = build("tiny-resnet", tiny_folder, prompts="look", temperature=1.5).describe()
    assert said["prompts"]["sharpness"] == [["Sharp photo.", "Blurry photo."]]
    assert said["temperature"] == 1.5 and said["activation"] == "QuickGELU"
    assert said["pixel_mean"] == pytest.approx(MEAN, abs=1e-6) and said["pixel_std"] == pytest.approx(STD, abs=1e-6)
    assert said["direction"] == "higher is better" and said["resize"].startswith("none")
    mini = OpenQualiCLIP("qualiclip-mini").describe()
    assert len(mini["weights"]["sha256"]) == 64 and mini["weights"]["licence"] == "CC-BY-SA-4.0"
    assert mini["pixel_mean"] is None
    json.dumps([said, mini])


def test_a_fresh_context_learns(tiny_folder: Path) -> None:
    net = build("tiny-context", tiny_folder, n_ctx=4).train()
    assert not net.tower.training
    x = upstream.pictures(4, 64, 64)
    target = torch.tensor([[0.9], [0.1], [0.9], [0.1]])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        trained = net(x)
        assert (net.eval()(x) - trained).abs().max() < 1e-6  # eval encodes the context once, as it now is
        other = build("tiny-context", tiny_folder, n_ctx=4)
        assert (other(x) - trained).abs().max() > 1e-3
        other.load_state_dict(net.state_dict())
        assert (other(x) - trained).abs().max() < 1e-6


@pytest.mark.parametrize("per_text", [True, False])
def test_a_context_of_either_shape_loads(tiny_folder: Path, per_text: bool) -> None:
    source = build("tiny-context", tiny_folder, prompt_specific_ctx=per_text, ctx_init="a photo of")
    assert source.prompt_learner is not None and source.prompt_learner.n_ctx == 3
    with torch.no_grad():
        source.prompt_learner.ctx.add_(0.1)
    target = build("tiny-context", tiny_folder, n_ctx=3, prompt_specific_ctx=not per_text)
    target.load_state_dict(source.state_dict())
    x = upstream.pictures(2, 64, 64)
    with torch.no_grad():
        assert (target(x) - source.train().eval()(x)).abs().max() < 1e-6


def _train_one_rank(rank: int, folder: str, tiny: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    upstream.add_tiny_backbones(Path(tiny))
    torch.manual_seed(rank)  # the first rank's context must win
    net = build("tiny-context", Path(tiny), ctx_init="").train()
    with torch.no_grad():
        net.prompt_learner.ctx.add_(torch.randn_like(net.prompt_learner.ctx) * 0.01)
    wrapped = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(2):
        x = upstream.pictures(2, 64, 64, seed=10 * rank + step)
        optimizer.zero_grad()
        (1 - wrapped(x)).mean().backward()
        optimizer.step()
    torch.save(net.prompt_learner.ctx.detach(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_trains_a_context(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = [(rank, str(tmp_path), str(tiny_folder)) for rank in range(2)]
    processes = [forks.CONTEXT.Process(target=_train_one_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    fresh = build("tiny-context", tiny_folder).prompt_learner.ctx
    assert (first - fresh).abs().max() > 0


def _settings(folder: Path) -> list[tuple[dict, type[Exception], str]]:
    tiny = {"backbone": "tiny-resnet", "weights": folder / "tiny-resnet.pt"}
    return [
        ({"model_type": "clipiq"}, SettingsError, "did you mean 'clipiqa'"),
        ({"model_type": "qualiclip-mini"}, SettingsError, "belongs to OpenQualiCLIP"),
        ({"backbone": "RN5", "weights": folder / "tiny-resnet.pt"}, SettingsError, "did you mean 'RN50'"),
        ({"backbone": "coca_ViT-B-32", "weights": folder / "tiny-resnet.pt"}, WeightsError, "lacks|another model"),
        ({"backbone": "tiny-vit", "weights": folder / "tiny-resnet.pt"}, WeightsError, "lacks|another model"),
        ({**tiny, "temperature": 0}, SettingsError, "positive"),
        ({**tiny, "pretrained": "some.pth"}, SettingsError, "fixed prompts"),
        ({**tiny, "prompts": "quallity"}, PromptError, "did you mean 'quality'"),
        ({**tiny, "model_type": "clipiqa+"}, SettingsError, "learned on RN50"),
        ({**tiny, "model_type": "clipiqa+", "pretrained": False, "n_ctx": 75}, SettingsError, "do not fit"),
        ({**tiny, "model_type": "clipiqa+", "pretrained": False, "n_ctx": 0}, SettingsError, "at least one"),
    ]


@pytest.mark.parametrize("index", range(11))
def test_settings_errors_are_one_clear_line(tiny_folder: Path, index: int) -> None:
    options, kind, said = _settings(tiny_folder)[index]
    with pytest.raises(kind, match=said) as caught:
        OpenCLIPIQA(**{"model_type": "clipiqa", **options})
    assert "\n" not in str(caught.value)


def test_mini_knows_its_own_texts_only() -> None:
    net = OpenQualiCLIP("qualiclip-mini", prompts={"sharpness": ("Sharp photo.", "Blurry photo.")})
    assert net.attributes == ("sharpness",)
    with pytest.raises(PromptError, match="no text tower and no feature for 'Happy photo"):
        net.set_prompts("happy")


@pytest.mark.parametrize("photo", ["hats", "lighthouse", "parrots", "portrait"])
def test_a_blurred_background_costs_less_than_a_blurred_photograph(photo: str) -> None:
    rgb = load_image(ROOT / "examples" / "photos" / f"{photo}.jpg")[None]
    blurred, far = (gaussian_blur2d(rgb, (4 * s + 1, 4 * s + 1), (s, s)) for s in (2, 8))
    y, x = (torch.linspace(-1, 1, side) for side in rgb.shape[2:])
    subject = ((0.5 - torch.hypot(y[:, None], x[None, :])) * 10).sigmoid()
    net = build("qualiclip-mini", ROOT)
    with torch.no_grad():
        sharp, portrait, soft = (float(net(each)) for each in (rgb, torch.lerp(far, rgb, subject), blurred))
    # A limit of the model: a background that is no fault still costs half of what blur does (weights/PROVENANCE.md).
    assert sharp > portrait > soft + 0.25 * (sharp - soft)


def test_a_file_trained_with_this_package_says_what_it_holds(tiny_folder: Path, tmp_path: Path) -> None:
    """`weights=` of our own format: tower, prompts and scale come from the file, the temperature does not."""
    state = torch.load(tiny_folder / "tiny-resnet.pt")
    features = nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    file = tmp_path / "model.safetensors"
    metadata = {
        "format": "qualiclip-pyiqa/1",
        "backbone": "tiny-resnet",
        "tower": "{}",
        "prompts": json.dumps([["Fine.", "Poor."], ["Crisp.", "Soft."]]),
        "licence": "CC0-1.0",
        "source": "this test",
    }
    tensors = {key: value for key, value in state.items() if key.startswith("visual.")}
    save_file({**tensors, "prompts_features": features, "logit_scale": torch.tensor(3.0)}, file, metadata)
    x = upstream.pictures(3, 64, 64)
    metric = pyiqa.create_metric("qualiclip", device="cpu", weights=str(file), prompts=[("Fine.", "Poor.")])
    with torch.no_grad():
        image = nn.functional.normalize(build("tiny-resnet", tiny_folder).tower(x), dim=-1)
        logits = torch.tensor(3.0).exp() * image @ features[:2].T / 2
        assert (metric(x) - logits.softmax(-1)[:, :1]).abs().max() < 1e-6
    assert metric.net.describe()["weights"]["licence"] == "CC0-1.0"
    with pytest.raises(PromptError, match="expected some of 'Fine"):
        pyiqa.create_metric("qualiclip", device="cpu", weights=str(file), prompts="happy")
    mini = pyiqa.create_metric("qualiclip", device="cpu", weights=find("qualiclip-mini"), temperature=1)
    assert torch.equal(mini(x), pyiqa.create_metric("qualiclip-mini", device="cpu")(x))


def test_learned_context_refuses_other_prompts(tiny_folder: Path) -> None:
    with pytest.raises(SettingsError, match="learned context"):
        build("tiny-context", tiny_folder).set_prompts("look")


@pytest.mark.parametrize("kind", ["tiny-resnet", "qualiclip-mini"])
@torch.no_grad()
def test_memory_grows_linearly_with_the_picture(tiny_folder: Path, kind: str) -> None:
    class Largest(TorchDispatchMode):
        """The largest tensor that any operation returns."""

        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    net = build(kind, tiny_folder)
    largest = []
    for side in (512, 2048):  # attention over all pairs of 4096 tokens would be the largest at 2048
        with Largest() as mode:
            net(torch.rand(1, 3, side, side))
        largest.append(mode.numel)
    assert largest[1] <= 16.1 * largest[0]  # 16 times the pixels, and a row that is set aside for odd heights


def test_fixed_prompts_are_encoded_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = TextTower.forward
    monkeypatch.setattr(TextTower, "forward", lambda *args: calls.append(1) or forward(*args))
    fixed, learned = build("tiny-resnet", tiny_folder), build("tiny-context", tiny_folder)
    assert fixed.text_tower is None
    x = upstream.pictures(1, 64, 64)

    def calls_of(*nets: PromptIQA) -> int:
        calls.clear()
        for net in nets * 3:
            net(x)
        return len(calls)

    assert calls_of(fixed, learned) == 0
    assert calls_of(learned.train()) == 3
    learned.eval()
    assert calls_of(learned) == 0


def test_qualiclip_needs_one_file(upstream_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "QualiCLIP.pth").symlink_to(upstream_folder / "QualiCLIP.pth")
    (tmp_path / "QualiCLIP+_koniq.pth").symlink_to(upstream_folder / "QualiCLIP+_koniq.pth")
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    for name in ("qualiclip", "qualiclip+"):
        assert pyiqa.create_metric(name, device="cpu")(upstream.pictures(1, 32, 32)).shape == (1, 1)


def scores_of(net: PromptIQA, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def test_qualiclip_file_serves_both_scales_and_other_prompts(upstream_weights: Path) -> None:
    x = upstream.pictures(2, 64, 64)
    two, one = (pyiqa.create_metric(name, device="cpu").net for name in ("qualiclip", "qualiclip-hub"))
    assert two.text_tower is None
    stored = torch.load(upstream_weights / "QualiCLIP.pth")["prompts_features"]
    assert torch.allclose(two.prompt_features, stored, atol=1e-6)
    assert (two.temperature, one.temperature) == (2, 1)
    assert (scores_of(two, x) - scores_of(one, x)).abs().max() > 1e-3
    two.set_prompts("look")
    assert scores_of(two, x).shape == (2, 7)


class Peak(TorchDispatchMode):
    """The most bytes that the tensors which are made meanwhile hold at once; a metric uses PyTorch's public
    operators alone."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and (storage := each.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: each for key, each in self.made.items() if not each[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.made.values()))
        return out


# In float64 rounding is out of the way, so that a wrong row or column, or a missing one, would show.
@pytest.mark.parametrize("kind", ["tiny-resnet", "tiny-resnet-pos", "qualiclip-mini"])
@pytest.mark.parametrize(
    ("size", "rows"),
    [((611, 70), 32), ((512, 64), 96), ((130, 47), 1), ((97, 311), 7), ((64, 512), 32), ((33, 300), 3)],
)
@torch.no_grad()
def test_large_pictures_in_strips_score_as_in_one_piece(
    kind: str, size: tuple[int, int], rows: int, tiny_folder: Path, cut_small_pictures: Callable[..., None]
) -> None:
    net = build(kind, tiny_folder).double()
    x = upstream.pictures(2, *size).double()
    with Peak() as at_once:
        whole = net.features(x)
    cut_small_pictures(rows)
    with Peak() as in_strips:
        assert (net.features(x) - whole).abs().max() < 1e-10
    assert in_strips.bytes < at_once.bytes


# Of 64 and 8 strips. The embedded tower's energies are of the whole picture.
@pytest.mark.parametrize(
    ("kind", "size", "share"),
    [
        ("tiny-resnet", (2048, 64), 0.08),
        ("tiny-resnet", (256, 512), 0.35),
        ("qualiclip-mini", (2048, 64), 0.15),
        ("qualiclip-mini", (256, 512), 0.35),
    ],
)
@torch.no_grad()
def test_only_what_the_next_strip_needs_is_kept(
    kind: str, size: tuple[int, int], share: float, tiny_folder: Path, cut_small_pictures: Callable[..., None]
) -> None:
    net = build(kind, tiny_folder)
    x = upstream.pictures(1, *size)
    with Peak() as at_once:
        net(x)
    cut_small_pictures()
    with Peak() as in_strips:
        net(x)
    assert in_strips.bytes < share * at_once.bytes


@torch.no_grad()
def test_hooks_see_the_whole_of_large_pictures(tiny_folder: Path, cut_small_pictures: Callable[..., None]) -> None:
    net = build("tiny-resnet", tiny_folder)
    x = upstream.pictures(2, 256, 64)
    expected = net(x)
    cut_small_pictures()
    seen: list[tuple[int, ...]] = []
    hook = net.tower.layer2.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    assert torch.equal(net(x), expected)
    assert [(shape[0], *shape[2:]) for shape in seen] == [(2, 32, 8)]
    hook.remove()
    net(x)
    assert len(seen) == 1


def test_gradients_are_those_of_the_whole_picture(tiny_folder: Path, cut_small_pictures: Callable[..., None]) -> None:
    """No strips and no other memory layout in training: the gradient is an ordinary, contiguous one."""
    net = build("tiny-resnet", tiny_folder).double()
    x = upstream.pictures(1, 300, 64).double().requires_grad_()
    net(x).sum().backward()
    expected = x.grad
    assert expected is not None and expected.is_contiguous()
    x.grad = None
    cut_small_pictures()
    net(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_folding_does_not_change_gradients(tiny_folder: Path) -> None:
    """The gradient in the picture is that of open_clip's own model, with its BatchNorm and its full attention pool."""
    model = open_clip.CLIP(**upstream.TINY_RESNET).double().eval()
    model.load_state_dict(torch.load(tiny_folder / "tiny-resnet.pt"))
    net = build("tiny-resnet-pos", tiny_folder).double()
    x = upstream.pictures(2, 224, 224).double().requires_grad_()
    direction = torch.randn(
        net.prompt_features.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    (net.tower(x) @ direction).sum().backward()
    ours, x.grad = x.grad, None
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    (model.encode_image((x - mean) / std) @ direction).sum().backward()
    # Folded weights are float32: what remains is their rounding.
    assert (ours - x.grad).abs().max() < 1e-5 * x.grad.abs().max()
    assert ours.is_contiguous()


def test_a_file_that_changes_after_loading_is_neither_described_nor_read_as_the_model(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "model.pt"
    shutil.copy(tiny_folder / "tiny-resnet.pt", file)
    net = OpenCLIPIQA("clipiqa", backbone="tiny-resnet", weights=file)
    x = upstream.pictures(1, 64, 64)
    score, sha256 = scores_of(net, x), hashlib.sha256(file.read_bytes()).hexdigest()
    net.set_prompts("look")
    net.set_prompts("clipiqa")
    torch.save(upstream.random_clip(upstream.TINY_RESNET, seed=1), tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(file)
    with pytest.raises(WeightsError, match="changed after"):
        net.set_prompts("look")
    assert torch.equal(scores_of(net, x), score) and net.prompts.attributes == ("quality",)
    said = net.describe()["weights"]
    assert said["sha256"] is None and said["licence"] == "unknown" and "changed after it was loaded" in caplog.text
    other = OpenCLIPIQA("clipiqa", backbone="tiny-resnet", weights=file)
    assert other.describe()["weights"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() != sha256
    file.unlink()
    assert net.describe()["weights"]["sha256"] is None
