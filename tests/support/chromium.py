# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A headless Chromium that tests drive through its debugging pipe (the Chrome DevTools Protocol): no other package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root may not use the sandbox, and containers often have no user namespaces
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
    "--mute-audio",
]
_KEYS = {
    "Enter": 13,
    "Escape": 27,
    " ": 32,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
}
_KEYS |= {"PageUp": 33, "PageDown": 34, "End": 35, "Home": 36}


class Chromium:
    """One process of Chromium; ``open`` shows a file in a tab of its own."""

    def __init__(self, profile: Path) -> None:
        program = next((found for name in NAMES if (found := shutil.which(name))), None)
        if program is None:
            raise FileNotFoundError(f"expected one of {', '.join(NAMES)} on the PATH; apt-get install chromium")
        (child_in, self._out), (self._in, child_out) = (tuple(map(_high, os.pipe())) for _ in range(2))
        command = f'exec "$0" "$@" 3<&{child_in} 4>&{child_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(child_in, child_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(profile / "stderr").open("w"),
            start_new_session=True,
        )
        os.close(child_in)
        os.close(child_out)
        self._buffer, self._number, self._tabs = b"", 0, dict[str, Tab]()

    def open(self, path: Path, *, width: int = 1280, height: int = 800, dark: bool = False) -> Tab:
        """Return a tab that has loaded the file, and whose script has set ``data-ready``."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.media(dark=dark)
        started = time.monotonic()
        tab.call("Page.navigate", url=path.resolve().as_uri())
        tab.wait_for(
            "document.documentElement.hasAttribute('data-ready') || !document.getElementById('problem').hidden"
        )
        tab.seconds = time.monotonic() - started
        return tab

    def call(self, method: str, session: str | None = None, /, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command; raise RuntimeError with Chromium's message if the command fails."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            if answer.get("sessionId") in self._tabs:
                self._tabs[answer["sessionId"]].hear(answer)

    def close(self) -> None:
        """End the process and the processes that it has started."""
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, 9)
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _next(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"Chromium did not answer within {seconds} s")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError(f"Chromium ended: {self._process.poll()}")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(text))


class Tab:
    """One page; ``problems`` has every error of the console, every exception and every violation of the policy."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target
        self.problems: list[str] = []
        self.seconds = 0.0
        """The seconds from the start of loading until the script of the page was done."""

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def hear(self, event: dict[str, Any]) -> None:
        parameters = event["params"]
        if event["method"] == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:2000])
        elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(parameters["args"])[:2000])
        elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, after its promise, if it is one; JSON values only."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> None:
        """Return when the expression is true."""
        deadline = time.monotonic() + seconds
        while not self._true(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {seconds} s: {expression}; problems of the page: {self.problems}")
            time.sleep(0.01)

    def text(self, selector: str) -> str:
        """Return the visible text of the first element that the selector finds."""
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Scroll to the element and click its middle with the mouse."""
        x, y = self._place(selector, 0.5, 0.5)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Scroll to the element and move the mouse to a place in it; the shares run from left and from top."""
        x, y = self._place(selector, across, down)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Press the mouse in the element at the share ``start`` of its width and release the mouse at ``end``."""
        (x0, y), (x1, _) = self._place(selector, start, 0.5), self._place(selector, end, 0.5)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x0, y=y)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x0, y=y, button="left", clickCount=1)
        for share in (0.5, 1.0):
            x = x0 + (x1 - x0) * share
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x1, y=y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        """Press and release a key: a name of `_KEYS`, or one character."""
        code = _KEYS.get(name, ord(name.upper()) if len(name) == 1 else 0)
        common = {"key": name, "windowsVirtualKeyCode": code}
        text = {"text": "\r" if name == "Enter" else name} if len(name) == 1 or name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, *, dark: bool = False, printed: bool = False) -> None:
        """Show the page as a dark or light desktop does, or as a printer."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="print" if printed else "", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """Write what the window shows, or the whole page, as PNG; return the path."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def _true(self, expression: str) -> bool:
        try:
            return bool(self.value(f"Boolean({expression})"))
        except RuntimeError:  # the page is being replaced
            return False

    def _place(self, selector: str, across: float, down: float) -> tuple[float, float]:
        found = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]; })()"
        )
        if found is None:
            raise LookupError(f"the page has no element {selector}")
        left, top, width, height = found
        return left + across * width, top + down * height


def _high(descriptor: int) -> int:
    """Return a copy of the descriptor with a number above 9, and close the descriptor."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy
