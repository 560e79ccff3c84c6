"""The chat page as files: which address gives which bytes, and what a browser may do with them.

The page loads nothing from elsewhere, runs no script but its own, and talks to the server that sent it only.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class PageFile(NamedTuple):
    """One file of the page."""

    content: bytes
    media_type: str


def page_files() -> dict[str, PageFile]:
    """Return the files by their address: the page is `/`, all else is below `/page/`."""
    files = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in _MEDIA_TYPES:
            address = "/" if path.name == "index.html" else f"/page/{path.name}"
            files[address] = PageFile(path.read_bytes(), _MEDIA_TYPES[path.suffix])
    return files
