"""Runs a search: claims trials in a shared Optuna study, hands them to worker processes, survives their deaths.

A *trial* is one run: a point with a seed. One process per machine (this one) talks to the storage; it claims trials,
gives them to its workers and writes the losses back. The same command started elsewhere with the same storage and study
joins in. Optuna keeps the study and does the sampling; what to try next is a pure function of the results.

Why not Optuna's own heartbeat and pruners: the former needs a database, and journal files are what works on a network
file system; the latter rank a run among all others, and ours is compared with one: the run of the same seed, so of the
same batches, at the point that it has to beat.
"""

from __future__ import annotations

import math
import os
import platform
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from moe_param.tuning.points import Point, canonical, key_of
from moe_param.tuning.strategies import Staged, Strategy, Wanted
from moe_param.tuning.study import (
    LIVE,
    RETRIED,
    SearchError,
    results_of,
    run_of,
    status_of,
    taken,
)
from moe_param.tuning.workers import ATTEMPTS, Answer, Died, Evaluate, Pool, Progress, Raised, sigterm_as_interrupt

ANYWHERE = FloatDistribution(1e-30, 1e30, log=True)  # of a value that was chosen, not sampled

HOPELESS = {0.3: 0.05, 0.5: 0.025, 0.75: 0.015}
"""Share of the run → how far above its rival's training loss, at the same steps, ends it. (Of 26 changes to a tuned
base, the gap at half of the run was within 0.02 of the gap at its end.)"""


@dataclass
class _Open:
    """A trial that this process has claimed and not finished."""

    trial: Trial
    point: Point
    seed: int
    rival: Mapping[float, float]  # of the run it has to keep up with: share → training loss
    curve: dict[float, float] = field(default_factory=dict)
    deaths: int = 0


@dataclass
class Search:
    """`run` goes on until the strategy wants nothing more; see the module's docstring."""

    study: optuna.Study
    strategy: Strategy
    evaluate: Evaluate
    workers: int = 1
    limit: float | None = None  # seconds that a run may take
    heartbeat: float = 5.0  # seconds between two signs of life of this process
    grace: float = 60.0  # seconds without one after which another process's trials are taken over
    on_change: Callable[[list[FrozenTrial], float], None] = lambda trials, expected: None
    check: Callable[[], None] = lambda: None  # before every write: raises where the study is gone

    def __post_init__(self) -> None:
        self.owner = f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._open: dict[int, _Open] = {}
        self._queue: deque[int] = deque()
        self._pool = Pool(self.evaluate, self.workers)
        self._seen: dict[str, tuple[Any, float]] = {}  # owner → its last sign of life, when we first saw that one
        self._beats, self._next_beat, self._next_look = 0, 0.0, 0.0

    def run(self) -> list[FrozenTrial]:
        """All trials of the study, by whomever.

        Raises:
            SearchError: a run that raised an exception, or the first ones all failed.
            KeyboardInterrupt: also for SIGTERM; the trials under way are marked as withdrawn.
        """
        with sigterm_as_interrupt():
            try:
                while self._step():
                    pass
            finally:
                self._pool.stop()
                for number in list(self._open):
                    self._fail(number, "withdrawn")
        return self.study.get_trials(deepcopy=False)

    def _step(self) -> bool:
        self.check()
        now = time.monotonic()
        if now >= self._next_beat:
            self._beats, self._next_beat = self._beats + 1, now + self.heartbeat
            self.study.set_user_attr(f"alive {self.owner}", self._beats)
        if now >= self._next_look:
            self._next_look = now + min(1.0, self.heartbeat)
            if not self._look():
                return False
        while self._queue and self._pool.free:
            number = self._queue.popleft()
            self._pool.start(number, self._open[number].point, self._open[number].seed, limit=self.limit)
        for number, answer in self._pool.answers(timeout=min(1.0, self.heartbeat)):
            self._collect(number, answer)
        return True

    def _look(self) -> bool:
        """Reads the study, takes over what others lost and claims what our workers can start; False: all is done."""
        self._take_over()
        trials = self.study.get_trials(deepcopy=False)
        results = results_of(trials)
        self.on_change(trials, self.strategy.expected(results))
        if not self.strategy.wanted(results):
            return False
        while len(self._queue) < self._pool.free:
            if not self._claim():
                break
        return True

    # -- claiming --
    def _claim(self) -> bool:
        """Takes the most urgent run that nobody has; False where there is none."""
        trials = self.study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        wanted = self.strategy.wanted(results_of(trials))
        had = {whole: {run_of(trial) for trial in trials if taken(trial, whole)} for whole in (True, False)}
        to_sample = sum(run.point is None for run in wanted) - len(running)
        for run in wanted:
            if run.point is None:
                return to_sample > 0 and self._claim_sample(run, trials)
            if (key_of(run.point), run.seed) not in had[run.rival is None]:
                return self._claim_point(run, run.point)
        return False

    def _claim_sample(self, run: Wanted, trials: Sequence[FrozenTrial]) -> bool:
        """A new point, or one whose trial was lost."""
        live = {run_of(trial) for trial in trials if trial.state in LIVE} | {
            (key, seed) for key, of_seed in results_of(trials).items() for seed in of_seed
        }
        for trial in trials:
            if status_of(trial) in RETRIED and "point" in trial.user_attrs and run_of(trial) not in live:
                return self._claim_point(run, trial.user_attrs["point"])
        strategy = self.strategy
        assert isinstance(strategy, Staged) and strategy.sampler and strategy.ranges is not None
        self.study.sampler = sampler(strategy.sampler, len(trials))
        asked = self.study.ask()
        chosen = {name: asked.suggest_float(name, *ends, log=True) for name, ends in strategy.ranges.items()}
        point = canonical({**(strategy.fixed or {}), **chosen})
        for name, value in self._signed(point, run.seed).items():
            asked.set_user_attr(name, value)
        return self._own(asked, point, run)

    def _claim_point(self, run: Wanted, point: Point) -> bool:
        """A trial that exists as running, and as ours, from its first moment."""
        claim = uuid.uuid4().hex
        ranges = (isinstance(self.strategy, Staged) and self.strategy.ranges) or {}
        spaces: dict[str, BaseDistribution] = {
            name: FloatDistribution(*ranges[name], log=True) if inside(value, ranges.get(name)) else ANYWHERE
            for name, value in point.items()
        }
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=dict(point),
                distributions=spaces,
                user_attrs={**self._signed(point, run.seed), "claim": claim},
            )
        )
        mine = next(t for t in reversed(self.study.get_trials(deepcopy=False)) if t.user_attrs.get("claim") == claim)
        return self._own(Trial(self.study, mine._trial_id), point, run)

    def _signed(self, point: Point, seed: int) -> dict[str, Any]:
        return {"owner": self.owner, "key": key_of(point), "point": point, "seed": seed}

    def _own(self, trial: Trial, point: Point, run: Wanted) -> bool:
        self._open[trial.number] = _Open(trial, point, run.seed, self._rival(run.rival, run.seed))
        # Numbers are unique and grow, so of two machines that want the same at once exactly one keeps it.
        before = (t for t in self.study.get_trials(deepcopy=False) if t.number < trial.number)
        if any(run_of(t) == (key_of(point), run.seed) and taken(t, run.rival is None) for t in before):
            self._fail(trial.number, "duplicate")
        else:
            self._queue.append(trial.number)
        return True

    def _rival(self, rival: Point | None, seed: int) -> Mapping[float, float]:
        """Training losses by share of the rival's complete run with this seed; empty where there is none."""
        for trial in self.study.get_trials(deepcopy=False) if rival else ():
            if run_of(trial) == (key_of(rival or {}), seed) and status_of(trial) == "complete":
                return {float(share): loss for share, loss in trial.user_attrs.get("curve", {}).items()}
        return {}

    # -- running --
    def _collect(self, number: int, answer: Answer | Progress | Raised | Died) -> None:
        entry = self._open.get(number)
        if isinstance(answer, Progress):
            if entry:
                entry.curve[round(answer.share, 3)] = answer.loss
                if hopeless(entry.curve, entry.rival):
                    self._pool.cancel(number)
        elif isinstance(answer, Died):
            self._mourn(number, answer)
        elif entry is None:  # given up
            return
        elif isinstance(answer, Raised):
            self._fail(number, "error", error=answer.text)
            raise SearchError(f"trial {number} ({key_of(entry.point)}, seed {entry.seed}): {answer.text}")
        else:
            self._note(number, entry, answer)

    def _mourn(self, number: int, death: Died) -> None:
        """A worker died of this run: it is tried again, or its trial given up."""
        if death.by_itself:
            raise SearchError(f"a worker process ended with exit code {death.exit_code}: what it said is above")
        if not (entry := self._open.get(number)):
            return
        if death.timed_out:
            self._note(number, entry, Answer(math.inf, failure=f"took longer than {self.limit:g} seconds"))
            return
        entry.deaths += 1
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            entry.trial.set_user_attr("worker_deaths", entry.deaths)
        if entry.deaths < ATTEMPTS:
            self._queue.appendleft(number)
        else:
            self._fail(number, "gave up")

    def _note(self, number: int, entry: _Open, answer: Answer) -> None:
        """The trial's end: a loss, ∞ where it diverged, stopped by us, or failed by itself."""
        facts: dict[str, Any] = {"share": answer.share, "curve": _plain(entry.curve)}
        self._close(number)
        if answer.failure is not None:
            self._tell(entry.trial, None, TrialState.FAIL, reason="failed", failure=answer.failure, **facts)
            self._stop_where_nothing_works()
        elif answer.stopped and math.isfinite(answer.loss):
            self._tell(entry.trial, None, TrialState.PRUNED, loss=answer.loss, **facts)
        else:
            value = answer.loss if math.isfinite(answer.loss) else math.inf
            self._tell(entry.trial, value, None, **facts)

    def _stop_where_nothing_works(self) -> None:
        """Raises where the first runs failed, all of them: what is wrong is not the point's numbers."""
        trials = self.study.get_trials(deepcopy=False)
        failed = [trial for trial in trials if status_of(trial) == "failed"]
        if len(failed) >= ATTEMPTS and not any(
            trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials
        ):
            raise SearchError(
                f"the first {len(failed)} runs failed and none did not: {failed[-1].user_attrs['failure']}. Failed "
                "runs count as results: mend what is wrong and start again with another --study NAME"
            )

    def _fail(self, number: int, reason: str, **attributes: Any) -> None:
        self._tell(self._close(number).trial, None, TrialState.FAIL, reason=reason, **attributes)

    def _tell(self, trial: Trial, value: float | None, state: TrialState | None, **attributes: Any) -> None:
        self._next_look = 0.0
        self.check()
        try:
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            self.study.tell(trial.number, value, state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            pass  # taken for lost meanwhile, and given to someone else: theirs counts

    def _close(self, number: int) -> _Open:
        self._queue = deque(other for other in self._queue if other != number)
        return self._open.pop(number)

    # -- other machines --
    def _take_over(self) -> None:
        """Fails the trials of processes that show no life. By our own clock: others' clocks may differ."""
        now, alive = time.monotonic(), self.study.user_attrs
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get("owner", f"trial {trial.number}")  # killed before it could sign
            if owner == self.owner:
                continue
            beat = alive.get(f"alive {owner}")
            if owner not in self._seen or self._seen[owner][0] != beat:
                self._seen[owner] = (beat, now)
            elif now - self._seen[owner][1] > self.grace:
                self._tell(Trial(self.study, trial._trial_id), None, TrialState.FAIL, reason="lost")


def hopeless(curve: Mapping[float, float], rival: Mapping[float, float]) -> bool:
    """Whether the last training loss of a run is too far above its rival's at the same step."""
    if not curve:
        return False
    share = max(curve)
    margins = [margin for least, margin in HOPELESS.items() if share >= least]
    return bool(margins and share in rival and curve[share] > rival[share] * (1 + margins[-1]))


def _plain(curve: Mapping[float, float]) -> dict[str, float]:
    """JSON: shares as text; without what is not finite."""
    return {f"{share:g}": round(loss, 6) for share, loss in curve.items() if math.isfinite(loss)}


def inside(value: float, ends: tuple[float, float] | None) -> bool:
    return ends is not None and ends[0] <= value <= ends[1]


def sampler(name: str, number: int) -> optuna.samplers.BaseSampler:
    """Optuna's, seeded by the trial's number: no two of them, on any machine or after a restart, draw the same."""
    seed = zlib.crc32(f"0 {number}".encode())
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=False)
