"""`qualiclip weights convert`: every layout keeps its tensors and is accepted where the file was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import contrastive_files as contrastive
import pytest
import torch
import upstream
from safetensors import safe_open

from qualiclip_pyiqa import ContriqueIQA, OpenCLIPIQA
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.pretrained import manifest
from qualiclip_pyiqa.pretrained.convert import convert
from qualiclip_pyiqa.pretrained.files import file_sha256
from qualiclip_pyiqa.pretrained.layouts import detect_layout
from qualiclip_pyiqa.pretrained.read import read
from qualiclip_pyiqa.towers import contrastive as towers


def test_an_output_that_cannot_be_written_is_named(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none" / "x.safetensors"
    assert run(files["face"], "-o", out) == 2
    assert capsys.readouterr().err == f"qualiclip: {out} cannot be written: {out.parent} is not a folder\n"
    with pytest.raises(OSError, match=r"x\.safetensors cannot be written \(No such file or directory\)"):
        convert(files["face"], out)


def run(*words: object) -> int:
    return cli.main(["weights", "convert", *map(str, words)])


def plain(folder: Path, name: str, *shapes: str) -> Path:
    """A state dict with small tensors of these names."""
    path = folder / name
    torch.save({key: torch.randn(3, 4) for key in shapes}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, upstream_folder: Path) -> dict[str, Path]:
    """A file of each layout that is not safetensors."""
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "ridge.save").write_bytes(contrastive.pickled_ridge(contrastive.rule_regression(), 50.0))
    adapter = ("visual.trunk.stem.weight", "token_embedding.weight", "adapter.learnable_text_tokens")
    face = ("model.input_layer.0.weight", "model.body.0.weight", "model.output_layer.0.weight")
    return {
        "openai-clip": upstream_folder / "RN50.pt",
        "qualiclip": upstream_folder / "QualiCLIP.pth",
        "context": upstream_folder / "QualiCLIP+_koniq.pth",
        "context, a bare tensor": upstream_folder / "CLIP-IQA+_learned_prompts-603f3273.pth",
        "contrique": contrastive.write_contrique(folder),
        "ridge": folder / "ridge.save",
        "re-iqa": contrastive.write_re_iqa(folder)[0],
        "deep-prompts": plain(folder, "deep.pth", "prompts_text.0", "prompts_vis.0"),
        "ranking-aware": plain(folder, "adapter.pt", *adapter),
        "face": plain(folder, "face.ckpt", *face),
    }


KINDS = (
    "openai-clip",
    "qualiclip",
    "context",
    "context, a bare tensor",
    "contrique",
    "ridge",
    "re-iqa",
    "deep-prompts",
    "ranking-aware",
    "face",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_keeps_its_tensors(
    kind: str,
    files: dict[str, Path],
    tmp_path: Path,
    upstream_weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.safetensors"
    assert run(files[kind], "-o", out) == 0
    said = capsys.readouterr()
    layout = kind.partition(",")[0]
    assert said.out == f"{out}\n" and f"layout {layout}, " in said.err
    before, after = read(files[kind]), read(out, layout=layout)
    assert detect_layout(after.tensors, {}) == layout and after.is_safetensors
    assert before.tensors.keys() == after.tensors.keys()
    for name, value in before.tensors.items():
        assert value.dtype == after.tensors[name].dtype and torch.equal(value, after.tensors[name]), name
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata()["converted_from"] == file_sha256(files[kind])
    # Whatever was converted once is refused, and a file that exists is kept.
    assert run(out, "-o", tmp_path / "again.safetensors") == 1
    assert "is safetensors already" in capsys.readouterr().err
    content = out.read_bytes()
    assert run(files[kind], "-o", out) == 2
    assert f"{out} exists; pass --force" in capsys.readouterr().err
    assert run(files[kind], "-o", out, "--force") == 0 and out.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors"}


@torch.no_grad()
def test_contrique_scores_alike_on_converted_files(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(towers, "DEPTHS", contrastive.SHALLOW)
    x = upstream.pictures(2, 64, 80)
    expected = ContriqueIQA("contrique", weights=files["contrique"], regression=files["ridge"]).eval()(x)
    # Under the authors' names, and so wherever those are looked for.
    assert run(files["contrique"], "-o", tmp_path / "CONTRIQUE_checkpoint25.safetensors") == 0
    assert run(files["ridge"], "-o", tmp_path / "Koniq.safetensors") == 0
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tmp_path))
    converted = ContriqueIQA("contrique").eval()
    assert torch.equal(converted(x), expected)
    assert converted.describe()["weights"]["record"] == "CONTRIQUE"


def test_openais_weights_keep_their_activation(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's vision transformers need QuickGELU, which no tensor shows; a file is known as theirs by its hash."""
    source = tiny_folder / "tiny-vit.pt"
    known = manifest.manifest()
    digest = file_sha256(source)
    hashes = manifest.openai_hashes() | {digest}
    monkeypatch.setattr("qualiclip_pyiqa.pretrained.read.openai_hashes", lambda: hashes)
    monkeypatch.setitem(known, "ViT-B-16", replace(known["ViT-B-16"], hf_size=source.stat().st_size, hf_sha256=digest))
    assert read(source).from_openai
    out = tmp_path / "any-name.safetensors"
    assert run(source, "-o", out) == 0
    assert read(out).from_openai
    both = [OpenCLIPIQA("clipiqa", backbone="tiny-vit", weights=file).describe() for file in (source, out)]
    assert both[0]["activation"] == both[1]["activation"] == "QuickGELU"


def test_what_is_not_converted_is_one_line(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(status: int, *words: object) -> str:
        before = sorted(tmp_path.iterdir())
        assert run(*words) == status
        captured = capsys.readouterr()
        assert not captured.out and len(captured.err.splitlines()) == 1
        assert sorted(tmp_path.iterdir()) == before
        return captured.err

    out = tmp_path / "out.safetensors"
    assert "ends with .safetensors" in refused(2, files["ridge"], "-o", tmp_path / "out.pt")
    assert "no weight file" in refused(1, tmp_path / "absent.pt", "-o", out)
    other = plain(tmp_path, "other.pt", "some.weight")
    assert "is not of layout openai-clip: it lacks visual., logit_scale (it holds some.weight" in refused(
        1, other, "-o", out
    )
    pickled = tmp_path / "other.save"
    pickled.write_bytes(contrastive.pickled_ridge(contrastive.rule_regression(), 50.0)[:-9])
    assert "refused without executing any of it" in refused(1, pickled, "-o", out)
    embedded = manifest.data_folder() / "qualiclip-mini.safetensors"
    assert "is a file of this package" in refused(1, embedded, "-o", out)
