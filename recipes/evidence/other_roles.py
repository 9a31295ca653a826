"""What the role `other` covers, family by family: the parameters for which there is a rule but no theory.

    python -m recipes.evidence.other_roles > docs/other.md

Matrices that are neither attention, experts, router nor MLP (mixers, convolutions, hyper-connections) take the fan-in
rule, vectors of the same modules (sinks, decays, learned scales) keep their rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import transformers

from moe_param.structure.roles import Info, read_structure
from recipes.evidence.coord_check.run import FAMILIES, tiny

HEADER = """# What `other` covers

Written by `python -m recipes.evidence.other_roles > docs/other.md`; [families.md](families.md) explains roles.
Families that are not listed have no such parameters. *Closing* matrices end a residual branch (`other_out`).

| family | matrices | closing matrices | vectors |
|---|---|---|---|"""


def row(parameters: Mapping[str, Info]) -> tuple[str, str, str] | None:
    """Names inside a layer (or whole ones) of a family's `other` parameters: matrices, closing ones, vectors."""
    kinds: dict[str, dict[str, None]] = {"matrices": {}, "closing": {}, "vectors": {}}
    for info in parameters.values():
        if info.role in ("other", "other_out"):
            kind = "vectors" if info.fan_in is None else "closing" if info.role == "other_out" else "matrices"
            kinds[kind][f"`{info.relative.removesuffix('.weight')}`"] = None
    matrices, closing, vectors = (", ".join(sorted(names)) for names in kinds.values())
    return (matrices, closing, vectors) if matrices or closing or vectors else None


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    print(HEADER)
    for family in sorted(FAMILIES):
        found = row(read_structure(*tiny(family)).parameters)
        if found is not None:
            print(f"| {family} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
