"""Every test runs offline, with caches of its own; weight files in upstream layouts are made once per session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before anything is imported that reads them: no test sees or touches the user's caches or the network.
_CACHES = tempfile.TemporaryDirectory(prefix="qualiclip-pyiqa-tests-")
for _name in ("TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME"):
    os.environ[_name] = str(Path(_CACHES.name, _name.lower()))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("QUALICLIP_PYIQA_WEIGHTS", None)
# Tracing for any size computes with more symbolic expressions than SymPy remembers by default.
os.environ.setdefault("SYMPY_CACHE_SIZE", "100000")
# Workers of pytest-xdist share the cores.
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import torch  # noqa: E402
import upstream  # noqa: E402

QUALICLIP_TEXTS = [
    "Good photo.",
    "Bad photo.",
    "Sharp image.",
    "Blurry image.",
    "Sharp edges.",
    "Blurry edges.",
    "High-resolution image.",
    "Low-resolution image.",
    "Noise-free image.",
    "Noisy image.",
    "High-quality image.",
    "Low-quality image.",
    "Good picture.",
    "Bad picture.",
]
CLIPIQA_TEXTS = ["Good photo..", "Bad photo.."]


@contextmanager
def made_once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Yield a folder of the whole run, and whether this worker is the first, which fills it while the others wait."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    base = factory.getbasetemp() if alone else factory.getbasetemp().parent
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        if not alone:
            import fcntl  # POSIX only

            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield folder, not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def upstream_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RN50 and everything that stands on it, under upstream's file names, with random values."""
    with made_once(tmp_path_factory, "upstream") as (folder, first):
        if first:
            write_upstream(folder)
    return folder


def write_upstream(folder: Path) -> None:
    import open_clip

    config = open_clip.get_model_config("RN50-quickgelu")
    state = upstream.random_clip(config, seed=0, side=96)
    torch.save(state, folder / "RN50.pt")
    tuned = upstream.random_clip(config, seed=1, side=96)
    upstream.write_qualiclip(folder / "QualiCLIP.pth", tuned)
    shared, own = "CLIP-IQA+_learned_prompts-603f3273.pth", "CLIPIQA+_RN50_512-89f5d940.pth"
    upstream.write_context(folder / shared, state, CLIPIQA_TEXTS, per_text=False, bare=True, seed=2)
    upstream.write_context(folder / own, state, CLIPIQA_TEXTS, per_text=True, bare=False, seed=3)
    for seed, dataset in enumerate(("koniq", "clive", "flive", "spaq"), start=4):
        file = folder / f"QualiCLIP+_{dataset}.pth"
        upstream.write_context(file, tuned, QUALICLIP_TEXTS, per_text=True, bare=False, seed=seed)


@pytest.fixture
def upstream_weights(upstream_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, in the look-up path; its random files cannot have the published hashes."""
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(upstream_folder))
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    return upstream_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny-resnet` and `tiny-vit` known to open_clip, with weight files `NAME.pt`: OpenAI-style towers in small."""
    with made_once(tmp_path_factory, "tiny") as (folder, first):
        upstream.add_tiny_backbones(folder)
        if first:
            torch.save(upstream.random_clip(upstream.TINY_RESNET, seed=0), folder / "tiny-resnet.pt")
            torch.save(upstream.random_clip(upstream.TINY_VIT, seed=0), folder / "tiny-vit.pt")
            torch.save(upstream.random_clip(upstream.TINY_VIT_32, seed=0), folder / "tiny-vit-32.pt")
    return folder


@pytest.fixture(scope="session")
def families_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weight files `NAME.pt` of all `upstream.families`, which open_clip knows too, beside those of `tiny_folder`."""
    with made_once(tmp_path_factory, "families") as (_, first):
        if first:
            upstream.write_words(tiny_folder / "words")
            for name in upstream.families(tiny_folder / "words"):
                torch.save(upstream.random_model(name).state_dict(), tiny_folder / f"{name}.pt")
    return tiny_folder


@pytest.fixture
def cut_small_pictures(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets every picture go through the networks in strips of so many rows, from the call on."""

    def cut(rows: int = 32) -> None:
        monkeypatch.setattr("qualiclip_pyiqa.towers.streaming.LARGE_PIXELS", 1000)
        monkeypatch.setattr("qualiclip_pyiqa.towers.streaming.CPU_STRIP_PIXELS", 1)
        monkeypatch.setattr("qualiclip_pyiqa.towers.streaming.MULTIPLE", rows)

    return cut
