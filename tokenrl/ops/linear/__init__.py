"""What is written once over the kernels of any backend: ops from hidden states and a head."""
