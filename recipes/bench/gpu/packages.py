"""What the machine lacks of what we need, from a folder of wheels, into a folder of its own: nothing that is there is
touched, and a version in our ranges is taken as it is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[3]
EXTRAS = ("plots", "train", "tune")
TESTS = ("pytest",)  # of the test extra
NOT_HERE = ("moe-param", "psycopg")  # the checkout itself; what searches over several machines need


def needed(extras: Iterable[str] = EXTRAS) -> list[Requirement]:
    """What pyproject.toml asks for at run time, and what the tests start with."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    options = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in extras for text in options[extra])]
    found = [Requirement(text) for text in texts + options["test"]]
    tests = [requirement for requirement in found[len(texts) :] if requirement.name in TESTS]
    return [one for one in found[: len(texts)] if one.name not in NOT_HERE] + tests


def installed(path: list[str] | None = None) -> dict[str, str]:
    """name → version of what can be imported; what comes first on the path counts."""
    found: dict[str, str] = {}
    for distribution in distributions(path=sys.path if path is None else path):
        found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return found


def wheels_here(folder: Path) -> dict[str, Path]:
    """name → the newest wheel in a folder that this Python can use."""
    usable, found = set(sys_tags()), {}
    for wheel in sorted(folder.glob("*.whl"), key=lambda wheel: parse_wheel_filename(wheel.name)[1]):
        name, _, _, tags = parse_wheel_filename(wheel.name)
        if usable & tags:
            found[str(name)] = wheel
    return found


def requirements_of(wheel: Path, environment: dict[str, str] | None = None) -> list[Requirement]:
    """What a wheel depends on, without extras, here or in another `environment` (of PEP 508 markers)."""
    with zipfile.ZipFile(wheel) as file:
        name = next(n for n in file.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
        metadata = HeaderParser().parsestr(file.read(name).decode("utf-8"))
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    # An environment that is given is laid over this machine's.
    values = {**(environment or {}), "extra": ""}
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate(values)]


def missing(requirements: Iterable[Requirement], wheels: dict[str, Path], here: dict[str, str]) -> dict[str, Any]:
    """What is to be installed of the wheels, and what neither they nor the machine have; with what they depend on."""
    install: dict[str, Path] = {}
    lacking: dict[str, str] = {}
    left = list(requirements)
    while left:
        requirement = left.pop(0)
        name = canonicalize_name(requirement.name)
        there = here.get(name)
        if name in install or (there and requirement.specifier.contains(there, prereleases=True)):
            continue
        wheel = wheels.get(name)
        if wheel and requirement.specifier.contains(parse_wheel_filename(wheel.name)[1], prereleases=True):
            install[name] = wheel
            left += requirements_of(wheel)
        else:
            lacking[name] = f"{there or 'nothing'} is here, {requirement.specifier or 'any version'} is needed"
    return {"install": install, "lacking": lacking}


def install(wheels: Iterable[Path], target: Path) -> None:
    """Puts wheels into `target`, with nothing that they depend on.

    Raises:
        subprocess.CalledProcessError: pip's words are on the standard error stream.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--upgrade", "--target", str(target), *map(str, wheels)], check=True)
