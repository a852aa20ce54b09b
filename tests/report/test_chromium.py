"""Pages in a real browser: no error, no request, something to see, and they print."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from qlora_cli.display import QuietReport
from qlora_cli.plan.preview import preview
from qlora_cli.report import write_page, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (apt-get install chromium)")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # not even the browser's own requests leave
)  # fmt: skip


class Opened(NamedTuple):
    """What a browser made of a page. told: on its console. requests: of the page, but for itself.

    marked: which share of the screenshot's lines is not of one colour. pages: of the PDF.
    """

    told: list[str]
    requests: set[str]
    marked: float
    pages: int


def opened(page: Path, folder: Path, *more: str) -> Opened:
    """Opens a page twice, for its screenshot and for its print."""
    net, shot, pdf = folder / "net.json", folder / "shot.png", folder / "page.pdf"
    err = browse(page, folder, f"--log-net-log={net}", f"--screenshot={shot}", *more)
    err += browse(page, folder, f"--print-to-pdf={pdf}", *more)
    told = re.findall(r":CONSOLE[:(].*", err)
    return Opened(told, requests(net), marked(shot.read_bytes()), len(re.findall(rb"/Type /Page\b", pdf.read_bytes())))


def browse(page: Path, folder: Path, *more: str) -> str:
    """What the browser says while it opens a page in a new profile."""
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def requests(log: Path) -> set[str]:
    """Where the page wanted something from; requests of the browser's own have no origin."""
    found = json.loads(log.read_text())
    assert found["events"], "nothing was logged"
    asked = [event["params"] for event in found["events"] if "initiator" in event.get("params", {})]
    return {params["url"] for params in asked if params["initiator"] != "not an origin"}


def marked(png: bytes) -> float:
    """The share of lines in which a pixel differs from its neighbours, as their filters tell."""
    width, height, _, kind = struct.unpack(">IIBB", png[16:26])
    at, data = 8, b""
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        at += 12 + size
    lines = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(height, -1)
    step = {2: 3, 6: 4}[kind]
    assert lines.shape[1] == 1 + step * width
    return float((lines[:, 1 + step :] != 0).any(axis=1).mean())


def check(found: Opened) -> None:
    """A page that says nothing, asks for nothing, shows something and prints."""
    assert found.told == []
    assert found.requests == set()
    assert found.marked > 0.2
    assert found.pages >= 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_without_errors_and_without_requests(trained_run, tmp_path, scheme):
    write_report(trained_run, tmp_path / "report.html", tmp_path / "loss.png")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    check(opened(tmp_path / "report.html", tmp_path, *dark))


def test_the_preview_opens_without_errors_and_without_requests(make_recipe, tmp_path):
    write_page(tmp_path / "preview.html", preview(make_recipe(), QuietReport(), "train", None, 20))
    check(opened(tmp_path / "preview.html", tmp_path))


def test_a_narrow_window_needs_no_scrolling_to_the_side(trained_run, tmp_path):
    write_report(trained_run, tmp_path / "report.html", tmp_path / "loss.png")
    page = tmp_path / "report.html"
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    asking = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    told = page.read_text()
    assert policy in told
    page.write_text(told.replace(policy, "").replace("</body>", asking))
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=400,800", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    wide, room = map(int, re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups())
    assert wide <= room <= 500


def test_a_page_that_errs_asks_and_is_empty_is_found_out(tmp_path):
    page = tmp_path / "planted.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png" hidden><script>console.error("boom")</script>')
    found = opened(page, tmp_path)
    assert any("boom" in line for line in found.told)
    assert found.requests == {"http://127.0.0.1:9/x.png"}
    assert found.marked < 0.01
    with pytest.raises(AssertionError):
        check(found)


def test_what_is_planted_into_a_page_of_ours_is_stopped_by_its_policy_and_told(trained_run, tmp_path):
    write_report(trained_run, tmp_path / "report.html", tmp_path / "loss.png")
    page = tmp_path / "report.html"
    planted = '<body><img src="http://127.0.0.1:9/x.png"><script>document.title = "mine"</script>'
    page.write_text(page.read_text().replace("<body>", planted))
    found = opened(page, tmp_path)
    assert found.requests == set()
    assert len([line for line in found.told if "Content Security Policy" in line]) >= 2
