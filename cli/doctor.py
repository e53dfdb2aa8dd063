"""`slm doctor`."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click

from slm.cli.console import print_json, print_table, say
from slm.cli.options import json_option
from slm.runtime.threads import cpu_quota, usable_cores

# What each extra brings, in the order of the chain.
_PACKAGES = {
    "tiktoken": "train",
    "datasets": "train",
    "torch": "train",
    "peft": "train",
    "safetensors": "convert",
    "onnx": "convert",
    "onnxscript": "convert",
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "cuda",
}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has, what is missing, and which extra brings it."""
    packages = {name: _version(name) for name in _PACKAGES}
    report = {
        "python": platform.python_version(),
        "cores": usable_cores(),
        "cpu_quota": cpu_quota(),
        "providers": _providers(),
        "cuda": _cuda(),
        "packages": packages,
        "problems": _problems(packages),
    }
    if as_json:
        print_json(report)
        return
    rows = [(name, str(report[name])) for name in ("python", "cores", "cpu_quota", "providers", "cuda")]
    rows += [(name, found or f"missing; pip install 'slm-edge[{_PACKAGES[name]}]'") for name, found in packages.items()]
    print_table("this machine", ("", ""), rows)
    for problem in _problems(packages):
        say(f"problem: {problem}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _providers() -> list[str]:
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _cuda() -> str | None:
    if find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _problems(packages: dict[str, str | None]) -> list[str]:
    cpu, cuda = packages["onnxruntime"], packages["onnxruntime-gpu"]
    if cpu and cuda:
        return ["onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one"]
    if not cpu and not cuda:
        return ["no onnxruntime: pip install 'slm-edge[cpu]' or 'slm-edge[cuda]'"]
    return []
