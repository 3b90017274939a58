"""Builds the native library with cargo and puts it inside the package. Everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folder() -> Path:
    """The torch package of this interpreter, by the name that cargo knows it by where it does.

    Another name for the same folder would make cargo build everything anew.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is missing: pip install torch==2.11.0")
    folder = Path(spec.origin).parent
    link = ROOT / ".venv" / "torch"
    return link if link.exists() and link.samefile(folder) else folder


class CargoBuild(build_ext):
    """Runs cargo where setuptools would run a C compiler."""

    def build_extension(self, ext: Extension) -> None:
        if shutil.which("cargo") is None:
            sys.exit("cargo is missing: install Rust 1.89 or newer (rustup, or your distribution's packages)")
        environment = {**os.environ, "LIBTORCH": os.environ.get("LIBTORCH", str(torch_folder()))}
        subprocess.run(["cargo", "build", "--release", "--lib", "--locked"], cwd=ROOT, env=environment, check=True)
        target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old library mapped keeps it whole.
        temporary = destination.with_suffix(".new")
        shutil.copyfile(target / "release" / "libinfold.so", temporary)
        os.replace(temporary, destination)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """The library talks to PyTorch's C++ interface, not Python's: one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("infold.libinfold", sources=[])],
    cmdclass={"build_ext": CargoBuild, "bdist_wheel": PlatformWheel},
)
