"""Moved into the package: `moe-param transfer`. Kept so that an old command says so, and goes on."""

from __future__ import annotations

import sys

from moe_param.cli.main import run

if __name__ == "__main__":
    print("recipes.transfer is now `moe-param transfer` (the config is its first argument)", file=sys.stderr)
    run("transfer", sys.argv[1:])
