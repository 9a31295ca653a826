"""The wheel, outside any checkout: everything the product is, from explaining to training in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.models import BYTE_MIXTRAL

ROOT = Path(__file__).parents[1]
SHORT = {"max_steps": 3, "seq_len": 32, "per_device_train_batch_size": 4, "validation_blocks": 4}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("the wheel")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs, and nothing else of ours."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: a config, and no checkout near it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    config = {"model_type": "mixtral", "overrides": BYTE_MIXTRAL, "learning_rate": 2**-7, **SHORT}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def moe_param(installed: Path, folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """What a command prints; the package is the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [*launcher, *arguments] if launcher else [sys.executable, "-m", "moe_param.cli.main", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_holds_the_product_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "moe_param" in tops
    specs = {path.name for path in (ROOT / "moe_param" / "scaling" / "specs").glob("*.yaml")}
    for name in (
        "py.typed",
        "structure/adapters.yaml",
        *(f"tuning/templates/page.{kind}" for kind in ("html", "css", "js")),
        *(f"scaling/specs/{spec}" for spec in specs),
        "patches/install.py",
        "patches/check.py",
        "patches/cub_debug_synchronous.h",
        "patches/without_nvcc/sitecustomize.py",
    ):
        assert f"moe_param/{name}" in names


def test_it_is_the_installed_package_that_runs(installed: Path, folder: Path) -> None:
    code = "import moe_param; print(moe_param.__file__)"
    where = moe_param(installed, folder, launcher=(sys.executable, "-c", code))
    assert Path(where.strip()).is_relative_to(installed)


def test_from_a_config_to_a_trained_target(installed: Path, folder: Path) -> None:
    """explain, tune, transfer, train, coord-check: each takes what the one before it wrote."""
    search = ("--log2_lrs", "-8", "-7", "--seeds", "0", "--workers", "1", "--output_dir", "base")
    moe_param(installed, folder, "tune", "config.yaml", *search)
    assert "expert_down" in moe_param(installed, folder, "explain", "base/tuned.yaml", "--target", "width=32")
    axes = ("--axes", "width=2", "--smallest", "--workers", "1", "--output_dir", "moved")
    moe_param(installed, folder, "transfer", "base/tuned.yaml", *axes)
    assert (folder / "moved" / "transfer.json").is_file()
    assert "</html>" in (folder / "base" / "tune.html").read_text("utf-8")
    assert "</html>" in (folder / "moved" / "transfer.html").read_text("utf-8")
    shape = ("--shape", "width=32,expert_size=32", "--output_dir", "trained", "--report_to", "none")
    moe_param(installed, folder, "train", "base/tuned.yaml", *shape)
    assert (folder / "trained" / "model.safetensors").is_file()
    check = ["--base", "width=16", "--axis", "width", "--factors", "1,2", "--steps", "1", "--seeds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_param.cli.main", "coord-check", "base/tuned.yaml", "--out", "check", *check]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1, 3) and (folder / "check" / "width.json").is_file(), done.stderr


def test_two_processes(installed: Path, folder: Path) -> None:
    launch = ROOT / "recipes" / "accelerate" / "cpu-2-processes.yaml"
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(launch),
        "-m",
        "moe_param.train",
    )
    more = ("--output_dir", "two", "--report_to", "none", "--learning_rate", "0.004")
    text = moe_param(installed, folder, "config.yaml", *more, launcher=launcher)
    assert "2 processes" in text and (folder / "two" / "model.safetensors").is_file()


def test_the_installer_is_in_it(installed: Path, folder: Path) -> None:
    assert moe_param(installed, folder, "install-kernels", "--level", "triton", "--dry-run").startswith("here: torch ")
