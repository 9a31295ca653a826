"""Runs a search: claims trials in a shared Optuna study, hands their runs to worker processes, survives their deaths.

A *trial* is one point, a *run* is one point with one seed. One process per machine (this one) talks to the storage; it
claims trials, spreads their runs over its workers and writes the losses back. The same command started elsewhere with
the same storage and study joins in. Optuna keeps the study and does the sampling (TPE); what to try next in the other
modes is a pure function of the results, so there is nothing else to restore after a crash.

Why not Optuna's GridSampler and heartbeat: the former gives the same point to several workers now and then, the latter
needs a database, and journal files are what works on a network file system.
"""

from __future__ import annotations

import math
import os
import platform
import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import optuna
import sqlalchemy.exc
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from moe_param.errors import MoeParamError
from moe_param.tuning.constants import Losses, Pass, Point, canonical, coordinate_pass, key_of
from moe_param.tuning.workers import ATTEMPTS, Answer, Died, Evaluate, Pool, Progress, Raised, sigterm_as_interrupt

ANYWHERE = FloatDistribution(1e-30, 1e30, log=True)  # of a value that was chosen, not sampled
DIVERGED: Losses = (math.inf,)
LIVE = (TrialState.RUNNING, TrialState.COMPLETE)
RETRIED = ("lost", "withdrawn", "error")


Run = tuple[int, int]  # trial number, seed


class SearchError(MoeParamError):
    """A search that cannot go on as asked; the message says why, and what to do."""


# -- what to try ---------------------------------------------------------------------------------------------------
class Strategy(Protocol):
    def wanted(self, results: Mapping[str, Losses]) -> Sequence[Point | None]:
        """Points still without a result, the most urgent first; None is one for the sampler to choose."""

    def expected(self, results: Mapping[str, Losses]) -> int:
        """How many trials it will have taken, as far as can be told."""


@dataclass(frozen=True)
class Grid:
    points: tuple[Point, ...]

    def wanted(self, results: Mapping[str, Losses]) -> list[Point]:
        return [point for point in self.points if key_of(point) not in results]

    def expected(self, results: Mapping[str, Losses]) -> int:
        return len(self.points)


@dataclass(frozen=True)
class Tpe:
    """`trials` points from Optuna's tree-structured Parzen estimator, log-uniform between the ends of each range."""

    ranges: Mapping[str, tuple[float, float]]
    fixed: Point
    trials: int
    seed: int = 0

    def wanted(self, results: Mapping[str, Losses]) -> list[None]:
        return [None] * (self.trials - len(results))

    def expected(self, results: Mapping[str, Losses]) -> int:
        return self.trials

    def suggest(self, trial: Trial) -> Point:
        # Seeded by the trial's number: no two of them, on any machine or after a restart, draw the same numbers.
        seed = zlib.crc32(f"{self.seed} {trial.number}".encode())
        trial.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        chosen = {name: trial.suggest_float(name, *ends, log=True) for name, ends in self.ranges.items()}
        return canonical({**self.fixed, **chosen})


@dataclass(frozen=True)
class Coordinate:
    start: Point
    coordinates: tuple[str, ...]
    factors: tuple[float, ...] = (0.25, 4.0)
    lr_factors: tuple[float, ...] = (0.5, 2.0)
    error_rate: float = 0.05

    def replay(self, results: Mapping[str, Losses]) -> Pass:
        return coordinate_pass(
            self.start,
            self.coordinates,
            results,
            factors=self.factors,
            lr_factors=self.lr_factors,
            error_rate=self.error_rate,
        )

    def wanted(self, results: Mapping[str, Losses]) -> list[Point]:
        return list(self.replay(results).wanted.values())

    def expected(self, results: Mapping[str, Losses]) -> int:
        return max(len(results), 1 + len(self.coordinates) * len(self.factors) + len(self.lr_factors))


# -- the study -----------------------------------------------------------------------------------------------------
def open_study(url: str, name: str, settings: Mapping[str, Any]) -> optuna.Study:
    """Creates or joins the study, and refuses one whose losses would not compare with ours.

    Raises:
        SearchError: a storage that cannot be used, or a study made with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with storage_errors(url, RuntimeError, OSError):  # tables of another Optuna; a folder that is not there
        study = optuna.create_study(study_name=name, storage=_storage(url), load_if_exists=True)
        if "settings" not in study.user_attrs:
            study.set_user_attr("settings", dict(settings))
        before, now = dict(_flat(study.user_attrs["settings"])), dict(_flat(settings))
    for entry in sorted(before.keys() | now.keys()):
        if before.get(entry) != now.get(entry):
            raise SearchError(
                f"study {name!r} in {shown(url)} was made with {entry} = {before.get(entry)!r}, this is "
                f"{now.get(entry)!r}: keep that setting to go on with it, or start another with --study NAME"
            )
    return study


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _storage(url: str) -> BaseStorage:
    if url.startswith("journal:"):
        return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    if "://" not in url:
        raise SearchError(
            f"storage {url!r}: expected a database URL (sqlite:///FILE, postgresql://USER@HOST/NAME) or journal:FILE"
        )
    scheme, rest = url.split("://", 1)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if scheme.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}  # seconds to wait for another process's lock
    elif scheme in ("postgresql", "postgres"):
        scheme = "postgresql+psycopg"
    if scheme == "postgresql+psycopg":
        options["connect_args"] = {"connect_timeout": 10}
    for _ in range(5):  # two machines that create the tables at once get in each other's way
        try:
            return RDBStorage(f"{scheme}://{rest}", engine_kwargs=options)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            time.sleep(0.5)
    return RDBStorage(f"{scheme}://{rest}", engine_kwargs=options)


STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


@contextmanager
def storage_errors(url: str, *more: type[Exception], running: bool = False) -> Iterator[None]:
    """What a storage can raise, in one line; of a study that is `running`, also that its file was removed."""
    file = local_file(url) if running else None
    more += (SearchError,) if file else ()
    try:
        yield
    except ModuleNotFoundError as error:
        raise SearchError(
            f"storage {shown(url)}: no driver ({error.name} is not installed): pip install 'psycopg[binary]' for "
            "PostgreSQL"
        ) from error
    except STORAGE_ERRORS + more as error:
        if file and not file.exists():
            raise SearchError(
                f"{file} was removed while the search ran, and all its trials with it: the same command starts afresh"
            ) from error
        if isinstance(error, SearchError):
            raise
        reason = str(getattr(error, "orig", None) or error.__cause__ or error).strip().split("\n")[0]
        raise SearchError(
            f"storage {shown(url)} cannot be used: {reason}. Check the address and that the server runs; what is "
            "finished is kept, and the same command goes on from there"
        ) from error


def local_file(url: str) -> Path | None:
    """The file that a storage is; None of a server."""
    scheme, _, path = url.partition(":")
    if scheme == "journal":
        return Path(path)
    return Path(path.removeprefix("///")) if scheme == "sqlite" and path != "///:memory:" else None


def shown(url: str) -> str:
    """Without the password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True) if "://" in url else url
    except sqlalchemy.exc.ArgumentError:
        return "URL"


def status_of(trial: FrozenTrial) -> str:
    """complete · diverged · running, or why a trial has no result: lost · duplicate · withdrawn · error · gave up."""
    if trial.state == TrialState.COMPLETE:
        return "diverged" if trial.value == math.inf else "complete"
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get("reason", "lost"))
    return trial.state.name.lower()


def results_of(trials: Iterable[FrozenTrial]) -> dict[str, Losses]:
    """key → losses. A point that its workers or machines never survived counts as diverged."""
    results: dict[str, Losses] = {}
    lost: Counter[str] = Counter()
    for trial in trials:
        key, status = trial.user_attrs.get("key", ""), status_of(trial)
        if status in ("complete", "diverged"):
            losses = sorted((int(seed), loss) for seed, loss in trial.user_attrs["losses"].items())
            results.setdefault(key, DIVERGED if status == "diverged" else tuple(loss for _, loss in losses))
        else:
            lost[key] += {"gave up": ATTEMPTS, "lost": 1}.get(status, 0)
    for key, times in lost.items():
        if times >= ATTEMPTS:
            results.setdefault(key, DIVERGED)
    return results


# -- running it -------------------------------------------------------------------------------------------------------
@dataclass
class _Open:
    """A trial that this process has claimed and not finished."""

    trial: Trial
    point: Point
    losses: dict[int, float] = field(default_factory=dict)
    deaths: int = 0


@dataclass
class Search:
    """`run` goes on until the strategy wants nothing more; see the module's docstring."""

    study: optuna.Study
    strategy: Strategy
    evaluate: Evaluate
    seeds: tuple[int, ...]
    workers: int = 1
    heartbeat: float = 5.0  # seconds between two signs of life of this process
    grace: float = 60.0  # seconds without one after which another process's trials are taken over
    on_change: Callable[[int, int, str], None] = lambda done, expected, text: None
    check: Callable[[], None] = lambda: None  # before every write: raises where the study is gone

    def __post_init__(self) -> None:
        self.owner = f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._open: dict[int, _Open] = {}
        self._queue: deque[Run] = deque()
        self._pool = Pool(self.evaluate, self.workers)
        self._seen: dict[str, tuple[Any, float]] = {}  # owner → its last sign of life, when we first saw that one
        self._beats, self._next_beat, self._next_look = 0, 0.0, 0.0

    def run(self) -> list[FrozenTrial]:
        """All trials of the study, by whomever.

        Raises:
            SearchError: a run that raised an exception.
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
            number, seed = self._queue.popleft()
            self._pool.start((number, seed), self._open[number].point, seed)
        for (number, seed), answer in self._pool.answers(timeout=min(1.0, self.heartbeat)):
            self._collect(number, seed, answer)
        return True

    def _look(self) -> bool:
        """Reads the study, takes over what others lost and claims what our workers can start; False: all is done."""
        self._take_over()
        trials = self.study.get_trials(deepcopy=False)
        results = results_of(trials)
        self.on_change(len(results), self.strategy.expected(results), self._describe(trials))
        if not self.strategy.wanted(results):
            return False
        while len(self._queue) < self._pool.free:
            if not self._claim():
                break
        return True

    def _describe(self, trials: list[FrozenTrial]) -> str:
        others = sum(t.state == TrialState.RUNNING and t.number not in self._open for t in trials)
        return f"{len(self._open)} under way here" + (f", {others} elsewhere" if others else "")

    # -- claiming --
    def _claim(self) -> bool:
        """Takes the most urgent point that nobody has; False where there is none."""
        trials = self.study.get_trials(deepcopy=False)
        results = results_of(trials)
        wanted = self.strategy.wanted(results)
        live = {trial.user_attrs.get("key") for trial in trials if trial.state in LIVE}
        if isinstance(self.strategy, Tpe):
            if len(wanted) <= sum(trial.state == TrialState.RUNNING for trial in trials):
                return False
            retry = (t for t in trials if status_of(t) in RETRIED and "point" in t.user_attrs)
            for key, point in ((t.user_attrs["key"], t.user_attrs["point"]) for t in retry):
                if key not in live and key not in results:
                    return self._claim_point(key, point)
            return self._claim_sampled()
        for point in wanted:
            if point is not None and key_of(point) not in live:
                return self._claim_point(key_of(point), point)
        return False

    def _claim_point(self, key: str, point: Point) -> bool:
        """A trial that exists as running, and as ours, from its first moment."""
        claim = uuid.uuid4().hex
        ranges = self.strategy.ranges if isinstance(self.strategy, Tpe) else {}
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=dict(point),
                distributions={
                    name: FloatDistribution(*ranges[name], log=True) if name in ranges else ANYWHERE for name in point
                },
                user_attrs={"owner": self.owner, "key": key, "point": point, "claim": claim},
            )
        )
        mine = next(t for t in reversed(self.study.get_trials(deepcopy=False)) if t.user_attrs.get("claim") == claim)
        return self._own(Trial(self.study, mine._trial_id), key, point)

    def _claim_sampled(self) -> bool:
        assert isinstance(self.strategy, Tpe)
        trial = self.study.ask()
        point, key = self.strategy.suggest(trial), f"sample {trial.number}"
        for name, value in {"owner": self.owner, "key": key, "point": point}.items():
            trial.set_user_attr(name, value)
        return self._own(trial, key, point)

    def _own(self, trial: Trial, key: str, point: Point) -> bool:
        self._open[trial.number] = _Open(trial, point)
        # Numbers are unique and grow, so of two machines that want the same at once exactly one keeps it.
        before = [t for t in self.study.get_trials(deepcopy=False) if t.number < trial.number and t.state in LIVE]
        keys = {t.user_attrs.get("key") for t in before}
        if key in keys or (isinstance(self.strategy, Tpe) and len(keys) >= self.strategy.trials):
            self._fail(trial.number, "duplicate")
        else:
            self._queue.extend((trial.number, seed) for seed in self.seeds)
        return True

    # -- running --
    def _collect(self, number: int, seed: int, answer: Answer | Progress | Raised | Died) -> None:
        entry = self._open.get(number)
        if isinstance(answer, Progress):
            return
        if isinstance(answer, Died):
            self._mourn(number, seed, answer)
        elif entry is None:  # given up, or a seed of a point that diverged already
            return
        elif isinstance(answer, Raised):
            self._fail(number, "error", error=answer.text)
            raise SearchError(f"trial {number} ({key_of(entry.point)}, seed {seed}): {answer.text}")
        else:
            self._note(number, seed, entry, answer.loss)

    def _mourn(self, number: int, seed: int, death: Died) -> None:
        """A worker died of this run: it is tried again, or its trial given up."""
        if death.by_itself:
            raise SearchError(f"a worker process ended with exit code {death.exit_code}: what it said is above")
        if entry := self._open.get(number):
            entry.deaths += 1
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                entry.trial.set_user_attr("worker_deaths", entry.deaths)
            if entry.deaths < ATTEMPTS:
                self._queue.appendleft((number, seed))
            else:
                self._fail(number, "gave up")

    def _note(self, number: int, seed: int, entry: _Open, loss: float) -> None:
        """One more loss of a trial, which may be its last."""
        entry.losses[seed] = loss
        diverged = not math.isfinite(loss)  # one seed decides, the others are not waited for
        if diverged or len(entry.losses) == len(self.seeds):
            value = math.inf if diverged else math.fsum(entry.losses.values()) / len(self.seeds)
            self._close(number)
            losses = {str(seed): x if math.isfinite(x) else None for seed, x in sorted(entry.losses.items())}
            self._tell(entry.trial, value, losses=losses)

    def _fail(self, number: int, reason: str, **attributes: Any) -> None:
        self._tell(self._close(number).trial, None, reason=reason, **attributes)

    def _tell(self, trial: Trial, value: float | None, **attributes: Any) -> None:
        self._next_look = 0.0
        self.check()
        try:
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            self.study.tell(trial.number, value, None if value is not None else TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            pass  # taken for lost meanwhile, and given to someone else: theirs counts

    def _close(self, number: int) -> _Open:
        self._queue = deque(run for run in self._queue if run[0] != number)
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
                self._tell(Trial(self.study, trial._trial_id), None, reason="lost")
