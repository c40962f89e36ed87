"""The report in a browser on a phone: every figure is drawn, nothing is wider than the page."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest

from flexlora.journal.record import Event
from flexlora.reporting import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="chromium is not installed"),
]

# The page of a phone is a frame in the page of a desk: a window cannot be as narrow.
FRAME = """<!DOCTYPE html><body><iframe style="width:400px;height:900px;border:0" srcdoc="{page}">
</iframe><script>
const failures = [];
const frame = document.querySelector("iframe");
frame.contentWindow.addEventListener("error", (event) => failures.push(event.message));
const say = () => {{
  const inner = frame.contentDocument;
  const table = inner.querySelector("#clients table");
  inner.querySelectorAll("details").forEach((each) => {{ each.open = true; }});
  const head = table.querySelectorAll("th button")[2];
  head.click();
  setTimeout(() => {{
    document.title = JSON.stringify({{
      failures,
      width: inner.documentElement.scrollWidth,
      plots: inner.querySelectorAll(".plot").length,
      drawn: inner.querySelectorAll(".plot svg.main-svg:first-of-type").length,
      rounds: [...table.tBodies[0].rows].map((row) => Number(row.cells[2].textContent)),
    }});
  }}, 3000);
}};
setTimeout(say, 3000);
</script></body>"""


def test_the_report_on_a_phone(make_journal: Callable[..., list[Event]], tmp_path: Path):
    (tmp_path / "frame.html").write_text(FRAME.format(page=escape(page.render(make_journal()))))
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'browser'}",
            "--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path / 'frame.html'}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Content Security Policy" not in done.stderr and "Uncaught" not in done.stderr
    (title,) = re.findall("<title>({.*?})</title>", done.stdout)
    found = json.loads(title)
    assert found["failures"] == [] and found["width"] <= 400
    assert found["plots"] == found["drawn"] > 10
    assert found["rounds"] == sorted(found["rounds"]) and len(set(found["rounds"])) > 1
