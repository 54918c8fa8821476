"""The demo: what Gradient Vaccine does to a small translation model. Run it with ``python -m gradvac_kernels.demo``."""
