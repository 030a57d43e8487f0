"""Reads a page of ours: its text, its charts, and what a browser would load, run and show."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.parsers import expat

from tests.browser import Page
from tests.polling import poll

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "embed", "source", "wbr"}
LOADING = {"link", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "image"}
ADDRESSES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "formaction"}
VALUES = "document.querySelector('#vg-tooltip-element.visible')?.innerText"  # JavaScript: the values at the pointer


class HtmlPage(HTMLParser):
    """The text of a page outside its scripts, and its charts. Asserts that tags are closed in order."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.scripted: list[str] = []
        self.scripts: dict[str, str] = {}  # by type
        self.policy = ""
        self.text: list[str] = []
        self.cells: list[str] = []
        self.feed(body.decode())
        self.close()
        assert self.open == []
        for svg in re.findall(r"<svg.*?</svg>", body.decode(), re.DOTALL):
            expat.ParserCreate().Parse(svg, True)
        self.styles = re.findall(r"url\(([^)]*)\)|@import", body.decode())
        self.charts: dict[str, Any] = json.loads(self.scripts["application/json"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.addresses += [value for name, value in values.items() if name in ADDRESSES]
        self.scripted += [name for name in values if name.startswith("on")]
        self.type = values.get("type", "")
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            assert self.type not in self.scripts
            self.scripts[self.type] = data
            return
        self.text.append(data)
        if "td" in self.open[-2:]:
            self.cells.append(data.strip())

    def count(self, name: str) -> int:
        """How many texts of the page contain the name."""
        return sum(name in part for part in self.text)

    def assert_loads_nothing(self) -> None:
        """Asserts that the page has no address, and that its policy allows no request and no script but its own two."""
        assert self.tags & LOADING == set()
        assert self.scripted == []
        assert [address for address in self.addresses + self.styles if not address.startswith("#")] == []
        vega = gzip.decompress(base64.b64decode(self.scripts["application/gzip"]))
        hashes = [hashlib.sha256(script).digest() for script in (self.scripts["module"].encode(), vega)]
        allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
        assert self.policy.startswith(f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline';")


def middle(tab: Page, selector: str) -> tuple[float, float]:
    """Scrolls to the element. Returns its middle in the window."""
    element = f"document.querySelector({selector!r})"
    tab.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    x, y = tab.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())")
    return x, y


def values_at_pointer(tab: Page, selector: str) -> str:
    """The values that the page shows when the pointer moves to the middle of the element."""
    x, y = middle(tab, selector)
    for offset in (0, 1):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + offset, y=y)
    return str(poll(lambda: tab.run(VALUES)))
