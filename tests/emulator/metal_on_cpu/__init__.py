"""Metal on a CPU: compile unmodified Metal source with clang and execute it thread for thread. See README.md."""

from .library import CompileError, Kernel, Library, compile
from .lint import Diagnostic, lint
from .report import Counters, ExecutionError, Finding, LimitError, Report
from .toolchain import ToolError, build_shared

__all__ = [
    "CompileError",
    "Counters",
    "Diagnostic",
    "ExecutionError",
    "Finding",
    "Kernel",
    "Library",
    "LimitError",
    "Report",
    "ToolError",
    "build_shared",
    "compile",
    "lint",
]
