"""`python -m universal_gcl` is the `gcl` command."""

from universal_gcl.cli import main

if __name__ == "__main__":
    main()
