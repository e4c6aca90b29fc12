"""The project's own promises: one list of packages, data that flow one way, no pickles, help that answers."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from commands import run_here

ROOT = Path(__file__).parent.parent
PACKAGES = ("extract", "store", "probes", "analysis", "edit")
# extract → store → probes → analysis → edit: who may import whom.
ALLOWED = {
    "store": set(),
    "extract": {"store"},
    "probes": {"store"},
    "analysis": {"store", "probes"},
    "edit": {"store", "probes", "extract", "analysis"},
}
# Three files may reach back, on demand: to answer for a picture at hand a trained probe needs the single pass; pictures
# lie where extract finds them, and so do the norm and the head of a checkpoint.
REACHES_BACK = {
    "probes/trained.py": {"extract"},
    "analysis/maps/pictures.py": {"extract"},
    "analysis/states/lens.py": {"extract"},
}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


def test_environment_yml_installs_pyproject_under_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == project["name"]
    assert f"python{project['requires-python']}" in conda
    assert pip == {"pip": ["--constraint constraints.txt", "--group dev", "--editable ."]}


def test_constraints_pin_every_dependency_and_carry_no_index():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?://|--(extra-)?index|--find-links|file:", text)
    pinned = {line.split("==")[0].lower() for line in text.splitlines() if "==" in line}
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = table["project"]["dependencies"] + table["dependency-groups"]["dev"]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        assert name in pinned, f"{name} is not in constraints.txt: compile it again"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_data_flow_one_way_and_every_file_says_its_purpose(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = {package} | ALLOWED[package] | REACHES_BACK.get(path.relative_to(ROOT).as_posix(), set())
    for name in imports_of(path):
        other = name.split(".")[0]
        assert other not in PACKAGES or other in allowed, f"{package} imports {other}"
        assert other not in ("pickle", "dill", "joblib"), f"{path} reads pickles"
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} does not say its purpose"
    assert "trust_remote_code=True" not in path.read_text()


@pytest.mark.parametrize(
    "program",
    [
        "extract",
        "extract.scenes",
        "extract.ground",
        "extract.pocket evaluate",
        "extract.review",
        "store",
        "store verify",
        "probes sweep",
        "probes train",
        "probes attend",
        "probes evaluate",
        "analysis curves",
        "analysis heads",
        "analysis states",
        "analysis report",
        "edit train",
        "edit run",
        "edit evaluate",
        "edit report",
        "edit gap",
        "edit judge",
        "edit recipe",
        "edit.pocket vae",
    ],
)
def test_every_command_teaches_in_its_help(program):
    done = run_here(*program.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 40


def test_extracts_help_shows_the_paper_preset():
    done = run_here("extract", "--help")
    text = " ".join(done.stdout.split())
    for word in ("paper", "Qwen/Qwen2.5-VL-7B-Instruct", "OmniEdit", "128,000"):
        assert word in text


def test_an_unknown_command_is_one_line_on_standard_error():
    done = subprocess.run([sys.executable, "-m", "store", "frobnicate"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "frobnicate" in done.stderr


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"\bmake ((?:[a-z-]+ ?)+)", re.sub(r"#.*", "", (ROOT / "README.md").read_text()))
    used = {word for line in named for word in line.split()} & {
        "setup",
        "test",
        "extract",
        "probe",
        "figures",
        "pocket",
        "help",
    }
    assert {"extract", "probe", "figures", "test", "help"} <= used <= targets
    for target in ("bench", "lint", "setup", "test-slow"):
        assert target in targets


def test_no_tracked_text_names_an_index_or_a_private_path():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yml", ".txt", "") and path.is_file():
            text = path.read_text(errors="ignore")
            assert not re.search(r"(index-url|find-links)[ =]+\S", text), name


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["extract", "--preset", "bogus"], "bogus"),
        (["extract", "--no-such-option"], "no-such-option"),
        (["store", "verify"], "Folder or URL"),
        (["extract.scenes", "--samples", "many", "--out", "x"], "many"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(arguments, word):
    done = run_here(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert word in done.stderr
