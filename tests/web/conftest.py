"""Fixtures for the web page: its modules in Node, and the site of the bundled demo model."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.runtime import shipped
from slm.web.npm import HOME, packages, vendored
from slm.web.server import SiteServer
from slm.web.site import Site, local_site
from tests.serving import running

Node = Callable[..., Any]


@pytest.fixture(scope="session")
def vendor() -> None:
    """Skips the test if the files from npm are missing."""
    try:
        vendored(name for package in packages().values() for name in package.files)
    except SlmError as error:
        pytest.skip(f"{error.message}; `make web` fetches it")


@pytest.fixture(scope="session")
def shipped_site(vendor: None) -> Site:
    return local_site(Bundle.open(shipped.model_path()), "stories")


@pytest.fixture(scope="module")
def server(shipped_site: Site) -> Iterator[SiteServer]:
    with running(SiteServer(shipped_site, "127.0.0.1", 0)) as started:
        yield started


@pytest.fixture(scope="session")
def in_node() -> Node:
    """Runs a module in Node that finds the page's modules under `page/`: (program, argument) to the JSON it prints."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node to run the page's modules in")

    def run(program: str, argument: Any = None) -> Any:
        found = program.replace("page/", (HOME / "static").as_uri() + "/")
        given = Path("argument.json")
        given.write_text(json.dumps(argument), encoding="utf-8")
        opening = "import fs from 'node:fs'; const given = JSON.parse(fs.readFileSync('argument.json', 'utf8'));\n"
        done = subprocess.run(
            [node, "--no-warnings", "--input-type=module", "-"],
            input=opening + found,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run
