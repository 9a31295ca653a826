"""The tables of the evidence, in Markdown, from what the studies wrote: python -m recipes.evidence.transfer.tables"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.evidence.transfer.run import HERE, JOINT, STUDIES

Record = Mapping[str, Any]


def records(study: str, results: Path) -> dict[str, Record]:
    """base → what a study wrote, of those that are done."""
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted((results / study).glob("*.json"))}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def target_of(name: str) -> str:
    """As a reader knows it."""
    return "all four ×2" if name == JOINT else name.replace("num_experts=", "experts ×").replace("=", " ×")


def at_the_tuned_rate(row: Record, model: str) -> float:
    """Mean loss of base or target at the rate of the file."""
    return float(row["losses"][model][row["octaves"][model].index(0.0)])


def ladders(study: str, results: Path) -> str:
    """Drift, regret and losses of every target under every parameterization."""
    rows = []
    for base, record in records(study, results).items():
        for row in record["summary"]:
            half = "" if row["drift_interval"] is None else f" ± {row['drift_interval']:.2f}"
            kept, best, at_base = at_the_tuned_rate(row, "target"), row["best_loss"], at_the_tuned_rate(row, "base")
            rows.append(
                (
                    *(base, target_of(row["target"]), Path(row["spec"]).stem, f"{row['drift_octaves']:+.2f}{half}"),
                    *(f"{kept:.3f}", f"{best:.3f}", f"{kept / best - 1:.2%}", f"{at_base:.3f}"),
                )
            )
    headings = ("base", "target", "spec", "drift (octaves)", "tuned rate", "best rate", "worse by", "base, tuned rate")
    return table(headings, rows)


def searches(study: str, results: Path) -> str:
    """What each way to numbers cost and came to."""
    rows = []
    for base, record in records(study, results).items():
        for costs in record["costs"]:
            for way in costs["ways"]:
                gain = "" if way.get("gain") is None else f"{way['gain']:+.1%}"
                rows.append(
                    (
                        *(base, target_of(costs["target"]), way["name"], f"{way['runs']:.3g}"),
                        *(f"{way['total']:.2e}", f"{way['loss']:.3f}", gain),
                    )
                )
    return table(
        ("base", "target", "numbers", "runs to find them", "FLOPs in all", "loss", "transferred is lower by"), rows
    )


def bases(results: Path) -> str:
    """What the searches of the bases found."""
    rows = []
    for base, record in records("tune", results).items():
        point = dict(record["best"]["best"])
        rate, std = math.log2(point.pop("learning_rate")), point.pop("init_std")
        constants = " ".join(f"{name} ×{value:g}" for name, value in point.items())
        loss = record["best"]["loss"]
        rows.append(
            (base, f"2^{rate:g}", f"{std:.3g}", constants or "none", f"{loss:.3f}", f"{record['full_runs']:.0f}")
        )
    return table(("base", "rate", "init std", "constants", "loss", "full runs"), rows)


def horizons(results: Path) -> str:
    """The exponent of each base."""
    rows = []
    for base, record in records("horizon", results).items():
        half = record["exponent_interval"]
        interval = "" if half is None else f" ± {half:.2f}"
        regrets = " ".join(f"×{longer}: {value:.2%}" for longer, value in record["regret_of_the_base_s_rate"].items())
        rows.append((base, f"{record['exponent']:+.2f}{interval}", regrets))
    return table(("base", "exponent", "regret of the base's rate at so many times its steps"), rows)


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    results = parser.parse_args().results
    print(f"Bases\n\n{bases(results)}\n\nHorizon\n\n{horizons(results)}")
    for study, options in STUDIES.items():
        shown = searches if options.options["search"] != ["none"] else ladders
        print(f"\n{study}\n\n{shown(study, results)}")


if __name__ == "__main__":
    main()
