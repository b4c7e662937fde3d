"""Read CONTRIQUE's regressors, pickles of scikit-learn's Ridge, without executing any of them.

`pickletools.genops` splits a pickle into opcodes and arguments and runs nothing. A file is accepted only if each of
them is the one that scikit-learn 1.0 and NumPy 1 wrote for a Ridge on 4096 float32 features; only the numbers and the
version may differ. So there is no list of forbidden things to be complete: whatever is not expected is refused.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES = 4096
MAX_BYTES = 20_000  # the authors' files have 16,941
#: How such a pickle starts: protocol 3, and the class.
START = b"\x80\x03csklearn.linear_model._ridge\nRidge\n"


@dataclass(frozen=True)
class RidgePickle:
    """A linear regression: `features @ coefficients + intercept`.

    Attributes:
        coefficients: (4096,) float32.
        intercept: a float32 number.
        alpha: strength of the penalty that it was fitted with.
        sklearn_version: that wrote the file.
    """

    coefficients: NDArray[np.float32] = field(repr=False)
    intercept: float
    alpha: float
    sklearn_version: str


def read_ridge(content: bytes) -> RidgePickle:
    """Read a pickled Ridge on 4096 float32 features.

    Raises:
        ValueError: anything else, in one line.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has {len(content)} bytes; a pickled Ridge on {FEATURES} features has at most {MAX_BYTES}")
    found: dict[str, Any] = {}
    expected = iter(_OPCODES)
    end = 0
    for opcode, argument, position in _opcodes(content):
        step = next(expected, None)
        if step is None or opcode != step.opcode or not step.accepts(argument):
            raise ValueError(
                f"at byte {position} it has {opcode} {_shown(argument)}, expected "
                f"{'its end' if step is None else step}; only a pickled Ridge on {FEATURES} float32 features is read"
            )
        if step.name:
            found[step.name] = argument
        end = position + 1
    if next(expected, None) is not None or end != len(content):
        raise ValueError(f"{len(content) - end} bytes follow its end" if end != len(content) else "it is cut off")
    coefficients = np.frombuffer(found["coef_"], "<f4").astype(np.float32)
    (intercept,) = struct.unpack("<f", found["intercept_"])
    if not np.isfinite(coefficients).all() or not math.isfinite(intercept):
        raise ValueError("its coefficients or its intercept are not finite")
    return RidgePickle(coefficients, intercept, found["alpha"], found["_sklearn_version"])


def _opcodes(content: bytes) -> Iterator[tuple[str, Any, int]]:
    try:
        for opcode, argument, position in pickletools.genops(content):
            yield opcode.name, argument, position or 0
    except Exception as error:  # of pickletools, for bytes that are not a pickle: ValueError, IndexError and others
        raise ValueError("it is cut off or not a pickle") from error


def _shown(argument: object) -> str:
    if isinstance(argument, bytes | str) and len(argument) > 60:
        return f"of {len(argument)} {'bytes' if isinstance(argument, bytes) else 'characters'}"
    return "" if argument is None else repr(argument)


@dataclass(frozen=True)
class _Step:
    """An opcode that must come next.

    Attributes:
        opcode: its name.
        wanted: the argument that it must have, or a check of it.
        name: under which the argument is kept; empty for one that is not.
    """

    opcode: str
    wanted: object | Callable[[Any], bool]
    name: str = ""

    def accepts(self, argument: object) -> bool:
        if callable(self.wanted):
            return bool(self.wanted(argument))
        return type(argument) is type(self.wanted) and argument == self.wanted

    def __str__(self) -> str:
        wanted = "with another argument" if callable(self.wanted) else _shown(self.wanted)
        return f"{self.opcode} {wanted}".strip()


def _expected() -> list[_Step]:
    """List the opcodes of a pickled Ridge in order."""
    steps: list[_Step] = []
    kept = 0

    def add(opcode: str, wanted: object = None, name: str = "") -> None:
        steps.append(_Step(opcode, wanted, name))

    def keep() -> int:
        """The pickle numbers what it may refer to again, in order."""
        nonlocal kept
        add("BINPUT", kept)
        kept += 1
        return kept - 1

    def text(value: object, name: str = "") -> None:
        add("BINUNICODE", value, name)
        keep()

    def imported(what: str) -> None:
        add("GLOBAL", what)
        keep()

    def entry(key: str, opcode: str, wanted: object = None, name: str = "") -> None:
        text(key)
        add(opcode, wanted, name)

    def made(opcode: str) -> int:
        add(opcode)
        return keep()

    add("PROTO", 3)
    imported("sklearn.linear_model._ridge Ridge")
    add("EMPTY_TUPLE")
    made("NEWOBJ")
    made("EMPTY_DICT")
    add("MARK")
    entry("alpha", "BINFLOAT", _is_positive, "alpha")
    entry("fit_intercept", "NEWTRUE")
    entry("normalize", "BINUNICODE", "deprecated")
    keep()
    entry("copy_X", "NEWTRUE")
    entry("max_iter", "NONE")
    entry("tol", "BINFLOAT", _is_positive)
    entry("solver", "BINUNICODE", "auto")
    keep()
    entry("positive", "NEWFALSE")
    entry("random_state", "NONE")
    entry("n_features_in_", "BININT2", FEATURES)
    entry("_normalize", "NEWFALSE")
    # The coefficients: an empty array, then its state: shape, dtype, order and bytes.
    text("coef_")
    imported("numpy.core.multiarray _reconstruct")
    imported("numpy ndarray")
    add("BININT1", 0)
    made("TUPLE1")
    add("SHORT_BINBYTES", b"b")
    keep()
    made("TUPLE3")
    made("REDUCE")
    add("MARK")
    add("BININT1", 1)
    add("BININT2", FEATURES)
    made("TUPLE1")
    imported("numpy dtype")
    text("f4")
    add("NEWFALSE")
    add("NEWTRUE")
    made("TUPLE3")
    dtype = made("REDUCE")
    add("MARK")
    add("BININT1", 3)
    text("<")
    for _ in range(3):
        add("NONE")
    for value in (-1, -1):
        add("BININT", value)
    add("BININT1", 0)
    made("TUPLE")
    add("BUILD")
    add("NEWFALSE")
    add("BINBYTES", lambda data: len(data) == 4 * FEATURES, "coef_")
    keep()
    made("TUPLE")
    add("BUILD")
    entry("n_iter_", "NONE")
    text("intercept_")
    imported("numpy.core.multiarray scalar")
    add("BINGET", dtype)
    add("SHORT_BINBYTES", lambda data: len(data) == 4, "intercept_")
    keep()
    made("TUPLE2")
    made("REDUCE")
    text("_sklearn_version")
    text(lambda version: len(version) <= 20, "_sklearn_version")
    add("SETITEMS")
    add("BUILD")
    add("STOP")
    return steps


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


_OPCODES = tuple(_expected())
