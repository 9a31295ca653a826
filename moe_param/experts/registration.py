"""Puts "megablocks" into transformers' table of experts implementations, whichever of the two is imported first.

`import moe_param` must not import transformers (it takes seconds), and transformers has no entry points. So the one
module that holds the table is watched for: when it has been imported, by whomever, the implementation is added.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLE = "transformers.integrations.moe"
NAME = "megablocks"


def register_experts() -> None:
    """Now, if transformers' table is there, otherwise as soon as it is."""
    module = sys.modules.get(TABLE)
    if hasattr(module, "ALL_EXPERTS_FUNCTIONS"):
        _register(module)  # type: ignore[arg-type]
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register(module: ModuleType) -> None:
    from moe_param.experts.megablocks import (
        megablocks_experts_forward,  # needs torch, which the table's module has loaded
    )

    module.ALL_EXPERTS_FUNCTIONS.register(NAME, megablocks_experts_forward)


class _Watch:
    """A finder that lets the others find the module, and adds one step to what its loader does."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module  # the loader is this module's own: nobody else sees the change

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
