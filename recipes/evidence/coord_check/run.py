"""Coordinate checks of every mixture-of-experts family in transformers, or with --dense of dense ones, at tiny size.

    python -m recipes.evidence.coord_check.run --out recipes/evidence/coord_check/results
    python -m recipes.evidence.coord_check.run --dense --out recipes/evidence/coord_check/results/dense

Every family × its axes (width, depth, num_experts, expert_size) × {moe-completep, standard}: what passes, what standard
parameterization does on the same row, and what is refused and why. Interrupt it at any time; it resumes. Results are
families.json (everything) and families.md (one row per family).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

from moe_param.ledger import append, fingerprint, read_finished
from moe_param.structure.shape import AXES

SPECS = ("moe-completep", "standard")
FAMILIES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "families.json").read_text())
DENSE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "dense_families.json").read_text())


def tiny(family: str) -> tuple[Any, Any]:
    """(model class, tiny config) of a family."""
    entry = (FAMILIES | DENSE)[family]
    module = importlib.import_module(entry["module"])
    config_class = getattr(transformers, entry["config_class"], None) or getattr(module, entry["config_class"])
    return getattr(module, entry["model_class"]), config_class(**entry["tiny_config"])


def proportional(config: Any) -> Any:
    """The config without leading dense layers: their number stays while depth grows, so that what they add fades."""
    values = config.to_dict()
    for key in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if key in values:
            values[key] = 0
    if values.get("mlp_only_layers"):
        values["mlp_only_layers"] = []
    if "mlp_layer_types" in values:
        values["mlp_layer_types"] = ["sparse" if kind == "dense" else kind for kind in values["mlp_layer_types"]]
    return type(config).from_dict(values)


def check_family(family: str, factors: tuple[int, ...], steps: int, seeds: int, limit: int) -> dict[str, Any]:
    """All axes and specs of one family: {"axis/spec": {"passed", "slopes", "reasons"} or {"refused": why}}."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    from moe_param import Shape
    from moe_param.checks.coordinates import coord_check
    from moe_param.structure.shape import measure
    from moe_param.structure.trace import trace_model

    model_class, config = tiny(family)
    base: Shape = measure(*trace_model(model_class, config))
    found: dict[str, Any] = {}
    started = time.monotonic()
    for axis in base.axes:
        for spec in SPECS:
            left = limit - (time.monotonic() - started)
            try:
                with _deadline(left):
                    result = coord_check(
                        proportional(config) if axis == "depth" else copy.deepcopy(config),
                        base,
                        axis=axis,
                        factors=factors,
                        spec=spec,
                        steps=steps,
                        seeds=seeds,
                        lr=2**-9,
                        model_class=model_class,
                    )
            except TimeoutError:
                found[f"{axis}/{spec}"] = {"refused": f"not finished within {limit} s for the family"}
                continue
            except Exception as error:  # whatever a family raises belongs in its row
                found[f"{axis}/{spec}"] = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
                continue
            found[f"{axis}/{spec}"] = {
                "passed": result.passed,
                "status": result.status,
                "slopes": {q: round(s.value, 3) for q, s in result.slopes["change"].items()},
                "reasons": {q: v.reason for q, v in result.verdicts.items() if not v.passed},
            }
    return {"family": family, "seconds": round(time.monotonic() - started, 1), "checks": found}


class _deadline:
    """Raises TimeoutError in the main thread of this process after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def expired(*_: Any) -> None:
            raise TimeoutError

        if self.seconds <= 0:
            raise TimeoutError
        signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """One row per family: our verdict / standard's verdict per axis, and what is refused."""
    axes = [axis for axis in AXES if f"{axis}/{SPECS[0]}" in rows[0]["checks"]]
    lines = [
        "# Coordinate checks of all families",
        "",
        f"`{command}`; transformers {transformers.__version__}, torch {torch.__version__}.",
        "",
        "Per axis: `moe-completep` / `standard`. ok: passes; the quantity that moves most and its exponent otherwise;",
        "–: refused, with the reason below.",
        "",
        "| family | " + " | ".join(axes) + " |",
        "|---|" + "---|" * len(axes),
    ]
    notes = []
    for row in rows:
        cells = []
        for axis in axes:
            ours, theirs = (_cell(row["checks"][f"{axis}/{spec}"]) for spec in SPECS)
            cells.append(f"{ours} / {theirs}")
            refused = row["checks"][f"{axis}/{SPECS[0]}"].get("refused")
            if refused:
                notes.append(f"- {row['family']}, {axis}: {refused}")
        lines.append(f"| {row['family']} | " + " | ".join(cells) + " |")
    totals = ["passes"]
    for axis in axes:
        counts = [sum(bool(r["checks"][f"{axis}/{spec}"].get("passed")) for r in rows) for spec in SPECS]
        totals.append(f"{counts[0]} / {counts[1]} of {len(rows)}")
    lines.append("| **" + "** | **".join(totals) + "** |")
    if notes:
        lines += ["", "Refused:", "", *notes]
    return "\n".join(lines) + "\n"


def _cell(check: dict[str, Any]) -> str:
    if "refused" in check:
        return "–"
    if check["passed"]:
        return "ok"
    worst = max(check["reasons"], key=lambda q: abs(check["slopes"][q]))
    return f"{worst.replace('_', ' ')} {check['slopes'][worst]:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/coord_check"))
    parser.add_argument("--dense", action="store_true", help="families without experts")
    parser.add_argument("--families", nargs="*", help="default: all of them")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=int, default=300, help="seconds per family")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    known = DENSE if args.dense else FAMILIES
    args.families = args.families or sorted(known)
    unknown = sorted(set(args.families) - set(known))
    if unknown:
        parser.error(f"unknown families {unknown} (known: {', '.join(sorted(known))})")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = (tuple(args.factors), args.steps, args.seeds, args.limit)
    made_with = fingerprint({"settings": settings, "text": "stdlib", "transformers": transformers.__version__})
    log = args.out / "finished.jsonl"
    done = {row["family"]: row for row in read_finished(log) if row.get("made_with") == made_with}
    todo = [family for family in args.families if family not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        futures = [pool.submit(check_family, family, *settings) for family in todo]
        for future in track(as_completed(futures), total=len(futures), description="families"):
            row = {**future.result(), "made_with": made_with}
            done[row["family"]] = row
            append(log, row)
    rows = [done[family] for family in sorted(args.families)]
    command = (
        f"python -m recipes.evidence.coord_check.run {'--dense ' * args.dense}"
        f"--factors {' '.join(map(str, args.factors))} --steps {args.steps} --seeds {args.seeds}"
    )
    (args.out / "families.md").write_text(markdown(rows, command))
    result = {"command": command, "transformers": transformers.__version__, "torch": torch.__version__, "rows": rows}
    (args.out / "families.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out / 'families.md'}")


if __name__ == "__main__":
    main()
