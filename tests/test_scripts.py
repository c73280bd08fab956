"""The shell scripts with a Python, a pip and a df that are made up: what they say where something
is missing, and what a finished quickstart does when it is called again."""

import os
import re
import subprocess

import pytest
from helpers import ROOT

PYTHON = """#!/bin/sh
# an interpreter whose `-m venv` makes an environment of fakes
case "$*" in
    *version_info*) exit ${TOO_OLD:-0} ;;
    -V) echo Python 3.9.2 ;;
    "-m venv"*)
        mkdir -p "$3/bin"
        cp "$IN_VENV" "$3/bin/python"
        if [ -n "${VENV_FAILS:-}" ]; then
            printf '#!/bin/sh\\nexit 1\\n' >"$3/bin/python"
            printf '%s\\n' "$VENV_FAILS" "Failing command: $3/bin/python"
            exit 1
        fi ;;
esac
"""
IN_VENV = """#!/bin/sh
# the interpreter of such an environment
echo "$*" >>"$LOG"
case "$*" in
    "-m pip"*) exit ${PIP_FAILS:-0} ;;
    *--judge*) echo "a table of attributes" ;;
    *"--unet_number 1")
        trap 'echo saved >>"$LOG"; exit 143' TERM
        for _ in $(seq ${BASE_STAGE_SLEEPS:-0}); do sleep .1; done
        echo "step 1000 of the base stage"
        exit ${BASE_STAGE_FAILS:-0} ;;
    train_prior.py*) [ -z "${PRIOR_FAILS:-}" ] || { sleep .5; exit $PRIOR_FAILS; } ;;
esac
"""
DEBIAN = "The virtual environment was not created successfully because ensurepip is not available."
NEED = "-c", ". scripts/environment.sh; need requirements.txt"


@pytest.fixture
def sh(tmp_path):
    """sh(argument, ..., NAME="value", ...) -> (exit code, stdout, stderr, the calls of Python)."""
    log = tmp_path / "log"
    for name, text in (("python3", PYTHON), ("in_venv", IN_VENV), ("df", """#!/bin/sh
echo "Filesystem 1024-blocks Used Available Capacity Mounted on"
echo "/dev/vda 100000000 0 ${FREE_KB:-100000000} 0% /"
""")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments, **variables):
        log.write_text("")
        done = subprocess.run(["sh", *arguments], cwd=ROOT, text=True, capture_output=True, env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"),
            "OUT": str(tmp_path / "out"), "LOG": str(log), "IN_VENV": str(tmp_path / "in_venv"),
            **variables})
        return done.returncode, done.stdout, done.stderr, log.read_text().splitlines()
    return run


@pytest.mark.parametrize("variables, message", [
    ({"PYTHON": "/no/python"}, "no /no/python here; install Python 3.10 or newer"),
    ({"TOO_OLD": "1"}, "python3 is Python 3.9.2, 3.10 or newer is needed"),
    ({"FREE_KB": "5000000"}, "venv needs 6 GB of disk space, 4 GB are free"),
    ({"VENV_FAILS": DEBIAN}, "on Debian and Ubuntu: sudo apt install python3-venv"),
    ({"VENV_FAILS": "no room"}, "failed: Failing command"),
    ({"PIP_FAILS": "1"}, "could not be installed .* connection .* The same command resumes")])
def test_what_is_missing_is_said_in_one_line_and_the_same_command_goes_on(sh, variables, message):
    code, _, err, _ = sh("scripts/quickstart.sh", **variables)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    code, _, err, calls = sh(*NEED)
    assert (code, err) == (0, "") and calls[-1].startswith("-m pip install")
    assert sh(*NEED)[3] == []  # nothing is installed twice


def test_a_quickstart_wants_room_for_its_output(sh, tmp_path):
    sh(*NEED)
    code, _, err, calls = sh("scripts/quickstart.sh", FREE_KB="2500000")
    assert code == 2 and err == f"error: {tmp_path}/out needs 3 GB of disk space, 2 GB are free\n"
    assert calls == []


def test_a_finished_quickstart_only_shows_what_is_there(sh, tmp_path):
    sh(*NEED)
    for name in ("clip/clip.safetensors", "prior/prior.safetensors", "decoder/decoder.safetensors",
                 "from_text/index.html", "from_true_embedding/index.html"):
        (tmp_path / "out" / name).parent.mkdir(parents=True)
        (tmp_path / "out" / name).touch()

    def list_commands(**variables):
        code, out, err, calls = sh("scripts/quickstart.sh", **variables)
        assert code == 0 and ("step 1000 of the base stage" in err) == bool(calls)
        assert "a table of attributes\n" in out and f"{tmp_path}/out/from_text/index.html" in out
        return sorted(call.split()[0] for call in calls)  # some of them run side by side
    every = sorted(["data/toy_coco.py", "train_clip.py", "train_prior.py", "train_decoder.py",
                    "train_decoder.py", "test_dalle2.py", "test_dalle2.py", "data/toy_coco.py"])
    assert list_commands() == every
    assert list_commands() == []
    assert list_commands(SEED="1") == every  # of which the first refuses the folder
    assert list_commands() == every
    (tmp_path / "out" / "prior" / "prior.safetensors").rename(tmp_path / "elsewhere")
    assert list_commands() == every


@pytest.mark.parametrize("script, last", [
    ("scripts/quickstart.sh", ["test_dalle2.py"] * 2 + ["data/toy_coco.py"]),
    ("scripts/photos.sh", ["saved", "train_decoder.py .* --unet_number 1$", "test_dalle2.py"])])
def test_a_script_waits_for_the_stage_beside_and_stops_it_when_it_stops(sh, tmp_path, script, last):
    """That of the photographs stops it and goes on with it alone, with all cores."""
    sh(*NEED)
    (tmp_path / "out").mkdir()
    code, out, err, calls = sh(script, BASE_STAGE_SLEEPS="10")
    assert code == 0 and "step 1000 of the base stage" in out + err
    assert all(map(re.match, last, calls[-len(last):])), calls
    (tmp_path / "out/finished").unlink(missing_ok=True)
    code, _, _, calls = sh(script, BASE_STAGE_FAILS="7", PRIOR_FAILS="0")
    assert code == 7 and not any(call.endswith("--unet_number 2") for call in calls)
    code, _, _, calls = sh(script, PRIOR_FAILS="3", BASE_STAGE_SLEEPS="300")
    assert code == 3 and calls[-1] == "saved"  # and was told so at once, or this would take 30 s
