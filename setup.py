"""Only what pyproject.toml cannot say: cffi makes the C extension, and it takes a compiler to build it."""

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildExtension(build_ext):
    """Says in one line what is missing, where a failed compilation would bury it."""

    def run(self) -> None:
        """Check, then build."""
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
        if not shutil.which(compiler):
            raise SystemExit(f"vdev: no C compiler ({compiler} is not on PATH); "
                             "on Debian and Ubuntu: sudo apt install gcc libc6-dev")
        header = Path(sysconfig.get_path("include"), "Python.h")
        if not header.exists():
            raise SystemExit(f"vdev: no {header}; on Debian and Ubuntu: sudo apt install python3-dev")
        super().run()


setup(cffi_modules=["ring/_build.py:ffi", "ring/_build.py:driver_ffi"],
      cmdclass={"build_ext": BuildExtension})
