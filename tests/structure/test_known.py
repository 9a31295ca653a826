"""A family that nobody has looked at is named once, with the measurement that settles it."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

import moe_param
from moe_param.structure import adapters, known
from tests.models import AHEAD, DENSE, FAMILIES, build, classes, tiny_config
from tests.own_models import ListConfig, ListLM

OWN = ListConfig(hidden_size=24, num_attention_heads=2, head_dim=12, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_said", set())


def lines(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "nobody has looked" in str(w.message)]


def test_the_shipped_list_is_that_of_the_tests() -> None:
    """And the version that of requirements-tested.txt."""
    found = [classes(name) for name in (*FAMILIES, *DENSE, *AHEAD["without_interface"])]
    tested = {config.model_type for model, config in found if model.__module__.startswith("transformers.")}
    listed, newest = known.looked_at()
    missing = sorted(tested - listed)
    assert not missing, f"add to moe_param/structure/known.yaml: {missing}"
    if transformers.__version__.startswith(str(newest)):
        assert len(listed - tested) == len(AHEAD["newer"])  # of a later transformers
    requirements = Path(__file__).parents[2] / "requirements-tested.txt"
    versions = re.findall(r"^transformers==(\S+)", requirements.read_text(), re.MULTILINE)
    assert max(map(Version, versions)).release[:2] == newest.release[:2]


def test_an_unknown_family_is_named_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            moe_param.apply(ListLM(OWN), OWN, seed=1)
    assert len(lines(caught)) == 1
    assert re.search(r"looked at own_list yet:.*moe-param coord-check CONFIG --base .*--axis width", lines(caught)[0])
    assert caught[-1].filename == __file__, "it points at the call of apply"


def test_nothing_is_said_of_a_known_family_or_of_one_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})
    moe_param.register_adapter("own_list", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("mixtral", "llama"):
            monkeypatch.setattr(transformers, "__version__", str(known.looked_at()[1]))
            moe_param.apply(build(name), tiny_config(name), seed=1)
        moe_param.apply(ListLM(OWN), OWN, seed=1)


def test_a_newer_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.99.0.dev0")
    with pytest.warns(UserWarning, match=r"looked at mixtral in transformers 5\.99\.0\.dev0 yet.*coord-check"):
        moe_param.apply(build("mixtral"), tiny_config("mixtral"), seed=1)


def test_a_failed_apply_has_said_nothing() -> None:
    with pytest.raises(moe_param.MoeParamError):
        moe_param.apply(ListLM(OWN), OWN, spec="no such table")
    assert not known._said


def test_explain_says_it_too(tmp_path: Path) -> None:
    """Of a family that the list lacks: one of transformers' own, struck from it."""
    script = (
        "import sys; from moe_param.structure import known; listed, newest = known.looked_at();"
        "known.looked_at = lambda: (listed - {'mixtral'}, newest);"
        f"from moe_param.cli.explain import main; main([{str(tmp_path)!r}, '--base', 'width=32'])"
    )
    tiny_config("mixtral").save_pretrained(tmp_path)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "nobody has looked at mixtral yet" in found.stderr and "nobody" not in found.stdout
