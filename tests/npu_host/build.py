"""Build the stand-in for one torch_npu wheel: `python tests/npu_host/build.py [--release 2.13.0]`.

Without a release it is the one of releases.json (torch_npu release: torch release) for the torch installed.

Prints the folder that holds it. Installs the unmodified wheel apart from the environment, reads from it
which symbols no library defines, and compiles driver.cpp and kernels.cpp with the system's compiler.
Nothing is built again while the sources, the wheel and torch stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("NPU_HOST_CACHE", ROOT / ".npu_host"))
SONAMES = ("libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
"""CANN libraries beside libascendcl that the wheel's libraries name; every symbol is in libascendcl."""
FROM_ELSEWHERE = re.compile(r"^_?Py|^_ITM_|^__gmon_start__$|^__cxa_|^_ZTH|^__tls_get_addr$")
CXX = os.environ.get("CXX", "g++")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", help="a torch_npu release on PyPI (default: the one for this torch)")
    print(build(parser.parse_args().release or release_for_torch()))


def release_for_torch() -> str:
    """The release of releases.json that was built for the torch installed."""
    releases = json.loads((HERE / "releases.json").read_text())
    installed = torch_version().split("+")[0]
    for release, torch in releases.items():
        if torch.split(".")[:2] == installed.split(".")[:2]:
            return str(release)
    known = ", ".join(f"{release} (torch {torch})" for release, torch in releases.items())
    sys.exit(f"npu_host: no torch_npu release is known for torch {installed}; known are {known}.\n"
             "Install one of these torch releases, or name a torch_npu release in NPU_HOST_RELEASE.")  # fmt: skip


def build(release: str) -> Path:
    """The folder of the stand-in for `release`: site/ (the wheel), lib/ (the driver), kernels.so."""
    home = CACHE / f"torch_npu-{release}"
    site = home / "site"
    check_machine(release)
    if not (site / "torch_npu").is_dir():
        install(release, site)
    sources = [
        HERE / name for name in ("driver.cpp", "driver.h", "hccl.cpp", "kernels.cpp", "cuda_torch.cpp", "build.py")
    ]
    stamp = hashlib.sha256(b"".join(s.read_bytes() for s in sources) + torch_version().encode()).hexdigest()
    if (home / "stamp").exists() and (home / "stamp").read_text() == stamp:
        return home
    build_driver(site / "torch_npu", home)
    build_kernels(home)
    build_for_cuda_torch(home)
    (home / "stamp").write_text(stamp)
    return home


def install(release: str, site: Path) -> None:
    fresh = site.with_name("site.new")
    shutil.rmtree(fresh, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", fresh, f"torch_npu=={release}"]
    done = subprocess.run([str(part) for part in pip], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{done.stdout}{done.stderr}npu_host: pip could not get torch_npu {release} (its output is above). These "
            f"tests need the real wheel: give pip an index that has it, or unpack it into {site}."
        )
    fresh.rename(site)


def check_machine(release: str) -> None:
    """The wheel is for Linux, has CPython's version in its name, and belongs to one minor release of torch."""
    if sys.platform != "linux":
        sys.exit(f"npu_host: torch_npu's wheels are for Linux, this is {sys.platform}")
    lacking = [tool for tool in (CXX, "nm") if shutil.which(tool) is None]
    if lacking:
        sys.exit(f"npu_host: {' and '.join(lacking)} not found; the stand-in is built with the system's compiler: "
                 "install g++ and binutils, or name a compiler in CXX")  # fmt: skip
    torch = torch_version()
    if torch.split(".")[:2] != release.split(".")[:2]:
        sys.exit(f"npu_host: torch_npu {release} was built for another torch than {torch}")


def torch_version() -> str:
    return importlib.metadata.version("torch")


def torch_home() -> Path:
    """Where torch lies; found without importing it, which would load torch_npu."""
    located = importlib.metadata.distribution("torch").locate_file("torch")
    return Path(str(located))


def libraries(package: Path) -> list[Path]:
    """The wheel's libraries that are loaded by `import torch_npu`: not torchair's GE executor, not atb."""
    found = [*package.glob("lib/*.so"), *package.glob("_C*.so")]
    return [path for path in found if "atb" not in path.name]


def symbols(path: Path, *which: str) -> set[str]:
    output = subprocess.run(["nm", "-D", *which, str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in output.splitlines() if line.strip()}


def missing_symbols(package: Path) -> set[str]:
    """What the wheel's libraries use and neither they, torch, nor the system's libraries define."""
    wanted = set().union(*(symbols(path, "--undefined-only") for path in libraries(package)))
    ours = [*libraries(package), *(torch_home() / "lib").glob("*.so")]
    defined = set().union(*(symbols(path, "--defined-only") for path in ours), *map(system_symbols, SYSTEM))
    return {name for name in wanted - defined if not FROM_ELSEWHERE.match(name)}


SYSTEM = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libstdc++.so.6", "libgcc_s.so.1",
          "ld-linux-x86-64.so.2")  # fmt: skip


def system_symbols(name: str) -> set[str]:
    path = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return symbols(Path(path), "--defined-only") if Path(path).is_file() else set()


def build_driver(package: Path, home: Path) -> None:
    lib, work = home / "lib", home / "build"
    for folder in (lib, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    headers = package / "include" / "third_party" / "acl" / "inc"
    objects = [work / f"{name}.o" for name in ("driver", "hccl")]
    for made in objects:
        run(CXX, "-std=c++17", "-O1", "-fPIC", "-w", f"-I{headers}", f"-I{headers.parents[2]}",
            f"-I{HERE}", "-c", HERE / f"{made.stem}.cpp", "-o", made)  # fmt: skip
    defined = set().union(*(symbols_of_object(made) for made in objects))
    check_against_wheel(package, defined)
    stubs = work / "stubs.c"
    stubs.write_text(stub_source(missing_symbols(package) - defined, headers))
    run(CXX, "-x", "c", "-O1", "-fPIC", "-w", "-fno-builtin", "-c", stubs, "-o", work / "stubs.o")
    run(CXX, "-shared", "-Wl,-soname,libascendcl.so", "-o", lib / "libascendcl.so", *objects, work / "stubs.o")
    empty = work / "empty.c"
    empty.write_text("")
    for name in SONAMES:
        run(CXX, "-shared", "-x", "c", empty, "-x", "none", "-Wl,--no-as-needed", f"-Wl,-soname,{name}.so",
            f"-L{lib}", "-lascendcl", "-Wl,-rpath,$ORIGIN", "-o", lib / f"{name}.so")  # fmt: skip


def symbols_of_object(path: Path) -> set[str]:
    output = subprocess.run(["nm", "--defined-only", "--extern-only", str(path)], capture_output=True, text=True,
                            check=True).stdout  # fmt: skip
    return {line.split()[-1] for line in output.splitlines() if " T " in line}


def check_against_wheel(package: Path, defined: set[str]) -> None:
    """Every function of the driver is one that the wheel links to or looks up by name."""
    known = set().union(*(symbols(path, "--undefined-only") for path in libraries(package)))
    text = b"".join(path.read_bytes() for path in libraries(package))
    unknown = {
        name for name in defined
        if not name.startswith(("npu_host", "_Z")) and name not in known and f"\0{name}\0".encode() not in text
    }  # fmt: skip
    if unknown:
        print(f"npu_host: this wheel never asks for {', '.join(sorted(unknown))}", file=sys.stderr)


def stub_source(names: set[str], headers: Path) -> str:
    """Functions that fail by name: the runtime's error code, or null where a pointer is returned."""
    text = "".join(path.read_text(errors="replace") for path in headers.rglob("*.h"))
    lines = ["int npu_host_unsupported(const char *);"]
    for name in sorted(names):
        pointer = re.search(rf"\*\s*{name}\s*\(", text)
        call = f'npu_host_unsupported("{name}")'
        body = f"{{ {call}; return 0; }}" if pointer else f"{{ return {call}; }}"
        lines.append(f"{'void *' if pointer else 'long '}{name}(void) {body}")
    return "\n".join(lines) + "\n"


def build_kernels(home: Path) -> None:
    torch = torch_home()
    include = torch / "include"
    run(CXX, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{include}", f"-I{include}/torch/csrc/api/include",
        f"-I{HERE}", HERE / "kernels.cpp", "-o", home / "kernels.so", f"-L{torch}/lib", "-ltorch_cpu", "-lc10",
        "-ltorch", f"-L{home}/lib", "-lascendcl")  # fmt: skip


def build_for_cuda_torch(home: Path) -> None:
    """What undoes a clash of names between torch's CUDA build and torch_npu, where torch keeps a table of them."""
    torch = torch_home()
    shared = any("getMutableKeys" in name for name in symbols(torch / "lib" / "libc10.so", "--defined-only"))
    if shared and (torch / "lib" / "libc10_cuda.so").exists():
        run(CXX, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{torch}/include", HERE / "cuda_torch.cpp",
            "-o", home / "cuda_torch.so", f"-L{torch}/lib", "-lc10")  # fmt: skip


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"npu_host: {' '.join(str(p) for p in command[:3])} … failed\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
