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
    Link,
    Paragraph,
    Section,
    Table,
    order_of,
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


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (("1,234", "-3.5", "+0.25 ± 0.01", "7 of 9"), (1234, -3.5, 0.25, 7)),
        (("17 B", "1.5 KiB", "3.00 GiB"), (17, 1536, 3 * 2**30)),
        (("7.25 s", "1 min 05 s", "2 h 01 min"), (7.25, 65, 7260)),
        (("9.90 (2.8 to 17.6)", "0.00 %"), (9.9, 0)),
    ],
)
def test_cells_are_sorted_by_the_value_that_they_show(texts, values):
    assert tuple(float(order_of(text)) for text in texts) == values


def test_words_are_sorted_as_words_and_nothing_last():
    assert order_of("client-9") == "client-9"
    assert order_of(Link("–", "x")) == order_of("") == ""


def test_a_link_never_leaves_the_folder_of_its_page():
    for path in ("javascript:alert(1)", "//evil.example/x", "a b/é#?%", "\ud800"):
        href = Link("x", path).href
        assert href.startswith("./") and not set(' #?<>"') & set(href)


def test_codes_that_control_a_terminal_or_a_line_are_shown_as_such():
    codes = "\x1b[31m\u202e\0\u2028\u200b\ud800"
    header = Header(codes, codes, codes, [codes], [(codes, codes)])
    page = html.render_document(codes, header, [Section(codes, [Paragraph(codes)])])
    assert not set(codes) - set("[31m") & set(page)
    assert page.count("\N{REPLACEMENT CHARACTER}") >= 30
    page.encode()
