"""Makes `python -m vitzoo_hf` the same program as `vitzoo`."""

from vitzoo_hf.cli import main

if __name__ == "__main__":
    main()
