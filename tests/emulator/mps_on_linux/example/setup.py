from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="double_plus_one",
    ext_modules=[
        CppExtension(
            "double_plus_one",
            ["double_plus_one.mm"],
            extra_compile_args=["-DTORCH_TARGET_VERSION=0x020b000000000000"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
