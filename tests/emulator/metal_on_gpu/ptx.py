"""Unmodified Metal source to machine code for an NVIDIA GPU: clang of the ziglang wheel, ptxas of the triton wheel."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.emulator.metal_on_cpu import rewrite
from tests.emulator.metal_on_cpu.library import without_standard_includes
from tests.emulator.metal_on_cpu.toolchain import METAL_LANGUAGE, ToolError, cached, preprocess, run, shim_text

HERE = Path(__file__).parent
SHIM = HERE / "shim"
TARGET = "nvptx64-nvidia-cuda"
ARCHITECTURE = "sm_90"  # H100, H200
PTX = "+ptx80"
FRONT_END = [
    *["-target", TARGET, *METAL_LANGUAGE, "-cl-fp32-correctly-rounded-divide-sqrt"],
    *["-Xclang", "-cl-ext=+cl_khr_fp16,+__opencl_c_program_scope_global_variables"],
    *["-Ddevice=__global", "-Dthreadgroup=__local", "-Dthread="],
    *["-fno-strict-aliasing", "-Wno-everything", "-include", SHIM / "metal.h"],
    *["-S", "-emit-llvm", "-O3", "-Xclang", "-disable-llvm-passes", "-o", "-", "-"],
]
BACK_END = ["-target", TARGET, "-x", "ir", "-S", "-O3", "-mllvm", "-inline-threshold=1000000", "-Wno-everything"]
# How a build differs. `exact` rounds every operation, as metal_on_cpu does; `fast` fuses a * b + c, as Metal's compiler
# may; `fma` besides replaces the emulated matrix multiply by as many plain multiplications: wrong numbers, for timing.
BUILDS = {
    "exact": ["-ffp-contract=off"],
    "fast": ["-ffp-contract=fast", "-DTENSOR_CORES"],
    "fma": ["-ffp-contract=fast", "-DMULTIPLY_BY_FMA"],
}


@dataclass(frozen=True)
class Kernel:
    """What the host and a reader need to know of one kernel of a module."""

    constants: list[int]  # buffer indices that take eight bytes, not an address
    written: list[int]  # and those of buffers that are not const
    max_total_threads: int
    registers: int = 0
    local_bytes: int = 0  # of a thread's stack and spills
    shared_bytes: int = 0


@dataclass(frozen=True)
class Module:
    code: bytes
    kernels: Mapping[str, Kernel]


def why_unavailable() -> str | None:
    """What is missing to build a module here; None if nothing is."""
    try:
        tools()
        run("clang", ["-target", TARGET, "--version"])
    except ToolError as error:
        return str(error)
    return None


def tools() -> tuple[Path, Path]:
    """ptxas and libdevice, which the triton wheel contains."""
    found = importlib.util.find_spec("triton")
    folder = Path(found.origin).parent / "backends" / "nvidia" if found and found.origin else Path()
    paths = folder / "bin" / "ptxas", folder / "lib" / "libdevice.10.bc"
    if not all(path.is_file() for path in paths):
        raise ToolError("no ptxas and libdevice: the triton wheel, which has them, is not installed")
    return paths


class Rewriter(rewrite.Rewriter):
    """As for the CPU, but for what a kernel is exported as: an entry of the module."""

    def launcher_text(self, kernel: rewrite.Kernel, function: str, limit: str, symbol: str, host_name: str) -> str:
        constants = sum(1 << found.index for found in kernel.arguments if found.space == "constant")
        return (
            f'extern "C" {{ extern const __constant uint {symbol}_limit __asm__("{host_name}_limit") = {limit}::value;'
            f' __attribute__((device_kernel)) void {symbol}(KernelArguments a) __asm__("{host_name}");'
            f" void {symbol}(KernelArguments a)"
            f" {{ const ExecutorThread t = metal::executor::thread_of<{constants}u>(a);"
            f" metal::executor::launch<{', '.join(kernel.sources)}>({function}, &t); }} }}"
        )


def edited(ir: str) -> str:
    """What clang's OpenCL C++ cannot say, in the intermediate code of kernels that are not optimised yet."""
    # The constants of a kernel lie among its arguments, which have no address space of their own.
    ir = re.sub(r" addrspace\(4\)", "", ir)
    # An entry's one caller is the driver: what it calls is inlined whole.
    ir = re.sub(r"\b(linkonce_odr|weak_odr) dso_local\b", "internal", ir)
    # A threadgroup variable has a shared one of its kernel's.
    sizes: dict[str, int] = {}

    def variable(call: re.Match[str]) -> str:
        size, site = call["size"], call["site"]
        sizes[site] = int(size)
        return f"{call['result']} = getelementptr i8, ptr addrspace(3) @threadgroup_{site}, i64 0"

    mangled = r"@_ZN5metal8executor15shared_variableILj(?P<size>\d+)ELj(?P<site>\d+)EEEPU3AS3vv\(\)"
    ir = re.sub(rf"(?P<result>%\d+) = call [^@\n]*{mangled}.*", variable, ir)
    ir = re.sub(rf"^declare .*{mangled}.*$", "", ir, flags=re.MULTILINE)
    for site, size in sizes.items():
        ir += f"\n@threadgroup_{site} = internal addrspace(3) global [{size} x i8] undef, align 16"
    # What ptxas may give a thread of registers follows from the threads that share them.
    for name, limit in limits(ir).items():
        ir = re.sub(rf"(ptx_kernel void @{name}\(.*?\)) (#\d+)", rf'\1 \2 "nvvm.maxntid"="{limit}"', ir)
    return ir


def limits(ir: str) -> dict[str, int]:
    """max_total_threads_per_threadgroup by kernel."""
    return {name: int(limit) for name, limit in re.findall(r"@(\w+)_limit = .*constant i32 (\d+)", ir)}


def build(source: str, name: str = "metal", variant: str = "exact", architecture: str = ARCHITECTURE) -> Module:
    """Compile Metal source to a module; what was built before comes from the cache."""
    ptxas, libdevice = tools()
    rewritten = Rewriter(preprocess(without_standard_includes(source), name)).run()
    processor = ["-Xclang", "-target-cpu", "-Xclang", architecture, "-Xclang", "-target-feature", "-Xclang", PTX]
    front, back = [*FRONT_END, *processor, *BUILDS[variant]], [*BACK_END, *processor, *BUILDS[variant][:1]]
    back += ["-Xclang", "-mlink-builtin-bitcode", "-Xclang", libdevice]

    def make(path: Path) -> None:
        ir = edited(run("clang", front, stdin=rewritten.text))
        files = {suffix: path.with_suffix(suffix) for suffix in (".ll", ".ptx", ".cubin")}
        files[".ll"].write_text(ir)
        run("clang", [*back, files[".ll"], "-o", files[".ptx"]])
        report = assemble(ptxas, files[".ptx"], files[".cubin"], architecture)
        found = {}
        for host_name, entry in rewritten.entries.items():
            indices = {
                name: [argument.index for argument in entry.arguments if chosen(argument)]
                for name, chosen in (
                    ("constants", lambda argument: argument.space == "constant"),
                    ("written", lambda argument: argument.space == "device" and "const" not in argument.type.split()),
                )
            }
            found[host_name] = indices | {"max_total_threads": limits(ir)[host_name]} | report[host_name]
        path.write_text(json.dumps({"code": files[".cubin"].read_bytes().hex(), "kernels": found}))

    tool = [file.read_text() for file in (Path(__file__), *sorted(SHIM.glob("*.h")))]
    parts = [rewritten.text, shim_text(), *tool, *map(str, [*front, *back]), str(ptxas.stat().st_size)]
    found = json.loads(cached(f"{name}-gpu", parts, ".json", make).read_text())
    kernels = {host_name: Kernel(**kernel) for host_name, kernel in found["kernels"].items()}
    return Module(bytes.fromhex(found["code"]), kernels)


def assemble(ptxas: Path, ptx: Path, cubin: Path, architecture: str) -> dict[str, dict[str, int]]:
    """Machine code, and what ptxas says of each kernel's registers and memory."""
    done = subprocess.run(
        [ptxas, "-v", "-O3", f"-arch={architecture}", ptx, "-o", cubin], capture_output=True, text=True
    )
    if done.returncode:
        raise ToolError(done.stderr)
    report = {}
    for entry in done.stderr.split("Compiling entry function '")[1:]:
        numbers = {
            name: int(found[1]) if (found := re.search(pattern, entry)) else 0
            for name, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("local_bytes", r"(\d+) bytes stack frame"),
                ("shared_bytes", r"(\d+) bytes smem"),
            )
        }
        report[entry.partition("'")[0]] = numbers
    return report
