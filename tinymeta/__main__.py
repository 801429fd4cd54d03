"""`python -m tinymeta explain` walks through one meta-gradient in the terminal."""

import argparse
import os
import sys

from tinymeta.lesson.explain import explain, picture
from tinymeta.tasks.files import write_whole

DESCRIPTION = """\
Walk through one MAML meta-gradient, computed as it is printed: the gradient of
each inner step, each Hessian-vector product, the finite differences, and what
the other algorithms make of it. Takes a second.

example: python -m tinymeta explain | less"""

EPILOG = """\
Read on in tinymeta/lesson/first_order.py: from a first-order engine to one of
any order. In a clone: python -m benchmarks.sinusoid --help trains all this."""


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tinymeta",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["explain"])
    parser.add_argument("--svg", metavar="FILE", help="also draw the graph of one inner step and its meta-gradient")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help\n")
    args = parser.parse_args(argv)
    try:
        print(explain(), flush=True)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1, f"{parser.prog}: {error}\n")
    if args.svg:
        try:
            write_whole(args.svg, picture().encode())
        except OSError as error:
            parser.exit(1, f"{parser.prog}: --svg: {error}\n")


if __name__ == "__main__":
    main()
