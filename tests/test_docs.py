"""What the pages say: their code runs, their links lead somewhere, their commands take the arguments shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import moe_param
from moe_param.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.md", "patches/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_quickstart_runs_as_it_stands(tmp_path: Path) -> None:
    """And what it saves is a plain checkpoint of a model that learned something."""
    (code,) = blocks(ROOT / "docs" / "quickstart.md", "python")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 24
    code += "print('LOSS', loss.item())\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("LOSS")[1]) < 4.5  # a byte costs ln 256 = 5.5 nats before
    reload = (
        "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained('quickstart'); "
        "sys.exit('moe_param' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", reload], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `moe-param …` in the pages' code, with the page it stands on."""
    for page in PAGES:
        text = page.read_text("utf-8")
        code = [*re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
        for line in "\n".join(code).replace("\\\n", " ").splitlines():
            if re.match(r"\s*(moe-param|accelerate launch .*-m moe_param\.train) ", line):
                line = re.sub(r".*-m moe_param\.train ", "moe-param train ", line)
                yield str(page.relative_to(ROOT)), shlex.split(line.split("#")[0].replace("…", ""))[1:]


def test_commands_exist_and_take_what_is_shown() -> None:
    found = list(commands())
    assert len(found) > 10
    wrong = []
    for page, words in found:
        if not words or words[0] not in cli.COMMANDS:
            wrong += [f"{page}: {' '.join(words)}"] * bool(words and not words[0].isupper())
            continue
        options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
        wrong += [f"{page}: moe-param {words[0]} has no {o}" for o in options if o not in known(words[0])]
    assert not wrong


def known(command: str) -> set[str]:
    """The options in a command's own help."""
    if command not in HELP:
        done = subprocess.run(
            [sys.executable, "-m", "moe_param.cli.main", command, "--help"], capture_output=True, text=True, timeout=120
        )
        HELP[command] = {"--help", *re.findall(r"--[A-Za-z][\w-]*", done.stdout)}
    return HELP[command]


HELP: dict[str, set[str]] = {}


@pytest.mark.slow
def test_the_api_reference_has_every_public_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.build", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "moe_param.html").read_text("utf-8")
    missing = [name for name in moe_param.__all__ if f'id="{name}"' not in page]
    assert not missing


@pytest.mark.parametrize("name", moe_param.__all__)
def test_public_names_say_what_they_are(name: str) -> None:
    value = getattr(moe_param, name)
    own = value.__doc__ or ""
    generated = own.startswith(f"{name}(")  # what dataclass writes where nobody did
    assert own.strip() and not generated
    assert not isinstance(value, type) or not hasattr(value, "__dataclass_fields__") or fields(value)
