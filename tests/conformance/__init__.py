"""What npu_fuse emits, against the real torch_npu wheel on the stand-in: `scripts/npu-host python -m pytest -m real_wheel`."""
