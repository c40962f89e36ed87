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
from flexlora.reporting import html, page
from flexlora.reporting.document import Header, Paragraph, Section

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


def title_of(frame: str, tmp_path: Path) -> dict:
    """What the script of a page has found out."""
    (tmp_path / "frame.html").write_text(frame)
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
    return json.loads(title)


def test_the_report_on_a_phone(make_journal: Callable[..., list[Event]], tmp_path: Path):
    found = title_of(FRAME.format(page=escape(page.render(make_journal()))), tmp_path)
    assert found["failures"] == [] and found["width"] <= 400
    assert found["plots"] == found["drawn"] > 10
    assert found["rounds"] == sorted(found["rounds"]) and len(set(found["rounds"])) > 1


WIDTH = """<!DOCTYPE html><body><iframe style="width:400px;height:900px;border:0" srcdoc="{page}">
</iframe><script>
setTimeout(() => {{
  const inner = document.querySelector("iframe").contentDocument.documentElement;
  document.title = JSON.stringify({{width: inner.scrollWidth}});
}}, 3000);
</script></body>"""


def test_long_words_in_texts_make_no_page_wider_than_a_phone(tmp_path: Path):
    """Reasons and notices have paths, and addresses without a blank."""
    text = "It diverged: /" + "a-long-folder-of-somebody/" * 20
    text += "x" * 200
    section = Section("Runs without scores", [Paragraph(text)])
    head = Header("Attacks", "Damage by attack and defence", text, [text], [("Folder", text)])
    markup = html.render_document("Attacks", head, [section])
    assert title_of(WIDTH.format(page=escape(markup)), tmp_path)["width"] <= 400
