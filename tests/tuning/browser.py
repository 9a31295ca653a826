"""A headless browser of our own, for as long as a test needs it: Chromium, through DevTools over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
ELSEWHERE = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
REQUIRED = "MOE_PARAM_BROWSER"
"""Set to `required` (CI does) where a missing browser is a failure; or to the path of one."""


def browser_program() -> Path | None:
    """Chromium or a relative of it: named in the environment, on PATH, or where macOS puts it."""
    named = os.environ.get(REQUIRED, "")
    candidates = [named] if named not in ("", "required") else []
    candidates += [found for name in NAMES if (found := shutil.which(name))] + list(ELSEWHERE)
    return next((Path(path) for path in candidates if Path(path).exists()), None)


class Tab:
    """A page in the browser: what it logged, what it asked the network for."""

    def __init__(self, send: Any, receive: Any) -> None:
        self._send, self._receive, self._last, self._session = send, receive, 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command; the events that come before it are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        self._send({**message, "sessionId": self._session} if self._session else message)
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Loads the page at this size; forgets the events of the one before."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def said(self) -> list[str]:
        """Console messages, exceptions, complaints of the browser (blocked content is one)."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def requested(self) -> list[str]:
        """URLs, the page's own among them."""
        asked = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in asked]

    def screenshot(self, path: Path) -> None:
        """Of the whole page, not only what is in the window."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))


@contextmanager
def browser(timeout: float = 300) -> Iterator[Tab]:
    """A browser with one tab; killed after `timeout` seconds, which is then an error of whoever waits for it."""
    program = browser_program()
    assert program is not None
    profile = tempfile.mkdtemp(prefix="browser")
    flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
    flags += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"]
    flags += ["--no-sandbox"] if sys.platform == "linux" and os.geteuid() == 0 else []  # root has to do without
    hears, to_browser = os.pipe()
    from_browser, speaks = os.pipe()
    # It reads from 3 and writes to 4.
    become = (
        "import fcntl, os, sys; ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]; "
        "os.dup2(ends[0], 3); os.dup2(ends[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", become, str(hears), str(speaks), str(program), *flags, "about:blank"],
        pass_fds=(hears, speaks), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": profile},
    )  # fmt: skip
    os.close(hears)
    os.close(speaks)
    deadline = threading.Timer(timeout, process.kill)
    deadline.start()
    buffer = bytearray()

    def send(message: dict[str, Any]) -> None:
        os.write(to_browser, json.dumps(message).encode() + b"\0")

    def receive() -> dict[str, Any]:
        while b"\0" not in buffer:
            more = os.read(from_browser, 1 << 16)
            assert more, "the browser went away"
            buffer.extend(more)
        message, _, rest = bytes(buffer).partition(b"\0")
        buffer[:] = rest
        answer: dict[str, Any] = json.loads(message)
        return answer

    try:
        yield Tab(send, receive)
    finally:
        deadline.cancel()
        os.close(to_browser)  # it takes that for the end
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        os.close(from_browser)
        shutil.rmtree(profile, ignore_errors=True)
