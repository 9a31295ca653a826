"""recipes/accelerate: every file is one for accelerate, and the command in its header one for the recipe."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from moe_param.training import pretrain

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_all_layouts_are_there() -> None:
    names = {path.stem for path in FILES}
    assert names >= {"cpu", "cpu-2-processes", "cpu-2-processes-fsdp2", "one-gpu", "ddp", "fsdp2", "fsdp2-nodes"}
    page = (FOLDER / "README.md").read_text()
    assert all(f"({path.name})" in page for path in [*FILES, FOLDER / "fsdp2-nodes.slurm"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_and_the_command_in_its_header(path: Path) -> None:
    config = load_config_from_file(str(path))  # unknown keys are an error
    assert (config.num_processes > 1) == (str(config.distributed_type.value) in ("MULTI_GPU", "FSDP"))
    if config.distributed_type.value == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    header = "".join(line[1:] for line in path.read_text().splitlines(True) if line.startswith("#"))
    command = re.search(r"accelerate launch(?:.*\\\n)*.*", header)
    assert command, "a command"
    words = shlex.split(command[0].replace("\\\n", " "))
    assert words[words.index("--config_file") + 1] == f"recipes/accelerate/{path.name}"
    config_file, *flags = words[words.index("moe_param.train") + 1 :]
    assert "--use_cpu" not in flags, "the configuration says it"
    pretrain.parse([str(FOLDER.parents[1] / config_file), *flags, "--use_cpu", "--bf16", "false"])


def test_the_slurm_script_is_one_for_bash_and_meets_where_slurm_says() -> None:
    script = FOLDER / "fsdp2-nodes.slurm"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    for word in ("--machine_rank", "--main_process_ip", "--num_machines", "SLURM_NODEID", "--resume"):
        assert word in text
