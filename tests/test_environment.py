"""What installs the project: the lock file, the conda environment, and the Makefile, whatever else is active."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
LOCK = (ROOT / "requirements.lock").read_text()


def asked():
    """Return the requirements of the project, those of developers included."""
    required = re.findall(r'^    "([^"]+)",$', PROJECT.partition("[tool.")[0], re.M)
    return [
        Requirement(each)
        for each in [*required, *re.findall(r'"([\w-]+)"', re.search(r"dev = \[(.*)\]", PROJECT)[1])]
    ]


@pytest.mark.parametrize("requirement", asked(), ids=lambda requirement: requirement.name)
def test_the_lock_file_pins_what_the_project_asks_for(requirement):
    locked = {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.+]+)", LOCK, re.M)
    }
    name = canonicalize_name(requirement.name)
    assert name in locked, f"{name} is not in requirements.lock: run `make lock`"
    version = locked[name]
    assert requirement.specifier.contains(version, prereleases=True), (
        f"{requirement} is locked at {version}: run `make lock`"
    )


def test_every_package_of_the_lock_file_has_its_hashes():
    packages = re.split(r"^(?=[\w.-]+==)", LOCK, flags=re.M)[1:]
    assert packages
    for package in packages:
        assert "--hash=sha256:" in package, package.partition("\n")[0]


def test_the_lock_file_names_no_index():
    assert not re.search(r"https?://|--index|--extra-index|--find-links", LOCK)


def test_the_conda_environment_installs_the_lock_file():
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert pip == ["--require-hashes -r requirements.lock"]
    supported = re.search(r'requires-python = "(.*)"', PROJECT)[1]
    assert f"python {supported}" in content["dependencies"]


def test_containers_and_continuous_integration_install_the_lock_by_make():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert "RUN make .venv/installed" in (ROOT / "Dockerfile").read_text()
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert container["postCreateCommand"].startswith("make .venv/installed")
    target = container["build"]["target"]
    assert re.search(rf"^FROM .* AS {target}$", (ROOT / "Dockerfile").read_text(), re.M)


def test_torch_for_cpus_has_the_versions_of_the_lock(checkout):
    installed = [call for call in make(checkout, "lint", "TORCH=cpu") if "uv pip install" in call]
    assert "--torch-backend cpu" in installed[0] and "--constraint requirements.lock" in installed[0]


@pytest.fixture
def checkout(tmp_path):
    """Return a checkout whose `python` makes an environment of programs that only write down how they were called."""
    folder = tmp_path / "checkout"
    (folder / "base").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    program = '#!/bin/sh\necho "$0 $*; $VIRTUAL_ENV; $PYTHONPATH" >> "$LOG"\n'
    makes = (
        program
        + 'mkdir -p .venv/bin\nfor name in python uv ruff jupyter; do cp "$LOG.program" .venv/bin/$name; done\n'
    )
    (tmp_path / "log.program").write_text(program)
    (folder / "base/python3").write_text(makes)
    for path in (tmp_path / "log.program", folder / "base/python3"):
        path.chmod(0o755)
    return folder


def make(folder, *arguments, **environment):
    """Run make in a folder as a user with these settings would; return the calls of the programs that it ran."""
    log = folder.parent / "log"
    log.unlink(missing_ok=True)
    path = os.pathsep.join([str(folder / "base"), os.environ["PATH"]])
    given = {**os.environ, "PATH": path, "LOG": str(log), **environment}
    done = subprocess.run(["make", *arguments], cwd=folder, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines() if log.exists() else []


def test_everything_is_installed_into_the_environment_of_the_checkout(checkout, tmp_path):
    """Whatever environment is active, and wherever pip is told to install."""
    other = {
        "VIRTUAL_ENV": str(tmp_path / "other"),
        "CONDA_PREFIX": str(tmp_path / "conda"),
        "PYTHONPATH": "/elsewhere",
    }
    created, pip, *installed, linter, _ = make(checkout, "lint", **other)
    assert "-m venv" in created
    venv = checkout / ".venv"
    assert (
        pip.startswith(f"{venv}/bin/python -m pip install")
        and f"--prefix={venv}" in pip
        and "--no-user" in pip
    )
    assert len(installed) == 2
    for call in installed:
        assert f"--python {venv}/bin/python" in call
    assert linter.startswith(str(venv))
    for call in (pip, *installed, linter):
        assert call.endswith(f"; ; {checkout}")  # no other environment, no other code


def test_an_environment_is_made_once_and_anew_in_a_copy(checkout, tmp_path):
    assert any("-m venv" in call for call in make(checkout, "lint"))
    assert not any("-m venv" in call for call in make(checkout, "lint"))
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    assert any("-m venv --clear" in call for call in make(copy, "lint"))


def test_options_are_passed_on(checkout):
    make(checkout, "lint")
    (call,) = make(checkout, "lab", "ARGS=--allow-root")
    assert "lab notebooks --allow-root" in call
    (call,) = make(checkout, "test", "ARGS=-k fpdm")
    assert "-m not slow -k fpdm" in call


def test_a_study_is_run_job_by_job_and_taken_in_by_dvc(checkout):
    make(checkout, "lint")
    program = (checkout.parent / "log.program").read_text()
    (checkout / ".venv/bin/dvc").write_text(program + "case $1 in status) exit 1;; esac\n")
    (checkout / ".venv/bin/dvc").chmod(0o755)
    (checkout / "studies/one").mkdir(parents=True)
    calls = make(checkout, "study", "STUDY=studies/one", "JOBS=1")
    made = [
        call.partition(";")[0].partition("bin/")[2]
        for call in calls
        if "status" not in call and "config" not in call
    ]
    assert made == ["python -m equilab submit --jobs 1", "dvc commit --force --quiet", "dvc repro"]


def test_a_study_that_is_up_to_date_is_not_run(checkout):
    make(checkout, "lint")
    (checkout / ".venv/bin/dvc").write_text((checkout.parent / "log.program").read_text())
    (checkout / ".venv/bin/dvc").chmod(0o755)
    assert not any("submit" in call for call in make(checkout, "study"))


@pytest.mark.slow
def test_pip_installs_into_the_environment_whatever_its_settings_say(tmp_path):
    """`user`, `target` and `prefix` in a file of settings do not lead the Makefile's install elsewhere."""
    venv, wheel = tmp_path / "venv", tmp_path / "nothing-1-py3-none-any.whl"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing.py", "")
        archive.writestr("nothing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1\n")
        archive.writestr(
            "nothing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("nothing-1.dist-info/RECORD", "")
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nuser = true\ntarget = {tmp_path}/target\nprefix = {tmp_path}/prefix\n")
    options = re.search(r"-m pip install (.*) uv$", (ROOT / "Makefile").read_text(), re.M)[1]
    command = [
        venv / "bin/python",
        "-m",
        "pip",
        "install",
        "--no-index",
        *options.replace("$(VENV)", str(venv)).split(),
        wheel,
    ]
    environment = {**os.environ, "PIP_CONFIG_FILE": str(settings), "PIP_USER": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert [path.parent.parent.parent for path in venv.rglob("nothing.py")] == [venv / "lib"]
    assert not (tmp_path / "target").exists() and not (tmp_path / "prefix").exists()
