"""The pages of docs/ are true: links, commands, configs, and the table of every config key."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from flexlora import config
from flexlora.cli import main
from flexlora.federation import compose
from support import config_page

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
CONFIGS = sorted({*(ROOT / "configs").glob("*.toml")} - {ROOT / "configs" / "jobs.toml"})


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```sh[^\n]*\n(.*?)```", text_of(page), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("flexlora ")]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_commands_are_those_of_the_command_line(line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(main.app).commands[name]
    command.make_context(name, arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid(path):
    assert compose.load(path).federation.rounds > 0


def test_configs_that_pages_name_exist():
    for page in PAGES:
        for target in re.findall(r"configs/[\w-]+\.toml", text_of(page)):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def toml_blocks() -> list[str]:
    pages = [page for page in PAGES if page.name in ("configuration.md", "data.md", "watching.md")]
    return [b for p in pages for b in re.findall(r"```toml\n(.*?)```", text_of(p), re.DOTALL)]


@pytest.mark.parametrize("block", toml_blocks())
def test_parts_of_configs_are_valid(block):
    rest = {
        "model": {"name": "model"},
        "data": {"format": "procedural"},
        "ranks": {"rank": 8},
        "federation": {"rounds": 1, "cohort": 2},
    }
    assert compose.parse({**rest, **tomllib.loads(block)}, "the block")


def test_files_that_the_design_names_exist():
    source = ROOT / "src" / "flexlora"
    named = re.findall(r"`([\w/]+\.py)`", text_of(ROOT / "docs" / "design.md"))
    files = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    names = {Path(file).name for file in files}
    assert len(named) > 30
    # In a sentence about one package a file's name stands without its folder.
    assert [name for name in named if name not in (files if "/" in name else names)] == []


def test_every_key_of_a_config_is_documented_with_its_type_and_default():
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page(), "run: make docs"


def test_every_key_of_a_config_has_a_meaning():
    sections = config_page.tables()
    meanings = config_page.meanings()
    assert [key for rows in sections.values() for key in rows if len(meanings[key]) < 5] == []
    assert text_of(config_page.PAGE).count(" |  |\n") == 0
    assert "federation" in sections and {"weights", "accuracy"} <= set(
        sections["of several methods"]
    )


def test_the_rank_distributions_of_the_page_are_those_of_the_paper():
    page = text_of(ROOT / "docs" / "configuration.md")
    names = ("uniform", "heavy-tail-light", "heavy-tail-strong", "normal")
    for name, kind in config.PAPER_TYPES.items():
        cells = re.search(rf"^\| `{name}` \|(.*)\|$", page, re.MULTILINE)[1].split("|")
        assert [int(cells[0]), int(cells[1])] == [kind.attention, kind.feed_forward]
        shares = [float(cell.strip(" %")) / 100 for cell in cells[2:]]
        assert shares == pytest.approx([config.distribution(n)[name] for n in names])
