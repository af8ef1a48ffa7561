"""A page as headless Chromium sees it: pictures, console, requests, and what a script says of it (Chrome DevTools)."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0", "--hide-scrollbars",
)  # fmt: skip
_START_SECONDS, _ANSWER_SECONDS = 30, 60


class Seen(NamedTuple):
    """What a look at a page gave: errors of console and scripts, addresses asked for, and the answers to questions."""

    errors: list
    requests: list
    answers: dict


@contextlib.contextmanager
def browser(folder):
    """A Chromium of our own, with its profile in a folder; yields the address of its tools."""
    profile = Path(folder) / "profile"
    process = subprocess.Popen(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{_port(profile / 'DevToolsActivePort')}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(file):
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError, IndexError):
            return int(file.read_text().split()[0])
        time.sleep(0.05)
    raise TimeoutError("chromium did not start")


def look(
    address,
    page,
    *,
    width=1280,
    height=900,
    schemes=("light",),
    questions=(),
    picture=None,
    part="null",
    pdf=None,
    ready="true",
):
    """Open a page and wait until a script's `ready` is true.

    Args:
        address: of `browser`.
        schemes: colour schemes, `light` or `dark`, that are wished for one after the other.
        page: a file, or an address.
        questions: scripts, each a single expression; their values are `Seen.answers`.
        picture: file for a PNG of the whole page, in which `{scheme}` stands for the colour scheme.
        part: an expression for the element that the picture is to show.
        pdf: file for what a printer would get.
        ready: what must hold before the page is looked at.

    Returns:
        What was seen, once a scheme; errors and requests are those until then.
    """
    return asyncio.run(_look(address, page, (width, height), schemes, questions, picture, part, pdf, ready))


async def _look(address, page, size, schemes, questions, picture, part, pdf, ready):
    url, found = page if "://" in str(page) else Path(page).absolute().as_uri(), []
    async with aiohttp.ClientSession() as session, session.put(f"{address}/json/new?about:blank") as answer:
        target = await answer.json(content_type=None)
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.ask(f"{domain}.enable")
            width, height = size
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            await tab.ask("Emulation.setDeviceMetricsOverride", **metrics)
            for number, scheme in enumerate(schemes):
                wish = [{"name": "prefers-color-scheme", "value": scheme}]
                await tab.ask("Emulation.setEmulatedMedia", features=wish)
                if number == 0:
                    await tab.ask("Page.navigate", url=url)
                await tab.until(f"document.readyState === 'complete' && ({ready})")
                answers = {question: await tab.value(question) for question in questions}
                if picture:
                    await tab.picture(picture.format(scheme=scheme), part)
                requests = [asked for asked in tab.requests if asked != url]
                found.append(Seen(list(tab.errors), requests, answers))
            if pdf:
                printed = await tab.ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
                Path(pdf).write_bytes(base64.b64decode(printed["data"]))
                found[-1].errors.extend(tab.errors[len(found[-1].errors) :])
        await session.get(f"{address}/json/close/{target['id']}")
    return found


class _Tab:
    def __init__(self, socket):
        self.socket, self.number, self.errors, self.requests = socket, 0, [], []

    async def ask(self, method, **parameters):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            told = json.loads((await asyncio.wait_for(self.socket.receive(), _ANSWER_SECONDS)).data)
            if told.get("id") == self.number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.note(told.get("method"), told.get("params", {}))

    def note(self, event, told):
        if event == "Runtime.exceptionThrown":
            self.errors.append(told["exceptionDetails"].get("exception", {}).get("description") or str(told))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value", part)) for part in told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    async def value(self, expression):
        told = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, expression):
        for _ in range(int(_ANSWER_SECONDS / 0.05)):
            if await self.value(expression):
                return
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{expression} never came true; console: {self.errors}")

    async def picture(self, file, part):
        box = f"(({part}) ?? document.documentElement).getBoundingClientRect()"
        size = await self.value(f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])({box})")
        clip = dict(zip(("x", "y", "width", "height"), size, strict=True)) | {"scale": 1}
        taken = await self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(file).write_bytes(base64.b64decode(taken["data"]))
