"""pyiqa knows our metrics in an interpreter that never imports us, whatever the order, the switch or the damage."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import qualiclip_pyiqa_start
from qualiclip_pyiqa.metrics.registry import METRICS

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "examples" / "photos" / "lighthouse.jpg"
MINI = next((ROOT / "weights").glob("*.safetensors"))


def run(code: str, *options: str, **environment: str) -> str:
    """What a new interpreter prints; it must not fail, and must not print to stderr what we did not ask for."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "qualiclip" not in done.stderr, done.stderr
    return done.stdout


def test_nothing_to_import() -> None:
    names = sorted(METRICS)
    out = run(
        f"""
import sys
assert "qualiclip_pyiqa" not in sys.modules and "torch" not in sys.modules
import pyiqa
from pyiqa.default_model_configs import DEFAULT_CONFIGS
assert set({names}) <= set(pyiqa.list_models())
assert set({names}) <= set(pyiqa.list_models(metric_mode="NR"))
assert "torch" not in sys.modules or "qualiclip_pyiqa.archs" not in sys.modules
entry = DEFAULT_CONFIGS["qualiclip+"]
assert entry["metric_opts"] == {{
    "type": "OpenQualiCLIP", "model_type": "qualiclip+", "backbone": "RN50", "prompts": "qualiclip",
    "weights": "QualiCLIP", "temperature": 2.0, "pos_embedding": False, "pretrained": "QualiCLIP+_koniq",
}}, entry
assert (entry["score_range"], entry["lower_better"], entry["metric_mode"]) == ("0, 1", False, "NR")
metric = pyiqa.create_metric("qualiclip-mini", device="cpu")
print(metric({str(PHOTO)!r}).item())

# A user's change of an entry survives everything that registers again.
DEFAULT_CONFIGS["clipiqa"]["metric_opts"]["temperature"] = 3.0
import qualiclip_pyiqa, qualiclip_pyiqa_start
qualiclip_pyiqa_start.start(); qualiclip_pyiqa_start.arrange()
assert DEFAULT_CONFIGS["clipiqa"]["metric_opts"]["temperature"] == 3.0
assert sum(type(f).__module__ == "qualiclip_pyiqa_start" for f in sys.meta_path) == 1
import importlib, pyiqa.default_model_configs as table
importlib.reload(table)
assert table.DEFAULT_CONFIGS["clipiqa"]["metric_opts"]["type"] == "OpenCLIPIQA"

# The same for the class that reads files: wrapped once, and again after a reload.
from pathlib import Path
module = pyiqa.models.inference_model
assert not hasattr(module.InferenceModel.forward.__wrapped__, "__wrapped__")
old = module.InferenceModel
importlib.reload(module)
assert module.InferenceModel is not old and not hasattr(module.InferenceModel.forward.__wrapped__, "__wrapped__")
again = module.InferenceModel("qualiclip-mini", device="cpu")
assert again(Path({str(PHOTO)!r})) == metric({str(PHOTO)!r})

# pyiqa's own modules stay importable beside us (openai-clip wants a pkg_resources that new setuptools lacks).
import packaging, packaging.version, types
if "pkg_resources" not in sys.modules:
    sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    sys.modules["pkg_resources"].packaging = packaging
from pyiqa.archs import clipiqa_arch, qualiclip_arch
from pyiqa.utils.registry import ARCH_REGISTRY
assert ARCH_REGISTRY.get("CLIPIQA") is clipiqa_arch.CLIPIQA
assert ARCH_REGISTRY.get("OpenCLIPIQA") is qualiclip_pyiqa.OpenCLIPIQA
"""
    )
    assert 0 < float(out.splitlines()[-1]) < 1


def test_switched_off() -> None:
    """Nothing until the package is imported, and then only names that replace nothing."""
    run(
        f"""
import sys
import pyiqa
from pyiqa.default_model_configs import DEFAULT_CONFIGS
theirs = {{name: dict(entry) for name, entry in DEFAULT_CONFIGS.items()}}
forward = pyiqa.models.inference_model.InferenceModel.forward
assert "qualiclip-mini" not in theirs and len(set(theirs) & set({sorted(METRICS)})) == 9
pyiqa.create_metric("psnr", device="cpu")  # loads the entry points
assert "qualiclip-mini" not in pyiqa.list_models() and "qualiclip_pyiqa" not in sys.modules
import qualiclip_pyiqa
assert {{name: entry for name, entry in DEFAULT_CONFIGS.items() if name in theirs}} == theirs
assert DEFAULT_CONFIGS["qualiclip"]["metric_opts"]["type"] == "QualiCLIP"
assert set(DEFAULT_CONFIGS) - set(theirs) == set({sorted(METRICS)}) - set(theirs)
metric = pyiqa.create_metric("qualiclip-mini", device="cpu")
assert 0 < metric({str(PHOTO)!r}).item() < 1
assert pyiqa.models.inference_model.InferenceModel.forward.__wrapped__ is forward
# The file of a model of ours is ours whatever pyiqa's names mean.
scorer = qualiclip_pyiqa.Scorer({str(MINI)!r}, device="cpu", workers=0)
assert next(scorer.score([{str(PHOTO)!r}])).error is None
""",
        QUALICLIP_PYIQA_AUTOLOAD="0",
    )


def test_imported_before_pyiqa() -> None:
    run(
        """
import sys
import qualiclip_pyiqa
assert "torch" not in sys.modules and "pyiqa" not in sys.modules
assert qualiclip_pyiqa.__version__ and set(qualiclip_pyiqa.__all__) <= set(dir(qualiclip_pyiqa))
import pyiqa.default_model_configs as table
assert "qualiclip-mini" in table.DEFAULT_CONFIGS
for name in qualiclip_pyiqa.__all__:
    getattr(qualiclip_pyiqa, name)
""",
        QUALICLIP_PYIQA_AUTOLOAD="0",
    )


def test_the_pyiqa_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyiqa.pyiqa_cmd", "qualiclip-mini", "-t", str(PHOTO), "--device", "cpu", "-v"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert str(PHOTO) in done.stdout and "mean" in done.stdout


def test_a_pyiqa_that_changed_is_a_warning(tmp_path: Path) -> None:
    """No class to wrap, or nothing of that name: the user hears that files are read by other rules."""
    for inference, said in (
        ("class Other: pass", "AttributeError"),
        (None, "does not find pyiqa.models.inference_model"),
    ):
        fake = tmp_path / said / "pyiqa"
        (fake / "models").mkdir(parents=True)
        (fake / "utils").mkdir()
        for name in ("__init__.py", "models/__init__.py", "utils/__init__.py"):
            (fake / name).write_text("")
        registry = "class ARCH_REGISTRY: register_lazy = staticmethod(lambda *args, **more: None)"
        (fake / "utils" / "registry.py").write_text(registry)
        code = "import qualiclip_pyiqa_start as start; start.register_archs()"
        if inference is not None:
            (fake / "models" / "inference_model.py").write_text(inference)
            code = "import pyiqa.models.inference_model\n" + code
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(fake.parent)!r})\n{code}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("RuntimeWarning: qualiclip_pyiqa") == 1
        assert said in done.stderr and "metric(path) reads files by pyiqa's rules" in done.stderr


def _site(tmp_path: Path, start: str, package: str) -> Path:
    """A folder that `site` treats like site-packages, with our start-up files and stand-ins for our modules."""
    import site

    root = next(Path(p) for p in [*site.getsitepackages(), *sys.path] if Path(p, "qualiclip_pyiqa.pth").is_file())
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "qualiclip_pyiqa.pth").write_text((root / "qualiclip_pyiqa.pth").read_text())
    (folder / "qualiclip_pyiqa_start.py").write_text(start)
    (folder / "qualiclip_pyiqa").mkdir()
    (folder / "qualiclip_pyiqa" / "__init__.py").write_text(package)
    return folder


@pytest.mark.parametrize("start", ["raise RuntimeError('broken')", "this is no Python", None])
def test_a_broken_start_troubles_nobody(tmp_path: Path, start: str | None) -> None:
    folder = _site(tmp_path, start or "", "")
    if start is None:
        (folder / "qualiclip_pyiqa_start.py").unlink()
    code = f"import site; site.addsitedir({str(folder)!r}); print('fine')"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_broken_package_is_a_warning_and_pyiqa_works(tmp_path: Path) -> None:
    real = Path(qualiclip_pyiqa_start.__file__).read_text()
    folder = _site(tmp_path, real, "raise RuntimeError('broken')")
    fake = folder / "pyiqa"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    (fake / "default_model_configs.py").write_text("DEFAULT_CONFIGS = {'psnr': {}}")
    code = (
        f"import site, sys; site.addsitedir({str(folder)!r}); sys.path.insert(0, {str(folder)!r})\n"
        "from pyiqa.default_model_configs import DEFAULT_CONFIGS; print(DEFAULT_CONFIGS)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "{'psnr': {}}\n")
    assert "RuntimeWarning: qualiclip_pyiqa could not add its metrics to pyiqa (RuntimeError: broken)" in done.stderr


def test_start_up_imports_one_small_module() -> None:
    """What the hook costs an interpreter without pyiqa: one module of ours and nothing it would not have had."""
    spec = find_spec("qualiclip_pyiqa_start")
    assert spec is not None
    before = run("import sys; print(sorted(sys.modules))", QUALICLIP_PYIQA_AUTOLOAD="0")
    after = run("import sys; print(sorted(sys.modules))", QUALICLIP_PYIQA_AUTOLOAD="1")
    assert before == after  # both import the module; neither imports anything for it
    assert "'qualiclip_pyiqa_start'" in after and "'qualiclip_pyiqa'" not in after
