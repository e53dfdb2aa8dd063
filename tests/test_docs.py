"""The documents: links lead to something, and paths in them exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from slm.cli.options import REPLACING

ROOT = Path(__file__).parents[1]
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
# The directories of the repository that documents name files of.
HOMES = (
    "benchmarks",
    "cli",
    "core",
    "deploy",
    "docs",
    "examples",
    "export",
    "finetune",
    "interchange",
    "quantize",
    "runtime",
)
HOMES += ("serve", "src", "steps", "tests", "train", "web")
HISTORY = ("CHANGELOG.md", "LOG.md")  # which name files as they were


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(directory: Path, text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|^    .*$", "", text, flags=re.DOTALL | re.MULTILINE)):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = directory / name
        exists = not name or target.exists()
        if not exists or (anchor and anchor not in anchors(target.read_text(encoding="utf-8") if name else text)):
            yield link


def missing_paths(text: str) -> list[str]:
    """Paths in backticks, of a test the file alone, that do not exist."""
    named = re.findall(rf"`((?:{'|'.join(HOMES)})/[\w./-]*)(?:::\w+)?`", text)
    return [name for name in sorted(set(named)) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    assert list(broken_links(page.parent, page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8")) == []


def test_a_broken_link_and_a_missing_path_are_found() -> None:
    """The control."""
    text = "[a](README.md) [b](docs/none.md) [c](#none) [d](https://example.org/x) [e](#here-too) [f](LICENSE#none)\n"
    assert list(broken_links(ROOT, text + "\n## Here, too\n\n    [g](none)\n")) == [
        "docs/none.md",
        "#none",
        "LICENSE#none",
    ]
    text = "`core/none.py`, `core/manifest.py`, `tests/none.py::test_x`, `tests/test_docs.py::test_y`, `runs/tiny`"
    assert missing_paths(text) == ["core/none.py", "tests/none.py"]


def test_architecture_names_the_files_of_every_package() -> None:
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert {"/".join(name.split("/")[:1]) for name in named} >= {*HOMES} - {"benchmarks", "deploy", "docs", "examples"}
    assert len(set(named)) > 50


def missing_names(text: str) -> list[str]:
    """Of "`name` in `file.py`", the names that the file does not define."""
    lists = re.findall(r"((?:`[\w.]+`(?:, | and | or )?)+) in `([\w/]+\.py)`", text)
    found = [(name, file) for names, file in lists for name in re.findall(r"`([\w.]+)`", names)]
    return [
        f"{name} in {file}"
        for name, file in found
        if any(
            not re.search(
                rf"^ *(?:async )?(?:def |class )?{part}\b",
                (ROOT / file).read_text(encoding="utf-8"),
                flags=re.MULTILINE,
            )
            for part in name.split(".")
        )
    ]


def test_architecture_names_what_files_define() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert text.count("` in `") > 50 and missing_names(text) == []
    wrong = "`Bundle.open` in `core/manifest.py`, `Bundle.shut` in `core/manifest.py`; `seal`, `unseal` in `core/manifest.py`"
    assert missing_names(wrong) == ["Bundle.shut in core/manifest.py", "unseal in core/manifest.py"]  # the control


def avoided_words(text: str) -> set[str]:
    """The words of a page, code left out, that CONTRIBUTING asks to avoid."""
    listed = re.search(r"^Avoid: (.*?)\.$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    assert listed is not None
    words = re.findall(r"\b[a-z]+\b", re.sub(r'".*?"', "", listed[1], flags=re.DOTALL))
    assert len(words) > 5
    prose = " ".join(re.sub(r"```.*?```|^    .*$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE).split())
    return set(words) & set(re.findall(r"\w+", prose.replace(REPLACING, "").lower()))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in (*HISTORY, "CONTRIBUTING.md")], ids=lambda page: page.name
)
def test_pages_avoid_the_words_to_avoid(page: Path) -> None:
    assert avoided_words(page.read_text(encoding="utf-8")) == set()


def test_a_word_to_avoid_is_found() -> None:
    """The control."""
    assert avoided_words("The model is made anew.\n\n    slm made told\n\n`somebody` ```\nnobody\n```\n") == {
        "made",
        "anew",
    }


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page}" not in index} == set()
