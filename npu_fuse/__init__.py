"""npu_fuse: a torch.compile backend that fuses, proves each rewrite and explains every site."""

__version__ = "0.1.0"

import contextlib

# Nothing above `backend` needs torch: where torch itself fails to load, `doctor` must still be able to say why.
from npu_fuse import errors
from npu_fuse.doctor import doctor
from npu_fuse.findings import Finding
from npu_fuse.options import Options, check_options
from npu_fuse.report import GraphReport, SiteReport, Status, clear_reports, reports

with contextlib.suppress(ImportError, OSError):
    import torch  # noqa: F401

    from npu_fuse.backend import backend
    from npu_fuse.expert_report import ExpertsReport
    from npu_fuse.explain import ExplainReport, explain
    from npu_fuse.group_experts import group_experts, ungroup_experts
    from npu_fuse.integrations.vllm import vllm_pass

__all__ = [
    "ExpertsReport",
    "ExplainReport",
    "Finding",
    "GraphReport",
    "Options",
    "SiteReport",
    "Status",
    "__version__",
    "backend",
    "check_options",
    "clear_reports",
    "doctor",
    "errors",
    "explain",
    "group_experts",
    "reports",
    "ungroup_experts",
    "vllm_pass",
]
