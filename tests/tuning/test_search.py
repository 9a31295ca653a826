"""The search, on losses that cost nothing: workers and machines that die, resuming, storages, coordinate passes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from moe_param.tuning.constants import coordinate_pass
from moe_param.tuning.points import Losses, Point, key_of
from moe_param.tuning.search import Search
from moe_param.tuning.stages import sampled
from moe_param.tuning.strategies import Coordinate, Grid, Staged, Strategy, Wanted
from moe_param.tuning.study import SearchError, open_study, results_of, status_of
from tests.tuning.postgres import postgres, postgres_programs
from tests.tuning.search_process import RATES, grid
from tests.tuning.surfaces import Bowl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: making the tables takes longer than the searches."""
    return f"sqlite:///{tmp_path_factory.mktemp('storage') / 'study.db'}"


def search(url: str, name: str, strategy: Strategy, bowl: Bowl, **options: Any) -> list[FrozenTrial]:
    options = {"workers": 2, "heartbeat": 0.2, "grace": 30.0, **options}
    return Search(open_study(url, name, options.pop("settings", {})), strategy, bowl, **options).run()


def statuses(trials: list[FrozenTrial]) -> Counter[str]:
    return Counter(map(status_of, trials))


# -- when a change counts ------------------------------------------------------------------------------------------
class Lazy(dict[str, Losses]):
    """Trains whatever the pass asks about."""

    def __init__(self, bowl: Bowl, seeds: int = 3) -> None:
        self.bowl, self.seeds, self.run = bowl, seeds, 0

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Losses:
        point = {name: float(value) for name, value in (part.split("=") for part in key.split())}
        self[key] = tuple(self.bowl.loss(point, seed) for seed in range(self.seeds))
        return self[key]


ROLES = ("embedding", "attention_in", "attention_out", "router", "expert_up", "expert_down", "unembedding")
COORDINATES = tuple(f"{role}.{kind}" for role in ROLES for kind in ("init", "lr"))


def whole_pass(results: Mapping[str, Losses], start: Point | None = None, **options: Any) -> Any:
    options = {"factors": (0.25, 4.0), "lr_factors": (0.5, 2.0), "error_rate": 0.05, **options}
    return coordinate_pass({"learning_rate": 2.0**-7, **(start or {})}, COORDINATES, results, **options)


def test_noise_is_rejected() -> None:
    """A surface that is flat but for noise: a pass should change something at most once in twenty."""
    changed = tempted = 0
    for repetition in range(100):
        state = whole_pass(Lazy(Bowl(noise=0.02, curvature=0.0, salt=repetition)))
        changed += state.current != {"learning_rate": 2.0**-7}
        tempted += any(min(judgement.gains) > 0 for judgement in state.judgements)
        assert not state.wanted and len(state.judgements) >= 2 * len(COORDINATES) + 2
    assert changed <= 9  # 5 are to be expected at most; 10 or more would have a chance of 3% even then
    assert tempted > 50  # "better with every seed" alone would take noise for a gain in most passes


@pytest.mark.parametrize("name", ["router.lr", "expert_down.init"])
@pytest.mark.parametrize("factor", [64.0, 1 / 64])
def test_planted_constant_is_found(name: str, factor: float) -> None:
    state = whole_pass(Lazy(Bowl(noise=0.01)), {name: factor})
    assert state.current == {"learning_rate": 2.0**-7}  # back to 1, the others untouched
    accepted = [judgement for judgement in state.judgements if judgement.accepted]
    assert [judgement.coordinate for judgement in accepted] == [name] * 3  # three steps of 4


def test_learning_rate_is_checked_last() -> None:
    state = whole_pass(Lazy(Bowl({"learning_rate": 2.0**-9}, noise=0.003)))
    assert state.current == {"learning_rate": 2.0**-9}
    assert state.judgements[-1].coordinate == "learning_rate" and not state.judgements[-1].accepted


def test_divergence_in_a_pass() -> None:
    seeds = (1.0, 1.1)
    start = {"learning_rate": 1.0}
    lower, higher = {"learning_rate": 0.5}, {"learning_rate": 2.0}
    results = {key_of(start): (math.inf,), key_of(lower): seeds, key_of(higher): (math.inf,)}
    results[key_of({"learning_rate": 0.25})] = seeds
    state = coordinate_pass(start, (), results, factors=(), lr_factors=(0.5, 2.0), error_rate=0.05)
    assert state.current == lower and not state.wanted  # anything finite is better, nothing diverged ever is


def test_pass_asks_for_what_it_needs_first_and_looks_ahead() -> None:
    state = whole_pass({})
    wanted = list(state.wanted.values())
    rate = {"learning_rate": 2.0**-7}
    assert wanted[:3] == [rate, {**rate, "embedding.init": 0.25}, {**rate, "embedding.init": 4.0}]
    assert len(wanted) == 1 + 2 * len(COORDINATES) + 2
    bowl, results = Bowl(noise=0.01), {}
    while (state := whole_pass(results, {"router.lr": 64.0})).wanted:  # one at a time, the last wanted first
        key, point = list(state.wanted.items())[-1]
        results[key] = tuple(bowl.loss(point, seed) for seed in range(3))
    assert state.judgements == whole_pass(Lazy(bowl), {"router.lr": 64.0}).judgements


# -- workers and machines ------------------------------------------------------------------------------------------
def test_killed_workers(url: str, tmp_path: Path) -> None:
    """One worker is killed once, one point kills every worker, one diverges: all are accounted for."""
    bowl = Bowl(kills={RATES[1]: 1, RATES[3]: 99}, folder=tmp_path, diverges_above=RATES[6], log=tmp_path / "log")
    trials = search(url, "killed", grid(0, 1), bowl)
    by_rate = {(trial.user_attrs["point"]["learning_rate"], trial.user_attrs["seed"]): trial for trial in trials}
    both = [(rate, seed) for rate in RATES for seed in (0, 1)]
    # one seed that diverged, or was given up, decides: the other is not trained
    assert sorted(by_rate) == [run for run in both if run not in ((RATES[3], 1), (RATES[7], 1))]
    assert len(trials) == len(by_rate)
    assert statuses(trials) == {"complete": 12, "diverged": 1, "gave up": 1}
    assert all(trial.state.is_finished() for trial in trials)
    assert by_rate[RATES[1], 0].user_attrs["worker_deaths"] == 1 and status_of(by_rate[RATES[1], 0]) == "complete"
    assert by_rate[RATES[3], 0].user_attrs["worker_deaths"] == 3 and status_of(by_rate[RATES[3], 0]) == "gave up"
    assert by_rate[RATES[7], 0].state == TrialState.COMPLETE and by_rate[RATES[7], 0].value == math.inf
    for rate in RATES[:3]:
        for seed in (0, 1):
            assert by_rate[rate, seed].value == pytest.approx(bowl.loss({"learning_rate": rate}, seed))
    results = results_of(trials)
    assert set(results) == {key_of(point) for point in grid().points}
    assert results[key_of({"learning_rate": RATES[3]})][0].loss == math.inf


def test_resume_repeats_nothing(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = Grid(grid().points[:3], (0, 1))
    search(url, "resumed", first, Bowl(log=log))
    assert len(log.read_text().splitlines()) == 6
    trials = search(url, "resumed", grid(0, 1), Bowl(log=log))
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 * len(RATES)
    assert statuses(trials) == {"complete": 2 * len(RATES)}


def test_failure_stops_the_search_and_is_tried_again(url: str) -> None:
    with pytest.raises(SearchError, match=r"learning_rate=0.001953125, seed 0\): RuntimeError: out of memory"):
        search(url, "failure", grid(), Bowl(raises_at=RATES[2]))
    trials = search(url, "failure", grid(), Bowl())
    assert statuses(trials)["complete"] == len(RATES) and statuses(trials)["error"] == 1
    assert not [trial for trial in trials if not trial.state.is_finished()]


def start(url: str, name: str, **bowl: Any) -> subprocess.Popen[bytes]:
    """Another machine."""
    command = [sys.executable, "-m", "tests.tuning.search_process", url, name, json.dumps(bowl, default=str)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)


def wait_until(condition: Any) -> None:
    for _ in range(15000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for five minutes")


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # dead, but nobody has asked: where there is no init
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_killed_machine(tmp_path: Path) -> None:
    """A machine is killed with its trial under way; another one takes that over once it is seen to be dead."""
    journal = f"journal:{tmp_path / 'study.journal'}"
    machine = start(journal, "machines", folder=tmp_path, wait_for=2)  # its run waits for a second one in vain
    wait_until(lambda: list(tmp_path.glob("process-*")))
    wait_until(lambda: next(tmp_path.glob("process-*")).read_text())
    worker = int(next(tmp_path.glob("process-*")).read_text())
    assert alive(worker)
    os.kill(machine.pid, signal.SIGKILL)
    machine.communicate()
    wait_until(lambda: not alive(worker))  # nobody is left to train for
    trials = search(journal, "machines", grid(), Bowl(), grace=1.0)
    assert statuses(trials) == {"lost": 1, "complete": len(RATES)}
    assert len({trial.user_attrs["owner"] for trial in trials}) == 2


def test_two_machines_want_the_same_point(url: str) -> None:
    """Both saw it free: the one that comes first in the storage keeps it, whoever looks first."""
    point = grid().points[0]
    first, second = (Search(open_study(url, "race", {}), grid(), Bowl()) for _ in range(2))
    first._claim_point(Wanted(point, 0), point)
    second._claim_point(Wanted(point, 0), point)
    assert [status_of(trial) for trial in first.study.get_trials()] == ["running", "duplicate"]
    assert first._queue and not second._queue
    assert second._claim() and second.study.get_trials()[-1].user_attrs["point"] == grid().points[1]


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes"])
def test_samplers(url: str, name: str) -> None:
    """They stay within their ranges, learn where to look, go on after an interruption; the best get all seeds."""
    ranges = {"learning_rate": (2.0**-12, 2.0**-2), "router.lr": (1 / 64, 64.0)}
    bowl = Bowl({"init_std": 0.5}, diverges_above=2.0**-3)

    def strategy(count: int) -> Staged:
        return Staged(sampled(count, (0, 1)), 40, name, ranges, {"init_std": 0.5})

    trials = search(url, name, strategy(16), bowl, workers=1)
    samples, finals = trials[:16], trials[16:]
    for trial in samples:
        point = trial.user_attrs["point"]
        assert point["init_std"] == 0.5 and all(low <= point[n] <= high for n, (low, high) in ranges.items())
        assert trial.user_attrs["seed"] == 0
    assert len({key_of(trial.user_attrs["point"]) for trial in samples}) == 16
    early, late = ([t.value for t in part if status_of(t) == "complete"] for part in (samples[:10], samples[10:]))
    assert min(late) < sorted(early)[len(early) // 2]
    course = strategy(16).course(results_of(trials))
    assert course.choice and not course.wanted and {t.user_attrs["seed"] for t in finals} == {0, 1}
    finalists = sorted(samples, key=lambda t: math.inf if t.value is None else t.value)[:3]
    routers = {t.user_attrs["point"].get("router.lr", 1.0) for t in finalists}
    assert course.choice.point.get("router.lr", 1.0) in routers  # of the ladder only the rate is another


def test_coordinate_search_by_workers(url: str) -> None:
    """The whole mode, workers looking ahead: a constant that is 16 times too large is found, nothing else moves."""
    bowl = Bowl(noise=0.005)
    strategy = Coordinate({"learning_rate": 2.0**-7, "router.lr": 16.0}, ("embedding.init", "router.lr", "norm.lr"))
    trials = search(url, "coordinate", strategy, bowl)
    state = strategy.replay(results_of(trials))
    assert state.current == {"learning_rate": 2.0**-7} and not state.wanted
    assert all(trial.state.is_finished() for trial in trials)
    runs = Counter((t.user_attrs["key"], t.user_attrs["seed"]) for t in trials if t.state == TrialState.COMPLETE)
    assert runs.most_common(1)[0][1] == 1


# -- storages ------------------------------------------------------------------------------------------------------
def test_study_of_other_settings_is_refused(url: str) -> None:
    settings = {"model": {"hidden_size": 64}, "training": {"steps": 300}, "seeds": [0, 1]}
    open_study(url, "settings", settings)
    open_study(url, "settings", json.loads(json.dumps(settings)))
    with pytest.raises(SearchError, match=r"made with training.steps = 300, this is 100"):
        open_study(url, "settings", {**settings, "training": {"steps": 100}})
    with pytest.raises(SearchError, match=r"seeds = \[0, 1\], this is \[0\]"):
        open_study(url, "settings", {**settings, "seeds": [0]})


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study.db", "expected a database URL"),
        ("nonsense://x", "cannot be used"),
        ("postgresql://me:secret@127.0.0.1:1/x", "cannot be used: .*refused"),
        ("sqlite:////nowhere/at/all.db", "cannot be used: unable to open"),
        ("journal:/nowhere/at/all", "cannot be used"),
    ],
)
def test_storage_out_of_reach(storage: str, message: str) -> None:
    with pytest.raises(SearchError, match=message) as error:
        open_study(storage, "any", {})
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    if postgres_programs() is None:
        pytest.skip("PostgreSQL's server programs are not installed")
    with postgres() as running:
        yield running


def test_machines_share_a_search_through_postgresql(
    server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Two machines begin on an empty database at once; then the server goes away under a third."""
    url, process = server
    # no run ends before both machines have one
    machines = [start(url, "shared", folder=tmp_path, wait_for=2, seconds=0.05) for _ in range(2)]
    for machine in machines:
        _, said = machine.communicate(timeout=300)
        assert machine.returncode == 0, said.decode()
    trials = open_study(url, "shared", {}).get_trials()
    complete = [trial for trial in trials if status_of(trial) == "complete"]
    assert sorted(trial.user_attrs["point"]["learning_rate"] for trial in complete) == list(RATES)  # each once
    assert len({trial.user_attrs["owner"] for trial in complete}) == 2
    assert set(statuses(trials)) <= {"complete", "duplicate"}

    third = start(url, "third", folder=tmp_path, wait_for=99)
    wait_until(lambda: len(list(tmp_path.glob("process-*"))) > 2)
    process.send_signal(signal.SIGQUIT)  # "immediate shutdown"
    _, said = third.communicate(timeout=300)
    lines = said.decode().strip().splitlines()
    assert third.returncode == 1 and lines[-1].startswith("search: storage postgresql")
    assert "secret" not in lines[-1] and "Traceback" not in said.decode()
