"""What a fused op becomes: calls into the NPU's own ops, or the same ops in plain torch."""
