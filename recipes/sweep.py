"""Moved into the package: `moe-param tune`. Kept so that an old command says so, and goes on."""

from __future__ import annotations

import sys

from moe_param.cli.main import run

if __name__ == "__main__":
    print("recipes.sweep is now `moe-param tune` (it writes tuned.yaml, tune.json and tune.png)", file=sys.stderr)
    run("tune", sys.argv[1:])
