"""Coordinate check: do activations move by the same amount at every scale?

Trains the same architecture for a few steps at several sizes along one axis and fits, for every kind of activation,
the exponent with which its size at initialization and its change by training grow with that axis. Under a sound
parameterization changes neither grow nor vanish (Yang et al., arXiv:2203.03466, Appendix D.1; the quantities that
arXiv:2601.20205 asks to be Θ(1): Section 3.3, Desiderata 1-3).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moe_param.applying import plan
from moe_param.checks.measure import Run, measure
from moe_param.checks.verdicts import Slope, Status, Verdict, fit, judge, overall
from moe_param.checks.watch import QUANTITIES
from moe_param.corpus import byte_windows, stdlib_files
from moe_param.errors import MoeParamError
from moe_param.ledger import append, read_finished
from moe_param.naming import check_known, nearest
from moe_param.optim.adam import ADAM_ROLES, adam_class, matrix_numbers
from moe_param.scaling.spec import DEFAULT_SPEC, ScalingSpec
from moe_param.structure.scaling_config import scale_config
from moe_param.structure.shape import AXES, Shape, ShapeError
from moe_param.structure.trace import model_class_for

ROWS, LENGTH = 8, 64
"""Of the default batch: sequences, and ids in each."""


class CoordCheckError(MoeParamError):
    """A check that cannot be run: an unknown axis, too few factors, a factor at which sizes do not divide."""


@dataclass
class CoordCheck:
    """The result of `coord_check`.

    records: one per (factor, seed), as `moe_param.checks.measure.measure` returns it.
    """

    axis: str
    factors: tuple[float, ...]
    spec: str
    base_shape: Shape
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def slopes(self) -> dict[str, dict[str, Slope]]:
        """{"init" | "change": {quantity: Slope}}; changes after the last step."""
        return {
            "init": {q: fit((r["seed"], r["factor"], r["init"].get(q)) for r in self.records) for q in self.quantities},
            "change": {
                q: fit((r["seed"], r["factor"], r["change"][-1].get(q)) for r in self.records) for q in self.quantities
            },
        }

    @property
    def quantities(self) -> tuple[str, ...]:
        """The watched quantities this model has."""
        return tuple(q for q in QUANTITIES if self.records and q in self.records[0]["init"])

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Per quantity, judged by its change after the last step.

        Values at initialization are not judged: initial logits and initial expert outputs are meant to fall with size
        (their learned part is what stays), which makes them the known false alarms of coordinate checks.
        """
        diverged = sorted({r["factor"] for r in self.records if not all(map(math.isfinite, r["loss"]))})
        if diverged:
            return dict.fromkeys(self.quantities, Verdict("failed", f"training diverged at factor {diverged}"))
        return {quantity: judge(quantity, found, self.axis) for quantity, found in self.slopes["change"].items()}

    @property
    def status(self) -> Status:
        """ "failed" if one quantity failed, else "undecided" if the seeds do not tell of one, else "passed"."""
        return overall(verdict.status for verdict in self.verdicts.values())

    @property
    def passed(self) -> bool:
        """Whether every quantity behaves, and the seeds are enough to say so."""
        return self.status == "passed"

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything measured and concluded, as JSON text; also written to `path` if given."""
        text = json.dumps(
            {
                "axis": self.axis,
                "factors": list(self.factors),
                "spec": self.spec,
                "base_shape": asdict(self.base_shape),
                "status": self.status,
                "passed": self.passed,
                "slopes": {kind: {q: asdict(s) for q, s in found.items()} for kind, found in self.slopes.items()},
                "verdicts": {q: {**asdict(v), "passed": v.passed} for q, v in self.verdicts.items()},
                "records": self.records,
            },
            indent=1,
        )
        if path is not None:
            Path(path).write_text(text + "\n", "utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Writes the picture, one panel per quantity (needs matplotlib, the extra `plots`)."""
        from moe_param.checks.picture import draw

        draw(self, path)


def coord_check(
    config: PretrainedConfig,
    base_shape: Shape,
    *,
    axis: str,
    factors: Sequence[float] = (1, 2, 4, 8),
    spec: str | Path | Mapping[str, Any] | ScalingSpec = DEFAULT_SPEC,
    steps: int = 5,
    seeds: int = 5,
    lr: float = 2**-8,
    eps: float = 1e-12,
    batch: torch.Tensor | None = None,
    init_std: float | None = None,
    constants: Mapping[str, Mapping[str, float]] | None = None,
    optimizer: str = "adamw",
    matrix_lr_ratio: float | None = None,
    processes: int = 1,
    resume: str | Path | None = None,
    model_class: type[PreTrainedModel] | None = None,
    progress: bool = False,
) -> CoordCheck:
    """Trains `config` at `base_shape` with `axis` multiplied by each of `factors` and compares how far it moves.

    Args:
        config: the architecture; its own sizes do not matter.
        base_shape: where factor 1 stands.
        axis: width (expert_size follows, so that α of arXiv:2601.20205 is fixed), depth, num_experts (top_k follows) or
            expert_size.
        factors: at least two.
        spec, init_std, constants: as in `moe_param.apply`.
        steps, seeds, lr, eps: steps on one batch, number of initializations, and one learning rate for all.
        optimizer, matrix_lr_ratio: as in `Parameterization.optimizer`: "adamw", or "muon".
        batch: (batch, length) token ids to train and measure on. By default text, which a seed draws from the Python
            standard library, as bytes: random ids have nothing to learn that stays, and pass wrong rules.
        processes: at most one per core is used.
        resume: a file of finished runs (JSON lines); runs in it are not repeated, new ones are added as they finish.
            A run is taken from it only if everything that makes it is the same, the versions of the libraries too.

    Raises:
        CoordCheckError: an unknown axis, fewer than two factors, sizes that are not whole, no step or seed, ids that
            the model does not have.
        InputError: a vocabulary too small for text; a resume file that cannot be read.
        ShapeError, StructureError, …: as `scale_config` and `apply`.
    """
    _check_numbers(axis, factors, steps, seeds, lr)
    check_known((optimizer,), ("adamw", "muon"), "optimizer", "optimizer", CoordCheckError)
    matrix_numbers(adam_class(optimizer), matrix_lr_ratio, ADAM_ROLES, batch_ratio=1.0)  # or refuses
    table = ScalingSpec.load(spec)
    model_class = model_class or model_class_for(config)
    base = replace(base_shape, head_dim=None)
    vocabulary = config.get_text_config().vocab_size
    batches = _text(vocabulary, seeds) if batch is None else [_checked(batch, vocabulary)] * seeds
    runs = []
    for factor in sorted(set(factors)):
        try:
            scaled = scale_config(config, **base_shape.along(axis, factor).sizes, model_class=model_class)
        except ShapeError as error:
            raise CoordCheckError(f"{axis} × {factor:g}: {error}") from error
        plan(model_class, scaled, base, spec=table, init_std=init_std, constants=constants)  # or refuses
        runs += [
            Run(
                *(model_class, scaled, base, table, factor, seed, steps, lr, eps, ids, init_std, constants),
                *(optimizer, matrix_lr_ratio),
            )
            for seed, ids in enumerate(batches)
        ]
    records = _run_all(runs, processes, Path(resume) if resume else None, progress)
    return CoordCheck(axis, tuple(sorted(set(factors))), table.name, base_shape, records)


def _check_numbers(axis: str, factors: Sequence[float], steps: int, seeds: int, lr: float) -> None:
    if axis not in AXES:
        raise CoordCheckError(f"unknown axis {axis!r}{nearest(axis, AXES)}")
    if not all(0 < factor < math.inf for factor in factors):
        raise CoordCheckError(f"factors must be above 0, got {list(factors)}")
    if len(set(factors)) < 2:
        raise CoordCheckError(f"a slope needs at least two factors, got {list(factors)}")
    if steps < 1:
        raise CoordCheckError(f"steps is {steps}: a change needs at least 1")
    if seeds < 1:
        raise CoordCheckError(f"seeds is {seeds}: at least 1, and at least 3 for an interval that tells")
    if not 0 < lr < math.inf:
        raise CoordCheckError(f"lr is {lr}: a number above 0")


def _text(vocabulary: int, seeds: int) -> list[torch.Tensor]:
    """A batch of real text for every seed, as bytes."""
    files = [path for _, path in stdlib_files()]
    windows = (byte_windows(files, ROWS, LENGTH, seed=seed, vocabulary=vocabulary) for seed in range(seeds))
    return [torch.from_numpy(ids) for ids in windows]


def _checked(batch: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The user's batch, if a model with this vocabulary can be trained on it."""
    if batch.dim() != 2 or min(batch.shape) < 1 or batch.shape[1] < 2:
        raise CoordCheckError(
            f"the batch must be (batch, length) with at least two ids in a row, found {tuple(batch.shape)}"
        )
    if batch.is_floating_point() or batch.is_complex():
        raise CoordCheckError(f"the batch must hold whole numbers, found {batch.dtype}")
    low, high = int(batch.min()), int(batch.max())
    if low < 0 or high >= vocabulary:
        found = low if low < 0 else high
        raise CoordCheckError(f"the batch holds id {found}, and the model has ids 0 to {vocabulary - 1}")
    return batch.long()


def _run_all(runs: list[Run], processes: int, resume: Path | None, progress: bool) -> list[dict[str, Any]]:
    """The record of every run, in order; those in the file `resume` are not repeated, and new ones go there."""
    names = [run.fingerprint for run in runs]
    done: dict[str, dict[str, Any]] = {}
    if resume is not None:
        found = {line["fingerprint"]: line["record"] for line in read_finished(resume) if "fingerprint" in line}
        done = {name: found[name] for name in names if name in found}
    todo = {name: run for name, run in zip(names, runs) if name not in done}
    for name, record in _track(_results(todo, processes), len(todo), progress):
        done[name] = record
        if resume is not None:
            append(resume, {"fingerprint": name, "record": record})
    return [done[name] for name in names]


def _results(runs: dict[str, Run], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, record) as they finish."""
    workers = min(processes, os.cpu_count() or 1, len(runs))
    if workers <= 1:
        yield from ((name, measure(run)) for name, run in runs.items())
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start)
    try:
        pending = {pool.submit(measure, run): name for name, run in runs.items()}
        for future in as_completed(pending):
            yield pending[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Of a worker: one core, and an interrupt is for the process that started it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _track(results: Iterator[Any], total: int, progress: bool) -> Iterator[Any]:
    if not progress:
        return results
    from rich.progress import track

    return iter(track(results, total=total, description="coordinate check"))
