"""Build of `qat`: what is declarative is in pyproject.toml, what has to be computed belongs here.

The native extension `qat/native/_C.abi3.so` is optional. Where there is no C++ compiler or torch, or the build fails,
the installation goes on without it, with a warning, and `qat` computes everything in PyTorch; `QAT_NO_NATIVE=1` leaves
it out at once. It needs torch's headers at build time, so build with `--no-build-isolation`, in an environment that
has torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# relative, because setuptools wants the sources of an extension so
CSRC = Path("csrc")
#: Symbols of torch 2.10 at most are used, and all later versions have them.
STABLE_ABI = "0x020a000000000000"
#: Contraction would change results, and sums of products wrap around.
ARITHMETIC = ["-ffp-contract=off", "-fwrapv"]
COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", *ARITHMETIC, "-g0", "-Wall", "-Wextra"]
#: Contraction would change results; the last architecture's PTX serves what comes after it.
NVCC = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]
CUDA_ARCHITECTURES = ["80", "90"]
#: What `platform.machine()` calls the architectures of csrc/kernel_options.txt elsewhere.
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}


def kernel_options(machine: str) -> dict[str, list[str]]:
    """Return the options of single source files of csrc/kernels, by file name without suffix, for a machine."""
    lines = (Path(__file__).parent / CSRC / "kernel_options.txt").read_text(encoding="ascii").splitlines()
    entries = [line.split("|") for line in lines if line and not line.startswith("#")]
    architecture = MACHINES.get(machine, machine)
    return {stem: options.split() for name, stem, options in entries if name == architecture}


KERNEL_OPTIONS = kernel_options(platform.machine())


#: what `qat.packages.sources` looks for in an installed package; in a checkout it finds csrc itself
RUNNER_SOURCES = ("CMakeLists.txt", "kernel_options.txt", "cmake/*", "kernels/integer/*", "runtime/*", "runner/*")


class PythonBuild(build_py):
    """Adds the sources of the runner for devices, which packages contain and which are built for them."""

    def run(self) -> None:
        """Copy the sources beside `qat/packages`, unless the installation is editable."""
        super().run()
        if self.editable_mode:
            return
        for source in (path for part in RUNNER_SOURCES for path in sorted(CSRC.glob(part))):
            target = Path(self.build_lib) / "qat" / "packages" / CSRC / source.relative_to(CSRC)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(source), str(target))


class NativeBuild(build_ext):
    """Compiles the kernels one instruction set a file, without torch, then the registration against torch."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; what goes wrong is a warning, and the package works without it."""
        try:
            self._build(ext)
        # whatever a compiler, a linker or a broken torch brings
        except Exception as error:  # noqa: BLE001
            sys.stderr.write(
                f"warning: qat's native extension was not built, so its PyTorch code is used instead: "
                f"{type(error).__name__}: {error}\n"
            )

    def _build(self, ext: Extension) -> None:
        from torch.utils import cpp_extension

        newest_header = max(Path(header).stat().st_mtime for header in [*ext.depends, __file__])
        flags = shlex.split(os.environ.get("QAT_NATIVE_CXXFLAGS", ""))

        # objects of other flags, a sanitizer's say, are not to be reused
        folder = str(Path(self.build_temp) / str(zlib.crc32(repr(flags).encode())))

        def compile_one(source: str) -> list[str]:
            path = Path(source)
            options = [*COMMON, *flags]
            include: list[str] = []
            if path.parent.name == "torch":
                include = cpp_extension.include_paths()
                options.append(f"-DTORCH_TARGET_VERSION={STABLE_ABI}")
            else:
                options += KERNEL_OPTIONS.get(path.stem, [])
            made = self.compiler.object_filenames([source], output_dir=folder)
            stamps = [Path(name).stat().st_mtime for name in made if Path(name).exists()]
            if not self.force and stamps and min(stamps) > max(newest_header, path.stat().st_mtime):
                return made
            return self.compiler.compile(
                [source],
                output_dir=folder,
                # as system headers, whose warnings are not ours
                extra_preargs=[word for folder in include for word in ("-isystem", folder)],
                extra_postargs=options,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for made in pool.map(compile_one, ext.sources) for name in made]
        cuda = self._cuda_objects(folder, flags)
        self.compiler.link_shared_object(
            [*objects, *cuda],
            self.get_ext_fullpath(ext.name),
            libraries=["torch", "torch_cpu", *(["cudart_static", "rt", "dl", "pthread"] if cuda else [])],
            library_dirs=[*cpp_extension.library_paths(), *([str(nvcc_home() / "lib64")] if cuda else [])],
            extra_postargs=[
                # the current stream is in it, behind a weak symbol that the linker would not count as a use
                *(["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"] if cuda else []),
                *shlex.split(os.environ.get("QAT_NATIVE_LDFLAGS", "")),
            ],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def _cuda_objects(self, folder: str, flags: list[str]) -> list[str]:
        """Compile the GPU's kernels and their registration; what is missing for them is a line, and no object."""
        import torch
        from torch.utils import cpp_extension

        reason = None
        if torch.version.cuda is None:
            reason = "torch was built without CUDA"
        elif find_nvcc() is None:
            reason = f"there is no nvcc on PATH or in CUDA_HOME, and torch was built for CUDA {torch.version.cuda}"
        if reason is not None:
            sys.stderr.write(f"qat's CUDA kernels are left out: {reason}\n")
            return []
        include = [*cpp_extension.include_paths(), str(nvcc_home() / "include")]
        registration = self.compiler.compile(
            sorted(map(str, CSRC.glob("torch/cuda*.cpp"))),
            output_dir=folder,
            extra_preargs=[word for path in include for word in ("-isystem", path)],
            extra_postargs=[*COMMON, *flags, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"],
        )
        made = []
        for source in sorted(CSRC.glob("cuda/*.cu")):
            target = Path(folder) / source.with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([str(find_nvcc()), *NVCC, *gencode(), "-c", str(source), "-o", str(target)], check=True)
            made.append(str(target))
        return [*registration, *made]


def find_nvcc() -> str | None:
    """Return the CUDA compiler of CUDA_HOME, or else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def nvcc_home() -> Path:
    """Return the toolkit's directory; wrappers in PATH lie elsewhere, so nvcc itself is asked."""
    told = subprocess.run([str(find_nvcc()), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
    tops = [line.split("=", 1)[1] for line in told.stderr.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() if tops else Path(str(find_nvcc())).resolve().parent.parent


def gencode() -> list[str]:
    """Return nvcc's options for the machine code of each architecture and the PTX of the last."""
    codes = [f"arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    codes.append(f"arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
    return [f"-gencode={code}" for code in codes]


def native() -> dict[str, Any]:
    """Return the arguments of `setup` that are about csrc."""
    if os.environ.get("QAT_NO_NATIVE", "0") not in {"", "0"}:
        return {"cmdclass": {"build_py": PythonBuild}}
    extension = Extension(
        "qat.native._C",
        sources=sorted(
            str(path)
            for folder in ("kernels", "runtime", "torch")
            for path in CSRC.glob(f"{folder}/**/*.cpp")
            # see `_cuda_objects`
            if not path.stem.startswith("cuda")
        ),
        depends=[*sorted(map(str, CSRC.glob("**/*.h"))), str(CSRC / "kernel_options.txt")],
        language="c++",
        # one file for all versions of Python, which it does not even know
        py_limited_api=True,
        # setuptools must not miss it where it was not built
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": NativeBuild, "build_py": PythonBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native())
