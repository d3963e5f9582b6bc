"""Several processes over gloo: what fusing a matmul with a collective gives, on every rank."""
