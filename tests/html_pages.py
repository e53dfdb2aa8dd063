"""A check that an HTML page is complete and self-contained, for the tests of all reports."""

from html.parser import HTMLParser

_EMPTY = {"meta", "br"}


class Checker(HTMLParser):
    """Collects unclosed tags, and references that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.fetched == []
    assert not checker.tags & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in page and "@import" not in page and "http" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    return checker
