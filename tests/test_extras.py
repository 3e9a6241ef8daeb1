"""What is said where a package of an extra is missing, and that the extras are pyproject's."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from moebound.errors import BackendUnavailable
from moebound.extras import PACKAGES, check, need

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_package_is_named_with_the_command(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, extra = PACKAGES[module]
    said = rf"^this needs {package}: pip install '\.\[{extra}\]'"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailable, match=said):
        need(module, "this")
    with pytest.raises(BackendUnavailable, match=said):
        check("this", module)


def test_what_is_there_is_imported_and_no_more_is_said() -> None:
    check("this", "numpy")
    assert need("numpy.linalg", "this") is sys.modules["numpy.linalg"]


@pytest.mark.parametrize("module", PACKAGES)
def test_the_extra_has_the_package_and_the_product_does_not_need_it(module: str) -> None:
    package, extra = PACKAGES[module]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=;\s]", requirement)[0] for requirement in requirements}

    assert package in names(PROJECT["project"]["optional-dependencies"][extra])
    assert package not in names(PROJECT["project"]["dependencies"])
