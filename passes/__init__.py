"""The fused ops, one file each, in the order in which their rules are tried.

The folder is the package `npu_fuse.passes`; imported under another name its ops would register twice.
"""

if __name__ != "npu_fuse.passes":
    raise ImportError("write `import npu_fuse.passes`, not `import passes`")

from npu_fuse.passes import add_rms_norm, clipped_swiglu, geglu, rms_norm, rotary_mul, swiglu
from npu_fuse.sites import Rule

RULES: tuple[Rule, ...] = (
    rms_norm.RULE,
    add_rms_norm.RULE,
    rotary_mul.RULE,
    swiglu.RULE,
    geglu.RULE,
    clipped_swiglu.RULE,
)
