"""Pickled regressions of CONTRIQUE are read as data, and nothing else is."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from pathlib import Path

import by_rule
import contrastive_files as files
import pytest
import torch

from qualiclip_pyiqa.errors import WeightsError
from qualiclip_pyiqa.pretrained.contrastive import load_regression

GOLDEN = by_rule.golden("contrique")


def test_the_pickle_of_the_tests_is_the_authors_own_but_for_its_numbers() -> None:
    expected = GOLDEN["pickle"]
    content = files.pickled_ridge(files.rule_regression(), 50.0)
    found = list(pickletools.genops(content))
    assert [opcode.name for opcode, _, _ in found] == expected["opcodes"]
    assert len(content) == expected["bytes"]
    start = expected["coef_offset"]
    assert content[start : start + 4 * 4096] == files.rule_regression().numpy().astype("<f4").tobytes()
    assert content[expected["intercept_offset"] :][:4] == struct.pack("<f", 50.0)


@pytest.mark.parametrize("name", GOLDEN["pickle"]["files"])
def test_intercepts_of_the_authors_regressions(name: str, tmp_path: Path) -> None:
    """In full-reference mode an image compared with itself has no difference, and its score is the intercept."""
    expected = GOLDEN["pickle"]["files"][name]
    (intercept,) = struct.unpack("<f", bytes.fromhex(expected["intercept_float32_hex"]))
    file = tmp_path / "mine.save"
    file.write_bytes(files.pickled_ridge(files.rule_regression(), intercept, alpha=expected["alpha"]))
    found = load_regression(file)
    assert found.intercept == expected["intercept"]
    assert torch.equal(found.coefficients, files.rule_regression())
    stem = name.removesuffix(".save")
    itself = float(torch.zeros(4096) @ found.coefficients) + found.intercept
    assert itself == GOLDEN["of_an_image_with_itself"].get(stem, found.intercept)


def hostile() -> dict[str, bytes]:
    good = files.pickled_ridge(files.rule_regression(), 50.0)
    whole, half = good[:-1], len(good) // 2
    infinite = files.rule_regression().clone()
    infinite[7] = float("inf")
    return {
        "another class": good.replace(b"_ridge\nRidge\n", b"_ridge\nRidgeCV\n"),
        "another function": good.replace(b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nfromstring\n"),
        "code before the regression": good[:37] + b"cos\nsystem\n(X\x04\x00\x00\x00truetR0" + good[37:],
        "code after the regression": whole + b"cos\nsystem\n(X\x04\x00\x00\x00truetR0.",
        "another memo": good.replace(b"q\x05", b"q\x06", 1),
        "an attribute more": whole[:-1] + b"}b.",
        "bytes after its end": good + b"\x80\x03N.",
        "cut off": good[:half],
        "too long": good + bytes(9000),
        "fewer features": files.pickled_ridge(files.rule_regression()[:512], 50.0),
        "infinite coefficient": files.pickled_ridge(infinite, 50.0),
        "infinite intercept": files.pickled_ridge(files.rule_regression(), float("inf")),
        "negative alpha": files.pickled_ridge(files.rule_regression(), 50.0, alpha=-1.0),
    }


@pytest.mark.parametrize("kind", hostile())
def test_any_other_pickle_is_refused_in_one_line_and_not_executed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def executed(*_: object, **__: object) -> None:
        raise AssertionError("executed")

    for module, name in ((os, "system"), (pickle, "loads"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, executed)
    file = tmp_path / "mine.save"
    content = hostile()[kind]
    assert content != files.pickled_ridge(files.rule_regression(), 50.0)
    file.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load_regression(file)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message and "refused without executing any of it" in message


def test_files_under_the_authors_names_must_be_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUALICLIP_PYIQA_VERIFY", raising=False)
    file = tmp_path / "Koniq.save"
    file.write_bytes(files.pickled_ridge(files.rule_regression(), 50.0))
    with pytest.raises(WeightsError, match=GOLDEN["pickle"]["files"]["Koniq.save"]["sha256"]):
        load_regression(file)
