"""Guard: a family that appears in transformers and that nobody has looked at makes this fail, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from moe_param.structure.roles import read_structure
from tests.models import ALL_FAMILIES, FAMILIES, classes, families


def decorated() -> set[str]:
    """Families whose modeling file uses the experts interface (their folder's name)."""
    models = Path(transformers.__file__).parent / "models"
    return {f.parent.name for f in models.glob("*/modeling_*.py") if "@use_experts_implementation" in f.read_text()}


def test_no_family_is_unknown() -> None:
    known = {entry["module"].split(".")[-2] for entry in ALL_FAMILIES.values()}
    found = decorated()
    assert found, "transformers no longer decorates experts modules: moe_param finds experts by that decorator's marks"
    unknown = sorted(found - known)
    assert not unknown, (
        f"transformers {transformers.__version__} has families nobody has looked at: {unknown}. Add a tiny config for "
        "each to recipes/evidence/coord_check/families.json, run tests/structure/test_families.py, and add an entry to "
        "moe_param/structure/adapters.yaml where structure cannot tell."
    )


UNBUILDABLE = {
    # The default config of these families is not complete or not an MoE: there is no default model to read.
    **dict.fromkeys(("deepseek_ocr2", "deepseek_v2", "diffusion_gemma", "dots1", "glm4v_moe"), "sizes are missing"),
    **dict.fromkeys(("hunyuan_v1_moe", "lfm2_moe", "qwen3_omni_moe", "qwen4_exp"), "sizes are missing"),
    "gemma4": "experts are off by default",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", families(sorted(set(FAMILIES) - set(UNBUILDABLE))))
def test_every_parameter_has_a_role_at_the_default_size(family: str) -> None:
    """Billions of parameters, on fake tensors."""
    model_class, config_class = classes(family)
    structure = read_structure(model_class, config_class())
    assert {"embedding", "router", "expert_up", "expert_down"} <= {i.role for i in structure.parameters.values()}
    assert structure.shape.width >= 512
