from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path(__file__).resolve().parents[3] / "csrc" / "mps"

setup(
    name="wrong_binding",
    ext_modules=[
        CppExtension(
            "wrong_binding",
            ["wrong_binding.mm", str(CSRC / "kernels.mm")],
            include_dirs=[str(CSRC)],
            extra_compile_args=["-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
