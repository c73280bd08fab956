"""The documentation: the parser of each script takes the documented commands, links lead somewhere;
and the commands of the README run one after the other."""

import argparse
import contextlib
import importlib.util
import io
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from unittest.mock import patch

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from torch.distributed.run import get_args_parser

README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [README, CHINESE, *sorted({*ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md"),
                                   *ROOT.glob("result_good/**/*.md")})]
SCRIPTS = [path for folder in (".", "dalle2/tools", "data", "benchmarks")
           for path in sorted((ROOT / folder).glob("*.py")) if "parse_args()" in path.read_text()]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"([A-Z]\w*=\S+ )*(python|sh|torchrun|accelerate launch|pytest|pip install) ")
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*")


def list_fenced(page):
    """The commands of a page's sh blocks, without comments."""
    blocks = "".join(block for kind, block in FENCE.findall(page.read_text()) if kind == "sh")
    return [shlex.join(words) for line in blocks.replace("\\\n", " ").splitlines()
            if (words := shlex.split(line, comments=True))]


def list_inline(page):
    return [" ".join(code.split())
            for code in re.findall("`([^`]+)`", FENCE.sub("", page.read_text()))]


COMMANDS = [(str(page.relative_to(ROOT)), command) for page in PAGES for command in dict.fromkeys(
    [*list_fenced(page), *filter(COMMAND.match, list_inline(page))])]


# ----------------------------------------------------------------------------------------------
# parsers


class Built(Exception):
    """Raised where a script would read its flags."""


@cache
def get_parser(path):
    """The argparse parser of a script, which is run up to there."""
    def stop(parser):
        raise Built(parser)
    with patch.object(argparse.ArgumentParser, "parse_args", stop), patch.dict(os.environ), \
            patch.object(sys, "path", [*sys.path]), pytest.raises(Built) as built:
        runpy.run_path(str(path), run_name="__main__")
    return built.value.args[0]


def list_flags(parser):
    """Every flag of a parser and of its commands."""
    commands = [command for action in parser._actions
                if isinstance(action, argparse._SubParsersAction)
                for command in action.choices.values()]
    return {*parser._option_string_actions}.union(*map(list_flags, commands))


def parse(parser, words):
    """parser.parse_args(words); AssertionError where it refuses them."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            return parser.parse_args(words)
        except SystemExit:
            raise AssertionError(printed.getvalue()) from None


def check_command(words):
    """AssertionError where a command names what is not there or would be refused."""
    variables = {}
    while "=" in words[0]:
        name, variables[name] = words.pop(0).split("=", 1)
    launcher, *words = words
    if launcher == "sh":
        return check_shell_script(variables, *words)
    if launcher in ("torchrun", "accelerate"):
        parser = get_args_parser() if launcher == "torchrun" else launch_command_parser()
        args = parse(parser, words[launcher == "accelerate":])
        words = ["-m"] * bool(args.module) + [args.training_script, *args.training_script_args]
    elif launcher != "python":  # pip, pytest
        assert all((ROOT / word).exists() for word in words if word.endswith((".txt", ".py")))
        return
    check_python(words)


def check_python(words):
    if words[0] == "-m":
        words = words[1:]
        if "NAME" in words[0]:
            return
        path = importlib.util.find_spec(words[0]).origin
    else:
        path = ROOT / words[0]
    parser, flags = get_parser(path), [word for word in words[1:] if word != "..."]
    if flags:  # without any the script is only named
        parse(parser, flags)


def check_shell_script(variables, name, *flags):
    """A script that hands its flags on is checked as the one that gets them."""
    text = (ROOT / name).read_text()
    known = text + "".join(path.read_text() for path in ROOT.glob("scripts/*.sh")
                           if f". scripts/{path.name}" in text)
    for variable in variables:
        assert f"{{{variable}:" in known, variable
    if "LAUNCH_ARGS" in variables:
        parse(launch_command_parser(), [*shlex.split(variables["LAUNCH_ARGS"]), "train_prior.py"])
    target = re.search(r'^launch (\S+\.py) "\$@"', text, re.M)
    if target:
        return check_python([target[1], *flags])
    assert all(flag in text for flag in flags), flags


# ----------------------------------------------------------------------------------------------
# what the pages say


@pytest.mark.parametrize("page, command", COMMANDS)
def test_a_documented_command_is_understood(page, command):
    check_command(shlex.split(command))


def test_a_flag_in_the_text_is_one_of_some_script():
    shell = "".join(path.read_text() for path in ROOT.glob("*/*.sh"))
    known = set().union(*(list_flags(get_parser(path)) for path in SCRIPTS), FLAG.findall(shell),
                        list_flags(launch_command_parser()), list_flags(get_args_parser()))
    for page in PAGES:
        for code in list_inline(page):
            owner = [path for path in SCRIPTS if re.match(rf"\S*\b{path.name}\b", code)]
            for flag in FLAG.findall(code):
                assert flag in (list_flags(get_parser(owner[0])) if owner else known), (page, flag)


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.replace("%20", " ").partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in map(slug, re.findall(
            r"^#+ (.*)$", target.read_text(), re.M)), link
    for code in list_inline(page):
        if re.fullmatch(r"[\w/]+\.(py|sh)", code):
            assert any((ROOT / folder / code).exists() for folder in (
                "", "dalle2", "scripts", "data", "benchmarks")), code
        if re.fullmatch(r"(dalle2|benchmarks)(\.\w+)+", code) and "NAME" not in code:
            assert pkgutil.resolve_name(code), code


def test_both_readmes_have_the_same_commands_and_results():
    for pattern in (r"^(?:sh|python) [^#\n]*(?:\n    [^#\n]*)*", r"\d+\.\d %", r"docs/\w+\.md",
                    r"`[\w./-]+`"):
        found = [sorted(set(map(str.strip, re.findall(pattern, page.read_text(), re.M))))
                 for page in (README, CHINESE)]
        assert found[0] == found[1]
    assert len(README.read_text().splitlines()) <= 150


# ----------------------------------------------------------------------------------------------
# the commands of the README, run


@pytest.mark.slow
def test_the_commands_for_coco_find_each_others_files(toy, clip_path, tmp_path):
    """In a copy of the repository, on toy data where the download puts COCO: every path is a
    default. What is added makes them short; tests/test_download.py has the download."""
    shutil.copytree(ROOT, tmp_path / "r", ignore=shutil.ignore_patterns(
        ".*", "output", "coco", "prepared", "result*", "tests", "docs"))
    coco = tmp_path / "r" / "data" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(toy / split, coco / f"{split}2014")
        shutil.copy(toy / f"captions_{split}.json",
                    coco / "annotations" / f"captions_{split}2014.json")
    download, *commands = list_fenced(README)[2:6]
    assert "coco_download.py" in download
    train = ["--preset", "toy", "--num_steps", "2", "--batch_size", "4", "--num_val_images", "8",
             "--clip_pretrained", str(clip_path)]
    for command, more in zip(commands, (train, train, ["--num_images", "2"]), strict=True):
        subprocess.run([*command.replace("python", sys.executable).split(), *more], check=True,
                       cwd=tmp_path / "r", env={**os.environ, "VENV": sys.prefix})
    assert len(list((tmp_path / "r" / "result").glob("*.jpg"))) == 3  # two, and all in a grid


@pytest.mark.slow
@pytest.mark.parametrize("module, page", [("scaling", "scaling.md"),
                                          ("preset_costs", "presets.md")])
def test_a_table_of_counts_is_what_its_command_prints(module, page):
    def list_rows(text):
        return [line.replace(" ", "") for line in text.splitlines() if line.startswith("|")][2:]
    printed = subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout
    assert set(list_rows(printed)) <= set(list_rows((ROOT / "docs" / page).read_text()))
    assert len(list_rows(printed)) > 9
