"""`slm doctor`: what was found on this machine, and what to do about it."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import click

from slm.cli import nvidia, probes
from slm.cli.console import print_json, print_table, say
from slm.cli.finding import Finding
from slm.cli.gpu_findings import builds_findings, driver_findings, onnxruntime_findings, torch_gpu_finding
from slm.cli.options import json_option
from slm.cli.probes import Offline, Provider, TrainingType
from slm.core.install import install_hint
from slm.core.machine import Memory, cpu_quota, instruction_sets, memory, products_saturate, usable_cores
from slm.version import __version__

_T = TypeVar("_T")

# Packages of the chain and the extra that brings each; None: the base installation.
_PACKAGES = {
    "numpy": None,
    "tokenizers": None,
    "jinja2": None,
    "click": None,
    "pydantic": None,
    "rich": None,
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "cuda",
    "onnx": "convert",
    "onnxscript": "convert",
    "safetensors": "convert",
    "gguf": "convert",
    "huggingface_hub": "convert",
    "torch": "train",
    "tiktoken": "train",
    "datasets": "train",
    "peft": "train",
    "matplotlib": "train",
    "pyyaml": "train",
    "transformers": "dev",
}
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")

# Peaks as docs/LOG.md has them: the documented recipe on a CPU, and `make demo`.
_DOCUMENTED_RECIPE = int(11.3 * (1 << 30))
_DEMO = 631 << 20


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Report what this machine has, what is missing, and what to do about it.

    Each provider of onnxruntime runs one step of a tiny model, and the numbers are checked. For NVIDIA GPUs the report has the
    driver, the compute capability and the CUDA versions that onnxruntime and PyTorch were built for.

    \b
      slm doctor
      slm doctor --json      for a bug report; holds no token
    """
    found, findings = _examine()
    findings.sort(key=lambda finding: finding.level != "problem")
    problems = [finding for finding in findings if finding.level == "problem"]
    found |= {
        "problems": [f"{problem.value}: {problem.advice}" if problem.advice else problem.value for problem in problems],
        "findings": [asdict(finding) for finding in findings],
    }
    if as_json:
        print_json(found)
        return
    print_table("this machine", ("", "found", "what to do"), _rows(findings))
    for problem in found["problems"]:
        say(f"problem: {problem}")
    say(_verdict(found["problems"], found["packages"]))


def _rows(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """Returns the table: problems, then what could be better, then the rest; packages together, by what there is to do."""
    rows: list[tuple[str, str, str]] = []
    rank = {"problem": 0, "note": 1, "ok": 2}
    together: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda each: rank[each.level]):
        if finding.name in _PACKAGES and finding.name not in _ONNXRUNTIMES and finding.level != "problem":
            together.setdefault(finding.advice or "", []).append(finding)
        else:
            rows.append((finding.name, finding.value, finding.advice or ""))
    for advice, found in together.items():
        names = ", ".join(each.name if advice else f"{each.name} {each.value}" for each in found)
        rows.append(("missing packages" if advice else "packages", names, advice))
    return rows


def _verdict(problems: Sequence[str], packages: Mapping[str, str | None]) -> str:
    """Returns what works on this machine, in one line."""
    if problems:
        return f"Verdict: {len(problems)} problem{'s' * (len(problems) > 1)} to solve first, listed above."
    does = ["answering"]
    lacking: list[str] = []
    for what, extra in (("importing and quantizing", "convert"), ("training and exporting", "train")):
        missing = [name for name, brought_by in _PACKAGES.items() if brought_by == extra and not packages[name]]
        if missing:
            lacking.append(f"{what} needs {', '.join(missing)}")
        elif not lacking:
            does.append(what)
    also = f"; {'; '.join(lacking)}" if lacking else ""
    return f"Verdict: ready for {', '.join(does)}{also}."


def _examine() -> tuple[dict[str, Any], list[Finding]]:
    """Measures everything; a probe that fails is a finding, and its value None."""
    failed: list[Finding] = []

    def tried(name: str, probe: Callable[[], _T]) -> _T | None:
        try:
            return probe()
        except Exception as error:  # whatever it is, the other probes still have something to say
            failed.append(Finding(name, f"could not be asked ({_one_line(error)})", None, "note"))
            return None

    packages = {name: probes.package_version(name) for name in _PACKAGES}
    providers = _providers()
    cores = tried("cores", _cores)
    quota = tried("container's quota", cpu_quota)
    sets = tried("instruction sets", instruction_sets)
    room = tried("memory", memory)
    driver = tried("NVIDIA driver", nvidia.driver)
    gpu = tried("GPU in PyTorch", probes.cuda)
    builds = tried("CUDA versions", probes.cuda_builds)
    precision = tried("training type", probes.training_type)
    offline = tried("tokenizers offline", probes.offline)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "slm": __version__,
        "cores": cores,
        "cpu_quota": quota,
        "memory": room and asdict(room) | {"usable": room.usable},
        "instruction_sets": sets,
        "providers": {name: asdict(provider) for name, provider in providers.items()},
        "driver": driver and asdict(driver),
        "cuda": gpu and asdict(gpu),
        "cuda_builds": builds,
        "training_dtype": precision and asdict(precision),
        "tokenizers_offline": offline and asdict(offline),
        "packages": packages,
    }
    findings = [Finding("python", platform.python_version()), Finding("slm", __version__)]
    findings += onnxruntime_findings({name: packages[name] for name in _ONNXRUNTIMES}, providers)
    findings += driver_findings(driver, builds or {}) if driver else []
    findings += builds_findings(builds, driver) if builds else []
    findings += [torch_gpu_finding(gpu)] if gpu else []
    findings += [_type_finding(precision)] if precision else []
    findings += [_sets_finding(sets)] if sets is not None else []
    findings += [_cores_finding(cores, quota)] if cores else []
    findings += [_memory_finding(room)] if room else []
    findings += _offline_findings(offline) if offline else []
    findings += [_package_finding(name, version) for name, version in packages.items() if name not in _ONNXRUNTIMES]
    return found, findings + failed


def _providers() -> dict[str, Provider]:
    return probes.providers()  # each is tried in a process of its own: nothing of theirs fails here


def _cores() -> dict[str, int]:
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return {"machine": machine, "allowed": allowed, "used": usable_cores()}


def _type_finding(found: TrainingType) -> Finding:
    types = list(dict.fromkeys(found.presets.values()))
    models = {dtype: ", ".join(name for name, each in found.presets.items() if each == dtype) for dtype in types}
    value = (
        "; ".join(f"{dtype} for {'every model' if len(types) == 1 else models[dtype]}" for dtype in types) or "unknown"
    )
    return Finding("training type", f"{value} ({found.why})")


def _sets_finding(sets: Mapping[str, bool]) -> Finding:
    name = "instruction sets"
    if not sets:
        return Finding(name, "unknown: the system does not say")
    value = ", ".join(one for one, has in sets.items() if has) or "none of those that matter"
    lacks = [one for one, has in sets.items() if not has]
    value += f"; not {', '.join(lacks)}" if lacks else ""
    if not sets.get("AVX2", True):
        return Finding(name, value, "without AVX2 INT8 is slow: compare with the float32 bundle", "note")
    if products_saturate(sets):
        slower = "without VNNI INT8 products are slower, and those of slm quantize --int8-dynamic saturate: add --reduce-range"
        return Finding(name, value, slower, "note")
    if not sets.get("dot product", True):
        return Finding(name, value, "without dot product INT8 products are slower", "note")
    return Finding(name, value)


def _cores_finding(cores: Mapping[str, int], quota: float | None) -> Finding:
    value = f"{cores['machine']} in the machine, {cores['allowed']} allowed, slm uses {cores['used']}"
    if quota is not None:
        value += f" (the container's quota is {quota:g})"
    if quota is not None and quota < min(cores["allowed"], 2):
        return Finding("cores", value, "threads are suspended at the quota: give the container more CPU", "note")
    if cores["allowed"] < cores["machine"]:
        return Finding("cores", value, "taskset or a cpuset keeps the others from this process", "note")
    return Finding("cores", value)


def _memory_finding(room: Memory) -> Finding:
    sizes = {"in all": room.total, "available": room.available, "container's limit": room.container_limit}
    value = ", ".join(f"{size / (1 << 30):.1f} GiB {name}" for name, size in sizes.items() if size is not None)
    if room.usable is None:
        return Finding("memory", "unknown: the system does not say")
    if room.usable < _DEMO:
        return Finding("memory", value, "training needs more: slm demo took 631 MiB; answering needs less", "note")
    if room.usable < _DOCUMENTED_RECIPE:
        return Finding("memory", value, "the documented recipe took 11.3 GiB on a CPU: train a smaller one", "note")
    return Finding("memory", value)


def _offline_findings(offline: Offline) -> list[Finding]:
    gpt2 = Finding("GPT-2's tokenizer", f"in {offline.gpt2_directory}")
    if not offline.gpt2:
        fetch = "for --tokenizer gpt2 point TIKTOKEN_CACHE_DIR at a directory with its files, or be online once"
        gpt2 = Finding(
            "GPT-2's tokenizer", f"not in {offline.gpt2_directory or 'any cache: caching is off'}", fetch, "note"
        )
    models = f"{offline.hub_models} model{'s' * (offline.hub_models != 1)} in {offline.hub_directory}"
    hub = Finding("Hugging Face cache", models)
    if offline.hub_offline:
        unset = None if offline.hub_models else "unset HF_HUB_OFFLINE to download"
        hub = Finding("Hugging Face cache", f"{models}; HF_HUB_OFFLINE is set", unset, "note" if unset else "ok")
    token = "configured" if offline.hub_token else "none; only gated and private models need one"
    return [gpt2, hub, Finding("Hugging Face token", token)]


def _package_finding(name: str, version: str | None) -> Finding:
    if version:
        return Finding(name, version)
    extra = _PACKAGES[name]
    if extra is None:
        return Finding(name, f"{name} is missing", install_hint(), "problem")
    return Finding(name, "missing", install_hint(extra), "note")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
