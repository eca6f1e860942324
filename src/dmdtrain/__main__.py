"""`dmdtrain`: signals are answered from here on, while everything else is still to be imported."""

import os

from dmdtrain.train import interrupt

# Waiting OpenMP threads sleep instead of spinning: on a busy machine spinning can cost a factor of 25. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    interrupt.listen()
    from dmdtrain.cli import main as command

    command()


if __name__ == "__main__":
    main()
