"""Kills a training run again and again, and compares what it ends with to a run that was never stopped.

    python -m tests.training.kills FOLDER [--kills 20] [--steps 60] [--seed 0]

One process does the imports and forks a child for every launch, so a kill costs a second. Every other kill is a SIGKILL
from outside at a random moment; the others hit at a random file operation of a checkpoint that is being written.
Prints one JSON object; exit code 1 if the two runs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moe_param.training import pretrain
from moe_param.training.checkpoints import STAGING
from moe_param.training.report import MetricsFile, read_lines
from moe_param.training.trainer import PretrainTrainer
from tests.models import BYTE_MIXTRAL

SETTINGS: dict[str, Any] = {
    "model_type": "mixtral",
    "overrides": json.dumps(BYTE_MIXTRAL),
    "shape": "width=32",
    "inject_bias": True,  # so that there is a file beside the weights
    "streaming": True,  # two shards, so that there are positions in the data
    "shuffle_buffer": 20,
    "seq_len": 32,
    "validation_blocks": 8,
    "per_device_train_batch_size": 4,
    "warmup_tokens": 512,
    "lr_scheduler_type": "cosine",
    "learning_rate": 2**-7,
    "logging_steps": 1,
    "eval_steps": 20,
    "save_steps": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def texts(folder: Path, shards: int = 2) -> list[str]:
    """Documents of one small vocabulary, different ones in each file."""
    words = random.Random(1)
    paths = []
    for shard in range(shards):
        path = folder / f"texts{shard}.jsonl"
        lines = (" ".join(words.choice(("the", "cat", "sat", "on", "a", "mat")) for _ in range(20)) for _ in range(80))
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        paths.append(str(path))
    return paths


def arguments(output: Path, files: list[str], steps: int, *extra: str) -> list[str]:
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    return [*flags, "--train_files", *files, "--max_steps", str(steps), "--output_dir", str(output), *extra]


def fork(work: Callable[[], Any], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def die_while_writing(count: int) -> None:
    """SIGKILL at this process's own `count`-th file operation on a checkpoint that is not finished."""
    left = [count]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            path = str(args[0]) if isinstance(args[0], str | os.PathLike) else ""
            if STAGING in path or "checkpoint-" in path:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def finished(status: int) -> bool:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return True
    raise RuntimeError(f"a launch failed on its own: status {status}")


def run(folder: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    chance, log, files = random.Random(seed), folder / "log.txt", texts(folder)
    whole, broken = folder / "whole", folder / "broken"

    def launch(output: Path, before: Callable[[], Any] = bool) -> tuple[int, int]:
        """(the child, a pipe that gets a byte for each step it begins)"""
        reader, writer = os.pipe()

        def work() -> None:
            before()
            begin = PretrainTrainer.training_step
            PretrainTrainer.training_step = lambda *a, **k: (os.write(writer, b"."), begin(*a, **k))[1]  # type: ignore
            pretrain.main(arguments(output, files, steps, "--resume"))

        child = fork(work, log)
        os.close(writer)
        return child, reader

    def ended(child: int, reader: int) -> bool:
        status = os.waitpid(child, 0)[1]
        os.close(reader)
        return finished(status)

    def wait(reader: int, begun: int) -> None:
        """For so many steps to begin, or for the child's end."""
        while begun and os.read(reader, 1):
            begun -= 1

    started = time.perf_counter()
    child, reader = launch(whole)
    wait(reader, 1)
    training = time.perf_counter()
    assert ended(child, reader)
    setting_up, duration = training - started, time.perf_counter() - training

    hits: list[dict[str, Any]] = []
    launches = 0
    while len(hits) < kills:
        launches += 1
        launched = time.time()
        if launches % 2:  # at any moment; counted in steps, because how long one takes depends on the machine's load
            child, reader = launch(broken)
            wait(reader, chance.randint(1, max(1, 2 * steps // kills - 1)))
            time.sleep(chance.uniform(0, duration / steps))
            os.kill(child, signal.SIGKILL)
            how = "any moment"
        else:
            operation = chance.randint(1, 60)
            child, reader = launch(broken, lambda: die_while_writing(operation))  # noqa: B023
            how = f"file operation {operation}"
        if ended(child, reader):
            break  # trained to the end before it could be killed
        lines = read_lines(broken / MetricsFile.name)
        writing = any(path.stat().st_mtime > launched for path in (broken / STAGING).rglob("*"))
        hits.append({"how": how, "step": lines[-1]["step"] if lines else 0, "checkpoint half written": writing})
    assert ended(*launch(broken))
    return {
        "kills": len(hits),
        "seconds": {"to set up": round(setting_up, 1), "to train": round(duration, 1)},
        "while a checkpoint was being written": sum(hit["checkpoint half written"] for hit in hits),
        "steps": steps,
        "hits": hits,
        **compare(whole, broken),
    }


def compare(whole: Path, broken: Path) -> dict[str, Any]:
    def losses(output: Path) -> list[Any]:
        kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "moe/max_over_mean", "moe/bias_range")
        lines = [{k: line[k] for k in kept if k in line} for line in read_lines(output / MetricsFile.name)]
        return [line for line in lines if "loss" in line or "eval_loss" in line]

    first, second = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    return {
        "same losses": losses(whole) == losses(broken),
        "same weights": first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first),
        "final loss": [losses(output)[-1].get("eval_loss") for output in (whole, broken)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (("kills", 20), ("steps", 60), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.folder, options.kills, options.steps, options.seed)
    print(json.dumps(result))
    sys.exit(not (result["same losses"] and result["same weights"]))
