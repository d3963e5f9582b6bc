"""npu_fuse: a torch.compile backend that fuses, proves each rewrite and explains every site."""

__version__ = "0.1.0"

from npu_fuse import errors
from npu_fuse.options import Options, check_options
from npu_fuse.report import GraphReport, SiteReport, Status, clear_reports, reports

__all__ = [
    "GraphReport",
    "Options",
    "SiteReport",
    "Status",
    "__version__",
    "check_options",
    "clear_reports",
    "errors",
    "reports",
]
