"""What npu_fuse emits, against the real torch_npu wheel: `scripts/npu-host python -m pytest -m real_wheel`."""
