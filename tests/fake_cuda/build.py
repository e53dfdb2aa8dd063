"""Builds the fake CUDA: `python build.py WHEELS OUT`.

WHEELS is a directory in which onnxruntime-gpu, nvidia-cuda-runtime and nvidia-cuda-crt were installed. Every function of
CUDA's runtime, driver and cuBLAS that onnxruntime's CUDA provider wants and neither `device.c` nor `driver.c` defines gets a
body that succeeds: those that make a handle return one, matrix products count as launches.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_WANTED = re.compile(r" U ((?:__cuda|cuda|cublas|cudnn|cu)[A-Z]\w*)")
_DEFINED = re.compile(r"\b(__cuda\w+|cuda[A-Z]\w+)\(")
_MAKES_HANDLE = re.compile(r"Create(_v2)?$")
_PRODUCT = re.compile(r"gemm|Matmul$", re.IGNORECASE)
_DRIVER = re.compile(r"cu[A-Z]")


def build(wheels: Path, out: Path) -> None:
    """Compiles `libfakecuda.so`, to be preloaded, and the driver's `libcuda.so.1`.

    Raises:
        subprocess.CalledProcessError: When a compiler or nm fails.
    """
    provider = wheels / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    wanted = _output("nm", "-D", "--undefined-only", str(provider))
    names = sorted({match[1] for match in map(_WANTED.search, wanted.splitlines()) if match})
    defined = set(_DEFINED.findall((HERE / "device.c").read_text(encoding="utf-8")))
    out.mkdir(parents=True, exist_ok=True)
    (out / "rest.c").write_text(
        "#include <stdlib.h>\nvoid fake_cuda_launch(const char *name);\n"
        + "".join(map(_body, (name for name in names if name not in defined and not _DRIVER.match(name)))),
        encoding="utf-8",
    )
    driver = (HERE / "driver.c").read_text(encoding="utf-8")
    rest = [name for name in names if _DRIVER.match(name) and f" {name}(" not in driver]
    (out / "driver.c").write_text(driver + "".join(f"int {name}(void) {{ return 0; }}\n" for name in rest))
    headers = {str(file.parent) for file in wheels.rglob("cuda_runtime_api.h")}
    headers |= {str(file.parent.parent) for file in wheels.rglob("crt/host_defines.h")}
    flags = ["gcc", "-shared", "-fPIC", "-O1", "-w", *(f"-I{path}" for path in sorted(headers))]
    _output(*flags, "-o", str(out / "libfakecuda.so"), str(HERE / "device.c"), str(out / "rest.c"))
    _output(*flags, "-Wl,-soname,libcuda.so.1", "-o", str(out / "libcuda.so.1"), str(out / "driver.c"))


def _body(name: str) -> str:
    if _MAKES_HANDLE.search(name):
        return f"int {name}(void **handle) {{ *handle = calloc(1, 4096); return 0; }}\n"
    if name == "cublasLtMatmulAlgoGetHeuristic":  # says how many algorithms it found
        before = ", ".join(f"void *p{number}" for number in range(7))
        return f"int {name}({before}, int most, void *results, int *found) {{ *found = 1; return 0; }}\n"
    if _PRODUCT.search(name):
        return f'int {name}() {{ fake_cuda_launch("{name}"); return 0; }}\n'
    return f"int {name}() {{ return 0; }}\n"


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
