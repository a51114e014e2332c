"""``python -m lightning_norm`` is the console script ``lightning-norm``."""

from lightning_norm.cli.main import main

if __name__ == "__main__":
    main()
