"""``python -m tersor``: the command line without its script."""

from tersor.cli.main import main

if __name__ == "__main__":
    main()
