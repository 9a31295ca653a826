"""What a transfer found, as a table, pictures and a file.

`transfer.json` holds:

- command, settings (as asked; the targets by name), bounds, learning_rate (the file's: octave 0), tokens (of one run),
  active_parameters (of the base and every target), base_runs_shared (specs that are the first one at the base, which
  was run once), training_seconds, seconds, hardware, versions.
- runs: key → held-out loss, null where it diverged. Keys are `spec/target/octave/seed`, and those of a search
  `search/spec/target/constants or plain/init std/octave/seed`; a run that two ladders have in common is there once.
- summary: a list, one for each spec and target.
    - spec, target; octaves, losses, spread (means and standard deviations over the seeds, rung by rung), optimum: each
      with the keys base and target.
    - drift_octaves, drift_interval (half of the 95% interval; null for one seed), drift_of_seeds, drift_by_shape (the
      part of the interval that is not the seeds').
    - regret, regret_interval ([low, high] or null), regret_of_seeds; best_loss; at_edge (base, target).
    - transferred ("yes", "no", "undecided"), why.
- costs: a list, one for each target that was searched.
    - target; flops_of_a_run (base, target); base_runs (full runs of the base, null where not known),
      base_runs_source; transferred (seed → the target's loss with the file's numbers).
    - ways: a list, transfer first, each with name, runs, finding (FLOPs), total (FLOPs, with the run that is kept),
      loss. A search has besides: spec, constants, seeds, octaves, init_stds, best (octave, init_std), at_edge,
      loss_of_seeds, so_far (quantile → lowest loss after 1, 2, … runs in random order), gain (of transfer over it,
      relative), gain_interval (half; null for one seed), runs_to_transferred (runs after which the median search has
      the transferred loss; null: never).
    - computed_at_paper_scale (null where a count is not known; nothing of it was run): active_parameters, tokens, runs,
      finding and total (base, search: FLOPs), share_finding, share_total.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from moe_param.training.report import finite
from moe_param.tuning import costs as spending
from moe_param.tuning.costs import Costs
from moe_param.tuning.drift import Bounds, Row, Status, draw
from moe_param.tuning.page import write as write_page
from moe_param.tuning.reports import transfer_page

WIDTH = 110
"""Of the tables as text."""


@dataclass(frozen=True)
class TransferReport:
    """Whether the numbers of a base hold at its targets, and what the other ways to numbers cost.

    rows: one for each parameterization and target. costs: one for each target that was searched. learning_rate: the
    file's. facts: what else goes into transfer.json, see `moe_param.tuning.transfer_report`.
    """

    rows: tuple[Row, ...]
    costs: tuple[Costs, ...]
    bounds: Bounds
    learning_rate: float
    facts: Mapping[str, Any]

    @property
    def verdicts(self) -> dict[tuple[str, str], Status]:
        """(spec, target) → yes, no or undecided."""
        return {(row.spec, row.target): row.transferred for row in self.rows}

    def to_dict(self) -> dict[str, Any]:
        """What transfer.json holds: plain values, null for what is not finite."""
        summary = [row_values(row) for row in self.rows]
        found: dict[str, Any] = finite(
            {
                **self.facts,
                "bounds": vars(self.bounds),
                "learning_rate": self.learning_rate,
                "summary": summary,
                "costs": [costs.to_dict() for costs in self.costs],
            }
        )
        return found

    def write(self, folder: str | Path) -> None:
        """transfer.json, transfer.png, transfer.html and, where something was searched, costs.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "transfer.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")
        draw([row_values(row) for row in self.rows], self.learning_rate).savefig(folder / "transfer.png", dpi=120)
        if self.costs:
            spending.draw([costs.to_dict() for costs in self.costs]).savefig(folder / "costs.png", dpi=120)
        write_page(folder / "transfer.html", transfer_page(self.to_dict()))

    def __rich__(self) -> Group:
        return Group(table(self.rows, self.bounds), *map(spending.table, self.costs))

    def __str__(self) -> str:
        console = Console(width=WIDTH, file=io.StringIO(), record=True)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def row_values(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    regret = row.regret
    return {
        "spec": row.spec,
        "target": row.target,
        **{name: dict(getattr(row, name)) for name in ("octaves", "losses", "spread", "optimum")},
        "drift_octaves": row.drift.octaves,
        "drift_interval": row.drift.half,
        "drift_of_seeds": list(row.drift.of_seeds),
        "drift_by_shape": row.drift.shape,
        "regret": regret.mean,
        "regret_interval": None if regret.low is None else [regret.low, regret.high],
        "regret_of_seeds": list(regret.of_seeds),
        "best_loss": row.best_loss,
        "at_edge": list(row.at_edge),
        "transferred": row.transferred,
        "why": row.why,
    }


COLOURS = {"yes": "green", "no": "red", "undecided": "yellow"}


def table(rows: Sequence[Row], bounds: Bounds) -> Table:
    """A line for each target and spec; what is not yes is explained below."""
    found = Table(
        title="Best learning rate: drift from base to target (octaves, 95% interval), regret of keeping the base's",
        caption="\n".join(_notes(rows, bounds)),
        caption_justify="left",
    )
    found.add_column("target", overflow="fold")
    for heading in ("spec", "drift", "regret", "best loss", "transfers"):
        found.add_column(heading, no_wrap=True)
    for row in sorted(rows, key=lambda row: row.target):
        half, high = row.drift.half, row.regret.high
        found.add_row(
            row.target,
            row.spec,
            f"{row.drift.octaves:+.2f}{'' if half is None else f' ± {half:.2f}'}{' *' if row.at_edge else ''}",
            f"{row.regret.mean:.2%}{'' if high is None else f' (≤ {high:.2%})'}",
            f"{row.best_loss:.4f}",
            f"[{COLOURS[row.transferred]}]{row.transferred}[/]",
        )
    return found


def _notes(rows: Sequence[Row], bounds: Bounds) -> list[str]:
    """Below the table: the bounds, and why."""
    edge = "; * a best rate at the end of its ladder" if any(row.at_edge for row in rows) else ""
    notes = [f"transfers: both intervals within drift ≤ {bounds.drift:g} and regret ≤ {bounds.regret:.2%}{edge}"]
    return notes + [
        f"{row.target}, {row.spec}: {row.transferred}, {row.why}." for row in rows if row.transferred != "yes"
    ]
