"""Do the numbers that `moe-param tune` finds hold at larger models, and what is each rule worth?

    python -m recipes.evidence.transfer.run tune axes search

Studies are named by what they answer, see `STUDIES`. Each tunes its bases by the command's defaults, or takes the ones
that are there, and trains targets as `moe-param transfer` does. Interrupted, the same command goes on; a study that is
done costs nothing. What every run gave goes into results/STUDY/BASE.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from moe_param import transfer, tune
from moe_param.errors import MoeParamError
from recipes.evidence.transfer.bases import ALPHAS, BASES, MUON, STEPS, VARIANTS, config_of

HERE = Path(__file__).parent
JOINT = "width=2,depth=2,num_experts=2,expert_size=2"
CONSTANT_ROUTER = "recipes/evidence/transfer/constant-router.yaml"
SIZED = {"width": (0.5, 2), "depth": (0.5, 2), "num_experts": (2,), "expert_size": (0.5, 2)}
"""Half the experts of a base with 2 of 8 is 1 of 4, whose normalized gate is 1 whatever the router says."""


@dataclass(frozen=True)
class Study:
    """A question, and the call of `moe_param.transfer` that answers it for each base."""

    bases: tuple[str, ...]
    axes: tuple[str, ...]
    options: dict[str, Any]


SEARCH: dict[str, Any] = {
    **{"specs": ["moe-completep"], "octaves": [-2.0, -1.0, 0.0, 1.0], "seeds": [0], "extend": 1},
    **{"search": ["standard"], "init_stds": [0.03, 0.06, 0.12]},
}

STUDIES = {
    "axes": Study(
        BASES,
        ("width=4", "depth=4", "num_experts=4", "expert_size=4", JOINT),
        {"specs": ["moe-completep"], "octaves": [-1.0, -0.5, 0.0, 0.5, 1.0], "search": ["none"]},
    ),
    "search": Study(BASES[:3], ("width=4",), SEARCH | {"search_at": ["width=4"]}),
    "joint": Study(BASES[:1], (JOINT,), SEARCH | {"search_at": [JOINT]}),
    "specs": Study(
        BASES[:1],
        ("width=4",),
        {"specs": ["mup-moe", "kakao", "standard"], "octaves": [-1.0, 0.0, 1.0], "search": ["none"]},
    ),
    "specs_depth": Study(
        BASES[:1],
        ("depth=4",),
        {"specs": ["mup-moe", "standard"], "octaves": [-1.0, 0.0, 1.0], "search": ["none"]},
    ),
    "expert_size": Study(
        (*BASES[:3], *(f"{name}-stdlib" for name in ALPHAS)),
        ("expert_size=4", "expert_size=16"),
        {"specs": ["moe-completep", "completep"], "octaves": [-1.0, 0.0, 1.0], "search": ["none"], "extend": 0},
    ),
    "tables": Study(
        BASES[:1],
        ("width=4", "depth=4", "num_experts=4", "expert_size=4", JOINT),
        {"specs": ["mssp"], "octaves": [-1.0, 0.0, 1.0], "search": ["none"], "extend": 0},
    ),
    "epsilons": Study(
        BASES[:1],
        ("width=4", "depth=4", "num_experts=4", "expert_size=4", JOINT),
        {"specs": ["moe-completep", "table2", "mssp"], "octaves": [-1.0, 0.0, 1.0, 2.0], "search": ["none"]}
        | {"seeds": [0, 1], "extend": 1, "training": {"adam_epsilon": 1e-3}},
    ),
    "muon": Study(
        (f"{MUON}-stdlib",),
        ("width=4", JOINT),
        {"specs": ["moe-completep"], "octaves": [-1.0, 0.0, 1.0], "search": ["none"]},
    ),
    "router": Study(
        BASES[:1],
        ("width=8",),
        {"specs": ["moe-completep", CONSTANT_ROUTER], "octaves": [-1.0, 0.0, 1.0]} | {"search": ["none"], "extend": 0},
    ),
    "base_size": Study(
        BASES[:1],
        (*(f"{axis}={factor}" for axis, factors in SIZED.items() for factor in factors), JOINT),
        {"specs": ["moe-completep"], "octaves": [-2.0, -1.0, 0.0, 1.0], "search": ["none"], "extend": 1},
    ),
}
"""axes: how far the best rate moves, and what keeping the base's costs. search, joint: against `standard`, searched
at full size over rate and init std, with and without the base's constants. specs, specs_depth: where the rivals fail;
kakao has no rule for depth. expert_size: the paper's mean-field init of expert down against fan-in (`completep`).
router: its rate at 1/width against a constant one. base_size: where the best rate lies at smaller and larger bases, and
what it costs at one joint target. tables, epsilons: arXiv:2605.14200's rules and the paper's epsilons, the second at an
epsilon as large as gradients. muon: as axes, with Muon for the matrices."""

SMALLEST: dict[str, Any] = {"budget": 20, "seeds": (0,)}


def tuned_file(base: str, runs: Path, smallest: bool) -> Path:
    """tuned.yaml of a base, which is tuned now where it is not yet."""
    folder = runs / base / "base"
    file = folder / "tuned.yaml"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(config_of(base, 3 if smallest else STEPS)), "utf-8")
        tune(config, output_dir=folder, **(SMALLEST if smallest else {}))
    return file


def answer(name: str, base: str, args: argparse.Namespace, console: Console) -> None:
    """One study of one base."""
    study, file = STUDIES[name], tuned_file(base, args.runs, args.smallest)
    options = {**study.options, "smallest": args.smallest, "workers": args.workers}
    if args.smallest:
        options |= {"search": ["none"]}
    report = transfer(
        file,
        study.axes[:1] if args.smallest else study.axes,
        output_dir=args.runs / base / name,
        command=shlex.join(["python", "-m", "recipes.evidence.transfer.run", name, "--bases", base]),
        console=console,
        **options,
    )
    console.print(report)
    record = json.loads((args.runs / base / name / "transfer.json").read_text())
    write(args.out / name / f"{base}.json", record)


def keep_base(base: str, args: argparse.Namespace) -> None:
    """What the search of a base found, beside the studies."""
    record = json.loads((tuned_file(base, args.runs, args.smallest).parent / "tune.json").read_text())
    kept = ("command", "full_runs", "best", "steps", "tokens", "seconds", "hardware", "versions")
    write(args.out / "tune" / f"{base}.json", {name: record[name] for name in kept})


def write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def arguments(description: str | None, bases: Sequence[str]) -> argparse.ArgumentParser:
    """What every script here can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(bases), choices=[*BASES, *VARIANTS])
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="where searches and runs are kept")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0: one per core")
    parser.add_argument("--smallest", action="store_true", help="a few steps; proves nothing")
    return parser


def main() -> None:
    """The studies that were named, one base after the other."""
    parser = arguments(__doc__, BASES)
    parser.add_argument("studies", nargs="+", choices=["tune", *STUDIES])
    args, console = parser.parse_args(), Console()
    for base in args.bases:
        for name in args.studies:
            if name == "tune":
                keep_base(base, args)
            elif base in STUDIES[name].bases:
                answer(name, base, args, console)


if __name__ == "__main__":
    try:
        main()
    except MoeParamError as error:
        sys.exit(f"error: {error}")
