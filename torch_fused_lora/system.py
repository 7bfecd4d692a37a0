"""What the machine and its variables mean for this package, as plain functions of facts."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import re
from collections.abc import Mapping

OLDEST_MACOS = 14  # the first with Metal 3.1, which has bfloat

OFF = "patch_peft and patch_norms patch nothing"
_VARIABLES = {
    "PYTORCH_MPS_FAST_MATH": "Metal's compiler may then assume that there are no NaN and no infinities: what this "
    "package promises of them (softmax of -inf, NaN that stays NaN) does not hold",
    "PYTORCH_ENABLE_MPS_FALLBACK": "operators of torch's that MPS lacks then compute on the CPU, slowly and without a "
    "word; this package's never do",
    "TORCH_FUSED_LORA_PLAN": "the Metal kernels are launched as it says, for experiments, not as this package chooses",
}


@dataclasses.dataclass(frozen=True)
class System:
    """The operating system (``platform.system()``), the processor that Python is for, and on a Mac macOS's version and
    whether Rosetta translates this process."""

    name: str
    machine: str
    macos: str = ""
    translated: bool = False

    @classmethod
    def here(cls) -> System:
        name, machine = platform.system(), platform.machine()
        return cls(name, machine, platform.mac_ver()[0], name == "Darwin" and machine == "x86_64" and _translated())

    def without_metal(self) -> str | None:
        """Why the Metal kernels cannot run on this system, in one sentence; None where they might."""
        portable = "the portable operators compute on the CPU"
        if self.name == "Windows":
            return f"Windows has no Metal: {portable}, and on CUDA as everywhere."
        if self.name != "Darwin":
            return None
        if self.translated:
            return f"This Python is an x86 one, which Rosetta translates: {portable}; an arm64 Python can use the GPU."
        if self.machine != "arm64":
            return f"This is an Intel Mac, and the Metal kernels are for Apple silicon: {portable}."
        if self.macos and _major(self.macos) < OLDEST_MACOS:
            return f"This is macOS {self.macos}, and the Metal kernels need {OLDEST_MACOS} or later: {portable}."
        return None


def _translated() -> bool:
    """Whether Rosetta translates this process: the sysctl that Apple documents for it. Absent on an Intel Mac."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    sysctl = ctypes.CDLL(None).sysctlbyname
    return sysctl(b"sysctl.proc_translated", ctypes.byref(value), ctypes.byref(size), None, 0) == 0 and value.value == 1


def _major(macos: str) -> int:
    return int(macos.partition(".")[0])


def metal_version(macos: str) -> str:
    """The version of Metal's language that torch compiles for."""
    if not macos:
        return "unknown"
    major = _major(macos)
    return "4.0" if major >= 26 else "3.2" if major >= 15 else "3.1" if major >= OLDEST_MACOS else "3.0 or older"


def gpu_family(name: str) -> str:
    """A GPU's family by its name (Metal's feature set tables). torch does not tell what the device itself answers."""
    if is_virtual(name):
        return "unknown, a virtual GPU"
    chip = re.search(r"\bApple ([AM]\d+)\b", name)
    family = {"M1": 7, "M2": 8, "M3": 9, "M4": 9, "M5": 10, "A18": 9}.get(chip[1]) if chip else None
    return f"Apple{family}" if family else "unknown"


def is_virtual(name: str) -> bool:
    """Whether a GPU's name is that of a virtual machine's: macOS calls it "Apple Paravirtual device"."""
    return "paravirtual" in name.lower()


def switched_off(environment: Mapping[str, str]) -> str | None:
    """``TORCH_FUSED_LORA=off`` as it is set, where it has patches patch nothing; else None."""
    value = environment.get("TORCH_FUSED_LORA", "")
    return f"TORCH_FUSED_LORA={value}" if value.lower() in ("off", "0", "false", "no") else None


def notable_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set and change what this package does or how fast, each with what it means."""
    off = switched_off(environment)
    return ({off: OFF} if off else {}) | {
        f"{name}={environment[name]}": meaning
        for name, meaning in _VARIABLES.items()
        if environment.get(name, "") not in ("", "0")
    }
