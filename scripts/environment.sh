# shellcheck shell=bash
# Sourced by quickstart and test: puts a Python with torch and npu_fuse first on PATH.
#
#   NPU_FUSE_VENV          folder of the environment to make where none is active (default: .venv)
#   NPU_FUSE_TORCH_INDEX   package index to take a CPU build of torch from where torch is not installed
#   PYTHON                 the interpreter to start from (default: python3)
#
# A torch that is installed is never replaced: an NPU user has the one that torch_npu was built for.

say() { printf 'npu_fuse: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Metadata only: importing torch would load torch_npu, which fails where CANN is not set up.
torch_version() {
    "$1" -c 'import importlib.metadata as m
try: print(m.version("torch"))
except m.PackageNotFoundError: pass'
}

install_torch() {
    if [ -n "${NPU_FUSE_TORCH_INDEX:-}" ]; then
        say "installing torch 2.13.0 from the index in NPU_FUSE_TORCH_INDEX"
        python -m pip install --quiet --index-url "$NPU_FUSE_TORCH_INDEX" torch==2.13.0
    elif python -m pip install --quiet 'torch==2.13.0+cpu' 2>/dev/null; then
        say "installed the CPU build of torch 2.13.0"
    else
        say "pip's index has no build of torch marked as CPU only: taking its default one, which on Linux x86"
        say "is a CUDA build of several GB. For the small one, stop here and set NPU_FUSE_TORCH_INDEX to the"
        say "address that pytorch.org gives under 'Get started' for pip and CPU."
        python -m pip install --quiet torch==2.13.0
    fi
}

# use_environment EXTRA: install this checkout as npu_fuse[EXTRA], in the active environment or a new one.
use_environment() {
    local start=${PYTHON:-python3} venv=${NPU_FUSE_VENV:-$PWD/.venv} active outside found constraint
    active='import os, sys; sys.exit(sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"))'
    "$start" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or later is needed"
    if "$start" -c "$active"; then
        PATH=$(dirname "$("$start" -c 'import sys; print(sys.executable)')"):$PATH
    else
        if [ ! -x "$venv/bin/python" ]; then
            say "making an environment in $venv"
            # With a torch outside any environment, the new one sees it instead of installing another.
            outside=$(torch_version "$start")
            "$start" -m venv ${outside:+--system-site-packages} "$venv"
        fi
        PATH=$venv/bin:$PATH
    fi
    export PATH
    if [ -z "$(torch_version python)" ]; then
        install_torch
    fi
    found=$(torch_version python)
    say "using torch $found"
    constraint=$(mktemp)
    printf 'torch==%s\n' "$found" >"$constraint"
    python -m pip install --quiet --constraint "$constraint" --editable ".[$1]" ||
        die "could not install npu_fuse[$1] beside torch $found (it needs torch 2.10 to 2.14)"
    rm -f "$constraint"
}
