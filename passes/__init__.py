"""The fused ops, one file each: every module here that has a `RULE` is one, nothing has to be listed.

Rules are tried by their `order`: a composition comes after what it composes. The folder is the package
`npu_fuse.passes`; imported under another name its ops would register twice.
"""

import importlib
import pkgutil

if __name__ != "npu_fuse.passes":
    raise ImportError("write `import npu_fuse.passes`, not `import passes`")

from npu_fuse.sites import Rule


def _rules() -> tuple[Rule, ...]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    rules = [module.RULE for module in modules if hasattr(module, "RULE")]
    return tuple(sorted(rules, key=lambda rule: (rule.order, rule.name)))


RULES: tuple[Rule, ...] = _rules()
