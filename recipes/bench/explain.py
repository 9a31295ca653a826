"""What `moe-param base` and `moe-param explain` need for models of published size: seconds of one core, and memory.

    python -m recipes.bench.explain --out recipes/bench/results/explain.json

For each config in recipes/configs/published: a base is suggested, and the config explained from it. Each is a fresh
process with one thread. Seconds are the CPU time of the process, the least over the rounds, so that a busy machine does
not count; what importing transformers' model class alone takes is measured beside it, and is part of both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = "What moe-param base and explain need for models of published size."
PUBLISHED = Path(__file__).parents[1] / "configs" / "published"
SECONDS, MEMORY = 5.0, 1.5 * 2**30
"""Goals for `explain`: CPU seconds, and bytes at the peak."""

IMPORT = """
import sys
from moe_param.tuned import read_tuned
from moe_param.structure.trace import model_class_for
model_class_for(read_tuned(sys.argv[1]).target)
"""


@dataclass(frozen=True)
class Cost:
    """One process. cpu, wall: seconds. memory: bytes at the peak (ru_maxrss)."""

    cpu: float
    wall: float
    memory: int


def measure(*arguments: str | Path) -> tuple[Cost, int, str, str]:
    """Runs Python with these arguments on one thread: (what it needed, exit status, stdout, stderr)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=out, stderr=err, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it is waited for already
        cost = Cost(used.ru_utime + used.ru_stime, time.perf_counter() - start, used.ru_maxrss * 1024)
        for stream in (out, err):
            stream.seek(0)
        return cost, process.returncode, out.read(), err.read()


def least(costs: Sequence[Cost]) -> dict[str, Any]:
    """The cheapest round, as numbers to print."""
    best = min(costs, key=lambda cost: cost.cpu)
    rounded = {name: round(value, 2) for name, value in asdict(best).items() if name != "memory"}
    return {**rounded, "memory_gib": round(max(cost.memory for cost in costs) / 2**30, 3)}


def bench_config(path: Path, rounds: int) -> dict[str, Any]:
    """One config: passed is None where it is refused, with the reason."""
    command = ("-m", "moe_param.cli.main")
    result: dict[str, Any] = {"name": path.stem, "target": {"cpu": SECONDS, "memory_gib": MEMORY / 2**30}}
    bases, explained, imports = [], [], []
    for _ in range(rounds):
        imports.append(measure("-c", IMPORT, path)[0])
        cost, status, out, err = measure(*command, "base", path, "--json")
        if status:
            return {**result, "passed": None, "refused": err.strip().splitlines()[-1]}
        bases.append(cost)
        suggestion = json.loads(out)
        shape = suggestion["bases"][suggestion["best"]]["shape"]
        base = ",".join(f"{size}={value}" for size, value in shape.items() if size != "head_dim")
        cost, status, _, err = measure(*command, "explain", path, "--base", base)
        if status:
            raise SystemExit(f"{path.name} was given a base that explain refuses: {err}")
        explained.append(cost)
    result |= {
        "base": base,
        "import": least(imports),
        "moe-param base": least(bases),
        "moe-param explain": least(explained),
    }
    result["ours"] = round(result["moe-param explain"]["cpu"] - result["import"]["cpu"], 2)  # of explain's seconds
    result["passed"] = min(c.cpu for c in explained) <= SECONDS and max(c.memory for c in explained) <= MEMORY
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.explain", description=DESCRIPTION)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--only", nargs="+", help="names of configs; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smallest", action="store_true", help="the smallest config, one round: does it run at all")
    arguments = parser.parse_args(argv)
    wanted = ["olmoe-1b-7b"] if arguments.smallest else arguments.only
    # This process stays small until all is measured: ru_maxrss of a child includes what its parent had.
    results = []
    for path in sorted(PUBLISHED.glob("*.yaml")):
        if wanted and path.stem not in wanted:
            continue
        result = bench_config(path, 1 if arguments.smallest else arguments.rounds)
        results.append(result)
        print(path.stem, result.get("moe-param explain", result.get("refused")), result.get("ours", ""), flush=True)
    from recipes.bench.report import bench_report  # imports torch

    return bench_report("recipes.bench.explain", argv, arguments.smallest, results, arguments.out)


if __name__ == "__main__":
    main()
