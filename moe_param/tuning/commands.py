"""A run that is a command of the user's: their own script, which applies the trial's file and reports a loss.

Imports nothing heavy: a worker that only waits for a command should not hold torch in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moe_param.errors import InputError
from moe_param.trial import FILE, STOP, Reports
from moe_param.tuning.points import with_numbers
from moe_param.tuning.workers import INDEX, MARK, PATIENCE, Answer, Evaluate, Watch, end

if TYPE_CHECKING:
    from moe_param.tuning.base import Base

TRIAL, SEED = "{trial}", "{seed}"
SHELL = ("|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1")
"""What only a shell understands."""

GRACE = 60.0
"""Seconds that a script may go on after it was told to stop: for a last checkpoint, say."""

LINES, CHARACTERS = 8, 2000
"""How much of what a failed command said is kept."""

LAUNCHERS = (
    *("bin/accelerate", "accelerate/commands/", "bin/torchrun", "torch/distributed/run.py"),
    *("torch/distributed/launcher/", "torch/distributed/elastic/agent/"),
    "torch/distributed/elastic/multiprocessing/api.py",
)
"""What a launcher says of a script's failure begins with one of these; the script's own words come before it."""

DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class CommandRunner:
    """One run is one command, `accelerate launch train.py --tuned {trial} --seed {seed}`.

    `{trial}` is a file like tuned.yaml with the numbers to try, for `moe_param.apply(model, file)`; the script reports
    its held-out loss with `moe_param.report(loss)`. There is no shell: the command is split like one splits.

    command: with {trial} and, where several seeds are asked for, {seed}.
    limit: seconds after which a run is ended, and has failed. None: none.
    gpus_per_run: how many of the visible GPUs a run gets, by CUDA_VISIBLE_DEVICES.
    folder: where each run has a folder with its file, stdout and stderr. None: a new one for temporary files.
    """

    command: str
    limit: float | None = None
    gpus_per_run: int = 1
    folder: str | Path | None = None

    def workers(self) -> int:
        """As many as the GPUs are enough for; one where there are none: a script takes all cores."""
        return max(1, len(visible_gpus()) // self.gpus_per_run)

    def bind(self, base: Base) -> Evaluate:
        """What a worker calls.

        Raises:
            InputError: a command that cannot be run or lacks {trial} or {seed}, more GPUs than there are.
        """
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise InputError(f"limit is {self.limit}: expected seconds, or None")
        gpus = visible_gpus()
        if not 1 <= self.gpus_per_run <= max(1, len(gpus)):
            raise InputError(
                f"gpus_per_run is {self.gpus_per_run}: expected 1 to {max(1, len(gpus))}, the visible ones"
            )
        seeds = base.settings.get("seeds", ())
        folder = Path(self.folder or tempfile.mkdtemp(prefix="moe-param-"))
        return Command(
            parts_of(self.command, seeds),
            base.yaml,
            folder.resolve(),
            self.limit,
            tuple(",".join(gpus[i : i + self.gpus_per_run]) for i in range(0, len(gpus), self.gpus_per_run)),
            os.environ.get("OMP_NUM_THREADS"),
        )


def visible_gpus() -> list[str]:
    """The names of the GPUs that are there for us, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get(DEVICES, "").split(",") if name.strip()]
    return names[:count] if names else [str(index) for index in range(count)]


def parts_of(command: str, seeds: Sequence[int]) -> tuple[str, ...]:
    """The command's words.

    Raises:
        InputError: quotes that do not close, no such program, something for a shell, no {trial}, no {seed}.
    """
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise InputError(f"command {command!r}: {str(error).lower()}") from None
    if words := [part for part in parts if part in SHELL]:
        raise InputError(f"command {command!r}: {words[0]} is for a shell, write sh -c '…' around it")
    if not parts or shutil.which(parts[0]) is None:
        raise InputError(f"command {command!r}: there is no program {parts[0] if parts else ''!r} to start")
    if not any(TRIAL in part for part in parts):
        raise InputError(
            f"command {command!r} lacks {TRIAL}, the file with the numbers to try: "
            f"e.g. python train.py --tuned {TRIAL} --seed {SEED}"
        )
    if len(seeds) > 1 and not any(SEED in part for part in parts):
        raise InputError(
            f"command {command!r} lacks {SEED}: runs with the seeds {', '.join(map(str, seeds))} would all be the "
            f"same. Let the script take one (--seed {SEED}), or ask for one seed"
        )
    return tuple(parts)


@dataclass(frozen=True)
class Command:
    """What a worker does with a point and a seed."""

    parts: tuple[str, ...]
    yaml: Mapping[str, Any]  # the trial's file but for the numbers that are searched
    folder: Path
    limit: float | None = None
    gpus: tuple[str, ...] = ()  # for each worker, as CUDA_VISIBLE_DEVICES has them
    threads: str | None = None  # the user's OMP_NUM_THREADS: the search sets one for runs in process

    def __call__(self, point: dict[str, float], seed: int, watch: Watch) -> Answer:
        folder = self.folder / f"{digest(point)}-seed-{seed}"
        try:
            write_trial(folder, self.yaml, point)
            with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
                reports = Reports(folder / "reports")
                mark = f"{os.environ.get(MARK, '')} {uuid.uuid4().hex}"
                process = subprocess.Popen(
                    [part.replace(TRIAL, str(folder / "tuned.yaml")).replace(SEED, str(seed)) for part in self.parts],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=self._environment(reports.path, mark),
                    start_new_session=True,
                )
                try:
                    ended = follow(process, reports, watch, self.limit)
                finally:
                    end(mark, PATIENCE)  # a script's own children too
                    process.kill()  # where it took the mark out of its environment
                    process.wait()
        except OSError as error:  # a disk that is full, a program that is none
            return Answer(math.inf, failure=f"{error.filename or folder}: {error.strerror}")
        return answer_of(ended, reports.read(), folder)

    def _environment(self, reports: Path, mark: str) -> dict[str, str]:
        found = {**os.environ, FILE: str(reports), MARK: mark}
        if self.threads is None:
            found.pop("OMP_NUM_THREADS", None)
        else:
            found["OMP_NUM_THREADS"] = self.threads
        if self.gpus:
            found[DEVICES] = self.gpus[int(os.environ.get(INDEX, "0")) % len(self.gpus)]
        return found


def digest(point: Mapping[str, float]) -> str:
    """A folder's name for a point."""
    return hashlib.sha256(json.dumps(sorted(point.items())).encode()).hexdigest()[:12]


def write_trial(folder: Path, document: Mapping[str, Any], point: Mapping[str, float]) -> None:
    """A folder as new, with the file of the numbers to try: as `moe-param tune` writes tuned.yaml.

    Raises:
        OSError: where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("reports", "reports" + STOP):
        (folder / name).unlink(missing_ok=True)
    (folder / "tuned.yaml").write_text(
        yaml.safe_dump(with_numbers(document, point), sort_keys=False, allow_unicode=True), "utf-8"
    )


@dataclass(frozen=True)
class Ended:
    """How a command came to its end."""

    exit_code: int | None  # None: it was ended, because it was late or went on after it was told to stop
    late: float | None = None  # the limit that it exceeded


def follow(process: subprocess.Popen[bytes], reports: Reports, watch: Watch, limit: float | None) -> Ended:
    """Waits for the end of a command, hands on what it reports, and the wish that it ends."""
    wish = reports.path.with_name(reports.path.name + STOP)
    start, heard, asked_at = time.monotonic(), 0, math.inf
    while True:
        try:
            code = process.wait(0.05)
        except subprocess.TimeoutExpired:
            code = None
        for line in steps_of(reports.read()[heard:]):
            if not watch(line["step"] / line["steps"], line["loss"]):
                wish.touch()
            if wish.exists() or not line["go_on"]:
                asked_at = min(asked_at, time.monotonic())
        heard = len(reports.lines)
        if code is not None:
            return Ended(code)
        if limit is not None and time.monotonic() - start > limit:
            return Ended(None, late=limit)
        if time.monotonic() - asked_at > GRACE:
            return Ended(None)


def steps_of(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The reports of a run under way."""
    return [line for line in lines if line["step"] is not None]


def answer_of(ended: Ended, lines: Sequence[Mapping[str, Any]], folder: Path) -> Answer:
    """What a command that has ended came to."""
    steps = steps_of(lines)
    final = next((line["loss"] for line in reversed(lines) if line["step"] is None), None)
    share = steps[-1]["step"] / steps[-1]["steps"] if steps else 1.0
    if steps and not math.isfinite(steps[-1]["loss"]):
        return Answer(math.inf, share)
    told = not all(line["go_on"] for line in steps)
    if (told or ended == Ended(None)) and (final is None or share < 1.0):
        return Answer(steps[-1]["loss"], share, stopped=True)
    if failure := failure_of(ended, final, folder):
        return Answer(math.inf, share, failure=failure)
    return Answer(final if final is not None and math.isfinite(final) else math.inf)


def failure_of(ended: Ended, final: float | None, folder: Path) -> str | None:
    """Why a command is no result, with the end of what it said; None where it is one."""
    if ended.late is not None:
        why = f"took longer than the limit of {ended.late:g} s"
    elif ended.exit_code:
        code = ended.exit_code
        why = f"ended with exit code {code}" if code > 0 else f"killed by signal {-code} (9: out of memory?)"
    elif final is None:
        why = "ended without moe_param.report(loss)"
    else:
        return None
    if shutil.disk_usage(folder).free < 2**20:
        why += "; the disk is full"
    said = last_words(folder / "stderr") or last_words(folder / "stdout")
    return f"{why}; {folder}" + (f" says:\n{said}" if said else " has nothing that it said")


def last_words(path: Path) -> str:
    """The end of what a script said, without what its launcher has to say about it."""
    lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
    foreign = next((i for i, line in enumerate(lines) if any(name in line for name in LAUNCHERS)), len(lines))
    begin = foreign
    while begin and lines[begin - 1].startswith(" "):  # a traceback that was under way
        begin -= 1
    own = lines[: begin - 1] if begin and lines[begin - 1].startswith("Traceback") else lines[:foreign]
    return "\n".join((own or lines)[-LINES:])[-CHARACTERS:]
