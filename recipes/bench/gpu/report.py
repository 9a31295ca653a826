"""What a run leaves: report.md to read, report.json with every result, both written again after each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.bench.goals import collect, table
from recipes.bench.gpu.rows import describe
from recipes.bench.gpu.running import DONE, FAILED, LIMIT, Outcome, Run
from recipes.bench.gpu.steps import Step


def write(
    steps: Sequence[Step], outcomes: Sequence[Outcome], run: Run, setup: Mapping[str, Any], command: str
) -> tuple[dict[str, Any], str]:
    """Both files, and what is in them."""
    results = {step.name: read(run.result(step)) for step in steps}
    found = [one for result in results.values() for one in collect(result)]
    report = {
        "command": command,
        "smallest": run.smallest,
        **setup,
        "goals": found,
        "steps": [asdict(outcome) for outcome in outcomes],
        "results": results,
    }
    (run.folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    heading = "dry run, does not count" if run.smallest else "measured"
    text = markdown(steps, outcomes, run, setup, command, results, table(found, heading))
    (run.folder / "report.md").write_text(text, "utf-8")
    return report, text


def read(result: Path) -> dict[str, Any]:
    """What a step has written so far; nothing where a kill cut it short."""
    try:
        return json.loads(result.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def markdown(
    steps: Sequence[Step],
    outcomes: Sequence[Outcome],
    run: Run,
    setup: Mapping[str, Any],
    command: str,
    results: Mapping[str, dict[str, Any]],
    goals: str,
) -> str:
    machine = setup["machine"]
    parts = [f"# {machine['device'] or 'CPU'}, torch {machine['torch']}, transformers {machine['transformers']}"]
    parts.append(f"```\n{command}\n```")
    if run.smallest:
        parts.append("**A dry run: tiny sizes, kernels interpreted. It shows that everything runs; no number counts.**")
    parts += ["## Goals", goals, "## Steps", step_table(steps, outcomes), *reasons(outcomes)]
    for step in steps:
        if shown := describe(results[step.name].get("results", [])):
            parts.append(f"### {step.name}: {step.title}\n\n{shown}")
    parts += ["## Machine", facts(machine), "## Packages", *packages(setup)]
    return "\n\n".join(parts) + "\n"


def step_table(steps: Sequence[Step], outcomes: Sequence[Outcome]) -> str:
    title = {step.name: step.title for step in steps}
    lines = ["| step | what | became | seconds |", "|---|---|---|---|"]
    for outcome in outcomes:
        state = outcome.state if outcome.state in (DONE, FAILED, LIMIT) else f"{outcome.state}: {outcome.reason}"
        lines.append(f"| {outcome.step} | {title[outcome.step]} | {state} | {outcome.seconds:g} |")
    for step in steps[len(outcomes) :]:
        lines.append(f"| {step.name} | {step.title} | not there yet when this was written | |")
    return "\n".join(lines)


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """The end of what each failed step said."""
    failed = [outcome for outcome in outcomes if outcome.state in (FAILED, LIMIT)]
    return [f"{outcome.step} {outcome.state}:\n\n```\n{outcome.reason}\n```" for outcome in failed]


def facts(machine: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {'none' if value is None else value}" for name, value in machine.items())


def packages(setup: Mapping[str, Any]) -> list[str]:
    lines = ["| package | needed | here |", "|---|---|---|"]
    for name, found in setup["packages"].items():
        lines.append(f"| {name} | {found['needed']} | {found['here'] or 'none'} |")
    said = ["\n".join(lines)]
    if setup["installed"]:
        said.append("From the folder of wheels: " + ", ".join(setup["installed"].values()) + ".")
    if setup["lacking"]:
        said.append("Lacking: " + "; ".join(f"{name} ({why})" for name, why in setup["lacking"].items()) + ".")
    if setup["kernels"]:
        said.append(f"MegaBlocks' kernels: {setup['kernels']}")
    return said
