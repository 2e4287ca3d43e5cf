"""``python -m memlistener``: the command line."""

from memlistener.cli import main

if __name__ == "__main__":
    main()
