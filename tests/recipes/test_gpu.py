"""What waits for a GPU: every line of it runs here, is killed here, and goes on here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from moe_param.errors import InputError
from moe_param.folder_lock import folder_lock
from recipes.bench import balance, goals
from recipes.bench.goals import GOALS, held
from recipes.bench.gpu import __main__ as command
from recipes.bench.gpu import machine, packages, report, rows, running, setup, training, tuning, wheels
from recipes.bench.gpu.running import DONE, FAILED, LIMIT, NO_TIME, NOT_BUILT, NOT_RUN, Outcome, Run, run_all
from recipes.bench.gpu.steps import NOT_BUILT_STATUS, STEPS, Step
from tests.recipes.gpu_run import MACHINE
from tests.recipes.gpu_step import step

ROOT = Path(__file__).parents[2]
SETUP = {
    "machine": {"device": "a GPU", "torch": "2", "transformers": "5", "nvcc": None},
    "packages": {"rich": {"needed": ">=13", "here": "15"}, "datasets": {"needed": ">=4", "here": None}},
    "installed": {"rich": "rich-15-py3-none-any.whl"},
    "lacking": {"datasets": "nothing is here, >=4 is needed"},
    "kernels": "installed. ok",
}


def ended(steps: list[Step], folder: Path, seconds: float = 600, **options: Any) -> dict[str, Outcome]:
    run = Run(folder, "cpu", False, os.environ)
    return {found.step: found for found in run_all(steps, run, MACHINE, time.monotonic() + seconds, **options)}


def starts(folder: Path, name: str) -> int:
    path = folder / f"{name}.starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended, also where nobody has fetched its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


# -- limits, failures, resuming --------------------------------------------------------------------------------------
def test_each_step_comes_to_its_end_and_the_next_one_runs(tmp_path: Path) -> None:
    """One that works, one that raises, one that hangs: killed at its limit with what it started, and recorded."""
    steps = [
        step("a", "works"),
        step("b", "fails"),
        step("c", "hangs", limit=4.0),
        step("d", "works", needs="b"),
        step("e", "works", needs="a"),
        Step("f", "what is not there", not_built="nobody built it"),
        step("g", "is not built"),
    ]
    found = ended(steps, tmp_path)
    assert {name: outcome.state for name, outcome in found.items()} == {
        "a": DONE, "b": FAILED, "c": LIMIT, "d": NOT_RUN, "e": DONE, "f": NOT_BUILT, "g": NOT_BUILT
    }  # fmt: skip
    assert (found["f"].reason, found["g"].reason) == ("nobody built it", "at work")  # the last that it said
    assert "RuntimeError: no kernel image" in found["b"].reason and "raise RuntimeError" in found["b"].reason
    assert found["c"].reason == "after 4 s. at work" and found["d"].reason == "needs b"
    wait_for(lambda: gone(int((tmp_path / "c.child").read_text())))

    again = ended(steps[:6], tmp_path)
    assert list(again.values()) == list(found.values())[:6]
    assert [starts(tmp_path, name) for name in "abcde"] == [1, 1, 1, 0, 1]
    alone = ended([step("a", "works"), step("b", "works"), step("h", "works")], tmp_path, retry=True, only=["h"])
    assert (alone["a"], alone["b"], alone["h"].state) == (found["a"], found["b"], DONE)  # the others as they were
    assert ended([step("i", "works")], tmp_path, only=["a"])["i"].state == NOT_RUN
    retried = ended([step("b", "works"), *steps[2:4]], tmp_path, retry=True)
    assert [starts(tmp_path, name) for name in "abcdehi"] == [1, 2, 2, 1, 1, 1, 0]
    assert (retried["b"].state, retried["d"].state, ended(steps, tmp_path)["b"].state) == (DONE, DONE, DONE)


def test_killed_midway_it_repeats_the_running_step_alone(tmp_path: Path) -> None:
    """SIGKILL, which nothing can answer: the step that ran ends too, and the same command goes on with it."""
    words = [sys.executable, "-m", "tests.recipes.gpu_run", str(tmp_path)]
    process = subprocess.Popen([*words, "hangs"], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: starts(tmp_path, "two") == 1)
    process.kill()
    process.wait()
    wait_for(lambda: gone(int((tmp_path / "two.child").read_text())))
    done = subprocess.run([*words, "works"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["one done", "two done", "three done"]
    assert [starts(tmp_path, name) for name in ("one", "two", "three")] == [1, 2, 1]


def test_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step begins that could not get anywhere; one that is cut is not over, and the next run has it again."""
    found = ended([step("a", "works")], tmp_path, seconds=1)
    assert found["a"].state == NO_TIME and not starts(tmp_path, "a")
    monkeypatch.setattr(running, "LEAST", 0.0)
    found = ended([step("a", "works"), step("b", "hangs")], tmp_path, seconds=8)
    assert (found["a"].state, found["b"].state) == (DONE, NO_TIME)
    assert "the same command repeats it" in found["b"].reason
    assert ended([step("b", "works")], tmp_path)["b"].state == DONE and starts(tmp_path, "b") == 2


def test_results_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    ended([step("a", "works")], tmp_path)
    run = Run(tmp_path, "cpu", True, os.environ)
    with pytest.raises(InputError, match=r"torch was 2, here it is 3\. Give another --out"):
        list(run_all([step("a", "works")], run, {**MACHINE, "torch": "3"}, time.monotonic() + 60))


QUICK = ("a", "c", "e", "e, Muon", "f", "h")
"""Steps whose scripts no other test runs as they are."""


# -- the dry run -----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib")
@pytest.mark.parametrize("only", [QUICK, pytest.param((), marks=pytest.mark.long)], ids=["quick", "all"])
def test_dry_run(only: tuple[str, ...], tmp_path: Path) -> None:
    """The whole command on the CPU with Triton's kernels interpreted: what CI has time for, or every step."""
    words = [
        "--device",
        "cpu",
        "--smallest",
        "--minutes",
        "60",
        "--out",
        str(tmp_path),
        "--wheels",
        str(tmp_path / "none"),
        *(("--only", *only) if only else ()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    call = [sys.executable, "-m", "recipes.bench.gpu", *words]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    left = json.loads((tmp_path / "report.json").read_text())
    failed = {found["step"]: found["reason"] for found in left["steps"] if found["state"] in (FAILED, LIMIT)}
    assert done.returncode == 0 and not failed, (done.stderr, failed)
    assert [found["state"] for found in left["steps"]] == [
        DONE if one.name in (only or {every.name for every in STEPS}) else NOT_RUN for one in STEPS
    ]
    text = (tmp_path / "report.md").read_text()
    for goal in GOALS.values():
        assert f"| {goal.what} | {goal.text} |" in text
    assert "A dry run" in text and "| number | goal | dry run, does not count |" in text
    again = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and json.loads((tmp_path / "report.json").read_text())["steps"] == left["steps"]
    if only:
        return
    assert {found["goal"] for found in left["goals"]} == set(GOALS) - {"dense"}  # that one is for large shapes
    assert not any(found["wrong"] for found in left["results"]["a"]["results"])
    counts = left["results"]["b"]["results"][0]["counts"]
    assert counts["passed"] > 25 and set(counts) == {"passed", "skipped"}
    for name in ("c", "g, c again"):
        assert all("megablocks (torch)" in case["implementations"] for case in left["results"][name]["results"])
    assert [found["trials"] for found in left["results"]["h"]["results"]] == [2]


def test_the_dry_run_has_to_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu"])
    assert "give --smallest too" in capsys.readouterr().err
    with folder_lock(tmp_path, "something"), pytest.raises(SystemExit, match="is in use"):
        command.main(["--out", str(tmp_path)])
    run = Run(tmp_path, "cuda", False, {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="finds no CUDA device here; the dry run is --device cpu --smallest"):
            command.prepare(run, tmp_path)
    broken = Run(tmp_path, "cuda", False, {**os.environ, "PYTHONPATH": str(tmp_path)})
    (tmp_path / "packaging.py").write_text("raise ImportError('no packaging')")
    with pytest.raises(SystemExit, match=r"(?s)setup failed.*no packaging"):
        command.prepare(broken, tmp_path)


# -- what only a GPU has, made up ------------------------------------------------------------------------------------
def test_the_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    found = machine.look()
    assert (found["device"], found["capability"], found["GPU memory, GiB"]) == ("NVIDIA H100", "9.0", 80.0)
    assert machine.said("no such program") is None and machine.said("false") is None


def test_synchronizations_are_counted_and_the_modes_own_warning_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says when the mode is first switched on has the same words in it (libtorch_python of 2.11)."""
    import warnings

    modes = []

    def switched(mode: str) -> None:
        modes.append(mode)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=1,
        )

    def waits() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switched)
    assert balance.synchronizations(waits, "cuda") == 3 and modes == ["warn", "default"]
    assert balance.synchronizations(waits, "cpu") == 0


def test_tuning_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the public command, on the GPU where that can be asked for; else it is not built, never a CPU's search."""
    ran: list[list[str]] = []

    def run(words: list[str], **options: Any) -> Any:
        ran.append(words)
        if "--help" not in words:
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir()
            (folder / "tuned.yaml").write_text("learning_rate: 0.5\ninit_std: 0.02\n")
            trials = [{"loss": 2.5, "seconds": 3.0}, {"loss": 2.0, "seconds": 4.0}, {"loss": None, "seconds": 9.0}]
            (folder / "tune.json").write_text(json.dumps({"trials": trials}))
        return SimpleNamespace(stdout=said)

    monkeypatch.setattr(tuning.subprocess, "run", run)
    words = ["--out", str(tmp_path / "h.json"), "--device", "cuda"]
    said = "  --workers N   runs at a time, one on each --devices-like thing\n"
    assert tuning.main(words) == NOT_BUILT_STATUS and len(ran) == 1
    assert "moe-param tune has no --device" in capsys.readouterr().out

    said = "  --device DEVICE   where to train\n"
    assert tuning.main(words) == 0
    assert ran[-1][:4] == list(tuning.TUNE) and ran[-1][-2:] == ["--device", "cuda"]
    assert ran[-1][ran[-1].index("--workers") + 1] == "1" and "--overrides" not in ran[-1]
    found = json.loads((tmp_path / "h.json").read_text())["results"]
    assert found == [
        {"name": "tune", "trials": 2, "best_loss": 2.0, "learning_rate": 0.5, "init_std": 0.02, "seconds_of_runs": 7.0}
    ]


def test_the_base_that_is_tuned_has_some_30M_active_parameters() -> None:
    """By hand: attention, k of the experts with three matrices each, router and norms a layer; embedding, head."""
    sizes = yaml.safe_load(tuning.CONFIG.read_text())["overrides"]
    width, expert = sizes["hidden_size"], 3 * sizes["hidden_size"] * sizes["moe_intermediate_size"]
    layer = 4 * width**2 + sizes["num_experts_per_tok"] * expert + sizes["num_experts"] * width
    active = sizes["num_hidden_layers"] * layer + 2 * sizes["vocab_size"] * width
    assert 30e6 < active < 40e6


def test_what_a_training_run_on_a_gpu_logs(tmp_path: Path) -> None:
    """Its first speeds do not count; the share of the peak is there; and two runs beside each other."""
    speeds, losses = [1.0, 90.0, 100.0, 110.0, 105.0], [5.5, 5.0, 4.0, 3.5, 3.0]
    lines = [
        {"step": i, "loss": x, "tokens_per_second": s, "mfu": s / 400} for i, (x, s) in enumerate(zip(losses, speeds))
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 5, "eval_loss": 3.1}])
    )
    summary = {"validation_loss": 3.1, "parameters": 9, "active_parameters": 3, "steps": 5, "seconds": 1.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    ours = training.results(tmp_path)
    assert (ours["tokens_per_second"], ours["mfu"], ours["losses"]) == (102.5, 0.25, losses)
    theirs = {**ours, "tokens_per_second": 82.0, "validation_loss": 3.15, "losses": [5.5, 5.0, 4.0, 3.0, 3.2]}
    found = training.compare(ours, theirs, "bfloat16")
    assert found["losses_apart"] == {"median": 0.0, "most": 0.5}
    assert [(goal["goal"], goal["value"], goal["met"]) for goal in found["goals"]] == [
        ("training", 1.25, True), ("same loss", 0.05, False)
    ]  # fmt: skip
    assert not training.compare(ours, theirs, "float32")["goals"]  # there the two do not multiply alike


# -- the report ------------------------------------------------------------------------------------------------------
def test_the_goals_in_the_docs_are_these() -> None:
    """With the numbers of the report that is checked in, where there is one."""
    measured = ROOT / "recipes" / "bench" / "results" / "gpu.json"
    found = json.loads(measured.read_text("utf-8"))["goals"] if measured.exists() else []
    assert goals.table(found) in (ROOT / "docs" / "experts.md").read_text("utf-8")


def test_the_worst_number_counts() -> None:
    found = [held("eager", value) for value in (3.0, 1.4, 2.0)] + [held("balancing", value) for value in (1.001, 1.01)]
    worst = goals.worst(found)
    assert (worst["eager"]["value"], worst["eager"]["met_by"], worst["eager"]["met"]) == (1.4, 2, False)
    assert (worst["balancing"]["value"], worst["balancing"]["met_by"]) == (1.01, 1)
    table = goals.table([*found, held("step, Adam", 1.004)])
    assert "| ≥ 1.5 | 1.4 at worst, met by 2 of 3 |" in table and "| ≤ 1.005 | 1.004, met |" in table
    assert table.count("not measured") == len(GOALS) - 3


def test_numbers_stand_beside_their_goals_and_failures_say_why(tmp_path: Path) -> None:
    steps = [step("a", "works"), step("b", "fails"), Step("h", "tuning", not_built="no workers"), step("i", "works")]
    found = list(ended(steps[:3], tmp_path).values())
    (tmp_path / "i.json").write_text('{"results": [')  # what a kill can leave
    left, text = report.write(steps, found, Run(tmp_path, "cuda", False, os.environ), SETUP, "make gpu")
    assert json.loads((tmp_path / "report.json").read_text()) == left and (tmp_path / "report.md").read_text() == text
    assert text.startswith("# a GPU, torch 2, transformers 5\n\n```\nmake gpu\n```") and "dry run" not in text
    assert "| ≥ 1.5 | 1.25 at worst, met by 2 of 4 |" in text  # what b had found before it failed counts too
    assert "RuntimeError: no kernel image\n```" in text and "| h | tuning | not built: no workers | 0 |" in text
    assert "- nvcc: none" in text and "| datasets | >=4 | none |" in text and "Lacking: datasets (nothing" in text
    assert left["results"]["i"] == {} and "| i | a step that works | not there yet when this was written | |" in text


def test_an_experts_layer_is_a_table() -> None:
    case = {
        **{"shape": "E8k2F4096H1024", "tokens": 32768, "routing": "skewed", "not_run": {"sonicmoe": "no kernel"}},
        "implementations": {
            "dense": {"seconds": 0.01, "over_dense": 1.0},
            "eager": {"seconds": 0.05, "over_dense": 5.0},
        },
    }
    without = {**case, "routing": "balanced", "implementations": {"grouped_mm": {"seconds": 0.02}}}
    choice = {"name": "provider", "line": "FASTEST[(9, 0)] = 'torch'", "torch_over_grouped_gemm": 0.8}
    text = rows.describe([case, without, choice])
    assert "| E8k2F4096H1024 | 32768 | skewed | 10 | 5.00 | - |" in text
    assert "| balanced | - | - | - |" in text and "- not run: sonicmoe, 2 of 2: no kernel" in text
    assert "- provider: line FASTEST[(9, 0)] = 'torch', torch_over_grouped_gemm 0.8" in text


def test_a_line_says_what_a_ratio_is_of() -> None:
    row = {"name": "native bias", "target": 1.005, "ratio": 1.02, "ours": "with", "theirs": "without", "goals": []}
    assert rows.describe([row]) == "- native bias: with / without 1.02, target 1.005"
    assert rows.describe([{"counts": {"passed": 3, "skipped": 1}}]) == "- passed 3, skipped 1"


def test_errors_stand_beside_eagers_and_what_is_wrong_is_named() -> None:
    case = {"shape": "E4k1F512H256", "tokens": 1024, "routing": "skewed"}
    ours, eager = {"output": 0.004, "down_proj": 0.5}, {"output": 0.003, "down_proj": 0.0041}
    text = rows.describe([{**case, "ours": ours, "eager": eager, "wrong": ["down_proj"]}])
    assert "| shape | tokens | routing | output | down_proj | wrong |" in text
    assert "| E4k1F512H256 | 1024 | skewed | 0.004 (0.003) | 0.5 (0.0041) | down_proj |" in text


def test_each_test_is_on_disk_as_it_ends(tmp_path: Path) -> None:
    """One that passes, fails, is skipped, cannot be collected; and what a kill would leave of one that runs."""
    (tmp_path / "test_some.py").write_text(
        "import json, pathlib, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_left_out(): pass\n"
        "def test_running():\n"
        f"    rows = json.loads(pathlib.Path({str(tmp_path / 'out.json')!r}).read_text())['results']\n"
        "    assert rows[0]['counts'] == {'failed': 2, 'passed': 1, 'skipped': 1, 'running': 1}\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    arguments = ["--out", str(tmp_path / "out.json"), "--smallest"]
    code = f"import sys; from recipes.bench.gpu import gpu_tests; gpu_tests.TESTS = {str(tmp_path)!r}"
    words = [sys.executable, "-c", f"{code}; sys.exit(gpu_tests.main({arguments!r})[0])"]
    options = {**os.environ, "PYTEST_ADDOPTS": "--continue-on-collection-errors"}
    done = subprocess.run(words, cwd=ROOT, env=options, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results[0]["counts"] == {"failed": 2, "passed": 2, "skipped": 1}
    said = {found["test"].rsplit("/", 1)[-1]: found["reason"] for found in results[1:]}
    assert said["test_some.py::test_left_out"] == "no GPU"
    assert "one is not two" in said["test_some.py::test_bad"]
    lines = rows.describe(results)
    assert "one is not two" in lines and "- skipped, 1: no GPU" in lines and "failed: `" in lines


# -- packages --------------------------------------------------------------------------------------------------------
def wheel(folder: Path, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> Path:
    """A real wheel with one module that says its version."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        file.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata, ""]))
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_only_what_is_missing_is_installed_and_nothing_there_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    wheel(folder, "one", "2.0", "two>=1", "unused; python_version < '3'", "more; extra == 'all'")
    newer, old = wheel(folder, "two", "1.5"), wheel(folder, "two", "1.1")
    wheel(folder, "kept", "9.0")
    wheel(folder, "old", "3.0")
    wheel(folder, "foreign", "1.0", tag="cp27-cp27m-win32")
    asked = [Requirement(text) for text in ("one", "kept>=1", "old>=2", "foreign", "absent>=7")]
    here = {"kept": "1.0", "old": "1.0", "absent": "6"}
    found = packages.missing(asked, packages.wheels_here(folder), here)
    assert [(name, path.name) for name, path in found["install"].items()] == [
        ("one", "one-2.0-py3-none-any.whl"), ("old", "old-3.0-py3-none-any.whl"), ("two", newer.name)
    ]  # fmt: skip
    assert found["lacking"] == {
        "foreign": "nothing is here, any version is needed",
        "absent": "6 is here, >=7 is needed",
    }
    target = tmp_path / "site"
    packages.install(found["install"].values(), target)
    assert packages.installed([str(target)]) == {"one": "2.0", "old": "3.0", "two": "1.5"}
    packages.install([old], target)  # a target that holds another version gets this one
    assert packages.installed([str(target)])["two"] == "1.1"
    with pytest.raises(subprocess.CalledProcessError):
        packages.install([tmp_path / "none.whl"], target)


def test_the_setup_installs_and_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also MegaBlocks' kernels, where there are none, from their sources."""
    wheel(tmp_path, "not_there_before", "2.0")
    asked = [Requirement(text) for text in ("not-there-before>=1", "torch>=2.9", "absent")]
    monkeypatch.setattr(packages, "needed", lambda: asked)
    monkeypatch.setattr(setup, "install_kernels", lambda wheels, target: f"installed. {wheels.name} {target.name}")
    monkeypatch.setattr(setup, "KERNELS_IN", "no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    words = ["--wheels", str(tmp_path), "--target", str(tmp_path / "site"), "--out", str(tmp_path / "setup.json")]
    found = setup.main(words)
    assert json.loads((tmp_path / "setup.json").read_text()) == found
    assert found["packages"]["not-there-before"] == {"needed": ">=1", "here": "2.0"}
    assert found["packages"]["torch"]["here"] == torch.__version__ == found["machine"]["torch"]
    assert found["installed"] == {"not-there-before": "not_there_before-2.0-py3-none-any.whl"}
    assert list(found["lacking"]) == ["absent"] and found["kernels"] == f"installed. {tmp_path.name} site"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib")
def test_what_is_needed() -> None:
    names = {requirement.name for requirement in packages.needed()}
    assert {"torch", "transformers", "rich", "datasets", "optuna", "matplotlib", "pytest"} <= names
    assert not names & {"moe-param", "psycopg", "ruff", "trl"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib")
@pytest.mark.long
def test_wheels_and_sources_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real, where a package index is in reach: another Python's wheels, and sources that a CPU cannot build; then
    MegaBlocks' kernels from them into a private folder, without network."""
    try:
        found = wheels.main(["--out", str(tmp_path / "wheels")])
    except SystemExit as reason:
        if "No matching distribution" in str(reason):
            pytest.skip("no package index in reach")
        raise
    names = {re.split(r"-\d", path.name)[0] for path in found}
    assert {"rich", "typer", "datasets", "optuna", "sqlalchemy", "megablocks", "grouped_gemm", "stanford_stk"} <= names
    assert not names & {"torch", "transformers", "numpy", "triton", "pyarrow"}
    assert sum(path.stat().st_size for path in found) < 60e6
    compiled = [path.name for path in found if "manylinux" in path.name and "abi3" not in path.name]
    assert compiled and all("cp312" in name or "py3-none" in name for name in compiled)

    monkeypatch.setattr(setup, "KERNELS", (*setup.KERNELS, "--force"))  # they are here already
    said = setup.install_kernels(tmp_path / "wheels", tmp_path / "site")
    assert said.startswith("installed"), said
    assert (tmp_path / "site" / "megablocks" / "backend" / "kernels.py").exists()


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "needed", list)
    monkeypatch.setattr(wheels, "EXTRA", ("big",))

    def download(arguments: list[str], folder: Path, environment: Any = None) -> None:
        if "big" in arguments:
            with wheel(folder, "big", "1.0", "big").open("ab") as file:
                file.truncate(61_000_000)

    monkeypatch.setattr(wheels, "requirements_of", lambda path, environment: [Requirement("big"), Requirement("torch")])
    monkeypatch.setattr(wheels, "pip_download", download)
    with pytest.raises(SystemExit, match=r"holds 61 MB, 60 are allowed. The largest: big-1.0-py3-none-any.whl 61"):
        wheels.main(["--out", str(tmp_path)])
