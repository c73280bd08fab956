"""The shape of the repository: who imports whom, and that what the README names is there."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (  # from the ground up: a module imports from the floors below its own
    {"errors", "rng", "archives", "arrays", "diffusion", "fast_modules", "graphs", "rowwise",
     "sharding", "validation"},
    {"captions", "config", "files", "images", "logger", "optimizer", "processes"},
    {"checkpoint", "plots", "gallery", "data", "shards"},
    {"ema", "clip", "models", "sampling", "prepare"},
    {"run_folder", "train_state", "pipeline", "cli"}, {"train_loop", "tasks", "render"})
ONE_IMPORTER = {"open_clip": "clip", "pycocotools": "captions", "dalle2_pytorch": "fast_modules",
                "gradio": "app"}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def list_ours(path):
    """The modules of the package that a file imports."""
    names = {n.split(".")[1] if n.startswith("dalle2.") else "" for n in imported(path)}
    return names - {""}


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert floor.keys() == {path.stem for path in (ROOT / "dalle2").glob("[a-z]*.py")}
    for path in (ROOT / "dalle2").glob("[a-z]*.py"):
        for name in list_ours(path):
            assert floor.get(name, 99) < floor[path.stem], f"{path.stem} imports {name}"
    assert not list_ours(ROOT / "dalle2" / "train_loop.py") & {"models", "data", "clip", "sampling"}


def test_a_library_has_one_importer_and_an_entry_script_none():
    for path in (ROOT / "dalle2").rglob("*.py"):
        names = {name.split(".")[0] for name in imported(path)}
        for package, owner in ONE_IMPORTER.items():
            assert path.stem == owner or package not in names, path
        assert not names & {"train_prior", "train_decoder", "train_clip", "test_dalle2"}, path


@pytest.mark.parametrize("script", ["train_clip.py", "train_prior.py", "train_decoder.py",
                                    "test_dalle2.py", "data/toy_coco.py"])
def test_help_does_not_wait_for_torch(script):
    subprocess.run([sys.executable, "-c", """
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ending:
    assert not ending.code
assert "torch" not in sys.modules
""".replace("sys.argv[0]", repr(script))], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_scripts_are_posix_sh():
    for path in ROOT.glob("*/*.sh"):
        text = path.read_text()
        assert subprocess.run(["sh", "-n", path]).returncode == 0
        assert "set -eu" in text or not text.startswith("#!"), path
        assert not re.findall(r"benchmarks/\w+\.py", text), f"{path}: benchmarks are modules"
        for name in re.findall(r"-m ((?:benchmarks|dalle2)[\w.]+)", text):
            assert importlib.util.find_spec(name), f"{path}: {name}"


def test_nothing_holds_an_absolute_path_or_an_unsafe_load():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("scripts/*.sh")]:
        text = path.read_text()
        assert not re.search(r"[\"'](/home|/root|/Users|/mnt|C:\\\\)", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call and "map_location" in call, path


@pytest.mark.slow
def test_the_package_needs_no_fcntl_and_no_affinity(tmp_path):
    """As on Windows and macOS: modules, the lock of a run folder, the count of cores."""
    subprocess.run([sys.executable, "-c", """
import os, sys
from pathlib import Path

import pytest
sys.modules["fcntl"] = None
del os.sched_getaffinity
for path in Path("dalle2").rglob("[a-z]*.py"):
    if path.stem != "app":
        __import__(".".join(path.with_suffix("").parts))
from dalle2.data import count_cores
from dalle2.files import hold_lock
assert count_cores() == os.cpu_count()
with hold_lock(Path(sys.argv[1]) / ".lock", ""):
    pass
""", tmp_path], cwd=ROOT, check=True)
