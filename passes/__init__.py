"""The fused ops, one file each, in the order in which their rules are tried.

The folder is the package `npu_fuse.passes`; imported under another name its ops would register twice.
"""

if __name__ != "npu_fuse.passes":
    raise ImportError("write `import npu_fuse.passes`, not `import passes`")

RULES: tuple[object, ...] = ()
