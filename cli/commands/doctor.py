"""`slm doctor`: examines the machine and gives advice."""

import os
import platform
import sys
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
from slm.core import systems
from slm.core.install import install_hint
from slm.core.machine import Memory, cpu_quota, instruction_sets, memory, usable_cores
from slm.core.processes import allowed_processors
from slm.version import __version__

_T = TypeVar("_T")

# Packages that slm uses, with the extra that installs each; None is the base installation.
_PACKAGES = {
    "numpy": None,
    "tokenizers": None,
    "jinja2": None,
    "filelock": None,
    "psutil": None,
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

# Peak memory in bytes, from docs/LOG.md: of the documented recipe on a CPU, and of `make demo`.
_DOCUMENTED_RECIPE = int(11.3 * (1 << 30))
_DEMO = 631 << 20


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Examine this machine, and report problems with advice. The exit code is 1 if there is a problem.

    Each provider of onnxruntime runs one step of a tiny model, and the result is checked. For NVIDIA GPUs, the report shows
    the driver, the compute capability, and the CUDA versions that onnxruntime and PyTorch were built for.

    \b
      slm doctor
      slm doctor --json      for a bug report; contains no token
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
    else:
        print_table("this machine", ("", "found", "advice"), _rows(findings))
        for problem in found["problems"]:
            say(f"problem: {problem}")
        say(_verdict(found["problems"], found["packages"]))
    if problems:
        sys.exit(1)


def _rows(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """Returns the rows of the table: problems, then notes, then the rest. Packages with the same advice share a row."""
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
    """Returns a line that names the tasks for which this machine is ready."""
    if problems:
        return f"Verdict: {len(problems)} problem{'s' * (len(problems) > 1)}, listed above."
    does = ["generation"]
    lacking: list[str] = []
    for what, extra in (("import and quantization", "convert"), ("training and export", "train")):
        missing = [name for name, brought_by in _PACKAGES.items() if brought_by == extra and not packages[name]]
        if missing:
            lacking.append(f"{what} needs {', '.join(missing)}")
        elif not lacking:
            does.append(what)
    also = f"; {'; '.join(lacking)}" if lacking else ""
    return f"Verdict: ready for {', '.join(does)}{also}."


def _examine() -> tuple[dict[str, Any], list[Finding]]:
    """Runs all probes. A probe that fails becomes a finding, and its value is None."""
    failed: list[Finding] = []

    def tried(name: str, probe: Callable[[], _T]) -> _T | None:
        try:
            return probe()
        except Exception as error:  # one failed probe must not stop the others
            failed.append(Finding(name, f"probe failed ({_one_line(error)})", None, "note"))
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
    lacking = tried("system", systems.lacking)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "slm": __version__,
        "system": {"name": systems.name(), "lacking": lacking},
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
    findings += [_system_finding(lacking)] if lacking is not None else []
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


def _system_finding(lacking: Mapping[str, str]) -> Finding:
    if not lacking:
        return Finding("system", systems.name())
    instead = "; ".join(f"no {what}: {effect}" for what, effect in lacking.items())
    return Finding("system", systems.name(), instead)


def _providers() -> dict[str, Provider]:
    return probes.providers()  # runs each provider in a separate process and does not raise


def _cores() -> dict[str, int]:
    machine = os.cpu_count() or 1
    return {"machine": machine, "allowed": allowed_processors(), "used": usable_cores()}


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
        return Finding(name, "unknown: not reported by the system")
    value = ", ".join(one for one, has in sets.items() if has) or "no relevant ones"
    lacks = [one for one, has in sets.items() if not has]
    value += f"; not {', '.join(lacks)}" if lacks else ""
    if not sets.get("AVX2", True):
        return Finding(name, value, "INT8 is slow without AVX2: compare with the float32 bundle", "note")
    if "AVX2" in sets and not (sets.get("AVX-512 VNNI") or sets.get("AVX-VNNI")):
        return Finding(name, value, "INT8 is slower without VNNI", "note")
    if not sets.get("dot product", True):
        return Finding(name, value, "INT8 is slower without dot product instructions", "note")
    return Finding(name, value)


def _cores_finding(cores: Mapping[str, int], quota: float | None) -> Finding:
    value = f"{cores['machine']} in the machine, {cores['allowed']} allowed, slm uses {cores['used']}"
    if quota is not None:
        value += f" (the container's quota is {quota:g})"
    if quota is not None and quota < min(cores["allowed"], 2):
        return Finding("cores", value, "the quota suspends threads: give the container more CPU", "note")
    if cores["allowed"] < cores["machine"]:
        return Finding("cores", value, "taskset or a cpuset limits this process to some of the cores", "note")
    return Finding("cores", value)


def _memory_finding(room: Memory) -> Finding:
    sizes = {"total": room.total, "available": room.available, "container's limit": room.container_limit}
    value = ", ".join(f"{size / (1 << 30):.1f} GiB {name}" for name, size in sizes.items() if size is not None)
    if room.usable is None:
        return Finding("memory", "unknown: not reported by the system")
    if room.usable < _DEMO:
        return Finding("memory", value, "training needs more: slm demo takes 631 MiB; generation needs less", "note")
    if room.usable < _DOCUMENTED_RECIPE:
        return Finding("memory", value, "the documented recipe takes 11.3 GiB on a CPU: train a smaller model", "note")
    return Finding("memory", value)


def _offline_findings(offline: Offline) -> list[Finding]:
    gpt2 = Finding("GPT-2's tokenizer", f"in {offline.gpt2_directory}")
    if not offline.gpt2:
        fetch = "for --tokenizer gpt2, set TIKTOKEN_CACHE_DIR to a directory with its files, or download them once"
        gpt2 = Finding(
            "GPT-2's tokenizer", f"not in {offline.gpt2_directory or 'a cache: caching is disabled'}", fetch, "note"
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
