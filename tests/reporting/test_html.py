"""All HTML comes from templates, which escape text and refuse a missing value."""

import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
from jinja2 import UndefinedError

from flexlora import reporting
from flexlora.reporting import html
from flexlora.reporting.document import (
    Code,
    Details,
    Figure,
    Figures,
    Header,
    Paragraph,
    Section,
    Table,
)

FOLDER = Path(reporting.__file__).parent
EVIL = "<script>alert(1)</script>&\"'"


def test_no_module_writes_markup():
    for path in FOLDER.rglob("*.py"):
        # Plotly's own hover texts have its bold and extra tags.
        text = re.sub(r"</?(b|extra)>", "", path.read_text())
        assert not re.search(r"</|<[a-z]+[ >]|html\.escape\((?!line)", text), path


def test_all_pages_extend_one_skeleton_and_share_one_stylesheet():
    templates = {path.name: path.read_text() for path in (FOLDER / "templates").iterdir()}
    assert [name for name, text in templates.items() if "<html" in text] == ["base.html"]
    assert [name for name, text in templates.items() if "<style" in text] == ["base.html"]
    assert [name for name in templates if name.endswith(".css")] == ["style.css"]
    for name in ("document.html", "watch.html"):
        assert '{% extends "base.html" %}' in templates[name]


def test_every_part_of_a_document_is_escaped():
    table = Table([EVIL], [[EVIL]], {0}, [(EVIL, 1)])
    figure = Figures([Figure(EVIL, go.Figure(), EVIL)])
    parts = [Paragraph(EVIL), Code(EVIL), table, figure, Details(EVIL, [Paragraph(EVIL)])]
    header = Header(EVIL, EVIL, EVIL, [EVIL], [(EVIL, EVIL)])
    page = html.render_document(EVIL, header, [Section(EVIL, parts)])
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") == 18


def test_a_missing_value_is_an_error_and_not_a_gap():
    with pytest.raises(UndefinedError, match="header"):
        html.render("document.html", title="", sections=[], policy="", plotly="")
