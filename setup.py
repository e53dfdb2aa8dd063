"""The packages of the wheel: every directory at the root that has an `__init__.py` installs as a subpackage of `slm`.

Nothing installs as a bare `core` or `train`. All other settings are in `pyproject.toml`.
"""

from pathlib import Path

from setuptools import find_packages, setup

homes = {f"slm.{file.parent.name}": file.parent.name for file in sorted(Path(__file__).parent.glob("*/__init__.py"))}
inner = [f"{package}.{name}" for package, home in homes.items() for name in find_packages(home)]
setup(packages=["slm", *homes, *inner], package_dir={"slm": "src/slm", **homes})
