"""Builds MegaBlocks' extension and grouped_gemm for the GPU that is here: `python -m recipes.bench.gpu.build`.

By `patches.install`, from the sources among the wheels into the private folder: pip finds both in the environment.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from patches import install
from recipes.bench.report import bench_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON and the compilers' words go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only what would be done")
    parser.add_argument("--smallest", action="store_true", help="noted in the report")
    arguments = parser.parse_args(argv)
    dry = arguments.device == "cpu"
    level = ["--level", "triton", "--dry-run"] if dry else ["--level", "cuda"]
    start = time.perf_counter()
    try:
        code = install.main([*level, "--logs", str(arguments.out.with_suffix(".logs"))])
    finally:  # a step that fails leaves by SystemExit
        seconds = round(time.perf_counter() - start, 1)
        results = [{"name": "build", "dry": dry, "seconds": seconds}]
        bench_report("recipes.bench.gpu.build", argv, arguments.smallest, results, arguments.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
