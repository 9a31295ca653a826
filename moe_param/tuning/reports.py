"""What tune.json and transfer.json hold, as pages to share: tune.html and transfer.html.

Pure functions of the plain records. A page is a table of sections; a section is a function of the record that gives
None where the record has nothing for it, so a new key needs a function and a line in the table.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_param.training.report import finite
from moe_param.tuning import costs as spending
from moe_param.tuning.drift import Bounds, draw, said
from moe_param.tuning.page import (
    Code,
    Details,
    Figure,
    Gallery,
    Note,
    Page,
    Part,
    Row,
    Section,
    TableOf,
    Verdict,
    command,
    table,
)
from moe_param.tuning.pictures import plot_descent, plot_pass, plot_rates, points_of
from moe_param.tuning.points import split, without_rate
from moe_param.tuning.results import TOLERANCE

Record = Mapping[str, Any]
Builder = Callable[[Record], Section | None]

WIDTH = 4.8  # inches: at this size a picture's letters can be read on a phone


# -- numbers as one reads them -----------------------------------------------------------------------------------------
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float) -> str:
    """2⁻⁶ where it is one, else 0.0685."""
    exponent = math.log2(value)
    if abs(exponent - round(exponent)) < 1e-6:
        return "2" + str(round(exponent)).translate(SUPERSCRIPT)
    return f"{value:.3g}"


def octaves(value: float) -> str:
    return f"2^{math.log2(value):.2f}".replace("-", "−")


def nats(loss: float | None) -> str:
    return "diverged" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} hours" if hours >= 1 else f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} s"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(parameters: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= factor:
            return f"{parameters / factor:.3g}{unit}"
    return f"{parameters:.0f}"


def constants_of(point: Mapping[str, float]) -> str:
    """init std 0.06, router.lr ×4; empty where all is the config's own."""
    names = {"init_std": "init std "}
    return ", ".join(
        f"{names.get(name, name + ' ×')}{value:.4g}" for name, value in point.items() if name != "learning_rate"
    )


def plain(value: Any) -> str:
    """Text of anything that a record may hold."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    words = {None: "–", True: "yes", False: "no"}
    return words.get(value, str(value))


def things(rows: Any, caption: str) -> TableOf | None:
    """A table of any list of flat mappings, or of one mapping: for what has no section of its own shape."""
    if isinstance(rows, Mapping):
        return table(("", "value"), [(label(name), plain(value)) for name, value in rows.items()], caption)
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, Mapping) for row in rows):
        return None
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table([label(n) for n in names], [[plain(row.get(n)) for n in names] for row in rows], caption)


def label(name: str) -> str:
    return str(name).replace("_", " ")


def sections(builders: Iterable[Builder], record: Record) -> tuple[Section, ...]:
    return tuple(section for builder in builders if (section := builder(record)) is not None)


def facts_of(record: Record) -> tuple[tuple[str, str], ...]:
    """Where and with what it ran."""
    known_facts = [
        (label(name), plain(record[name])) for name in ("started", "finished", "date", "hardware") if name in record
    ]
    took = [("last session", duration(record["seconds"]))] if record.get("seconds") else []
    return (*known_facts, *took, *((name, str(value)) for name, value in record.get("versions", {}).items()))


def canvas(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


# -- tune --------------------------------------------------------------------------------------------------------------
def tune_page(record: Record) -> Page:
    """Of what tune.json holds."""
    record = finite(json.loads(json.dumps(record)))  # as the file has it: no infinity, lists alone
    best = record["best"]
    rate, std, constants = split(best["best"])
    low, high = best["stable"]
    done, all_of = record.get("statuses", {}).get("complete", 0), len(record["trials"])
    stable = math.log2(high / low)
    verdicts = [
        Verdict(f"{best['loss']:.3f}", "best loss", f"nats per token, mean of {count(len(seeds_of(record)), 'seed')}"),
        Verdict(power(rate), "learning rate", f"{rate:.4g}"),
        Verdict(f"{std:.3g}" if std else "config's", "init std", constants_note(constants)),
        Verdict(f"{stable:.1f}", "as good, octaves", f"{low:.3g} to {high:.3g} lose at most {TOLERANCE:.0%}"),
    ]
    return Page(
        title=f"Tuned: {record.get('settings', {}).get('model', {}).get('model_type', 'a base')}",
        lead=f"{base_of(record)}. Best loss {best['loss']:.3f} nats at learning rate {power(rate)}"
        + (f" with {constants_of(best['best'])}" if constants_of(best["best"]) else "")
        + f"; {done} of {count(all_of, 'run')} complete{spent_note(record)}.",
        verdicts=tuple(verdicts),
        sections=sections(TUNE, record),
        facts=facts_of(record),
    )


def spent_note(record: Record) -> str:
    """Where hopeless runs were stopped: what was spent, in full runs."""
    return f", {record['full_runs']:.1f} full runs in all" if record.get("full_runs") else ""


def constants_note(constants: Mapping[str, Any] | None) -> str:
    changed = sum(len(kinds) for kinds in (constants or {}).values())
    return f"{count(changed, 'constant')} changed" if changed else "no constant changed"


def seeds_of(record: Record) -> Sequence[int]:
    seeds: Sequence[int] = record.get("settings", {}).get("seeds", [])
    return seeds


def base_of(record: Record) -> str:
    """The base has width 32, depth 2, 8 experts of size 32, 2 active."""
    shape = record.get("tuned_at", {})
    words = [f"{name} {shape[name]}" for name in ("width", "depth") if shape.get(name)]
    if shape.get("num_experts"):
        words.append(f"{shape['num_experts']} experts of size {shape.get('expert_size')}, {shape.get('top_k')} active")
    return "The base has " + ", ".join(words)


def tune_notes(record: Record) -> Section | None:
    notes = [
        Note(f"The best {label(name)} is at the end of its ladder: it may lie outside. Make the ladder longer.")
        for name in record["best"].get("at_edge", ())
    ]
    lost = {status: n for status, n in record.get("statuses", {}).items() if status not in ("complete", "stopped")}
    if lost:
        said = ", ".join(f"{n} {status}" for status, n in lost.items())
        notes.append(Note(f"Not every run has a loss: {said}. They are in the list of all runs."))
    return Section("To be careful about", "", tuple(notes)) if notes else None


def tune_rates(record: Record) -> Section | None:
    """Drawn where there is a line of at least three rates."""
    best = record["best"]
    lines = [without_rate(point) for point, _ in points_of(record)]
    if not any(lines.count(name) >= 3 for name in lines):
        return None
    figure, axes = canvas(3.3)
    plot_rates(axes, record)
    low, high = best["stable"]
    alt = (
        f"Validation loss against learning rate. The loss of the chosen point, {best['loss']:.3f} nats, is at "
        f"{power(best['best']['learning_rate'])}; between {octaves(low)} and {octaves(high)} it is at most "
        f"{TOLERANCE:.0%} higher."
    )
    caption = f"The star is the chosen point; in the shaded region the loss is within {TOLERANCE:.0%} of its."
    return Section("Loss against learning rate", "", (Figure(figure, alt, caption), *ladder_table(record)))


def ladder_table(record: Record) -> list[Part]:
    """The last ladder: what a rate above the chosen one costs."""
    best = record["best"]
    rungs = [(rung["rate"], [x for x in rung["losses"] if x is not None]) for rung in best.get("rungs", ())]
    if not rungs:
        return []
    rows = []
    for rate, losses in rungs:
        mean = statistics.fmean(losses) if losses else math.inf
        factor = rate / best["best"]["learning_rate"]
        worse = f"{mean / best['loss'] - 1:+.2%}" if math.isfinite(mean) and factor != 1 else ""
        cells = (f"×{factor:g}", power(rate), nats(mean), worse, str(len(losses)))
        rows.append(Row(cells, "best" if factor == 1 else ""))
    headings = ("of the chosen", "rate", "loss", "worse by", "seeds")
    return [TableOf(headings, tuple(rows), "How stable training is around the chosen rate (nats per token)")]


def tune_pass(record: Record) -> Section | None:
    judgements = record["best"].get("judgements")
    if not judgements:
        return None
    figure, axes = canvas(max(2.0, 0.22 * len(judgements) + 1.2))
    plot_pass(axes, record)
    low, high = axes.get_xlim()
    axes.set_xticks([x for x in (-1.0, -0.1, 0.0, 0.1, 1.0) if low <= x <= high])
    axes.set_xlabel("gain of each seed (nats)")
    axes.tick_params("y", labelsize=8)
    kept = [j for j in judgements if j["accepted"]]
    rows = [
        Row(
            (j["coordinate"], f"×{j['factor']:g}", gain_of(j), nats(j["needed"]), each(j["gains"])),
            "best" if j["accepted"] else "",
        )
        for j in judgements
    ]
    start, end = record["best"].get("start_loss"), record["best"]["loss"]
    began = f" The search began at {nats(start)}, ended at {end:.4f}." if start is not None else ""
    return Section(
        "What was judged over the seeds",
        f"A change is kept where its mean gain over the seeds exceeds what noise would give. "
        f"{len(kept)} of {count(len(judgements), 'change')} kept.{began}",
        (
            Figure(
                figure,
                f"Gain of each change, seed by seed; {len(kept)} exceed what they had to.",
                "Dots: seeds; long bar: their mean; red bar: what the mean had to exceed; green: kept; ×: diverged.",
            ),
            Details(
                "The numbers",
                (TableOf(("change", "", "gain", "needed", "each seed"), tuple(rows), "Gains in nats per token"),),
            ),
        ),
    )


def each(gains: Sequence[float | None]) -> str:
    return " ".join("–" if gain is None else f"{gain:+.3f}" for gain in gains)


def gain_of(judgement: Record) -> str:
    """Infinite gains are null in a file: the change diverged, or the point before it did."""
    if judgement["gain"] is not None:
        return f"{judgement['gain']:+.4f}"
    return "no longer diverges" if judgement["accepted"] else "diverged"


def tune_descent(record: Record) -> Section | None:
    """How the loss fell, and what each stage cost."""
    best = record["best"]
    if not best.get("moves"):
        return None
    figure, axes = canvas(2.8)
    plot_descent(axes, record)
    rows = [(stage, f"{runs:.1f}") for stage, runs in (best.get("spent_in") or {}).items()]
    return Section(
        "How the loss fell",
        "Runs that could not catch up with the best one were stopped, and count by the steps that they did.",
        (
            Figure(figure, f"Best loss of one run so far against runs spent; it ends at {best['loss']:.3f}.", ""),
            table(("stage", "full runs"), rows, "What each stage cost"),
        ),
    )


def tune_constants(record: Record) -> Section | None:
    """The constants per role, where there are any."""
    _, _, constants = split(record["best"]["best"])
    if not constants:
        return None
    rows = [
        (role, *(f"×{kinds[kind]:.4g}" if kind in kinds else "–" for kind in ("init", "lr")))
        for role, kinds in constants.items()
    ]
    return Section("Constants", "", (table(("role", "init", "learning rate"), rows, "What differs from 1"),))


def tune_trials(record: Record) -> Section | None:
    trials = record["trials"]
    if not trials:
        return None
    points = sorted(points_of(record), key=lambda found: statistics.fmean(found[1]))
    chosen = record["best"]["best"]  # not always the lowest loss of all: that may be noise
    lower = [point for point, losses in points if statistics.fmean(losses) < record["best"]["loss"]]
    note = "Marked is the point that was chosen: what is lower may be so by noise." if lower else ""
    best = [
        Row((nats(statistics.fmean(losses)), *numbers_of(point), " ".join(map(nats, losses))), mark(point, chosen))
        for point, losses in points[:10]
    ]
    everything = [
        Row(
            (
                *(str(trial["number"]), trial["status"], nats(trial["loss"]), *numbers_of(trial.get("point") or {})),
                *(
                    plain(trial.get("seed")),
                    f"{trial.get('share', 1):.0%}",
                    plain(trial.get("seconds")),
                    said_by(trial),
                ),
            ),
            "" if trial["status"] == "complete" else "failed",
        )
        for trial in trials
    ]
    numbers = ("loss", "learning rate", "rest")
    listed = TableOf(
        ("run", "status", *numbers, "seed", "done", "seconds", "what it said"),
        tuple(everything),
        "All runs, in the order they were started",
    )
    return Section(
        "The search",
        "",
        (
            *(() if record["best"].get("moves") else progress(trials)),
            TableOf(
                (*numbers, "each seed"), tuple(best), f"The {count(len(best), 'point')} of lowest loss (nats)", note
            ),
            Details(f"All {count(len(trials), 'run')}", (listed,)),
        ),
    )


def mark(point: Mapping[str, float], chosen: Mapping[str, float]) -> str:
    return "best" if point == chosen else ""


def numbers_of(point: Mapping[str, float]) -> tuple[str, str]:
    """Learning rate and the rest of a point."""
    rate = point.get("learning_rate")
    return power(rate) if rate else "–", constants_of(point) or "config's own"


def said_by(trial: Record) -> str:
    return str(trial.get("error") or trial.get("failure") or "")


def progress(trials: Sequence[Record]) -> list[Part]:
    """Every loss in the order of the trials, and the best so far."""
    done = [(t["number"], t["loss"]) for t in trials if t["status"] == "complete" and t["loss"] is not None]
    gone = [t["number"] for t in trials if t["status"] == "diverged"]
    if len(done) < 3:
        return []
    numbers, losses = zip(*done)
    best = [min(losses[: i + 1]) for i in range(len(losses))]
    top = min(max(losses), statistics.median(losses) + 3 * (statistics.median(losses) - min(losses)))
    figure, axes = canvas(2.6)
    axes.plot(numbers, [min(loss, top) for loss in losses], "o", color="C7", markersize=4, label="a run")
    axes.step(numbers, best, where="post", color="C0", label="best so far")
    if gone:
        axes.plot(gone, [top] * len(gone), "x", color="C3", label="diverged")
    axes.locator_params("x", integer=True)
    axes.set(xlabel="run", ylabel="validation loss", ylim=(None, top + 0.05 * (top - min(losses)) + 1e-9))
    axes.legend(fontsize="small")
    alt = f"Loss of each run in order; the best so far falls from {best[0]:.3f} to {best[-1]:.3f}."
    above = "Losses above the picture are drawn at its upper edge." if max(losses) > top else ""
    return [Figure(figure, alt, above)]


def tune_use(record: Record) -> Section | None:
    shape = record.get("tuned_at", {})
    grown = {name: 4 * shape[name] for name in ("width", "expert_size") if shape.get(name)}
    sizes = ",".join(f"{name}={value}" for name, value in grown.items()) or "width=…"
    python = (
        "import moe_param\n\n"
        'p = moe_param.apply(model, "tuned.yaml", seed=0)   # the larger model, built from its config\n'
        "optimizer = p.optimizer(model)"
    )
    return Section(
        "How to use it",
        "tuned.yaml beside this page is a config for training and a base to apply. A larger model with these numbers, "
        "here four times as wide:",
        (
            command(f"moe-param train tuned.yaml --shape {sizes} --output_dir runs/wide"),
            Details(
                "In a script of one's own, or to see first that they transfer",
                (
                    Code(python, "Python"),
                    command("moe-param transfer tuned.yaml --axes width=4 depth=4 --output_dir runs/transfer"),
                ),
            ),
        ),
    )


def tune_made(record: Record) -> Section | None:
    settings = record.get("settings", {})
    training = settings.get("training", {})
    rows = [(label(name), plain(value)) for name, value in training.items() if value is not None]
    rows += [(label(name), plain(value)) for name, value in settings.get("data", {}).items() if value is not None]
    steps, batch, block = (training.get(name) for name in ("steps", "batch_size", "seq_len"))
    tokens = f", {steps * batch * block:,} tokens" if steps and batch and block else ""
    spec = settings.get("spec", {})
    asked = {
        "search": settings.get("mode"),
        "seeds": seeds_of(record),
        "parameterization": spec.get("name") if isinstance(spec, Mapping) else spec,
        "storage": record.get("storage"),
        "study": record.get("study"),
    }
    rows = [(name, plain(value)) for name, value in asked.items() if value is not None] + rows
    rows += [(f"base {label(name)}", plain(value)) for name, value in record.get("tuned_at", {}).items()]
    return Section(
        "How it was made",
        f"A run trains the base for {plain(steps)} steps{tokens} with a seed; a point is worth the mean of its "
        "held-out losses over the seeds. The command:",
        (
            command(record["command"]),
            Details("Settings", (table(("setting", "value"), rows, "What every run has in common"),)),
        ),
    )


TUNE: tuple[Builder, ...] = (
    tune_notes,
    tune_descent,
    tune_rates,
    tune_constants,
    tune_pass,
    tune_trials,
    tune_use,
    tune_made,
)


# -- transfer ----------------------------------------------------------------------------------------------------------
def transfer_page(record: Record) -> Page:
    """Of what transfer.json holds."""
    record = finite(json.loads(json.dumps(record)))
    spec, bounds = specs_of(record)[0], bounds_of(record)
    rows = [row for row in record["summary"] if row["spec"] == spec]
    held = [row["target"] for row in rows if said(row["transferred"]) == "yes"]
    drifts = [row for row in rows if row["drift_octaves"] is not None]
    regrets = [row for row in rows if row["regret"] is not None]
    worst_drift = max(drifts, key=lambda row: abs(row["drift_octaves"]), default=None)
    worst = max(regrets, key=lambda row: row["regret"], default=None)
    rate = record["learning_rate"]
    verdicts = [
        Verdict(f"{len(held)} of {len(rows)}", "targets hold", f"under {spec}"),
        Verdict(drift_of(worst_drift, False), "largest drift, octaves", worst_drift["target"] if worst_drift else ""),
        Verdict(f"{worst['regret']:.2%}" if worst else "–", "largest regret", worst["target"] if worst else ""),
        Verdict(power(rate), "the base's rate", f"{rate:.4g}"),
    ]
    lead = (
        f"The base's numbers, kept, at {count(len(rows), 'larger model')}: under {spec} the best learning rate stays "
        f"within {bounds.drift:g} octaves, at no more than {bounds.regret:.2%} of the loss, on "
        + ("all of them." if len(held) == len(rows) else f"{len(held)} of them." if held else "none of them.")
    )
    return Page(
        title="Do the numbers transfer?",
        lead=lead,
        verdicts=tuple(verdicts),
        sections=sections(TRANSFER, record),
        facts=facts_of(record),
    )


def specs_of(record: Record) -> list[str]:
    """In the order of the summary, the file's own first."""
    return list(dict.fromkeys(row["spec"] for row in record["summary"]))


def bounds_of(record: Record) -> Bounds:
    """What counted as transferred; files of version 0.1 do not say."""
    return Bounds(**record["bounds"]) if "bounds" in record else Bounds()


def drift_of(row: Record | None, interval: bool = True) -> str:
    if row is None or row["drift_octaves"] is None:
        return "–"
    half = f" ± {row['drift_interval']:.2f}" if interval and row.get("drift_interval") is not None else ""
    return f"{row['drift_octaves']:+.2f}{half}".replace("-", "−")


def transfer_drift(record: Record) -> Section | None:
    rows = sorted(record["summary"], key=lambda row: row["target"])
    edge = any(row["at_edge"] for row in rows)
    cells = [
        Row(
            (
                row["target"],
                row["spec"],
                drift_of(row) + (" *" if row["at_edge"] else ""),
                regret_of(row),
                nats(row["best_loss"]),
                said(row["transferred"]),
            )
        )
        for row in rows
    ]
    best: dict[str, tuple[float, int]] = {}  # per target, the lowest loss
    for i, row in enumerate(rows):
        if row["best_loss"] is not None and row["best_loss"] < best.get(row["target"], (math.inf, 0))[0]:
            best[row["target"]] = (row["best_loss"], i)
    several, bounds = len(specs_of(record)) > 1, bounds_of(record)
    marked = {i for _, i in best.values()} if several else set()
    cells = [replace(row, mark="best" if i in marked else "") for i, row in enumerate(cells)]
    notes = [
        Note(f"{row['target']} under {row['spec']}: {row['why']}.")
        for row in rows
        if said(row["transferred"]) == "undecided"
    ]
    note = (
        f"Holds: both intervals within {bounds.drift:g} octaves of drift and {bounds.regret:.2%} of regret."
        + (" Marked best: the lowest loss at a target, each with its own best rate." if several else "")
        + (" * an optimum at the end of the ladder: it may lie outside." if edge else "")
    )
    return Section(
        "How far the best rate moved",
        "Drift is how far the best learning rate moved from the base to the target, in octaves, with its 95% interval "
        "over the seeds; regret is what keeping the base's rate costs, as a share of the loss.",
        (
            *notes,
            forest(rows, bounds),
            TableOf(
                ("target", "parameterization", "drift", "regret", "best loss", "holds"),
                tuple(cells),
                "From the base to each target",
                note,
            ),
        ),
    )


def regret_of(row: Record) -> str:
    if row["regret"] is None:
        return "∞"
    _, high = row.get("regret_interval") or (None, None)
    return f"{row['regret']:.2%}" + (f" (at most {high:.2%})" if high is not None else "")


def forest(rows: Sequence[Record], bounds: Bounds) -> Figure:
    """Each drift with its interval, on a scale that very wide ones leave."""
    figure, axes = canvas(max(2.0, 0.34 * len(rows) + 0.9))
    specs = list(dict.fromkeys(row["spec"] for row in rows))
    reach = min(
        3.0, max([1.0, *(abs(row["drift_octaves"] or 0) + (row["drift_interval"] or 0) for row in rows)]) * 1.05
    )
    for i, row in enumerate(rows):
        colour = f"C{specs.index(row['spec'])}"
        if row["drift_octaves"] is None:
            axes.plot(0, i, "x", color=colour)
            continue
        axes.errorbar(row["drift_octaves"], i, xerr=row["drift_interval"], fmt="o", color=colour, capsize=3, ms=5)
    axes.axvspan(-bounds.drift, bounds.drift, color="tab:green", alpha=0.15)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['target']}\n{row['spec']}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("drift (octaves, 95% interval)")
    alt = "Drift of the best learning rate: " + "; ".join(
        f"{row['target']} under {row['spec']} {drift_of(row)}" for row in rows
    )
    return Figure(
        figure, alt, f"Shaded: within {bounds.drift:g} octaves of the base's. Wide intervals leave the picture."
    )


def transfer_curves(record: Record) -> Section | None:
    rows = [complete(row, record) for row in record["summary"]]
    targets = list(dict.fromkeys(row["target"] for row in rows))

    def picture(target: str) -> Figure:
        of_target = [row for row in rows if row["target"] == target]
        found = ", ".join(f"under {row['spec']} {drift_of(row)}, regret {row['regret']:.2%}" for row in of_target)
        figure = draw(of_target, record["learning_rate"])
        return Figure(figure, f"Loss against learning rate at the base and at {target}: {found}.")

    pictures = tuple(picture(target) for target in targets)
    losses = tuple(losses_at(record, target) for target in targets)
    return Section(
        "Loss against learning rate",
        "Means over the seeds with their standard deviations; the dotted lines are the best rates.",
        (Gallery(pictures), Details("The losses", losses)),
    )


def complete(row: Record, record: Record) -> dict[str, Any]:
    """A row of the file with infinity where that has null; in version 0.1 all ladders had the same rungs."""

    def number(value: Any) -> Any:
        return math.inf if value is None else value

    return {
        "octaves": dict.fromkeys(("base", "target"), record["settings"]["octaves"]),
        **row,
        "losses": {name: [number(loss) for loss in losses] for name, losses in row["losses"].items()},
        "optimum": {name: math.nan if at is None else at for name, at in row["optimum"].items()},
        "drift_octaves": math.nan if row["drift_octaves"] is None else row["drift_octaves"],
        "regret": number(row["regret"]),
    }


def losses_at(record: Record, target: str) -> TableOf:
    """A line for each rung; base and target under each parameterization."""
    rows = [complete(row, record) for row in record["summary"] if row["target"] == target]
    ladders = [(dict(zip(row["octaves"][at], row["losses"][at]))) for row in rows for at in ("base", "target")]
    headings = ["learning rate", *(f"{row['spec']}, {where}" for row in rows for where in ("base", "target"))]
    lines = [
        [
            power(record["learning_rate"] * 2.0**octave),
            *(nats(_null(ladder[octave])) if octave in ladder else "" for ladder in ladders),
        ]
        for octave in sorted({octave for ladder in ladders for octave in ladder})
    ]
    return table(headings, lines, f"{target}: validation loss (nats per token)")


def _null(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def transfer_costs(record: Record) -> Section | None:
    """Loss at the target against FLOPs, for each target that was searched."""
    if not record.get("costs"):
        return None
    parts: list[Part] = []
    for costs in record["costs"]:
        told = "; ".join(f"{way['name']}: {nats(way['loss'])}, {flops(way['total'])} FLOPs" for way in costs["ways"])
        parts.append(Figure(spending.draw([costs]), f"Loss at {costs['target']} against FLOPs. {told}."))
        lines = [
            (way["name"], plain(way["runs"]), flops(way["finding"]), flops(way["total"]), nats(way["loss"]))
            for way in costs["ways"]
        ]
        headings = ["way", "runs", "FLOPs to find the numbers", "FLOPs in all", "loss"]
        parts.append(table(headings, lines, f"{costs['target']}: what each way costs"))
        if paper := costs["computed_at_paper_scale"]:
            parts.append(
                Note(
                    "Computed, not run: with as many runs at the paper's sizes (38M active base, 2.5B target) finding "
                    f"the numbers at the base costs {paper['share_finding']:.1%} of the search, "
                    f"{paper['share_total']:.1%} with the target's run."
                )
            )
    return Section(
        "What it costs",
        "The runs of the base and one of the target, against a search at the target: the median over all orders in "
        "which its grid can be gone through, 10% to 90% of them shaded. The best run of a search is the model.",
        tuple(parts),
    )


def flops(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.2e}"


def transfer_sizes(record: Record) -> Section | None:
    active = record.get("active_parameters", {})
    if not active:
        return None
    base = active.get("base")
    rows = [(name, size(n), f"×{n / base:.1f}" if base else "–") for name, n in active.items()]
    return Section("The models", "", (table(("model", "active parameters", "of the base"), rows, "Sizes"),))


def transfer_use(record: Record) -> Section | None:
    config = record["settings"].get("config", "tuned.yaml")
    return Section(
        "How to use it",
        "A larger model, its sizes in place of the dots, takes the base's numbers from the same file:",
        (command(f"moe-param train {config} --shape width=…,expert_size=… --output_dir runs/large"),),
    )


def transfer_made(record: Record) -> Section | None:
    settings = record["settings"]
    rows = [(label(name), plain(value)) for name, value in settings.items()]
    shared = ", ".join(record.get("base_runs_shared", ()))
    runs, tokens = len(record.get("runs", {})), record.get("tokens")
    text = f"{count(runs, 'run')} of {tokens:,} tokens each" if tokens else count(runs, "run")
    text += f", {duration(record['training_seconds'])} of training." if record.get("training_seconds") else "."
    text += f" At the base {shared} is the same training as the first, which was run once." if shared else ""
    parts: list[Part] = [
        command(record["command"]),
        Details("Settings", (table(("setting", "value"), rows, "Settings"),)),
    ]
    if runs:
        listed = [(name, nats(loss)) for name, loss in record["runs"].items()]
        shown = table(("parameterization / target / octave / seed", "loss"), listed, "Every run (nats per token)")
        parts.append(Details(f"All {count(runs, 'run')}", (shown,)))
    return Section("How it was made", text + " The command:", tuple(parts))


TRANSFER: tuple[Builder, ...] = (
    transfer_drift,
    transfer_curves,
    transfer_costs,
    transfer_sizes,
    transfer_use,
    transfer_made,
)
