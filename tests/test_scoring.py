"""Many pictures: the scores of one at a time, in input order, in bounded memory, whatever happens to processes."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pyiqa
import pytest
import torch
from faults import workers_of
from forks import CONTEXT
from PIL import Image
from synthetic import synthetic_photograph
from test_archs import build

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.errors import SettingsError, WeightsError
from qualiclip_pyiqa.scoring.description import describe_metric
from qualiclip_pyiqa.scoring.network import BATCH_PIXELS, freezing
from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.scoring.tables import Record

# What the issue of batching may cost: kernels block a batch differently.
SAME = 2e-6
SIZES = [(40, 64), (64, 40), (33, 47), (96, 128)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """13 pictures of four sizes, the sizes in turn."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for number in range(13):
        height, width = SIZES[number % len(SIZES)]
        pixels = (synthetic_photograph(number, height, width).movedim(0, -1) * 255).round().byte().numpy()
        paths.append(folder / f"{number:02}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def expected(photos: list[Path]) -> list[float]:
    net = pyiqa.create_metric("qualiclip-mini", device="cpu").net
    with torch.no_grad():
        return [net(load_image(path)[None]).item() for path in photos]


def close(records: list[Record], expected: list[float]) -> bool:
    return np.allclose([r.scores["qualiclip-mini"] for r in records], expected, rtol=0, atol=SAME)


@pytest.mark.parametrize(
    ("device", "batch_size", "workers"),
    [("cpu", 1, 0), ("cpu", 3, 0), ("cpu", 8, 2), ("cpu,cpu", 2, 1), (["cpu", "cpu", "cpu"], 4, 2)],
)
def test_scores_are_those_of_single_pictures_in_input_order(
    device: object, batch_size: int, workers: int, photos: list[Path], expected: list[float]
) -> None:
    scorer = Scorer("qualiclip-mini", device=device, batch_size=batch_size, workers=workers)
    assert scorer.columns == ("qualiclip-mini",)
    for paths, scores in ((photos, expected), (photos[::-1], expected[::-1])):
        records = list(scorer.score(paths))
        assert [record.path for record in records] == [str(path) for path in paths]
        assert [(record.height, record.width) for record in records] == [load_image(p).shape[1:] for p in paths]
        assert close(records, scores)
        assert all(record.error is None for record in records)
    assert np.std(expected) > 1000 * SAME


@pytest.mark.parametrize("kind", ["tiny-resnet", "tiny-vit"])
@pytest.mark.parametrize(("device", "batch_size", "workers"), [("cpu", 1, 1), ("cpu,cpu", 4, 0)])
def test_clip_towers_score_a_batch_as_single_pictures(
    kind: str, device: str, batch_size: int, workers: int, tiny_folder: Path, photos: list[Path]
) -> None:
    net = build(kind, tiny_folder)
    with torch.no_grad():
        expected = [net(load_image(path)[None]).item() for path in photos]
    scorer = Scorer({"x": net}, device=device, batch_size=batch_size, workers=workers)
    for paths, scores in ((photos, expected), (photos[::-1], expected[::-1])):
        assert np.allclose([record.scores["x"] for record in scorer.score(paths)], scores, rtol=0, atol=SAME)
    assert np.std(expected) > 100 * SAME


def test_every_kind_of_source(photos: list[Path], expected: list[float]) -> None:
    path = photos[3]
    pixels = np.asarray(Image.open(path))
    tensor = torch.from_numpy(pixels.copy()).movedim(-1, 0)
    sources = [path, str(path), path.read_bytes(), Image.open(path), pixels, tensor, tensor / 255, pixels / 255.0]
    records = list(Scorer(["qualiclip-mini"], workers=1).score([*sources, torch.zeros(2, 40, 40), 5, b"no picture"]))
    assert close(records[:8], [expected[3]] * 8)
    assert [record.path for record in records[:3]] == [str(path), str(path), None]
    assert [record.error is None for record in records] == [True] * 8 + [False] * 3
    assert "shape (2, 40, 40)" in records[8].error and "is an int" in records[9].error and "bytes" in records[10].error


def test_several_devices_that_are_not_the_cpu() -> None:
    """As on a machine with two GPUs: the meta device has tensors without values."""
    scorer = Scorer(iter(["qualiclip-mini", "piqe"]), device="meta,meta")
    assert [network.columns for network in scorer.networks] == [("qualiclip-mini", "piqe")] * 2
    first, second = (network.heads[0][1] for network in scorer.networks)
    assert first.tower is not second.tower and first.prompt_features.device.type == "meta"


def test_a_metric_that_lies_on_a_gpu_is_copied_and_the_copy_moves() -> None:
    metric = pyiqa.create_metric("piqe", device="cpu")
    del metric.dummy_param
    metric.dummy_param = marker = torch.nn.Parameter(torch.empty(0)) * 1  # what pyiqa leaves there off the CPU
    ((_, copied),) = Scorer({"piqe": metric}, device="meta").networks[0].others
    assert copied.dummy_param.device.type == "meta"  # pyiqa sends pictures there
    assert metric.dummy_param is marker and marker.device.type == "cpu"


class OwnPath(os.PathLike[str]):
    """A path whose class no other process can import."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __fspath__(self) -> str:
        return self.path

    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


@pytest.mark.parametrize("workers", [0, 1])
def test_paths_of_every_kind(workers: int, photos: list[Path], expected: list[float]) -> None:
    folder = photos[0].parent
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)[:2]
    raw = sorted(os.scandir(os.fsencode(folder)), key=lambda entry: entry.name)[:2]
    missing = OwnPath(folder / "missing.png")
    records = list(
        Scorer("qualiclip-mini", device="cpu", workers=workers).score([OwnPath(photos[0]), missing, *entries, *raw])
    )
    assert [r.path for r in records] == [str(photos[0]), missing.path, *[str(path) for path in photos[:2] * 2]]
    assert close([records[0], *records[2:]], [expected[0], *expected[:2] * 2])
    assert records[1].error == f"{missing.path} does not exist; expected an image file"


def test_metrics_on_one_tower_share_its_pass(tiny_folder: Path, photos: list[Path]) -> None:
    pairs = {"light": ("Bright photo.", "Dark photo."), "sharp": ("Sharp image.", "Blurry image.")}
    metrics = {
        "one": build("tiny-resnet", tiny_folder),
        "two": build("tiny-resnet", tiny_folder, prompts=pairs),
        "other": build("tiny-vit", tiny_folder),
        "learned": build("tiny-context", tiny_folder),
        "tiled": build("tiny-resnet", tiny_folder, tile=32),
        "mini": pyiqa.create_metric("qualiclip-mini", device="cpu"),
    }
    scorer = Scorer(metrics, device="cpu", batch_size=4, workers=0)
    assert scorer.columns == ("one", "two.light", "two.sharp", "other", "learned", "tiled", "mini")
    passes = []
    for tower in {id(net.tower): net.tower for _, net, _ in scorer.networks[0].heads}.values():
        tower.register_forward_hook(lambda tower, *_: passes.append(tower))
    records = list(scorer.score(photos[:1]))
    # The ResNet once for three metrics and once for each of the four tiles of 40x64 pixels, the ViT, the mini tower.
    assert sorted(passes.count(tower) for tower in set(passes)) == [1, 1, 5]
    with torch.no_grad():
        x = load_image(photos[0])[None]
        flat = torch.cat([metric(x)[0] for metric in metrics.values()]).tolist()
    assert np.allclose(list(records[0].scores.values()), flat, atol=SAME, rtol=0)
    # What was passed in is untouched: the copies share a tower, the originals do not.
    assert metrics["one"].tower is not metrics["two"].tower


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_towers_are_shared_in_every_precision(precision: str, tiny_folder: Path) -> None:
    metrics = {
        "one": pyiqa.create_metric("qualiclip-mini", device="cpu"),
        "two": "qualiclip-mini",
        "three": build("tiny-resnet", tiny_folder),
        "four": build("tiny-resnet", tiny_folder),
        "five": build("tiny-vit", tiny_folder),
        "six": build("tiny-vit", tiny_folder),
    }
    (network,) = Scorer(metrics, device="cpu", precision=precision).networks
    assert [index for _, _, index in network.heads] == [0, 0, 1, 1, 2, 2]
    assert len({id(net.tower) for _, net, _ in network.heads}) == 3


@pytest.mark.parametrize("setting", ["activation", "heads"])
def test_equal_values_are_not_yet_the_same_tower(setting: str, tiny_folder: Path, photos: list[Path]) -> None:
    nets = {name: build("tiny-vit", tiny_folder) for name in ("one", "other")}
    for block in nets["other"].tower.transformer.resblocks:
        if setting == "activation":
            block.mlp.gelu = torch.nn.GELU()
        else:
            block.attn.num_heads, block.attn.head_dim = 2, block.attn.embed_dim // 2
    with torch.no_grad():
        expected = {name: net(load_image(photos[0])[None]).item() for name, net in nets.items()}
    assert abs(expected["one"] - expected["other"]) > 10 * SAME
    (record,) = Scorer(nets, device="cpu", workers=0).score(photos[:1])
    assert record.scores == pytest.approx(expected, abs=SAME)


def test_other_metrics_of_pyiqa_are_scored_one_by_one(photos: list[Path], tmp_path: Path) -> None:
    flat = tmp_path / "flat.png"
    Image.new("RGB", (64, 40)).save(flat)
    records = list(Scorer(["piqe", "qualiclip-mini"], device="cpu", workers=0).score([photos[3], photos[0], flat]))
    metric = pyiqa.create_metric("piqe", device="cpu")
    for record in records[:2]:
        assert record.scores["piqe"] == pytest.approx(metric(str(record.path)).item(), abs=1e-4)
    assert "qualiclip-mini" in records[2].scores


def test_a_foreign_metrics_failure_is_that_pictures_error(photos: list[Path]) -> None:
    class Fussy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[3] == 47:
                raise ValueError("too\nnarrow")
            return torch.full((1,), float("nan") if x.shape[3] == 40 else 0.5)

    records = list(Scorer({"qualiclip-mini": "qualiclip-mini", "fussy": Fussy()}, device="cpu").score(photos[:4]))
    assert [record.error for record in records] == [
        None,
        "fussy: the score is nan",
        "fussy: ValueError: too narrow",
        None,
    ]
    assert all("qualiclip-mini" in record.scores for record in records)
    assert ["fussy" in record.scores for record in records] == [True, False, False, True]


def test_memory_is_bounded_and_the_rest_is_left_unread(photos: list[Path]) -> None:
    read = 0

    def endless() -> Iterator[Path]:
        nonlocal read
        for path in itertools.cycle(photos):
            read += 1
            yield path

    scorer = Scorer("qualiclip-mini", device="cpu", batch_size=2, workers=1)
    running = scorer.score(endless())
    for number, record in enumerate(itertools.islice(running, 30)):
        assert record.path == str(photos[number % len(photos)])
        assert read - number <= 8 * 2 + 2 * 1
    running.close()  # and this returns, with its processes gone
    assert not workers_of(os.getpid())


@pytest.mark.parametrize("workers", [0, 2])
def test_heavy_pictures_are_read_one_by_one(workers: int, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qualiclip_pyiqa.scoring.run.DECODED_BYTES", np.asarray(Image.open(photos[0])).nbytes)
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield content

    content = photos[0].read_bytes()
    running = Scorer("qualiclip-mini", device="cpu", batch_size=4, workers=workers).score(endless())
    for number, _ in enumerate(itertools.islice(running, 20)):
        # Before the first one is decoded nobody knows its weight.
        assert read <= max(4, number + 1)
    running.close()


def test_no_pictures_no_records() -> None:
    assert list(Scorer("qualiclip-mini", device="cpu").score([])) == []


@pytest.mark.parametrize(
    "lack",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(
    lack: Exception, photos: list[Path], expected: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Scorer("qualiclip-mini", device="cpu", batch_size=13, workers=0)
    (network,) = scorer.networks
    sizes = []

    def small_device(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > 2 or x.shape[3] == 47:
            raise lack
        return network.heads[0][1].features(x)

    network.towers = [(small_device, small_device)]
    pictures = [np.array(Image.open(path)) for path in [*photos[0::4], *photos[1::4], photos[2]]]
    with caplog.at_level(logging.WARNING):
        records = list(scorer.score(pictures))
    assert close(records[:-1], [*expected[0::4], *expected[1::4]])
    assert records[-1].error == "47x33 pixels do not fit into the memory of cpu" and not records[-1].scores
    assert "out of memory; continuing with 2 images per batch" in caplog.text
    assert max(sizes) > 2 and sizes.count(max(sizes)) == 1  # not tried again


def test_what_is_no_lack_of_memory_is_raised(photos: list[Path]) -> None:
    scorer = Scorer("qualiclip-mini", device="cpu", workers=0)

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    scorer.networks[0].towers = [(broken, broken)]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(scorer.score(photos[:2]))


def test_a_foreign_metrics_lack_of_memory_takes_its_score_alone(photos: list[Path], expected: list[float]) -> None:
    class Greedy(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return x.mean()[None]

    scorer = Scorer({"qualiclip-mini": "qualiclip-mini", "greedy": Greedy()}, device="cpu", batch_size=2, workers=0)
    records = list(scorer.score([photos[0], photos[4]]))
    assert [record.error for record in records] == [
        "greedy: 64x40 pixels do not fit into the memory of cpu",
        None,
    ]
    assert close(records, [expected[0], expected[4]])


def test_large_pictures_go_through_the_network_in_small_batches(photos: list[Path]) -> None:
    scorer = Scorer("qualiclip-mini", device="cpu", batch_size=8, workers=0)
    (network,) = scorer.networks
    sizes = []
    network.towers = [(lambda x: sizes.append(len(x)) or network.heads[0][1].features(x),) * 2]
    assert network.batch_pixels == BATCH_PIXELS["cpu"]
    network.batch_pixels = 3 * 40 * 64
    list(scorer.score([photos[0]] * 8))
    assert max(sizes) == 3


def test_refused_before_decoding(tmp_path: Path, photos: list[Path]) -> None:
    for workers in (0, 1):
        records = list(Scorer("qualiclip-mini", device="cpu", workers=workers, max_pixels=5000).score(photos[:4]))
        assert [record.error is None for record in records] == [True, True, True, False]
        assert "is too large" in records[3].error
    before = Image.MAX_IMAGE_PIXELS
    buffer = io.BytesIO()
    Image.new("L", (before // 1000 + 1, 1000)).save(buffer, "PNG")
    (refused,) = Scorer("qualiclip-mini", device="cpu", workers=0).score([buffer.getvalue()])
    assert "too large" in refused.error and before == Image.MAX_IMAGE_PIXELS


def test_precision(photos: list[Path], expected: list[float]) -> None:
    for precision, tolerance in (("tf32", SAME), ("bf16", 0.15), ("fp16", 0.03)):
        records = list(Scorer("qualiclip-mini", device="cpu", precision=precision, workers=0).score(photos))
        scores = [record.scores["qualiclip-mini"] for record in records]
        assert np.allclose(scores, expected, rtol=0, atol=tolerance)
        assert precision == "tf32" or not np.array_equal(scores, expected)


def test_compiled(tiny_folder: Path, photos: list[Path]) -> None:
    net = build("tiny-resnet", tiny_folder)
    chosen = photos[0::4]
    scores = []
    for compile in (False, True):
        torch.compiler.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        scorer = Scorer({"x": net}, device="cpu", workers=0, compile=compile)
        scores.append([record.scores["x"] for record in scorer.score(chosen)])
        assert (graphs["unique_graphs"] > 0) == compile
    assert np.allclose(*scores, rtol=0, atol=SAME)


@pytest.mark.parametrize(("metric", "folder"), [("brisque", "pyiqa"), ("ckdn", "checkpoints")])
def test_a_download_that_failed_is_named_with_its_place(
    metric: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("unreachable")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(WeightsError) as caught:
        Scorer(metric, device="cpu")
    found = re.search(r"; check the network, or download (https://\S+) and put it at (\S+)$", str(caught.value))
    assert found is not None, caught.value
    place = Path(found[2])
    assert place.parent == Path(torch.hub.get_dir(), folder) and found[1].endswith(place.name)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            URLError(ConnectionRefusedError(111, "Connection refused")),
            WeightsError,
            r"^metric brisque cannot be built \(URLError: <.*Connection refused>\); check the network, or",
        ),
        (ImportError("No module\nnamed 'x'"), SettingsError, r"\(ImportError: No module named 'x'\); see pyiqa's"),
        (WeightsError("as it is"), WeightsError, "^as it is$"),
    ],
)
def test_a_metric_of_another_package_that_cannot_be_built(
    failure: Exception,
    kind: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object, **__: object) -> None:
        print("Downloading")
        raise failure

    monkeypatch.setattr("pyiqa.create_metric", failing)
    with pytest.raises(kind, match=message) as caught:
        Scorer("brisque", device="cpu")
    assert "\n" not in str(caught.value)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Downloading\n")  # a table may be on standard output


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        ("qualiclip-min", {}, "did you mean 'qualiclip-mini'"),
        ("zzz", {}, "unknown metric 'zzz' "),
        ([], {}, "no metric was given"),
        ("nope.safetensors", {}, "nope.safetensors does not exist; expected a metric's name or"),
        (["qualiclip-mini", "qualiclip-mini"], {}, "two metrics have the same name"),
        ([5], {}, "metric is of type int"),
        ("qualiclip-mini", {"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        ("qualiclip-mini", {"workers": -1}, "workers is -1"),
        ("qualiclip-mini", {"max_pixels": 1.5}, "max_pixels is 1.5"),
        ("qualiclip-mini", {"decode_timeout": 0}, "decode_timeout is 0; expected seconds above 0"),
        ("qualiclip-mini", {"decode_timeout": float("nan")}, "decode_timeout is nan"),
        ("qualiclip-mini", {"precision": "int8"}, "precision int8 is that of files"),
        ("qualiclip-mini", {"precision": "fp8"}, "expected one of fp32, tf32, bf16, fp16"),
        ("qualiclip-mini", {"device": "tpu"}, "device 'tpu' cannot be used"),
        ("qualiclip-mini", {"device": "cpu,meta"}, "several of the same type"),
        ("qualiclip-mini", {"device": []}, "expected one"),
    ],
)
def test_settings_that_make_no_sense(metrics: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Scorer(metrics, **{"device": "cpu", **options})


def test_columns_are_in_the_order_of_the_metrics(photos: list[Path]) -> None:
    scorer = Scorer(["piqe", "qualiclip-mini"], device="cpu", workers=0)
    assert scorer.columns == ("piqe", "qualiclip-mini")
    (record,) = scorer.score(photos[:1])
    assert record.error is None and record.scores.keys() == set(scorer.columns)


def test_two_columns_of_one_name_are_refused(tiny_folder: Path) -> None:
    pairs = {"b": ("Bright photo.", "Dark photo."), "c": ("Sharp image.", "Blurry image.")}
    with pytest.raises(SettingsError, match=r"two metrics would be called 'a\.b'"):
        Scorer({"a": build("tiny-resnet", tiny_folder, prompts=pairs), "a.b": "qualiclip-mini"}, device="cpu")


def _in_daemon(paths: list[Path], send: Any) -> None:
    send.send([record.scores["qualiclip-mini"] for record in Scorer("qualiclip-mini", device="cpu").score(paths)])


def test_in_a_process_that_may_not_start_others(photos: list[Path], expected: list[float]) -> None:
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_in_daemon, args=(photos[:2], send), daemon=True)
    process.start()
    assert receive.poll(120) and np.allclose(receive.recv(), expected[:2], rtol=0, atol=SAME)
    process.join()


SINGLE: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "path": Path,
    "bytes": Path.read_bytes,
    "PIL image": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
    "grey array": lambda path: np.asarray(Image.open(path).convert("L")),
    "tensor": load_image,
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_single_image_in_place_of_a_list_is_one_image(kind: str, photos: list[Path]) -> None:
    scorer = Scorer("qualiclip-mini", device="cpu", workers=0)
    source = SINGLE[kind](photos[0])
    (alone,), (listed,) = scorer.score(source), scorer.score([source])
    assert alone == listed and alone.error is None


def test_batches_are_read_one_by_one_and_other_things_are_refused(photos: list[Path]) -> None:
    scorer = Scorer("qualiclip-mini", device="cpu", workers=0)
    batch = torch.stack([load_image(photos[0]), load_image(photos[4])])
    records = list(scorer.score(batch))
    assert [record.scores for record in records] == [record.scores for record in scorer.score([*batch])]
    assert len(records) == 2
    with pytest.raises(SettingsError, match="images is of type int; expected an iterable of images, or one image"):
        list(scorer.score(5))  # type: ignore[arg-type]


class Rated(torch.nn.Module):
    """A network that says which way its scores point."""

    def __init__(self, lower_better: bool) -> None:
        super().__init__()
        self.lower_better = lower_better

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()[None]


def test_directions_come_from_the_metrics_whatever_the_columns_are_called(tiny_folder: Path) -> None:
    pairs = {"light": ("Bright photo.", "Dark photo."), "sharp": ("Sharp image.", "Blurry image.")}
    metrics = {
        "my piqe": pyiqa.create_metric("piqe", device="cpu"),
        "piqe": build("tiny-resnet", tiny_folder, prompts=pairs),
        "down": Rated(True),
        "up": Rated(False),
        "says nothing": torch.nn.Identity(),
    }
    scorer = Scorer(metrics, device="cpu", workers=0)
    assert scorer.lower_better == {
        "my piqe": True,
        "piqe.light": False,
        "piqe.sharp": False,
        "down": True,
        "up": False,
        "says nothing": False,
    }
    assert tuple(scorer.lower_better) == scorer.columns


def test_other_packages_metrics_are_described_as_they_run() -> None:
    columns = {}
    for device in ("cpu", "cuda"):
        described = describe_metric(pyiqa.create_metric("piqe", device="cpu"), torch.device(device))
        columns[device] = described["precision"]
    assert columns == {"cpu": "fp32", "cuda": "fp32, convolutions in TF32"}
    assert "precision" not in describe_metric(pyiqa.create_metric("qualiclip-mini", device="cpu"), torch.device("cpu"))


def test_a_default_dtype_of_double_precision_changes_no_score(photos: list[Path], tiny_folder: Path) -> None:
    def scored() -> list[dict[str, Any]]:
        metrics = {
            "mini": "qualiclip-mini",
            "resnet": build("tiny-resnet-pos", tiny_folder),
            "vit": build("tiny-vit", tiny_folder, prompts="sharpness"),
        }
        scorer = Scorer(metrics, device="cpu", workers=0)
        sources = [photos[0], load_image(photos[1]), np.asarray(Image.open(photos[2]))]
        return [dict(record.scores) for record in scorer.score(sources)]

    expected = scored()
    torch.set_default_dtype(torch.float64)
    try:
        found = scored()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert len(one) == 3 and one == pytest.approx(other, abs=SAME)


def test_what_is_passed_in_is_not_changed() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(1), torch.nn.Dropout()).train()
    image = np.full((32, 32, 3), 128, np.uint8)
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (record,) = Scorer({"net": net}, device="cpu", workers=0).score(image)
    assert record.error is None and net.training and all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    Scorer({"net": net}, device="meta")
    assert {value.device.type for value in net.state_dict().values()} == {"cpu"}


def test_inductors_configuration_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as config

    cpu = torch.device("cpu")
    with freezing(cpu):
        assert config.freezing
    with freezing(torch.device("meta")):
        assert not config.freezing
    monkeypatch.setitem(sys.modules, "torch._inductor.config", None)
    monkeypatch.delattr(torch._inductor, "config")
    with freezing(cpu):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(torch._inductor, "config", object())
    with freezing(cpu):
        pass
