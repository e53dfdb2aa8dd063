"""The documentation site, as `make docs` builds it, with Sphinx and its theme from build/sphinx."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slm

pytestmark = pytest.mark.peer
ROOT = Path(__file__).parents[2]
SPHINX = ROOT / "build" / "sphinx"


def built(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Builds a site, where every warning is an error, and returns the finished process."""
    if not (SPHINX / "sphinx").is_dir():
        pytest.skip("no Sphinx under build/sphinx; `make docs` installs it")
    command = [sys.executable, "-m", "sphinx", "-q", "--fail-on-warning", "-E", "-b", "html", "-c"]
    command += [str(ROOT / "docs" / "site"), str(source), str(site)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(SPHINX)}, capture_output=True, encoding="utf-8", timeout=280
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this repository."""
    home = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / "docs" / "site" / "stage.py", home / "source"], check=True)
    done = built(home / "source", home / "site")
    assert (done.returncode, done.stderr) == (0, "")
    return home / "site"


def test_every_document_has_a_page(site: Path) -> None:
    names = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in (ROOT / "docs").glob("*.md")}
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert names | {"index.html", "api.html", "SECURITY.html", "search.html"} <= pages
    text = (site / "docs" / "README.html").read_text(encoding="utf-8")
    assert re.search(r'href="training.html"><span class="[^"]*">Training</span>', text)  # not training.md


def test_links_inside_lead_to_something(site: Path) -> None:
    """Sphinx checks the links of the sources; this checks those of the pages, with their anchors."""
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    count = 0
    for page, text in texts.items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.is_file(), (page.name, link)
            assert not anchor or target not in anchors or anchor in anchors[target], (page.name, link)
            count += 1
    assert count > 2000


def test_the_api_reference_has_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    names = set(slm.__all__) - {"__version__"}
    assert {name for name in names if f'id="slm.{name}"' not in text} == set()
    assert "Annotated" not in text  # the text states limits
    assert "hold_out" in text and "PARAMETERS" in text.upper()


def test_nothing_comes_from_another_host(site: Path) -> None:
    loaded = []
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        loaded += re.findall(r"""<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)="((?:https?:)?//[^"]+)""", text)
        loaded += re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)""", text)
    assert loaded == []


def test_links_to_nowhere_are_errors(tmp_path: Path) -> None:
    """The control."""
    faults = [
        "[x](none.md)",
        "[x](other.md#lost)",
        "![x](none.png)",
        "```{eval-rst}\n.. autofunction:: slm.missing\n```",
    ]
    text = "\n\n".join(["# A", *faults, "```{toctree}\nother\n```\n"])
    (tmp_path / "index.md").write_text(text, encoding="utf-8")
    (tmp_path / "other.md").write_text("# B\n", encoding="utf-8")
    (tmp_path / "unlisted.md").write_text("# C\n", encoding="utf-8")
    done = built(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for fault in ("none.md", "lost", "none.png", "failed to import 'missing'", "unlisted.md"):
        assert fault in done.stderr


def test_a_site_without_faults_is_built(tmp_path: Path) -> None:
    """The control of the control."""
    text = "# A\n\n[x](other.md#c)\n\n```{toctree}\nother\n```\n\n```{eval-rst}\n.. autofunction:: slm.load\n```\n"
    (tmp_path / "index.md").write_text(text, encoding="utf-8")
    (tmp_path / "other.md").write_text("# B\n\n## C\n", encoding="utf-8")
    done = built(tmp_path, tmp_path / "site")
    assert (done.returncode, done.stderr) == (0, "")
