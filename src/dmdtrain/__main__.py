"""`dmdtrain`: signals are answered from here on, while everything else is still to be imported."""

from dmdtrain.train import interrupt


def main() -> None:
    interrupt.listen()
    from dmdtrain.cli import main as command

    command()


if __name__ == "__main__":
    main()
