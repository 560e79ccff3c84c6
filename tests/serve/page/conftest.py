"""A real server with a real model, and a real browser: Chromium of the system, driven by playwright."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Error, Page, Request

START_LIMIT_S = 120.0


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser of the system. Playwright's own is a download, so it is not used."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get("FERRY_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("there is no chromium: install it (Debian: apt-get install chromium), or set FERRY_TEST_CHROMIUM")
    return found


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def address(chromium: str, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`ferry serve` with SmolLM2, ready."""
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(smollm2), "--port", str(port), "--threads", "1", "--drain-timeout", "0"]
    with open(folder / "log", "wb") as log:
        environ = {**os.environ, "FERRY_HOME": str(folder / "home")}
        server = subprocess.Popen([sys.executable, "-m", "ferry", *words], stdout=log, stderr=log, env=environ)
    try:
        _wait(server, f"http://127.0.0.1:{port}", folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until_s = time.monotonic() + START_LIMIT_S
    while not _is_ready(address):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < until_s, f"not ready after {START_LIMIT_S:g} s: {log.read_text()}"
        time.sleep(0.05)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="session")
def tab(browser: Browser, address: str) -> Iterator[Page]:
    """One tab for all tests: making one takes longer than most of them."""
    with browser.new_context() as context:
        opened = context.new_page()
        opened.set_default_timeout(30_000)
        opened.goto(address)
        yield opened


@pytest.fixture
def page(tab: Page, address: str) -> Iterator[Page]:
    """The chat page as at a first visit, connected. A script error, or a request to another host, fails the test."""
    tab.set_viewport_size({"width": 1280, "height": 860})
    tab.emulate_media(color_scheme="light")
    tab.unroute_all()
    tab.evaluate("sessionStorage.clear()")
    tab.reload()
    tab.locator("#ready.is-ready").wait_for()
    errors: list[str] = []

    def note_error(error: Error) -> None:
        errors.append(str(error))

    def note_foreign(request: Request) -> None:
        if not request.url.startswith((address, "blob:", "data:")):
            errors.append(request.url)

    tab.on("pageerror", note_error)
    tab.on("request", note_foreign)
    yield tab
    tab.remove_listener("pageerror", note_error)
    tab.remove_listener("request", note_foreign)
    assert errors == []
