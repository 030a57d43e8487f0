"""A real browser for the tests: Chromium without a window, driven through its DevTools protocol (`make chromium`)."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

from tests.polling import PATIENCE_SECONDS, poll

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """A tab of the browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._numbers = connection, itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol. Returns its result."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self._connection.recv(PATIENCE_SECONDS))).get("id") != number:
            pass
        assert "error" not in message, message
        return dict(message["result"])

    def visit(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        poll(lambda: self.run("document.readyState == 'complete' && location.href != 'about:blank'"))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        return str(self.run("document.body.innerText"))

    def type(self, selector: str, text: str) -> None:
        """Type into the field, then press Enter."""
        poll(lambda: self.run(f"document.querySelector({selector!r}) != null"))
        self.run(f"document.querySelector({selector!r}).focus()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(folder: Path, *options: str) -> Iterator[Page]:
    """A new browser with an empty profile in the folder. Yields its tab."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program is not None, "no Chromium: make chromium"
    argv = [
        program, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run",
        "--disable-background-networking", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900",
        *options, "about:blank",
    ]  # fmt: skip
    if os.geteuid() == 0:
        argv.insert(1, "--no-sandbox")  # Chromium's sandbox refuses root
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        active = folder / "DevToolsActivePort"
        port, _ = poll(lambda: active.exists() and active.read_text().splitlines())  # empty at first
        with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:  # http on this host
            [tab] = [entry for entry in json.load(answer) if entry["type"] == "page"]
        url = tab["webSocketDebuggerUrl"]  # a busy browser may answer no ping for 20 s
        with connect(url, max_size=None, open_timeout=PATIENCE_SECONDS, ping_interval=None) as connection:
            yield Page(connection)
    finally:
        process.kill()
        process.wait()
