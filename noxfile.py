"""All checks of this repository, each in an environment of its own: `nox -s demo`, `nox -s tests`, `nox --list`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # a Python that is not installed is reported as skipped
nox.options.sessions = ["lint", "types", "docs", "wheel", "tests"]

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

RUNNING_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = list(dict.fromkeys([*nox.project.python_versions(PYPROJECT), RUNNING_PYTHON]))

SQLALCHEMY = {"2.0": "sqlalchemy>=2.0.47,<2.1", "2.1": "sqlalchemy>=2.1,<2.2"}
COMBINATIONS = [
    (python, line) for python in PYTHONS for line in SQLALCHEMY if (python, line) != ("3.10", "2.1")
]  # SQLAlchemy 2.1 needs Python 3.11

# nox looks for interpreters on PATH. pyenv's stand in folders of their own, and its shims answer only for the versions
# that are switched on.
PYENV_ROOT = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
PYENV_FOLDERS = [str(folder) for python in PYTHONS for folder in sorted(PYENV_ROOT.glob(f"versions/{python}.*/bin"))]
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *PYENV_FOLDERS])

# What real processes, signals and servers do takes minutes, and does not depend on each combination: those tests run
# with the oldest and the newest one that is here.
INSTALLED = [each for each in COMBINATIONS if each[0] == RUNNING_PYTHON or shutil.which(f"python{each[0]}")]
WITH_ACCEPTANCE = (INSTALLED[0], INSTALLED[-1])


def group(name: str) -> list[str]:
    """Return the requirements of one of the dependency groups in pyproject.toml."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


@nox.session
def demo(session: nox.Session) -> None:
    """Run the weather example."""
    session.install(".[cli]", *group("demo"))
    session.run("python", "-m", "examples.weather", *session.posargs)


@nox.session
@nox.parametrize("python,sqlalchemy", COMBINATIONS)
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """Run all tests, on SQLite and PostgreSQL, with each installed Python and each line of SQLAlchemy.

    Those with real processes (tests/acceptance) run with the oldest and the newest combination only.
    """
    session.install(".[postgres,cli]", SQLALCHEMY[sqlalchemy], *group("test"), *group("demo"))
    leave_out = () if (session.python, sqlalchemy) in WITH_ACCEPTANCE else ("--ignore", "tests/acceptance")
    session.run("pytest", "-n", "2", *leave_out, *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """Kill workers and servers at random for some minutes, and check that nothing is lost: see benchmarks/README.md."""
    session.install(".[postgres]", *group("test"))
    session.run("python", "benchmarks/chaos.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run flows side by side with other libraries, and with raw SQL, for half an hour: see benchmarks/README.md."""
    session.install(".[postgres]", *group("bench"))
    session.run("python", "benchmarks/compare.py", *session.posargs)


@nox.session
def curves(session: nox.Session) -> None:
    """Measure what grows with what, for some 20 minutes, and draw it for docs/performance.md."""
    session.install(".[postgres]", *group("bench"))
    session.run("python", "benchmarks/curves.py", *session.posargs)
    session.run("python", "benchmarks/plots.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, the direction of imports, and whether a migration would hold up PostgreSQL."""
    session.install(".", *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", env={"PYTHONPATH": "src"})
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "tests/migrations_sql.py", folder)
        session.run("squawk", *map(str, sorted(Path(folder).glob("*.sql"))))


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the library."""
    session.install(".[postgres,cli]", *group("types"))
    session.run("mypy")


@nox.session(python=INSTALLED[-1][0])
def docs(session: nox.Session) -> None:
    """Build the docs as a site in site/, and check it: a warning or a link that leads nowhere is an error."""
    session.install(".[postgres,cli]", *group("docs"))
    session.run("python", "docs/site/build.py")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel; use the wheel, installed outside the checkout, as a user would."""
    session.install(*group("build"))
    with tempfile.TemporaryDirectory() as folder:
        built, empty = Path(folder, "dist"), Path(folder, "empty")
        session.run("python", "-m", "build", "--outdir", str(built))  # the wheel is built from the sdist
        (wheel_file,) = built.glob("*.whl")

        session.run("python", "-m", "venv", str(Path(folder, "venv")))
        scripts = Path(folder, "venv", "Scripts" if os.name == "nt" else "bin")
        python, ebbs = str(scripts / "python"), str(scripts / "ebbs")
        session.run(python, "-m", "pip", "install", "--quiet", f"{wheel_file}[cli]", external=True)

        empty.mkdir()
        script = shutil.copy(ROOT / "tests" / "installed_wheel.py", folder)
        env = {"EBBS_DATABASE_URL": f"sqlite:///{Path(folder, 'flows.db')}"}
        with session.chdir(empty):
            session.run(ebbs, "db", "upgrade", env=env, external=True)
            session.run(python, script, env=env, external=True)
            listed = session.run(ebbs, "runs", "list", env=env, external=True, silent=True)
        if "installed-wheel" not in str(listed):
            session.error(f'"ebbs runs list" does not show the flow that ran:\n{listed}')
