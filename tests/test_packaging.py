"""What is shipped: a wheel that installs and imports, scripts that refuse import, launcher settings that parse."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **changes}
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: leftovers of earlier builds in the checkout would get into the wheel."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "peftrec", source / "peftrec", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "peftrec").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules | {
        "peftrec/py.typed",
        "peftrec/card.md.jinja",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_installs_and_imports(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    done = run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = (
        "import peftrec; from importlib.resources import files; "
        "print(peftrec.__version__, (files('peftrec') / 'py.typed').is_file(), peftrec.__file__)"
    )
    done = run(python, "-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    version, typed, file = done.stdout.split()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", version)
    assert typed == "True"
    assert Path(file).is_relative_to(tmp_path)
    assert (python.parent / "peftrec").is_file()


def test_importing_recipes_says_how_to_launch_them() -> None:
    done = run(sys.executable, "-c", "import recipes", cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: recipes: ")
    assert "accelerate launch recipes/finetune.py --config recipes/configs/ml-100k/click_lora.yaml" in last


def test_accelerate_launches_quietly(tmp_path: Path) -> None:
    """As `make demo` does: nothing printed but the script's own lines, and it uses the cores that there are."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch\n"
        "from peftrec import backbone\n"
        "backbone.use_all_cores(local_processes=1)\n"
        "print(torch.get_num_threads(), os.environ['ACCELERATE_USE_CPU'])\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    settings = ["--config_file", ROOT / "recipes" / "accelerate" / "cpu.yaml", "--num_cpu_threads_per_process", "1"]
    done = run(*launch, *settings, script, cwd=tmp_path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [str(len(os.sched_getaffinity(0))), "True"], "")


def test_constraints_allow_what_the_project_asks_for() -> None:
    """Each direct dependency is pinned, to a version within its bounds, and only pins are in the file."""
    packaging = pytest.importorskip("packaging.requirements")
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is new in Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [packaging.Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for pin in pins:
        (only,) = pin.specifier
        assert only.operator == "=="
        versions[plain(pin.name)] = only.version
    assert list(versions) == sorted(versions)
    for wanted in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = packaging.Requirement(wanted)
        assert requirement.specifier.contains(versions[plain(requirement.name)]), wanted


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make needs to think about building .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, *, version: str = "(3, 11)", pip: str = "exit 0") -> Path:
    """A program that answers like Python to what the Makefile asks: its version, `-m venv`, and pip inside it."""
    script = folder / "fake-python"
    real = sys.executable
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'  -c*) exec {real} -c "import sys; sys.version_info = {version}; $2" ;;\n'
        '  "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;\n'
        '  "-m pip --version") exit 0 ;;\n'
        f'  "-m pip install"*) echo installing; {pip} ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return script


def make(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run("make", *words, cwd=checkout, MAKEFLAGS="", MAKELEVEL="")


def test_make_installs_once_and_again_when_the_constraints_change(checkout: Path) -> None:
    python = f"PYTHON={fake_python(checkout)}"
    first, second = make(checkout, ".venv/.installed", python), make(checkout, ".venv/.installed", python)
    assert (first.returncode, first.stdout.count("installing\n")) == (0, 1), first.stderr
    assert (second.returncode, second.stdout.count("installing\n")) == (0, 0)
    later = (checkout / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(checkout / "constraints.txt", (later, later))
    assert make(checkout, ".venv/.installed", python).stdout.count("installing\n") == 1


def test_a_failed_install_is_done_again(checkout: Path) -> None:
    failed = make(checkout, ".venv/.installed", f"PYTHON={fake_python(checkout, pip='exit 1')}")
    assert failed.returncode == 2
    assert not (checkout / ".venv" / ".installed").exists()
    shutil.rmtree(checkout / ".venv")
    assert "installing" in make(checkout, ".venv/.installed", f"PYTHON={fake_python(checkout)}").stdout


def test_make_says_which_python_it_found(checkout: Path) -> None:
    old = make(checkout, "test", f"PYTHON={fake_python(checkout, version='(3, 8)')}")
    assert (old.returncode, "is Python 3.8; expected 3.10 or newer" in old.stderr) == (2, True), old.stderr
    absent = make(checkout, "test", "PYTHON=no-such-python")
    assert (absent.returncode, "'no-such-python' not found; expected Python 3.10" in absent.stderr) == (2, True)
    assert not (checkout / ".venv").exists()
