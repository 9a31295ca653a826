"""A step for tests of `recipes.bench.gpu`: `python -m tests.recipes.gpu_step --out FILE --device cpu WHAT`.

Each start is a line in FILE's .starts; one that hangs has a child that hangs too, in FILE's .child.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from recipes.bench.goals import held
from recipes.bench.gpu.steps import NOT_BUILT_STATUS, Step


def step(name: str, what: str, **options: object) -> Step:
    return Step(name, f"a step that {what}", "tests.recipes.gpu_step", (what,), **options)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("what", choices=("works", "fails", "hangs", "is not built"))
    arguments = parser.parse_args()
    rows = [{"name": "part", "goals": [held("eager", 1.25, where="one"), held("eager", 2.5, where="another")]}]
    arguments.out.write_text(json.dumps({"results": rows}))
    child = None
    if arguments.what == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        arguments.out.with_suffix(".child").write_text(str(child.pid))
    with arguments.out.with_suffix(".starts").open("a") as starts:
        starts.write("start\n")
    print("at work", flush=True)
    if arguments.what == "is not built":
        sys.exit(NOT_BUILT_STATUS)
    if arguments.what == "fails":
        raise RuntimeError("no kernel image")
    if child:
        time.sleep(600)


if __name__ == "__main__":
    main()
