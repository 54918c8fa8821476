"""``python -m gradvac_kernels.demo``."""

from .cli import main

if __name__ == "__main__":
    main()
