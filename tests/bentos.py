"""Bentos built as an operator builds them, in a store of the test's own; and what an image of one would hold."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

from tests.process import ROOT

# In processes of their own, which read BENTOML_HOME anew.
IMPORT = """
import pathlib, sys
from models.bento_store import import_artifact
import_artifact(pathlib.Path(sys.argv[1]))
"""
# What `bentoml containerize` gives to a container engine: the Dockerfile, and the folder that its COPY lines read.
CONTEXT = """
import shutil, sys
import bentoml
from bentoml._internal.container import construct_containerfile
with construct_containerfile(bentoml.get(sys.argv[1])) as (folder, dockerfile):
    shutil.copytree(folder, sys.argv[2])
"""
# RUN lines that make a container's own surroundings: a user, Debian's packages, uv, the rights of files.
SURROUNDINGS = ("if command -v groupadd", "mkdir ", "apt-get ", "command -v uv", "chmod ", "UV_PYTHON_INSTALL_DIR=")
INSTALL = "uv --directory $INSTALL_ROOT pip install -r $BENTO_PATH/env/python/requirements.txt"


def build(artifact: Path, home: Path, *options: str) -> str:
    """Import the artifact into the store at `home` and `bentoml build`; the Bento's tag."""
    store = os.environ | {"BENTOML_HOME": str(home)}
    subprocess.run([sys.executable, "-c", IMPORT, str(artifact)], cwd=ROOT, env=store, check=True)
    built = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--output", "tag", *options],
        cwd=ROOT,
        env=store,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    return built.stdout.strip().removeprefix("__tag__:")


def context(tag: str, home: Path, folder: Path) -> Path:
    store = os.environ | {"BENTOML_HOME": str(home)}
    subprocess.run([sys.executable, "-c", CONTEXT, tag, str(folder)], env=store, check=True)
    return folder


@dataclass
class Image:
    """A Dockerfile carried out without a container engine: its files under `root`, its environment, its command."""

    root: Path
    base: str = ""
    env: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    installs: bool = False
    _arguments: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Path, root: Path) -> Image:
        """Raises ValueError at a line that it would have to guess at."""
        image = cls(root)
        text = (source / "env" / "docker" / "Dockerfile").read_text()
        text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
        for line in filter(None, map(str.strip, text.splitlines())):
            word, _, rest = line.partition(" ")
            image._do(word, rest.strip(), source)
        return image

    def place(self, path: str) -> Path:
        """Where a path inside of the image is outside."""
        return self.root / os.path.join(self.folder, path).lstrip("/")

    def outside(self, environment: str) -> str:
        """The value of a variable, with the image's folders where they are outside."""
        return re.sub(r"(?<![\w.])/(home|app)/", lambda found: f"{self.root}{found[0]}", self.env[environment])

    def _do(self, word: str, rest: str, source: Path) -> None:
        if word == "FROM":
            self.base = rest.split(maxsplit=1)[0]
        elif word in ("ARG", "ENV"):
            name, _, value = rest.partition("=")
            known = self._arguments | self.env | {"PATH": os.environ["PATH"]}
            value = re.sub(r"\$\{?(\w+)\}?", lambda found: known[found[1]], " ".join(shlex.split(value)))
            (self.env if word == "ENV" else self._arguments)[name] = value
        elif word == "WORKDIR":
            self.folder = re.sub(r"\$(\w+)", lambda found: self.env[found[1]], rest)
            self.place(".").mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            here, there = rest.split()[-2:]
            shutil.copytree(source / here, self.place(there), dirs_exist_ok=True)
        elif word == "ENTRYPOINT":
            self.entrypoint = [part.strip(' "') for part in rest.strip("[]").split(",")]
        elif word == "RUN" and INSTALL in rest:
            self.installs = True
        elif not (word in ("EXPOSE", "USER") or (word == "RUN" and rest.startswith(SURROUNDINGS))):
            raise ValueError(f"a line that this does not know: {word} {rest}")


def pins(requirements: str) -> dict[str, frozenset[str]]:
    """By "name==version; marker": the hashes, of a file as uv or BentoML writes it.

    BentoML adds a line of its own for itself, without hashes.
    """
    found: dict[str, frozenset[str]] = {}
    for block in re.split(r"\n(?=[a-zA-Z0-9])", requirements):
        line = re.match(r"[a-zA-Z0-9][^\\#\n]*==[^\\#\n]*", block)
        if line is not None:
            name = str(Requirement(line[0]))
            found[name] = found.get(name, frozenset()) | frozenset(re.findall(r"sha256:\w{64}", block))
    return found
