"""A run that is a command of the user's: what it reports, every way in which it fails, and that it leaves nothing."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import moe_param
from moe_param.errors import InputError
from moe_param.trial import ReportError
from moe_param.tuned import read_tuned
from moe_param.tuning import commands
from moe_param.tuning.commands import CommandRunner, last_words
from moe_param.tuning.workers import Answer, Pool, Progress
from tests.tuning.test_ledger import alive, wait_until

ROOT = Path(__file__).parents[2]
POINT = {"learning_rate": 2.0**-6, "init_std": 0.04, "router.lr": 4.0, "expert_down.init": 0.25}
OVERRIDES = {
    **{"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
}
YAML = {
    **{"model_type": "mixtral", "overrides": OVERRIDES, "spec": "moe-completep", "weight_decay": 0.1},
    **dict.fromkeys(("learning_rate", "init_std", "constants")),
}


def base(*seeds: int) -> Any:
    return SimpleNamespace(settings={"seeds": list(seeds)}, yaml=YAML)


def script(folder: Path, code: str) -> str:
    """A command that runs `code`, where `tuned` and `seed` are what it was given."""
    path = folder / "own script.py"  # with a space
    path.write_text(
        f"import os, sys, time, moe_param\nfrom moe_param import report\ntuned, seed = sys.argv[1:]\n{code}\n"
    )
    return f"{sys.executable} '{path}' {{trial}} {{seed}}"


def answer(folder: Path, code: str, point: dict[str, float] = POINT, watch: Any = None, **options: Any) -> Answer:
    runner = CommandRunner(script(folder, code), folder=folder / "runs", **options)
    found = runner.bind(base(3, 4))(point, 3, watch or (lambda share, loss: True))
    assert isinstance(found, Answer)
    return found


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


# -- what goes in and out ------------------------------------------------------------------------------------------
def test_the_script_gets_the_numbers_and_its_loss_comes_back(tmp_path: Path) -> None:
    code = "import shutil; shutil.copy(tuned, 'TUNED'); report(float(seed) / 2); print('said')"
    assert answer(tmp_path, code.replace("TUNED", str(tmp_path / "seen.yaml"))) == Answer(1.5)
    seen = read_tuned(tmp_path / "seen.yaml")
    assert seen.numbers.learning_rate == 2.0**-6 and seen.init_std == 0.04 and seen.numbers.weight_decay == 0.1
    assert seen.constants == {"router": {"lr": 4.0}, "expert_down": {"init": 0.25}}
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "stdout").read_text() == "said\n"
    # the base's own numbers are not said, as in tuned.yaml
    answer(tmp_path, "report(1.0)", {"learning_rate": 0.5})
    files = [yaml.safe_load(path.read_text()) for path in (tmp_path / "runs").glob("*/tuned.yaml")]
    assert [file["learning_rate"] for file in files if "init_std" not in file and "constants" not in file] == [0.5]


def test_a_run_says_how_it_goes(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    code = "assert all(report(4.0 - i, step=i, steps=4) for i in range(1, 5)); report(0.25)"
    assert answer(tmp_path, code, watch=lambda *said: seen.append(said) or True) == Answer(0.25)
    assert seen == [(0.25, 3.0), (0.5, 2.0), (0.75, 1.0), (1.0, 0.0)]
    # the same folder a second time: nothing of the first is left
    assert answer(tmp_path, "report(9.0)") == Answer(9.0)


UNTIL_STOPPED = """
for i in range(1, 10_000):
    if not report(5.0, step=i, steps=10_000):
        break
    time.sleep(0.01)
"""


def test_a_run_is_stopped(tmp_path: Path) -> None:
    found = answer(tmp_path, UNTIL_STOPPED, watch=lambda share, loss: share < 0.001)
    assert found == Answer(5.0, found.share, stopped=True) and 0.001 <= found.share < 0.5
    # an evaluation after that is of another run than was asked for; ending badly is no failure then
    code = UNTIL_STOPPED + "report(1.0); sys.exit(3)"
    assert answer(tmp_path, code, watch=lambda share, loss: False).stopped


def test_a_script_that_does_not_listen_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "GRACE", 0.2)
    code = "report(5.0, step=1, steps=2); open('PID', 'w').write(str(os.getpid())); time.sleep(600)"
    found = answer(tmp_path, code.replace("PID", str(tmp_path / "pid")), watch=lambda share, loss: False)
    assert found == Answer(5.0, 0.5, stopped=True)


@pytest.mark.parametrize(
    ("code", "share"), [("report(float('nan'))", 1.0), ("report(float('inf'), step=1, steps=4) or sys.exit(1)", 0.25)]
)
def test_a_loss_that_left_the_finite_numbers_is_a_result(tmp_path: Path, code: str, share: float) -> None:
    assert answer(tmp_path, code) == Answer(math.inf, share)


FAILURES = {
    "crash": (
        "[print(i, file=sys.stderr) for i in range(20)]; raise ValueError('my data')",
        r"exit code 1; .* says:\n1\d\n",
    ),
    "killed": ("import signal; os.kill(os.getpid(), signal.SIGKILL)", r"killed by signal 9 \(9: out of memory\?\)"),
    "silent": ("print('all is well')", r"ended without moe_param.report\(loss\); .* says:\nall is well$"),
    "only steps": ("report(2.0, step=4, steps=4)", r"ended without moe_param.report\(loss\)"),
    "no number": ("report('abc')", r"ReportError: report: loss is 'abc': expected one number$"),
    "crash at the end": ("report(2.0); sys.exit('no space left')", r"exit code 1; .* says:\nno space left$"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_recorded(tmp_path: Path, name: str) -> None:
    code, expected = FAILURES[name]
    found = answer(tmp_path, code)
    assert found.loss == math.inf and not found.stopped
    assert found.failure and re.search(expected, found.failure, re.DOTALL), found.failure
    if name == "crash":
        assert found.failure.endswith("ValueError: my data") and len(found.failure.splitlines()) == 1 + commands.LINES


def test_a_hang_is_ended_at_the_limit(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('loading', file=sys.stderr, flush=True); time.sleep(600)"
    )
    found = answer(tmp_path, code, limit=3.0)
    assert found.failure and found.failure.startswith("took longer than the limit of 3 s; ")
    assert found.failure.endswith("says:\nloading")
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_full_disk_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, "report(1.0)")
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "tuned.yaml").unlink()
    (folder / "tuned.yaml").symlink_to("/dev/full")
    found = answer(tmp_path, "report(1.0)")
    assert found.failure and found.failure.endswith("No space left on device")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    other = {**POINT, "learning_rate": 0.5}
    assert "exit code 1; the disk is full" in (answer(tmp_path, "sys.exit(1)", other).failure or "")


def test_a_launchers_words_are_left_out(tmp_path: Path) -> None:
    own = "loading\nTraceback (most recent call last):\n  File train.py\nValueError: mine\n"
    launcher = (
        "Traceback (most recent call last):\n  File runpy\n    run\n"
        "  File /x/accelerate/commands/launch.py, line 1\nCalledProcessError\n"
    )
    torchrun = "E1128 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)\n"
    for said in (own + launcher, own + torchrun + launcher):
        (tmp_path / "stderr").write_text(said)
        assert last_words(tmp_path / "stderr") == own.strip()
    (tmp_path / "stderr").write_text(launcher)  # it has nothing but these
    assert last_words(tmp_path / "stderr") == launcher.strip()


# -- before the first run ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("true --seed {seed}", r"lacks \{trial\}, the file with the numbers to try: e.g. python train.py --tuned"),
        ("true {trial}", r"lacks \{seed\}: runs with the seeds 0, 1 would all be the same"),
        ("true '{trial} {seed}", "no closing quotation"),
        ("", "there is no program ''"),
        ("no-such-program {trial} {seed}", "there is no program 'no-such-program' to start"),
        ("cd there && true {trial} {seed}", "&& is for a shell, write sh -c"),
    ],
)
def test_what_is_wrong_with_a_command(command: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CommandRunner(command).bind(base(0, 1))


def test_one_seed_needs_no_place_and_a_shell_may_be_asked_for(tmp_path: Path) -> None:
    CommandRunner("true {trial}").bind(base(0))
    command = "sh -c 'test -f {trial} && echo \"{seed} $0\" >&2; exit 7' word"
    found = CommandRunner(command, folder=tmp_path).bind(base(0, 1))(POINT, 1, lambda share, loss: True)
    assert found.failure and found.failure.endswith("says:\n1 word")


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": math.nan}, {"gpus_per_run": 0}, {"gpus_per_run": 99}])
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=name):
        CommandRunner("true {trial} {seed}", **options).bind(base(0))


def test_gpus_are_dealt_to_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('OMP_NUM_THREADS')); report(1.0)"

    def seen(worker: str, **options: Any) -> str:
        monkeypatch.setenv("MOE_PARAM_WORKER", worker)
        answer(tmp_path, code, **options)
        return next((tmp_path / "runs").glob("*/stdout")).read_text().strip()

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert seen("1") == f"{os.environ.get('CUDA_VISIBLE_DEVICES')} 5"  # no GPU: left alone
    monkeypatch.setattr(commands, "visible_gpus", lambda: ["2", "3", "5", "7"])
    assert [seen(worker) for worker in "0134"] == ["2 5", "3 5", "7 5", "2 5"]
    assert [seen(worker, gpus_per_run=2) for worker in "012"] == ["2,3 5", "5,7 5", "2,3 5"]
    assert CommandRunner("true {trial}", gpus_per_run=2).workers() == 2


# -- report ---------------------------------------------------------------------------------------------------------
def test_report_without_a_search_does_nothing_but_look_at_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("MOE_PARAM_REPORT", raising=False)
    assert moe_param.report(2.0) and moe_param.report(torch.tensor([2.0]), step=0, steps=3)
    assert moe_param.report(math.nan), "nobody is there to stop it"
    for arguments in ({"loss": "2.0"}, {"loss": None}, {"loss": torch.ones(2)}, {"loss": 1.0, "step": 1}):
        with pytest.raises(ReportError, match=r"^report: "):
            moe_param.report(**arguments)  # type: ignore[arg-type]
    for step, steps in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ReportError, match="step ≤ steps"):
            moe_param.report(1.0, step=step, steps=steps)


def test_every_process_is_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 asks before, and after, the wish to stop is there; it gets what process 0 got at that call."""
    file = tmp_path / "reports"
    code = (
        "from moe_param import report\nprint([report(9.0, step=i, steps=9) for i in range(3)], report(9.0), flush=True)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "RANK": "1", "MOE_PARAM_REPORT": str(file)},
        stdout=subprocess.PIPE,
        text=True,
    )
    monkeypatch.setenv("MOE_PARAM_REPORT", str(file))
    monkeypatch.setenv("RANK", "0")
    told = [moe_param.report(3.0, step=0, steps=9)]
    Path(f"{file}.stop").touch()
    told.append(moe_param.report(3.0, step=1, steps=9))
    Path(f"{file}.stop").unlink()  # would be True again, had it a will of its own
    told.append(moe_param.report(3.0, step=2, steps=9))
    moe_param.report(3.0)
    assert told == [True, False, True]
    assert other.communicate(timeout=120)[0].strip() == f"{told} True"
    assert '"loss": 9.0' not in file.read_text()


def test_a_process_that_reports_alone_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_param.trial.WAIT", 0.1)
    monkeypatch.setenv("MOE_PARAM_REPORT", str(tmp_path / "reports"))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ReportError, match="call number 1: call it in every process equally often"):
        moe_param.report(1.0)


# -- in a pool ------------------------------------------------------------------------------------------------------
@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(CommandRunner(script(tmp_path, UNTIL_STOPPED), folder=tmp_path / "runs").bind(base(0, 1)), 1)
    yield made
    made.stop()


def test_the_search_stops_a_run(pool: Pool) -> None:
    pool.start("a", POINT, 1)
    found: list[Any] = []
    deadline = time.monotonic() + 120
    while not found or isinstance(found[-1], Progress):
        assert time.monotonic() < deadline
        for _, said in pool.answers(timeout=1.0):
            found.append(said)
            pool.cancel("a")
    assert found[-1].stopped and found[-1].failure is None and found[0] == Progress(0.0001, 5.0)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_command(tmp_path: Path, sent: signal.Signals) -> None:
    """Of one that does not heed SIGTERM, with a child in another session, when the search is killed or told Ctrl-C."""
    code = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open({str(tmp_path / 'new')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pids')!r}); time.sleep(600)"
    )
    search = (
        "import sys; from pathlib import Path; from moe_param.tuning.workers import Pool\n"
        "from moe_param.tuning.commands import Command, parts_of\n"
        "pool = Pool(Command(parts_of(sys.argv[1], [0]), {}, Path(sys.argv[2])), 1)\n"
        "try:\n    pool.start('a', {'learning_rate': 1.0}, 0)\n    while True: pool.answers(timeout=1.0)\n"
        "finally: pool.stop()"
    )
    command = [sys.executable, "-c", search, script(tmp_path, code), str(tmp_path / "runs")]
    parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_until(lambda: parent.poll() is not None or (tmp_path / "pids").exists())
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    os.killpg(parent.pid, sent)
    parent.wait(120)
    wait_until(lambda: not any(map(alive, pids)))


# -- the real thing -------------------------------------------------------------------------------------------------
EXAMPLE = "recipes.examples.tune_own_script"


@pytest.mark.slow
def test_two_processes_of_accelerate(tmp_path: Path) -> None:
    """The example under `accelerate launch`: its result, its end by the search, and its failure."""
    launch = (
        f"{sys.executable} -m accelerate.commands.launch --config_file {ROOT}/recipes/accelerate/cpu-2-processes.yaml"
    )
    runner = CommandRunner(f"{launch} -m {EXAMPLE} --tuned {{trial}} --seed {{seed}} --steps 20", folder=tmp_path)
    seen: list[float] = []
    found = runner.bind(base(0))(POINT, 0, lambda share, loss: seen.append(loss) or True)
    assert found.failure is None and found.share == 1.0 and 2.0 < found.loss < seen[0] - 0.3 and len(seen) == 20
    stopped = runner.bind(base(0))(POINT, 0, lambda share, loss: share < 0.3)
    assert stopped.stopped and 0.3 <= stopped.share < 1.0 and stopped.failure is None
    bad = runner.bind(base(0))({**POINT, "no_role.lr": 2.0}, 0, lambda share, loss: True)
    assert bad.failure and "no_role" in bad.failure and "torch/distributed" not in bad.failure, bad.failure
