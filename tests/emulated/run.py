"""Runs a bundle of each kind as other processors and compares the answers: `run.py cpus` and `run.py arm64`, of the Makefile.

`cpus` runs this environment's Python as older x86 processors (qemu-x86_64). `arm64` makes a Debian root for 64-bit ARM with
mmdebstrap, installs a wheel that is built here there, and runs it (qemu-aarch64). Both leave everything in build/emulated.

For each bundle, a prompt is read in one step and further tokens one at a time, everywhere those that the float model finds
most likely here: a divergence compares predictions after the same text.

| checked | limit |
|---|---|
| bundles without integers: logits | differ from those here by at most `FLOAT_LOGITS` |
| others: mean KL divergence from the float model here | 1.5 times the divergence here, and `KL_FLOOR` |
| most likely tokens | those here, or near ties, which are counted: the logits of both tokens here are within `NEAR_TIE` |

Speeds of emulated processors mean nothing.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "emulated"
HERE = Path(__file__).parent
PROMPT, FURTHER = 40, 16
KINDS = ("float32", "portable", "float16", "int8", "int8-quality", "int8-caches", "int8-halves", "int8-dynamic")
KINDS += ("int8-dynamic-older", "int4", "int4-size", "int8-portable", "int4-portable")
# The negative control: an older bundle with the weights of its file, which the runtime would replace on some processors.
CONTROL = "int8-dynamic-older as stored"
# The largest difference of logits of kinds without integers. Numbers in float16 from 8 to 16 are 0.008 apart, and ARM also adds
# in float16 (measured: 0.02).
FLOAT_LOGITS = {"float32": 2e-3, "portable": 2e-3, "float16": 6e-2}
KL_RATIO, KL_FLOOR = 1.5, 2e-4
# The difference of two logits below which rounding decides between two tokens.
NEAR_TIE = FLOAT_LOGITS | {"int8": 0.3, "int4": 0.6}

X86 = {"Nehalem": "SSE4.2", "Haswell": "AVX2", "Skylake-Server": "AVX2 (qemu has no AVX-512)"}
ARM = {"cortex-a53": "ARMv8.0", "neoverse-n1": "dot product", "max": "dot product, i8mm"}
# What `slm doctor` names on each.
ARM_SETS = {"cortex-a53": ["NEON"], "neoverse-n1": ["NEON", "dot product"], "max": ["NEON", "dot product", "i8mm"]}
# The CPU part in /proc/cpuinfo, by which onnxruntime finds the kind of core.
ARM_PARTS = {"cortex-a53": "0xd03", "neoverse-n1": "0xd0c", "max": "0xd40"}
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6", "libgcc-s1")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


class Missing(Exception):
    """Raised with one line that says what is missing."""


@dataclass(frozen=True)
class Answers:
    """The result of `answer.py`: what it says about the processor, and the logits of each bundle."""

    about: dict[str, Any]
    logits: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Answers":
        """Reads a result."""
        with np.load(path) as arrays:
            logits = {name: arrays[name] for name in arrays.files if name != "about"}
            return cls(json.loads(str(arrays["about"])), logits)


@dataclass(frozen=True)
class Verdict:
    """The comparison of one bundle on a processor with the same here."""

    kind: str
    kl: float
    kl_here: float
    largest: float
    others: int
    ties: int
    passed: bool


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    found: np.ndarray = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return found


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Returns the mean KL divergence in nats."""
    wanted = log_softmax(reference)
    return float((np.exp(wanted) * (wanted - log_softmax(logits))).sum(axis=-1).mean())


def compare(kind: str, float_model: np.ndarray, here: np.ndarray, there: np.ndarray) -> Verdict:
    """Compares the logits (positions, vocabulary) of a bundle on two processors."""
    kl, kl_here = divergence(float_model, there), divergence(float_model, here)
    best, other = here.argmax(axis=-1), there.argmax(axis=-1)
    rows = np.arange(len(here))
    gaps = (here[rows, best] - here[rows, other])[best != other]
    tie = NEAR_TIE[kind if kind in FLOAT_LOGITS else kind[:4]]
    largest = float(np.abs(there - here).max())
    near = largest <= FLOAT_LOGITS[kind] if kind in FLOAT_LOGITS else kl <= KL_RATIO * kl_here + KL_FLOOR
    return Verdict(
        kind, kl, kl_here, largest, int((gaps > tie).sum()), int((gaps <= tie).sum()), near and not (gaps > tie).any()
    )


def run(command: list[object], **environment: str) -> str:
    """Runs a command and returns its output."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], env=clean | environment, capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return done.stdout


def program(name: str, package: str) -> str:
    """Returns the path of a program, which apt-get installs if it may.

    Raises:
        Missing: If it is not there.
    """
    found = shutil.which(name)
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        run(["apt-get", "update", "-qq"])
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package], DEBIAN_FRONTEND="noninteractive")
        found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is missing: install {package}")
    return found


def bundles() -> Path:
    """Returns the directory of the bundles. They are made again if the code that makes them has changed."""
    files = [
        HERE / "bundles.py",
        *(file for name in ("core", "export", "quantize") for file in (ROOT / name).rglob("*.py")),
    ]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
    home, mark = HOME / "bundles", HOME / "bundles" / "made-by"
    if not mark.is_file() or mark.read_text() != digest:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        print("making the bundles, which takes minutes", flush=True)
        run([sys.executable, HERE / "bundles.py", home])
        mark.write_text(digest)
    return home


def answered(home: Path) -> tuple[dict[str, Any], Answers]:
    """Returns the plan for other processors, and the answers here."""
    sys.path.insert(0, str(HERE))
    from bundles import prompt

    plan = {
        "home": str(home),
        "bundles": [*KINDS, CONTROL],
        "prompt": prompt(home, PROMPT),
        "count": FURTHER,
        "further": {},
    }
    (HOME / "plan.json").write_text(json.dumps(plan))
    run([sys.executable, HERE / "answer.py", HOME / "plan.json", HOME / "here.npz"])
    here = Answers.load(HOME / "here.npz")
    return plan | {"further": here.about["tokens"]}, here


def report(name: str, what: str, here: Answers, there: Answers) -> bool:
    """Prints the comparison of all bundles on a processor; returns whether it passed."""
    saturate = there.about["products_saturate"]
    print(f"\n{name} ({what}): {'8-bit products saturate' if saturate else 'no saturation'}")
    print(f"{'bundle':30} {'KL here':>9} {'KL there':>9} {'largest':>9} {'ties':>5} {'others':>7}")
    passed = True
    for kind in [*KINDS, CONTROL]:
        found = compare(kind, here.logits["float32"], here.logits[kind], there.logits[kind])
        wanted = not (saturate and kind == CONTROL)
        passed &= found.passed == wanted
        said = "" if found.passed else " differs, as the control must" if not wanted else " FAILED"
        said = said if found.passed == wanted or not found.passed else " FAILED: the control passes"
        print(
            f"{kind:30} {found.kl_here:9.5f} {found.kl:9.5f} {found.largest:9.4f} {found.ties:5} {found.others:7}{said}",
            flush=True,
        )
    return passed


def cpus() -> bool:
    """Runs this environment as older x86 processors."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise Missing("make test-cpus needs Linux on x86-64")
    qemu = program("qemu-x86_64", "qemu-user")
    plan, here = answered(bundles())
    (HOME / "plan.json").write_text(json.dumps(plan))
    passed, saturated = True, False
    for name, what in X86.items():
        run([qemu, "-cpu", name, sys.executable, HERE / "answer.py", HOME / "plan.json", HOME / f"{name}.npz"])
        there = Answers.load(HOME / f"{name}.npz")
        passed &= report(name, what, here, there)
        saturated |= there.about["products_saturate"]
    if not saturated:
        print("FAILED: no processor saturates, so that nothing was tested")
    return passed and saturated


@dataclass(frozen=True)
class ArmRoot:
    """A Debian root for 64-bit ARM with slm's wheel. It is not configured: qemu runs its Python, and nothing else of it."""

    qemu: str
    root: Path = HOME / "arm64" / "root"
    site: Path = HOME / "arm64" / "site"

    def make(self) -> None:
        """Makes the root and the packages once, and installs the wheel each time."""
        if not (self.root / "usr/bin" / f"python{PYTHON}").exists():
            print("making the Debian root", flush=True)
            shutil.rmtree(self.root, ignore_errors=True)
            self.root.parent.mkdir(parents=True, exist_ok=True)
            debootstrap = program("mmdebstrap", "mmdebstrap")
            options = ["--variant=extract", "--architectures=arm64", f"--include={','.join(PACKAGES)}"]
            run([debootstrap, *options, SUITE, self.root, "http://deb.debian.org/debian"])
        (self.root / "proc").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _wheel(Path(scratch))
            constraints = ROOT / "constraints.txt"
            mark, wanted = self.site / "constraints", constraints.read_text() + (ROOT / "pyproject.toml").read_text()
            fresh = not mark.is_file() or mark.read_text() != wanted
            if fresh:
                print("installing the wheel and its packages for aarch64", flush=True)
                shutil.rmtree(self.site, ignore_errors=True)
            for old in [*self.site.glob("slm_edge-*"), self.site / "slm"]:
                shutil.rmtree(old, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
            pip += [
                "--target",
                str(self.site),
                "--only-binary=:all:",
                "--python-version",
                PYTHON,
                "--implementation",
                "cp",
            ]
            pip += [part for each in PLATFORMS for part in ("--platform", each)]
            chosen = [f"{wheel}[cpu]", "--constraint", str(constraints)] if fresh else [str(wheel), "--no-deps"]
            run([*pip, *chosen])
            mark.write_text(wanted)

    def python(self, cpu: str) -> Path:
        """Returns a program that runs the root's Python as a processor."""
        features = "fp asimd"
        if cpu != "cortex-a53":
            features += " asimddp" + " i8mm" * (cpu == "max")
        lines = (f"Features\t: {features}", "CPU implementer\t: 0x41", f"CPU part\t: {ARM_PARTS[cpu]}")
        # qemu shows the host's file, with which onnxruntime ends; a file in the root hides it.
        processors = ("\n".join((f"processor\t: {i}", *lines, "")) for i in range(os.cpu_count() or 1))
        (self.root / "proc" / "cpuinfo").write_text("\n".join(processors))
        script = self.root.parent / f"python-{cpu}"
        python = self.root / "usr/bin" / f"python{PYTHON}"
        script.write_text(
            f"#!/bin/sh\nexport PYTHONHOME={self.root}/usr PYTHONPATH={self.site} PYTHONDONTWRITEBYTECODE=\n"
            f'exec {self.qemu} -cpu {cpu} -0 {script} -L {self.root} {python} "$@"\n'
        )
        script.chmod(0o755)
        return script


def _wheel(scratch: Path) -> Path:
    """Builds slm's wheel from a copy of the repository's files."""
    names = run(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]).split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (scratch / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, scratch / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", scratch, scratch / "source"])
    return next(scratch.glob("slm_edge-*.whl"))


def arm64() -> bool:
    """Installs the wheel in a Debian root for 64-bit ARM and runs it as several processors."""
    if platform.machine() == "aarch64" or sys.platform != "linux":
        raise Missing("make test-arm64 needs Linux on another processor than 64-bit ARM, where make test does the same")
    root = ArmRoot(program("qemu-aarch64", "qemu-user"))
    root.make()
    plan, here = answered(bundles())
    (HOME / "plan.json").write_text(json.dumps(plan))
    greedy = ("generate", "-p", "Once upon a time", "--greedy", "--max-new-tokens", "24")
    text = run([sys.executable, "-m", "slm", *greedy])
    passed = True
    for name, what in ARM.items():
        python = root.python(name)
        run([python, HERE / "answer.py", HOME / "plan.json", HOME / f"{name}.npz"])
        passed &= report(name, what, here, Answers.load(HOME / f"{name}.npz"))
        doctor = json.loads(run([python, "-m", "slm", "doctor", "--json"]))
        sets = next(each["value"] for each in _findings(doctor) if each["name"] == "instruction sets")
        right = re.split(", ", sets.partition(";")[0]) == ARM_SETS[name]
        print(f"slm doctor: {sets}{'' if right else ' FAILED'}")
        same = run([python, "-m", "slm", *greedy]) == text
        print(f"slm generate --greedy with the shipped model: {'the text of x86' if same else 'another text: FAILED'}")
        passed &= right and same
    return passed


def _findings(value: Any) -> Iterator[dict[str, Any]]:
    """Yields the findings of `slm doctor --json`."""
    for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        if isinstance(each, dict) and {"name", "value"} <= each.keys():
            yield each
        else:
            yield from _findings(each)


def main() -> int:
    """Runs what the command line names; returns the exit code."""
    HOME.mkdir(parents=True, exist_ok=True)
    try:
        passed = {"cpus": cpus, "arm64": arm64}[sys.argv[1]]()
    except Missing as missing:
        print(missing)
        return 2
    print("\npassed" if passed else "\nFAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
