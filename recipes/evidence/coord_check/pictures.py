"""The two pictures of docs/coordinate-checks.md.

python -m recipes.evidence.coord_check.pictures [--out docs/figures] [--smallest]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moe_param import Shape, coord_check
from recipes.evidence.coord_check.run import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--smallest", action="store_true", help="two factors, one seed: to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    _, config = tiny("mixtral")
    base = Shape(width=32, depth=2, num_experts=8, top_k=2, expert_size=32)
    factors, seeds = ((1, 2), 1) if args.smallest else ((1, 2, 4, 8), 3)
    for name, spec in (("good", "moe-completep"), ("bad", "standard")):
        result = coord_check(config, base, axis="width", factors=factors, spec=spec, steps=8, seeds=seeds, lr=2**-8)
        result.plot(args.out / f"coord_{name}.png")
        print(f"{spec}: {result.status}; wrote {args.out / f'coord_{name}.png'}")


if __name__ == "__main__":
    main()
