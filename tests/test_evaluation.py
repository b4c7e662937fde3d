"""Evaluation against SciPy and formulas on known data, ties and constant columns included; the command on files."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Sequence
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.text
import numpy as np
import pyiqa
import pytest
import torch
from forks import Fork
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import optimize, stats
from test_cli_score import picture

from qualiclip_pyiqa import figures
from qualiclip_pyiqa.commands import DEFAULT_METRIC, cli
from qualiclip_pyiqa.degradations.bank import DEGRADATIONS
from qualiclip_pyiqa.degradations.camera import CAMERA
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.evaluation import plots
from qualiclip_pyiqa.evaluation.agreement import agreement, compare, fitted_logistic, logistic
from qualiclip_pyiqa.evaluation.datasets import pyiqa_ratings
from qualiclip_pyiqa.evaluation.gmad import gmad
from qualiclip_pyiqa.evaluation.ladders import score_degraded
from qualiclip_pyiqa.evaluation.opinions import report_opinions
from qualiclip_pyiqa.evaluation.ratings import read_ratings
from qualiclip_pyiqa.evaluation.scores import score_images
from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.scoring.scorer import Scorer

RNG = np.random.default_rng(0)
X = RNG.normal(size=200)
Y = 40 + 20 * np.tanh(X) + RNG.normal(size=200) * 5
ROOT = Path(__file__).parents[1]


def ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks, by definition."""
    return np.array([(values < v).sum() + (values == v).sum() / 2 + 0.5 for v in values])


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=6, max_size=30))
def test_correlations_equal_their_definitions_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, float).T
    found = agreement(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert found.n == len(pairs)
        assert (found.srcc, found.plcc, found.plcc_logistic, found.krcc, found.rmse, found.srcc_ci95) == (None,) * 6
        return
    assert found.srcc == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-12)
    assert found.plcc == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    dx, dy = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    tau_b = (dx * dy).sum() / np.sqrt((dx != 0).sum() * (dy != 0).sum())
    assert found.krcc == pytest.approx(tau_b, abs=1e-12)


def test_the_logistic_is_fitted() -> None:
    found = agreement(X, Y)
    assert found.plcc_logistic > found.plcc + 0.01  # tanh is a logistic
    mapped = fitted_logistic(X, Y)(X)
    assert found.rmse == pytest.approx(np.sqrt(np.mean((mapped - Y) ** 2)))
    assert found.rmse < 1.05 * 5  # the noise's standard deviation
    exact = logistic(X, 80, 10, 0.3, 0.5)
    assert agreement(X, exact).rmse < 1e-6 and agreement(X, exact).plcc_logistic == pytest.approx(1)
    # Falling data are mapped as well, and a mapped score has the direction of the opinions.
    falling = agreement(-X, Y, opposite=True)
    assert falling.srcc == pytest.approx(found.srcc) and falling.rmse == pytest.approx(found.rmse, rel=1e-4)
    assert falling.plcc_logistic == pytest.approx(found.plcc_logistic, rel=1e-4)
    assert agreement(X[:4], Y[:4]).rmse is None  # fewer points than make sense


def test_a_fit_warns_of_nothing_and_changes_no_filter() -> None:
    """A step is fitted by any narrow logistic: SciPy's `curve_fit` warns that its covariance is unknown."""
    x = np.arange(6.0)
    y = np.array([1.0, 1, 1, 2, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        assert agreement(x, y).rmse < 1e-6
        assert warnings.filters == before
    with pytest.warns(optimize.OptimizeWarning):
        optimize.curve_fit(logistic, x, y, p0=(2, 1, 2.5, x.std()), maxfev=20_000)


def test_equal_to_scipy() -> None:
    for n in (3, 5, 50, 200):
        for ties in (False, True):
            x, y = (np.round(v[:n], 1) if ties else v[:n] for v in (X, Y))
            found = agreement(x, y)
            assert found.srcc == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
            assert found.plcc == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
            assert found.krcc == pytest.approx(stats.kendalltau(x, y)[0], abs=1e-12)
            if n >= 50:
                top, bottom = y.max(), y.min()
                fit, _ = optimize.curve_fit(logistic, x, y, p0=(top, bottom, np.median(x), x.std()), maxfev=20_000)
                mapped = logistic(x, *fit)
                assert found.plcc_logistic == pytest.approx(stats.pearsonr(mapped, y)[0], abs=1e-9)
                assert found.rmse == pytest.approx(np.sqrt(np.mean((mapped - y) ** 2)), abs=1e-9)


def test_the_interval_is_the_bootstraps() -> None:
    low, high = agreement(X, Y).srcc_ci95

    def srcc(a: np.ndarray, b: np.ndarray) -> float:
        return stats.spearmanr(a, b)[0]

    seed = {"rng" if "rng" in signature(stats.bootstrap).parameters else "random_state": 1}  # before SciPy 1.15
    reference = stats.bootstrap(
        (X, Y), srcc, paired=True, vectorized=False, method="percentile", n_resamples=2000, **seed
    )
    low_reference, high_reference = reference.confidence_interval
    # Two bootstraps of a thousand samples and more: their 2.5 % quantiles differ by a tenth of the interval at most.
    assert abs(low - low_reference) < 0.1 * (high - low) and abs(high - high_reference) < 0.1 * (high - low)
    assert agreement(X, Y, seed=1).srcc_ci95 != (low, high) and agreement(X, Y).srcc_ci95 == (low, high)


def test_a_metric_that_disagrees_is_known_by_its_srcc_alone() -> None:
    found = agreement(-X, Y)
    assert found.srcc < -0.8 and found.plcc < -0.8 and found.krcc < -0.6
    assert found.plcc_logistic > 0.8  # the logistic falls too


def test_paired_comparison() -> None:
    noise = np.random.default_rng(2).normal(size=200)
    worse, alike = X + noise, X + noise * 0.001
    found = compare(X, worse, Y)
    assert found.difference == pytest.approx(stats.spearmanr(X, Y)[0] - stats.spearmanr(worse, Y)[0])
    assert found.p == pytest.approx(0.001) and 0 < found.ci95[0] < found.difference < found.ci95[1]
    backwards = compare(worse, X, Y)
    assert backwards.difference == -found.difference and backwards.p == found.p
    assert compare(X, alike, Y).p > 0.05
    assert compare(X, np.ones(200), Y) is None


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "at least 3"),
        ([1, 2, 3], [1, 2], "3 scores and 2"),
        ([1, 2, np.nan], [1, 2, 3], "not finite"),
        ([1, 2, 3], [1, 2, -1e101], "beyond 1e\\+100"),
    ],
)
def test_what_cannot_be_correlated(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        agreement(x, y)


@pytest.mark.parametrize("unit", [1e-300, 1e-150, 1e-30, 1e30, 1e99])
def test_units_of_scores_and_opinions_do_not_matter(unit: float) -> None:
    x, y = np.array([0.1, 0.4, 0.3, 0.9, 0.7, 0.2]), np.array([1.0, 3, 4, 7, 5, 2])
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        plain, scaled = agreement(x, y), agreement(x * unit, y * unit)
        compared = compare(x * unit, x[::-1] * unit, y * unit)
    assert compared is not None and math.isfinite(compared.difference)
    assert scaled.srcc == plain.srcc and scaled.krcc == plain.krcc
    assert scaled.plcc == pytest.approx(plain.plcc, abs=1e-12)
    assert all(value is None or np.isfinite(value).all() for value in scaled.as_dict().values())


def test_gmad_pairs() -> None:
    a, b = np.random.default_rng(1).uniform(size=(2, 3000))
    duels = gmad({"a": a, "b": b}, {"a": False, "b": True}, levels=3)
    assert [(duel.defender, duel.attacker) for duel in duels] == [("a", "b")] * 3 + [("b", "a")] * 3
    for duel in duels:
        defending, attacking, sign = (a, b, -1) if duel.defender == "a" else (b, a, 1)
        assert duel.defender_gap < 0.2 < 0.8 < duel.attacker_gap
        assert sign * attacking[duel.better] > sign * attacking[duel.worse]
        assert duel.level == pytest.approx((defending[duel.better] + defending[duel.worse]) / 2)
        # No other pair that the defender finds as alike is farther apart for the attacker.
        order = np.argsort(defending)
        (inside,) = (part for part in np.array_split(order, 7) if duel.better in part)
        assert duel.attacker_gap == np.ptp(attacking[inside])
        assert {duel.better, duel.worse} == {inside[attacking[inside].argmin()], inside[attacking[inside].argmax()]}
    assert [duel.level for duel in duels[:3]] == sorted(duel.level for duel in duels[:3])
    with pytest.raises(SettingsError, match="needs at least 18"):
        gmad({"a": a[:17], "b": b[:17]}, {}, levels=4)
    for none in (0, -1):
        with pytest.raises(SettingsError, match="expected at least 1"):
            gmad({"a": a, "b": b}, {}, levels=none)
    with pytest.raises(SettingsError, match="between two metrics"):
        gmad({"a": a}, {})


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs that get more and more blurred, with opinion scores that say so and DMOS that say the opposite."""
    folder = tmp_path_factory.mktemp("rated")
    lines = ["Image_Name,MOS,camera,dmos,constant"]
    for number, name in enumerate(("hats", "lighthouse", "parrots", "portrait")):
        with Image.open(ROOT / "examples" / "photos" / f"{name}.jpg") as photo:
            small = photo.resize((192, 128))
        for step, radius in enumerate((0, 0.7, 1.5, 3)):
            name = f"{number}{step}"
            small.filter(ImageFilter.GaussianBlur(radius)).save(folder / f"{name}.png")
            lines.append(f"{name},{90 - 20 * step + number},{'ab'[number % 2]},{10 + 20 * step - number},5")
    (folder / "mos.csv").write_text("\n".join(lines) + "\n")
    return folder


def evaluate(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments), "--device", "cpu"])


def test_command_with_ratings(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "e.json", tmp_path / "e.png"
    command = ["--ratings", rated / "mos.csv", "--images", rated, "-m", "qualiclip-mini", "-m", "piqe"]
    assert evaluate(*command, "--group", "camera", "--json", out, "--plot", plot) == 0
    written = json.loads(out.read_text())
    numbers = written["metrics"]
    mini = numbers["qualiclip-mini"]
    assert list(numbers) == ["qualiclip-mini", "piqe"] and written["left_out"] == {}
    assert written["ratings"]["images"] == written["ratings"]["rows"] == 16
    assert (mini["lower_better"], numbers["piqe"]["lower_better"]) == (False, True)
    assert {"n", "srcc", "plcc", "plcc_logistic", "krcc", "rmse", "srcc_ci95"} <= set(mini)
    assert mini["n"] == 16 and mini["srcc"] > 0.5 and mini["srcc_ci95"][0] <= mini["srcc"] <= mini["srcc_ci95"][1]
    assert numbers["piqe"]["srcc"] > 0  # lower is better, and so is counted
    assert set(mini["groups"]) == {"a", "b"} and mini["groups"]["a"]["n"] == 8
    assert set(mini["versus"]) == {"piqe"}
    said = capsys.readouterr().out
    assert f"| qualiclip-mini | 16 | {mini['srcc']:.4f} |" in said and "camera = a, 8 images" in said
    with Image.open(plot) as drawn:
        assert drawn.width > 600

    # A DMOS column is known to be better when lower; any column can be named and turned round.
    assert evaluate(*command[:6], "--mos-column", "dmos", "--json", out) == 0
    assert json.loads(out.read_text())["metrics"]["qualiclip-mini"]["srcc"] == pytest.approx(mini["srcc"])
    assert "lower opinion scores are better, judging by the column name dmos; else pass" in capsys.readouterr().out
    # ... of KADID-10k's own, higher is better.
    assert evaluate(*command[:6], "--mos-column", "dmos", "--no-lower-better", "--json", out) == 0
    assert json.loads(out.read_text())["metrics"]["qualiclip-mini"]["srcc"] == pytest.approx(-mini["srcc"])
    assert evaluate(*command[:6], "--lower-better", "--json", out) == 0
    assert "lower opinion scores are better, as passed" in capsys.readouterr().out
    assert json.loads(out.read_text())["metrics"]["qualiclip-mini"]["srcc"] == pytest.approx(-mini["srcc"])
    assert evaluate(*command[:6], "--mos-column", "constant", "--json", out) == 0
    assert json.loads(out.read_text())["metrics"]["qualiclip-mini"]["srcc"] is None
    assert ": no correlation, because all" in capsys.readouterr().out


def test_number_of_workers_is_chosen(rated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    score = Scorer.score

    def noted(scorer: Scorer, images: Any) -> Any:
        used.append(scorer.workers)
        return score(scorer, images)

    monkeypatch.setattr(Scorer, "score", noted)
    assert evaluate("--ratings", rated / "mos.csv", "--images", rated, "-m", "qualiclip-mini", "--workers", 0) == 0
    assert evaluate("--gmad", "qualiclip-mini", "qualiclip-mini+", rated, "--levels", 1, "--workers", 2) == 0
    assert used == [0, 2]
    assert evaluate("--ratings", rated / "mos.csv", "--images", rated, "--workers", -1) == 2


def test_command_with_a_data_set_of_pyiqa(
    rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "datasets"
    (root / "meta_info").mkdir(parents=True)
    (root / "SPAQ").mkdir()
    ratings = read_ratings(rated / "mos.csv", rated)
    lines = ["img_name,mos"] + [f"{p.name},{o}" for p, o in zip(ratings.paths, ratings.opinions, strict=True)]
    import pyiqa

    info = dict(pyiqa.get_dataset_info("spaq"))
    meta = root / Path(info["meta_info_file"]).relative_to("datasets")
    meta.write_text("\n".join(lines))
    images = root / Path(info["dataroot_target"]).relative_to("datasets")
    images.mkdir(parents=True, exist_ok=True)
    for path in ratings.paths:
        (images / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "e.json"
    assert evaluate("--dataset", "spaq", "--images", root, "--json", out) == 0
    by_pyiqa = json.loads(out.read_text())
    assert evaluate("--ratings", rated / "mos.csv", "--images", rated, "--json", out) == 0
    assert by_pyiqa["metrics"][DEFAULT_METRIC]["srcc"] == json.loads(out.read_text())["metrics"][DEFAULT_METRIC]["srcc"]
    table = tmp_path / "scores.csv"
    assert cli.main(["score", str(images), "-o", str(table), "--device", "cpu"]) == 0
    arguments = ["--dataset", "spaq", "--images", str(root), "--scores", str(table)]
    assert cli.main(["evaluate", *arguments, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["metrics"][DEFAULT_METRIC]
    assert found["srcc"] == pytest.approx(by_pyiqa["metrics"][DEFAULT_METRIC]["srcc"])
    table.write_text("\n".join(table.read_text().splitlines()[:-2]) + "\n")
    assert cli.main(["evaluate", *arguments]) == 2
    assert "2 of 16 rated images not in the table of scores, such as" in capsys.readouterr().err
    assert evaluate("--dataset", "spaq", "--images", root) == 0
    assert "16 images (spaq, all of it; higher opinion scores are better, as pyiqa states)" in capsys.readouterr().out
    for arguments, message in (
        (("--dataset", "spaqq"), "pyiqa has no data set 'spaqq'; expected one of cgfiqa, "),
        (("--dataset", "spaqq"), "tid2013; did you mean 'spaq'"),
        (("--dataset", "livec", "--images", root), "pyiqa cannot read its data set livec"),
        (
            ("--dataset", "ava", "--images", root),
            "pyiqa's data set ava uses the loader AVADataset; expected one of GeneralNRDataset",
        ),
        (("--dataset", "bapps"), "uses the loader BAPPSDataset"),
        (("--dataset", "pieapp"), "uses the loader PieAPPDataset"),
    ):
        assert evaluate(*arguments) == 2
        assert message in capsys.readouterr().err


def pyiqas_layout(root: Path, name: str, header: str, rows: list[str]) -> None:
    """A data set of pyiqa's: its table, and a file for each picture that is named in it."""
    import pyiqa

    info = pyiqa.get_dataset_info(name)
    meta, folder = (root / Path(info[key]).relative_to("datasets") for key in ("meta_info_file", "dataroot_target"))
    meta.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    meta.write_text("\n".join([header, *rows]))
    for row in rows:
        for cell in row.split(","):
            if cell.endswith(".png"):
                (folder / cell).touch()


def test_split_and_direction_of_a_data_set_of_pyiqa(tmp_path: Path) -> None:
    split = "ratio802_seed123_split_01"
    rows = [f"{k}.png,{k},{'train' if k < 7 else 'test'}" for k in range(10)]
    pyiqas_layout(tmp_path, "gfiqa", f"img_name,mos,{split}", rows)
    found = pyiqa_ratings("gfiqa", tmp_path)  # pyiqa's configuration names no split, and its loaders would train
    assert [path.name for path in found.paths] == ["7.png", "8.png", "9.png"] and found.opinions == [7, 8, 9]
    assert str(found).startswith(
        "3 images (gfiqa, its test split; higher opinion scores are better, as pyiqa does not state otherwise"
    )

    # A full-reference data set whose opinion scores are better when lower.
    pyiqas_layout(tmp_path, "csiq", "ref_img,dist_img,dmos", [f"r.png,d{k}.png,0.{k}" for k in range(4)])
    found = pyiqa_ratings("csiq", tmp_path)
    assert [path.name for path in found.paths] == [f"d{k}.png" for k in range(4)] and found.opinions[3] == 0.3
    assert found.lower_better and "lower opinion scores are better, as pyiqa states" in str(found)

    for name, header, row, complaint in (
        ("cgfiqa", "img_name,mos,official_split", "0.png,1,train", "has no images in its test split"),
        ("flive", "img_name,mos", "0.png,1", "cannot read its data set flive"),
    ):
        pyiqas_layout(tmp_path, name, header, [row])
        with pytest.raises(SettingsError, match=complaint):
            pyiqa_ratings(name, tmp_path)


def test_direction_is_known_by_the_name_of_the_column(tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    table = tmp_path / "scores.csv"
    for header, told, lower in (
        ("image,mos", None, False),
        ("image,mos", True, True),
        ("image, DMOS", None, True),  # with a space, as people write tables
        ("image, DMOS", False, False),
    ):
        table.write_text(f"{header}\n0.png, 5\n")
        assert read_ratings(table, tmp_path, lower_better=told).lower_better == lower, header


def test_command_with_degradations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pristine"
    folder.mkdir()
    for name in ("lighthouse", "parrots"):
        with Image.open(ROOT / "examples" / "photos" / f"{name}.jpg") as photo:
            photo.resize((photo.width // 4, photo.height // 4)).save(folder / f"{name}.png")
    out, plot = tmp_path / "d.json", tmp_path / "d.png"
    assert evaluate("--degradations", folder, "--json", out, "--plot", plot) == 0
    numbers = json.loads(out.read_text())["metrics"][DEFAULT_METRIC]
    assert numbers["photographs"] == 2 and len(numbers["types"]) == 24
    blur = numbers["types"]["lens_blur"]
    assert len(blur["means"]) == 6 and blur["falls"] and blur["means"][1] > blur["means"][5]
    assert numbers["types_falling"] == sum(each["falls"] for each in numbers["types"].values()) >= 12
    assert not numbers["types"]["mean_shift"]["monotone_by_design"]
    assert "| lens_blur |" in capsys.readouterr().out
    with Image.open(plot) as drawn:
        assert drawn.width > 1000
    # A photograph that cannot be read is left out, and the others have the figures they had.
    (folder / "unreadable.png").write_bytes(b"broken")
    assert evaluate("--degradations", folder, "--json", out, "--plot", plot) == 1
    assert "1 of 3 images left out:" in capsys.readouterr().err
    written = json.loads(out.read_text())
    assert written["metrics"][DEFAULT_METRIC] == numbers
    assert list(written["left_out"]) == [str(folder / "unreadable.png")]
    (folder / "unreadable.png").unlink()
    # Of a single photograph the means are its scores, and the pairs that are known to be ordered can be counted.
    assert evaluate("--degradations", folder, "--limit", 1, "--json", out) == 0
    for name, each in json.loads(out.read_text())["metrics"][DEFAULT_METRIC]["types"].items():
        pairs = [p for p in combinations(range(6), 2) if DEGRADATIONS[name].ordered(*p)]
        right = sum(each["means"][i] > each["means"][j] for i, j in pairs)
        assert each["in_order"] == pytest.approx(right / len(pairs)), name
    assert evaluate("--degradations", folder, "--limit", 1, "--bank", "camera", "--json", out) == 0
    written = json.loads(out.read_text())
    assert written["bank"] == "camera" and list(written["metrics"][DEFAULT_METRIC]["types"]) == list(CAMERA)


def test_command_with_gmad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        picture(tmp_path / "photos" / f"{number}.png", 64, 48 + number)
    out, plot = tmp_path / "g.json", tmp_path / "g.png"
    command = ["--gmad", "qualiclip-mini", "piqe", tmp_path / "photos", "--levels", 2]
    assert evaluate(*command, "--json", out, "--plot", plot) == 0
    pairs = json.loads(out.read_text())["pairs"]
    assert len(pairs) == 4 and {pair["defender"] for pair in pairs} == {"qualiclip-mini", "piqe"}
    assert all(Path(pair["better"]).is_file() and pair["better"] != pair["worse"] for pair in pairs)
    with Image.open(plot) as drawn:
        assert drawn.height > 800
    # An image that cannot be scored, or a folder that cannot be listed, takes part in no pair and is named.
    (tmp_path / "photos" / "00.png").write_bytes(b"broken")
    found = find_images([str(tmp_path / "photos")])
    found.unreadable["locked"] = "Permission denied"
    monkeypatch.setattr("qualiclip_pyiqa.images.paths.find_images", lambda folders: found)
    assert evaluate(*command, "--json", out) == 1
    said = capsys.readouterr().err
    assert "2 of 13 images left out:" in said and "locked cannot be listed (Permission denied)" in said
    assert json.loads(out.read_text())["pairs"] == pairs
    assert evaluate("--gmad", "piqe", "piqe", tmp_path / "photos", "--levels", 2) == 2
    assert evaluate("--gmad", "qualiclip-mini", "piqe", tmp_path / "photos") == 2
    assert "a gMAD competition at 4 levels needs at least 18" in capsys.readouterr().err


def test_names_that_a_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "写真" / f"{number}|国.png", 64, 48 + number)
    command = ["--gmad", "qualiclip-mini", "piqe", str(tmp_path / "写真"), "--levels", "1", "--device", "cpu"]
    out, said = tmp_path / "out", tmp_path / "said"
    done = Fork(
        ["evaluate", *command, "--json", str(tmp_path / "g.json")],
        environment={"PYTHONIOENCODING": "cp1252"},
        stdout=out,
        stderr=said,
    )
    assert done.wait() == 0, said.read_text()
    assert rb"\u5199\u771f" in out.read_bytes() and rb"\|\u56fd.png |" in out.read_bytes()
    assert len(json.loads((tmp_path / "g.json").read_text())["pairs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--gmad", "a", "a", "DIR"), "--gmad a is given twice; expected different metrics"),
        (("--degradations", "DIR", "-m", "a", "-m", "a"), "-m a is given twice"),
        (("--gmad", "a", "b", "DIR", "-m", "piqe"), "-m has no effect with --gmad; leave it out"),
        (("--gmad", "a", "b", "DIR", "--images", "DIR"), "--images has no effect with --gmad"),
        (("--gmad", "a", "b", "DIR", "--limit", "3"), "--limit has no effect with --gmad"),
        (("--gmad", "a", "b", "DIR", "--levels", "0"), "--levels is 0; expected at least 1"),
        (("--gmad", "a", "b", "DIR", "--levels", "-1"), "--levels is -1; expected at least 1"),
        (("--degradations", "DIR", "--limit", "0"), "--limit is 0; expected at least 1"),
        (("--degradations", "DIR", "--limit", "-1"), "--limit is -1; expected at least 1"),
        (("--gmad", "a", "b", "DIR", "--bank", "camera"), "--bank has no effect with --gmad"),
        (
            ("--degradations", "DIR", "--bank", "kamera"),
            "unknown degradation bank 'kamera'; expected one of kadid, camera",
        ),
        (("--degradations", "DIR", "--images", "DIR"), "--images has no effect with --degradations"),
        (("--degradations", "DIR", "--group", "x"), "--group has no effect with --degradations"),
        (("--degradations", "DIR", "--workers", "0"), "--workers has no effect with --degradations; leave it out"),
        (("--degradations", "DIR", "--no-lower-better"), "--lower-better has no effect with --degradations"),
        (("--dataset", "spaq", "--lower-better"), "--lower-better has no effect with --dataset"),
        (("--dataset", "spaq", "--mos-column", "x"), "--mos-column has no effect with --dataset"),
        (("--ratings", "x.csv", "--images", "DIR", "--limit", "3"), "--limit has no effect with --ratings"),
        (("--ratings", "x.csv", "--images", "DIR", "--plot", "p.xyz"), "expected a suffix of "),
        (("--ratings", "x.csv", "--images", "DIR", "--plot", "none/p.png"), "none is not a folder"),
        (("--ratings", "x.csv", "--images", "DIR", "--json", "none/p.json"), "none is not a folder"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_read(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


def test_no_output_depends_on_another_one(
    rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(plots, "scatter", full)
    out = tmp_path / "e.json"
    command = ["--ratings", rated / "mos.csv", "--images", rated, "-m", "piqe"]
    assert evaluate(*command, "--json", out, "--plot", tmp_path / "e.png") == 1
    assert json.loads(out.read_text())["metrics"]["piqe"]["n"] == 16
    said = capsys.readouterr()
    assert "| piqe | 16 |" in said.out and said.err.endswith("qualiclip: the disk is full\n")
    # Of several outputs that fail, each is said.
    monkeypatch.setattr("qualiclip_pyiqa.commands.evaluate.check_output", lambda _: None)
    nowhere = tmp_path / "none" / "e.json"
    assert evaluate(*command, "--json", nowhere, "--plot", tmp_path / "e.png") == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"qualiclip: {nowhere} cannot be written (No such file or directory)",
        "qualiclip: the disk is full",
    ]
    # What cannot be written at all does not keep the rest from being shown and drawn.
    monkeypatch.undo()
    monkeypatch.setattr("qualiclip_pyiqa.commands.evaluate.replacing", full)
    plot = tmp_path / "drawn.png"
    assert evaluate(*command, "--json", out, "--plot", plot) == 1
    said = capsys.readouterr()
    assert "| piqe | 16 |" in said.out and "the disk is full" in said.err and plot.stat().st_size > 1000


def test_plots_need_matplotlib_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate("--degradations", "DIR", "--plot", "p.png") == 2
    assert "qualiclip-pyiqa[plots]" in capsys.readouterr().err


def test_pairs_are_drawn_as_they_were_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned, deep = tmp_path / "turned.png", tmp_path / "deep.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    Image.new("RGB", (40, 60), "red").save(turned, exif=exif)
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(deep)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.extend(a.images[0] for a in figure.axes))
    plots.duels(tmp_path / "p.png", [plots.Pair(turned, deep, "", "")])
    assert drawn[0].get_array().shape == (40, 60, 3)
    assert np.mean(drawn[1].get_array()) == pytest.approx(0.5, abs=0.01)


def damaged(rated: Path, folder: Path) -> Path:
    """The rated images and their table, in a folder of its own, where three of them are broken."""
    shutil.copytree(rated, folder)
    for name in ("00", "13", "22"):
        (folder / f"{name}.png").write_bytes(b"broken")
    return folder / "mos.csv"


def test_images_that_cannot_be_scored_are_left_out_and_named(
    rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = damaged(rated, tmp_path / "damaged"), tmp_path / "e.json"
    plot = tmp_path / "e.png"
    command = ["--ratings", table, "--images", table.parent, "-m", "piqe", "--group", "camera"]
    assert evaluate(*command, "--json", out, "--plot", plot) == 1
    said = capsys.readouterr()
    assert "3 of 16 images left out:" in said.err and "13.png" in said.err and plot.is_file()
    written = json.loads(out.read_text())
    assert sorted(Path(path).name for path in written["left_out"]) == ["00.png", "13.png", "22.png"]
    assert (
        written["metrics"]["piqe"]["n"] == 13
        and f"| piqe | 13 | {written['metrics']['piqe']['srcc']:.4f} |" in said.out
    )

    # The same as if they had not been rated.
    lines = [line for line in table.read_text().splitlines() if line[:2] not in ("00", "13", "22")]
    table.write_text("\n".join(lines))
    assert evaluate(*command, "--json", out) == 0
    assert json.loads(out.read_text())["metrics"] == written["metrics"]


def test_options_of_reading(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Opinion scores that are the scores of pixels as they are stored: PLCC is 1 where these are scored."""
    out, table = tmp_path / "e.json", tmp_path / "mos.csv"
    folder = tmp_path / "turned"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in sorted(rated.glob("*0.png")):
        with Image.open(path) as image:
            image.convert("RGB").resize((96, 64)).save(folder / f"{path.stem}.jpg", exif=exif)
    metric = pyiqa.create_metric(DEFAULT_METRIC, device="cpu")
    paths = sorted(folder.iterdir())
    stored = [metric(load_image(path, ignore_orientation=True)[None]).item() for path in paths]
    table.write_text("image,mos\n" + "".join(f"{p.name},{s}\n" for p, s in zip(paths, stored, strict=True)))
    command = ["--ratings", table, "--images", folder, "--json", out]
    for options, ignored, said in (((), False, "applied"), (("--ignore-orientation",), True, "ignored")):
        assert evaluate(*command, *options) == 0
        written = json.loads(out.read_text())
        assert (written["metrics"][DEFAULT_METRIC]["plcc"] == pytest.approx(1, abs=1e-6)) == ignored
        assert written["ignore_orientation"] is ignored and written["ignore_profile"] is False
        assert f"EXIF orientation: {said}" in capsys.readouterr().out
        assert evaluate("--degradations", folder, "--limit", 1, "--json", out, *options) == 0
        means = json.loads(out.read_text())["metrics"][DEFAULT_METRIC]["types"]["jpeg"]["means"]
        assert (means[0] == pytest.approx(stored[0], abs=1e-5)) == ignored
        assert f"EXIF orientation: {said}" in capsys.readouterr().out

    assert evaluate(*command, "--ignore-profile") == 0
    assert json.loads(out.read_text())["ignore_profile"] is True
    assert "ICC profiles: ignored, as in published figures" in capsys.readouterr().out
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[: len(data) * 3 // 4])
    assert evaluate(*command) == 1
    assert list(json.loads(out.read_text())["left_out"]) == [str(paths[0])]
    assert evaluate(*command, "--allow-truncated") == 0
    assert evaluate(*command, "--max-pixels", 100) == 1
    assert "could be scored; the first: " in capsys.readouterr().err.splitlines()[-1]
    for option in ("--max-pixels", "--decode-timeout"):
        assert evaluate(*command, option, -1) == 2
        assert f"{option[2:].replace('-', '_')} is -1" in capsys.readouterr().err


def test_a_metric_that_fails_for_one_image_keeps_the_others(
    rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky(torch.nn.Module):
        lower_better = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.mean() < 0.4:
                raise ValueError("too dark")
            return x.std()

    ratings = read_ratings(rated / "mos.csv", rated)
    mean = {path: float(load_image(path).mean()) for path in ratings.paths}
    assert 0 < sum(value < 0.4 for value in mean.values()) < 13
    piqe = pyiqa.create_metric("piqe", device="cpu")
    scores = score_images(Scorer({"piqe": piqe, "picky": Picky()}, device="cpu", workers=0), ratings.images)
    assert {path for path, value in mean.items() if value < 0.4} == {Path(path) for path in scores.errors}
    report = report_opinions(scores, ratings)
    assert (report.agreements["piqe"].n, report.agreements["picky"].n) == (16, 16 - len(scores.errors))
    kept = [k for k, path in enumerate(ratings.paths) if str(path) not in scores.errors]
    x, z = -scores.values["piqe"][kept], scores.values["picky"][kept]
    expected = compare(x, z, np.array(ratings.opinions)[kept])
    assert report.differences["piqe", "picky"] == expected


def test_nothing_that_can_be_scored_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(b"broken")
    (tmp_path / "mos.csv").write_text("image,mos\n" + "".join(f"{n}.png,{n}\n" for n in range(20)))
    for arguments, said in (
        (("--ratings", tmp_path / "mos.csv", "--images", folder), "none of 20 images could be scored; the first: "),
        (("--degradations", folder), "none of 20 photographs could be scored; the first: "),
        (
            ("--gmad", "qualiclip-mini", "piqe", folder),
            "0 of 20 images could be scored; a gMAD competition at 4 levels",
        ),
    ):
        assert evaluate(*arguments) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert said in last and ".png" in last, last


def test_direction_is_the_metrics_whatever_its_column_is_called(rated: Path, tmp_path: Path) -> None:
    piqe = pyiqa.create_metric("piqe", device="cpu")
    ratings = read_ratings(rated / "mos.csv", rated)
    found = {}
    for name in ("piqe", "my piqe", "niqe", "clipiqa"):
        scorer = Scorer({name: piqe}, device="cpu", workers=0)
        scores = score_images(scorer, ratings.paths)
        report = score_degraded(scorer, [ratings.paths[0]])
        found[name] = (
            report_opinions(scores, ratings).agreements[name],
            report.behaviours[name],
            [
                (d.better, d.worse)
                for d in gmad(
                    {"other": ratings.opinions, name: scores.values[name].tolist()},
                    {"other": False} | scores.lower_better,
                    levels=1,
                )
            ],
        )
    assert found["piqe"][0].srcc > 0.5 and found["piqe"][1]["jpeg"].in_order > 0.8
    assert all(each == found["piqe"] for each in found.values())


def test_repeated_ratings_are_averaged_and_intervals_are_by_image(
    rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each image rated three times, spelled in three ways, has the figures of its mean rating."""
    single = read_ratings(rated / "mos.csv", rated)
    once, thrice = ["image,mos,who"], ["image,mos,who"]
    for path, opinion in zip(single.paths, single.opinions, strict=True):
        once.append(f"{path.name},{opinion},")
        for spelled, offset, who in ((path.name, -3, "a"), (f"./{path.name}", 1, "b"), (str(path), 2, "c")):
            thrice.append(f"{spelled},{opinion + offset},{who}")
    numbers = {}
    for name, lines in (("once", once), ("thrice", thrice)):
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        out = tmp_path / f"{name}.json"
        command = ["--ratings", tmp_path / f"{name}.csv", "--images", rated, "-m", "piqe", "-m", "qualiclip-mini"]
        assert evaluate(*command, "--json", out, *(["--group", "who"] * (name == "thrice"))) == 0
        numbers[name] = json.loads(out.read_text())
    assert "48 rows of 16 images, whose opinion scores are averaged" in capsys.readouterr().out
    assert numbers["thrice"]["ratings"]["rows"] == 48 and numbers["thrice"]["ratings"]["images"] == 16
    for metric, each in numbers["thrice"]["metrics"].items():
        groups = each.pop("groups")
        assert each == numbers["once"]["metrics"][metric]
        assert {group["n"] for group in groups.values()} == {16}
        assert {group["srcc"] for group in groups.values()} == {each["srcc"]}  # offsets change no rank


def test_scores_of_a_table(
    rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "scores.csv", tmp_path / "e.json"
    metrics = ["-m", "qualiclip-mini", "-m", "piqe"]
    assert cli.main(["score", str(rated), *metrics, "-o", str(table), "--device", "cpu"]) == 0
    ratings = ["--ratings", rated / "mos.csv"]
    assert evaluate(*ratings, "--images", rated, *metrics, "--json", out) == 0
    expected = json.loads(out.read_text())["metrics"]
    meta = tmp_path / "scores.csv.meta.json"

    monkeypatch.setattr(Scorer, "__init__", lambda *_, **__: pytest.fail("a network is built"))
    capsys.readouterr()

    def from_table(*arguments: object) -> dict[str, Any]:
        assert cli.main(["evaluate", "--scores", str(table), *map(str, arguments), "--json", str(out)]) == 0
        return json.loads(out.read_text())

    for folder in ((), ("--images", rated)):
        written = from_table(*ratings, *folder)
        for name, each in written["metrics"].items():
            assert each["srcc"] == pytest.approx(expected[name]["srcc"]), name
            assert each["lower_better"] == (name == "piqe") and each["n"] == 16
        assert written["directions"] == f"as stated in the meta.json of {table}"
    assert list(from_table(*ratings, "-m", "piqe")["metrics"]) == ["piqe"]

    # Columns of other names keep their directions as long as their description is there.
    assert "EXIF orientation: applied" in capsys.readouterr().out and written["ignore_orientation"] is False
    table.write_text(table.read_text().replace("piqe", "my piqe", 1))
    meta.write_text(meta.read_text().replace('"piqe"', '"my piqe"'))
    assert from_table(*ratings)["metrics"]["my piqe"]["srcc"] == pytest.approx(expected["piqe"]["srcc"])
    meta.unlink()
    capsys.readouterr()
    written = from_table(*ratings)
    assert written["metrics"]["my piqe"]["srcc"] == pytest.approx(-expected["piqe"]["srcc"])
    assert "judging by column names, since no meta.json of" in capsys.readouterr().out
    assert written["ignore_orientation"] is None


def test_tables_of_scores_that_do_not_fit(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def table(*rows: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        path.write_text("path,width,height,piqe,niqe.a,niqe.b,error\n" + "\n".join(rows) + "\n")
        return path

    mos = tmp_path / "mos.csv"
    mos.write_text("image,mos\n" + "".join(f"{n}.png,{n}\n" for n in range(4)))
    rows = [f"in/{n}.png,64,64,{n * n},{n},{-n}," for n in range(4)]
    for arguments, message in (
        ((table(*rows[:3]),), "line 5: 3.png not found; expected an image in the table of scores"),
        ((table(*rows, "other/3.png,64,64,1,1,1,"),), "3.png may be in/3.png and other/3.png; add its folder"),
        ((table(*rows, "in/3.png,64,64,7,1,1,"),), "has two rows of in/3.png with different scores"),
        ((table(*rows), "-m", "piq"), "has no score 'piq'; did you mean 'piqe'?; its scores: piqe, niqe.a, niqe.b"),
        ((table(*rows), "--max-pixels", 7), "--max-pixels has no effect with --scores; leave it out"),
        ((table(*rows), "--workers", 0), "--workers has no effect with --scores; leave it out"),
        ((tmp_path / "none.csv",), "none.csv cannot be read"),
    ):
        assert cli.main(["evaluate", "--ratings", str(mos), "--scores", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    # Rows without a score are left out; a metric's name stands for all its columns.
    out = tmp_path / "e.json"
    wrong = table(*rows[:3], "in/3.png,,,,,,in/3.png is broken")
    arguments = ["--ratings", mos, "--scores", wrong, "-m", "niqe", "--json", out]
    assert cli.main(["evaluate", *map(str, arguments)]) == 1
    assert "1 of 4 images left out:\n  in/3.png is broken" in capsys.readouterr().err
    written = json.loads(out.read_text())
    assert {name: each["n"] for name, each in written["metrics"].items()} == {"niqe.a": 3, "niqe.b": 3}
    assert written["left_out"] == {"in/3.png": "in/3.png is broken"}


@pytest.mark.parametrize("rows", [None, [("only one",)], [("a.png", "good")], [(3, 4.0)]])
def test_rows_of_pyiqa_in_another_form_are_one_clear_error(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyiqas_layout(tmp_path, "spaq", "img_name,mos", ["0.png,1"])
    dataset = types.SimpleNamespace(**({} if rows is None else {"paths_mos": rows}))
    monkeypatch.setattr("pyiqa.data.build_dataset", lambda options: dataset)
    with pytest.raises(
        SettingsError, match=f"pyiqa {pyiqa.__version__} stores the rows of its data set spaq in an unknown"
    ):
        pyiqa_ratings("spaq", tmp_path)


def test_pickled_splits_of_pyiqa_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyiqas_layout(tmp_path, "spaq", "img_name,mos", ["0.png,1"])
    known = pyiqa.get_dataset_info()
    monkeypatch.setattr("pyiqa.get_dataset_info", lambda: {"spaq": known["spaq"] | {"split_file": "splits.pkl"}})
    with pytest.raises(SettingsError, match=r"has its splits in splits\.pkl, a pickle, which could run code"):
        pyiqa_ratings("spaq", tmp_path)


def test_a_missing_extra_is_one_line(
    rated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "kornia", None)
    for arguments in (("--ratings", rated / "mos.csv", "--images", rated), ("--degradations", rated)):
        assert evaluate(*arguments) == 2
        said = capsys.readouterr().err
        assert 'pip install "qualiclip-pyiqa[eval]"' in said and said.count("\n") == 1


# ---------------------------------------------------------------- plots

NAMES = ("cash$$7", r"a\frac{1}{2}_x", "_hidden", "国立 写真", "$x", "\U0001f4f7", "line\nbreak", "lat\udce9in")


def drawn_with(names: Sequence[str], tmp_path: Path) -> None:
    values = {name: np.linspace(0, 1, 6) for name in names}
    plots.scatter(tmp_path / "s.png", values, [1, 2, 3, 4, 5, 7], dict.fromkeys(names, "$n$ = 6"))
    ladders = {name: {"lens_blur": [5.0, 4, 3, 2, 1, 0]} for name in names}
    plots.levels(tmp_path / "l.pdf", ladders, {name: {"lens_blur": True} for name in names})
    photo = tmp_path / "国$立_$.png"
    Image.new("RGB", (40, 60), "red").save(photo)
    plots.duels(tmp_path / "d.svg", [plots.Pair(photo, photo, name, name) for name in names])


def test_names_are_drawn_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: set[str] = set()
    save = plots.save_figure

    def watched(figure: Any, path: Path) -> None:
        save(figure, path)
        found = figure.findobj(matplotlib.text.Text)
        assert not any(text.get_parse_math() or text.get_usetex() for text in found)
        texts.update(text.get_text() for text in found)

    monkeypatch.setattr(plots, "save_figure", watched)
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn_with(NAMES, tmp_path)
    assert {"cash$$7", r"a\frac{1}{2}_x", "_hidden", "$x"} <= texts
    assert {r"\U0001f4f7", r"line\nbreak", r"lat\xe9in"} <= texts
    known = set().union(*(points for _, points in figures._fonts()))
    assert ("国立 写真" in texts) == ({*map(ord, "国立写真")} <= known)
    assert any("\\u56fd$\\u7acb_$.png" in text or "国$立_$.png" in text for text in texts)


def test_plots_leave_pyplot_and_the_backend_alone(tmp_path: Path) -> None:
    code = f"""
import matplotlib, sys
from pathlib import Path
matplotlib.use("svg")
from qualiclip_pyiqa.evaluation import plots
from qualiclip_pyiqa.figures import check_figure
check_figure(Path("x.png"))
plots.scatter(Path({str(tmp_path / "p.png")!r}), {{"m": range(6)}}, range(6), {{"m": "note"}})
assert "matplotlib.pyplot" not in sys.modules
print(matplotlib.get_backend())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip().lower() == "svg" and (tmp_path / "p.png").stat().st_size > 1000


def test_plots_are_written_in_few_formats(tmp_path: Path) -> None:
    """matplotlib's own list has formats that need TeX, and raw pixels, which nothing opens."""
    for suffix in ("raw", "rgba", "pgf", "ps", "PGF", ""):
        path = tmp_path / f"p.{suffix}"
        for write in (figures.check_figure, lambda path: plots.scatter(path, {"m": range(6)}, range(6), {"m": ""})):
            with pytest.raises(SettingsError, match=r"expected a suffix of \.png, \.svg, \.pdf, \.jpg"):
                write(path)
    assert not list(tmp_path.iterdir())
    for suffix in figures.FORMATS:
        plots.scatter(tmp_path / f"p.{suffix}", {"m": range(6)}, range(6), {"m": ""})
        assert (tmp_path / f"p.{suffix}").stat().st_size > 1000


def test_a_plot_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, part: Path, **_: object) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match=r"p\.png cannot be written \(No space left on device\)"):
        plots.scatter(tmp_path / "p.png", {"m": range(6)}, range(6), {"m": ""})
    assert not list(tmp_path.iterdir())


def test_large_images_are_drawn_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = tmp_path / "large.png"
    Image.new("RGB", (2500, 700), (255, 128, 0)).save(photo)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.extend(a.images[0] for a in figure.axes))
    plots.duels(tmp_path / "p.png", [plots.Pair(photo, photo, "", "")])
    assert drawn[0].get_array().shape == (233, 833, 3)
    assert np.allclose(drawn[0].get_array()[0, 0], [1, 128 / 255, 0])
