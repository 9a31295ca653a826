"""The shared record of a search: an Optuna study, its storage, what its trials say.

A *trial* is one run: a point and a seed. Optuna keeps it, with `point`, `key`, `seed`, `owner` and, once it has ended,
`share` (of the run's steps), `curve` (training loss as it went) and `failure` among its user attributes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from moe_param.errors import MoeParamError
from moe_param.tuning.points import ENDED, Result, Results
from moe_param.tuning.workers import ATTEMPTS

LAYOUT = 2
"""Of a study's trials; 1 (before 0.2.0) had one trial per point, with all its seeds."""

LIVE = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
RETRIED = ("lost", "withdrawn", "error")


def taken(trial: FrozenTrial, whole: bool) -> bool:
    """Whether a trial is, or will be, its run's result; one that was stopped is none where the whole run is wanted."""
    return trial.state in LIVE and not (whole and trial.state == TrialState.PRUNED)


class SearchError(MoeParamError):
    """A search that cannot go on as asked; the message says why, and what to do."""


def open_study(url: str, name: str, settings: Mapping[str, Any]) -> optuna.Study:
    """Creates or joins the study, and refuses one whose losses would not compare with ours.

    Raises:
        SearchError: a storage that cannot be used, or a study made with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = {"layout": LAYOUT, **settings}
    with storage_errors(url, RuntimeError, OSError):  # tables of another Optuna; a folder that is not there
        study = optuna.create_study(study_name=name, storage=_storage(url), load_if_exists=True)
        if "settings" not in study.user_attrs:
            study.set_user_attr("settings", dict(settings))
        before, now = dict(_flat(study.user_attrs["settings"])), dict(_flat(settings))
    for entry in sorted(before.keys() | now.keys(), key=lambda entry: (entry != "layout", entry)):
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
    """complete · diverged · stopped · failed · running, or why there is no result: lost · duplicate · withdrawn ·
    error · gave up."""
    if trial.state == TrialState.COMPLETE:
        return "diverged" if trial.value == math.inf else "complete"
    if trial.state == TrialState.PRUNED:
        return "stopped"
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get("reason", "lost"))
    return trial.state.name.lower()


def run_of(trial: FrozenTrial) -> tuple[str, int]:
    """What a trial is: a point's key and a seed; of one that was killed before it could sign, nothing's."""
    return trial.user_attrs.get("key", ""), int(trial.user_attrs.get("seed", -1))


def results_of(trials: Iterable[FrozenTrial]) -> Results:
    """What is known of every run. One that its workers or machines never survived counts as diverged."""
    results: dict[str, dict[int, Result]] = {}
    lost: Counter[tuple[str, int]] = Counter()
    for trial in trials:
        (key, seed), status = run_of(trial), status_of(trial)
        share = float(trial.user_attrs.get("share", 1.0))
        if status in ENDED:
            before = results.setdefault(key, {}).get(seed)
            loss = float(trial.value or 0.0) if status == "complete" else math.inf
            if before is None:
                results[key][seed] = Result(loss, share, status == "stopped")
            elif before.stopped and status != "stopped":  # it was needed whole after all
                results[key][seed] = Result(loss, before.share + share)
        else:
            lost[key, seed] += {"gave up": ATTEMPTS, "lost": 1}.get(status, 0)
    for (key, seed), times in lost.items():
        if times >= ATTEMPTS:
            results.setdefault(key, {}).setdefault(seed, Result(math.inf))
    return results
