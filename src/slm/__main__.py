"""Makes `python -m slm` run `slm`."""

from slm.cli.main import main

if __name__ == "__main__":
    main()
