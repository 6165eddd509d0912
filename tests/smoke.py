"""Studies for tests: smoke, with what a test changes, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from equilab import __main__
from equilab.core import like

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "studies/smoke/params.yaml"


def current_studies():
    """Return the folders of the studies whose committed results are of their params as they are."""
    listed = like.read(ROOT / "params.yaml")["scoreboard"]
    return [ROOT / folder for name, folder in listed["studies"].items() if name not in listed["earlier"]]


def sections():
    """Return smoke's params, for a study in any folder."""
    params = like.read(SMOKE)
    params["study"]["root"] = str(ROOT)
    return params


def write_study(folder, changes=None):
    """Write smoke's params.yaml into a folder, with other values at some paths ("study.seed"; ... takes a key away)."""
    params = sections()
    for path, value in (changes or {}).items():
        *above, last = path.split(".")
        place = params
        for key in above:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    keep(params, folder)
    return folder


class Plain(yaml.SafeDumper):
    """YAML without aliases: a change of one run changes no other."""

    def ignore_aliases(self, data):
        return True


def keep(params, folder="."):
    """Write the params of a study into a folder."""
    text = yaml.dump(params, Dumper=Plain, sort_keys=False)
    Path(folder, "params.yaml").write_text(text, encoding="utf-8")


def called(*command):
    """Run a command in this process, in the current folder; it must succeed."""
    assert __main__.main(list(command)) == 0


def refused(capsys, *command):
    """Return the sentence with which a command is refused."""
    capsys.readouterr()
    assert __main__.main(list(command)) == 2
    return capsys.readouterr().err


def start(
    folder, *arguments, environment=None, script="from equilab import __main__; sys.exit(__main__.main())"
):
    """Start a command of the study in a folder as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{script}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, *arguments, **options):
    """Run a command of the study in a folder; return its exit status and what it printed, stdout and stderr."""
    process = start(folder, *arguments, **options)
    out, err = process.communicate()
    return process.returncode, out, err
