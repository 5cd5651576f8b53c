"""Mistakes on the command line and in the file of --config, and Ctrl-C, as a user meets them."""

import subprocess
import sys

import pytest

from tests.system.conftest import ROOT, command

EXPERIMENT = ROOT / "experiments" / "luong_general.py"


def refused(*arguments):
    """What a command that trains says to these arguments."""
    done = command("s2s.main", *arguments, check=False)
    told = done.stderr.decode()
    assert done.returncode == 2 and "Traceback" not in told and told.startswith("s2s: ")
    return told


@pytest.mark.parametrize("override", [[], ["--config.model.hidden=8"]])
@pytest.mark.parametrize("module", ["s2s.main", "s2s.sweep"])
def test_a_mistyped_file_is_told_with_what_is_there(module, override):
    done = command(module, "--config=experiments/luong_generl.py:dates", *override, check=False)
    told = done.stderr.decode()
    assert done.returncode == 2 and "Traceback" not in told
    assert told.startswith("s2s: --config experiments/luong_generl.py: there is no such file; in experiments")
    assert "luong_general.py" in told


def test_a_mistyped_override_is_told_with_its_like():
    told = refused("--config", EXPERIMENT, "--config.model.hiden=8")
    assert told.startswith("s2s: a --config override names no field: 'hiden'") and '"hidden"' in told


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        (
            "config.model.hidden =",
            "config.model.hiden =",
            'line {}: AttributeError: Key "hiden" does not exist',
        ),
        ("config.model.hidden = 256", "config.model.hidden =", "line {}: SyntaxError: invalid syntax"),
        ("config.model.hidden = 256", "import no_such_module", "line {}: ModuleNotFoundError: No module"),
        ("def get_config", "def getconfig", " has no get_config(): write one"),
    ],
)
@pytest.mark.parametrize("override", [[], ["--config.optim.beta1=0.5"]])
def test_a_mistake_in_the_file_is_told_with_its_line(tmp_path, right, wrong, told, override):
    file = tmp_path / "mine.py"
    source = EXPERIMENT.read_text()
    assert right in source
    file.write_text(source.replace(right, wrong))
    line = source[: source.index(right)].count("\n") + 1
    said = refused(f"--config={file}", *override)
    assert said.startswith(f"s2s: {file}") and told.format(line) in said and len(said) < 300


def test_ctrl_c_before_the_first_update_is_no_trace(tmp_path):
    # Who started the tests may have it ignored, as a shell does for what runs in the background.
    script = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from s2s import commandline\ndef main(argv): os.kill(os.getpid(), signal.SIGINT)\n"
    script += "commandline.run(main)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "s2s: stopped by Ctrl-C; the same command goes on from what is saved\n"
