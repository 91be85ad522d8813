"""The table of native modules; everything else about the package stands in pyproject.toml."""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = [
    "_segment",
    "_pool",
    "_copy",
    "_outcome",
    "_link_end",
    "_stream",
    "_channel",
    "_local",
    "_local_copies",
    "_directory",
    "_core",
    "_pull",
    "_push",
    "_data_server",
    "_tcp_end",
    "_tcp_server",
    "_dlpack",
    "_shared_library",
    "_acl_runtime",
    "_acl_addresses",
    "_acl_device",
    "_acl_memory",
    "_acl_stream",
    "_hccl",
    "_ascend_lane",
    "_ascend_copies",
    "_hccl_exchange",
    "_hccl_end",
    "_hccl_regions",
    "_hccl_gets",
    "_hccl_one_sided",
]

# How they are compiled; `tests/instrumented.py` asks for the others, in a tree of its own.
FLAGS = {
    "": ["-O3"],
    "coverage": ["-O0", "--coverage"],
    "address": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
    "thread": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
INSTRUMENT = os.environ.get("LLM_DATADIST_INSTRUMENT", "")

extensions = [
    Extension(
        f"llm_datadist.{name}",
        [f"llm_datadist/{name}.pyx"],
        include_dirs=["llm_datadist/include"],
        depends=glob("llm_datadist/include/*.h"),
        extra_compile_args=[*FLAGS[INSTRUMENT], "-Wall", "-Wextra"],
        extra_link_args=FLAGS[INSTRUMENT] if INSTRUMENT else [],
    )
    for name in MODULES
]

setup(
    ext_modules=cythonize(
        extensions,
        build_dir="build/cython",
        emit_linenums=INSTRUMENT == "coverage",
        compiler_directives={
            "language_level": "3",
            "embedsignature": True,
            # Indices into native arrays are checked where values enter the native code, once, not at every use.
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
        },
    ),
    options={"build_ext": {"parallel": True}},
)
