"""npu_fuse: a torch.compile backend that fuses, proves each rewrite and explains every site."""

__version__ = "0.1.0"

from npu_fuse.report import GraphReport, SiteReport, Status, clear_reports, reports

__all__ = ["GraphReport", "SiteReport", "Status", "__version__", "clear_reports", "reports"]
