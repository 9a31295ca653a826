"""docs/other.md says what `other` covers: it is compared with the models of the installed transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_param.structure.roles import read_structure
from recipes.evidence.other_roles import row
from tests.models import FAMILIES, classes, families, tiny_config

PAGE = (Path(__file__).parent.parent.parent / "docs" / "other.md").read_text()


@pytest.mark.parametrize("family", families(FAMILIES))
def test_the_page_says_what_other_covers(family: str) -> None:
    found = row(read_structure(classes(family)[0], tiny_config(family)).parameters)
    listed = [line for line in PAGE.splitlines() if line.startswith(f"| {family} |")]
    assert listed == ([f"| {family} | {' | '.join(found)} |"] if found else [])
