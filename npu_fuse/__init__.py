"""npu_fuse: a torch.compile backend that fuses, proves each rewrite and explains every site."""

__version__ = "0.1.0"

# Nothing here imports torch: where torch itself fails to load, `doctor` must still be able to say why.
from npu_fuse import errors
from npu_fuse.doctor import Finding, doctor
from npu_fuse.options import Options, check_options
from npu_fuse.report import GraphReport, SiteReport, Status, clear_reports, reports

__all__ = [
    "Finding",
    "GraphReport",
    "Options",
    "SiteReport",
    "Status",
    "__version__",
    "check_options",
    "clear_reports",
    "doctor",
    "errors",
    "reports",
]
