"""What README, CHANGELOG, pyproject.toml and .ci/run say about each other."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def command(name: str) -> str:
    """The line in the code block after the README's marker; fails unless it is one line."""
    blocks = re.findall(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 1, f"README.md has {len(blocks)} commands marked {name}"
    assert blocks[0].count("\n") == 1, f"the command {name} is not one line"
    return blocks[0].strip()


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_command_is_complete(name: str) -> None:
    """It makes an environment, installs extras that exist with the tested versions, and runs."""
    line = command(name)
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
    (extras,) = re.findall(r'"\.\[([a-z,]+)\]"', line)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert not re.search(r"&& (?!\.venv/bin/)", line), "every later step runs from that environment"


def test_commands_run_the_main_job_and_all_tests() -> None:
    assert command("demo").endswith("&& .venv/bin/peft-fast demo")
    assert PROJECT["project"]["scripts"]["peft-fast"] == "peft_fast.cli.main:main"
    assert re.search(r"&& \.venv/bin/python -m pytest( -n \d+ --dist \w+)?$", command("tests")), "no test is left out"


@pytest.mark.skipif(shutil.which("awk") is None, reason="needs awk")
def test_ci_runs_the_readme_command() -> None:
    """The extraction in .ci/run, as it stands there, gives the README's line."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (line,) = [line for line in script.splitlines() if line.startswith("command=$(awk")]
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "$command"'], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == command("tests")


def test_readme_is_short() -> None:
    assert README.count("\n") < 200


def test_links_in_the_documentation_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_tested_versions_are_pinned() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert pins["torch"] == "2.13.0"
    assert "triton" not in pins, "torch's CUDA builds ask for one exact triton"
    for group in [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]:
        for requirement in group:
            name = re.match(r"[A-Za-z0-9_-]+", requirement)
            assert name and name[0] in {*pins, "triton", "liger-kernel"}, f"constraints.txt does not pin {requirement}"


def test_changelog_has_unreleased_entries() -> None:
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    assert sections[0].startswith("Unreleased\n") and re.search(r"^- \S", sections[0], flags=re.M)
