"""What the README says is so: its example command runs, and the files that it names exist."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_the_example_command_prints_the_published_count():
    readme = PAGES[0].read_text()
    marked = re.search(r"<!-- tests/test_readme.py .* -->\n```sh\nt5x_lite (.*)\n```", readme)
    command = [sys.executable, "-m", "t5x_lite", *shlex.split(marked[1])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "total parameters: 76,961,152"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_gin_files_that_a_page_names_exist(page):
    named = re.findall(r"--gin_file (?:gin_configs/)?(\S+\.gin)", page.read_text())
    missing = [name for name in named if not (REPOSITORY / "gin_configs" / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_what_exists(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]
