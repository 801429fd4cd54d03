"""A picture of characters: Omniglot's, and the generated ones that stand in for them where there are no real images.

Each column is a character, its three rows are three people's drawings of it.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks import report
from tinymeta.tasks import glyphs, omniglot

COLUMNS, DRAWERS = 20, 3


def sheet(characters, seed):
    """(rows, columns) of grey levels: COLUMNS characters, DRAWERS drawings of each, white lines between."""
    rng = np.random.default_rng(seed)
    which = rng.choice(len(characters.images), COLUMNS, replace=False)
    images = 255 - characters.images[np.sort(which)][:, :DRAWERS]
    framed = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=255)
    return framed.transpose(1, 2, 0, 3).reshape(DRAWERS * 32, COLUMNS * 32)


def main(argv=None):
    parser = report.parser(__doc__, "example: python -m benchmarks.characters --out benchmarks/results   (5 seconds)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="where Omniglot is (default: $TINYMETA_DATA, cache)")
    args = parser.parse_args(argv)
    try:
        if args.seed < 0 or args.json:
            raise ValueError("--seed is 0 or more, and there are no figures for --json")
        report.require_writable(args.out / "characters.png")
        sets = [glyphs.load()]
        if omniglot.find(args.data):
            sets.insert(0, omniglot.load(args.data))
    except (OSError, ValueError, ImportError) as error:
        parser.error(error)
    plt = report.pyplot()
    if plt is None:
        sys.exit(1)
    figure, axes = plt.subplots(len(sets), 1, figsize=(9, 1.6 * len(sets)), squeeze=False)
    for axis, characters in zip(axes.flat, sets):
        axis.imshow(sheet(characters, args.seed), cmap="gray", vmin=0, vmax=255)
        axis.set_title(characters.name, loc="left")
        axis.axis("off")
    figure.tight_layout()
    report.write_picture(args.out / "characters.png", figure)
    print(f"picture: {args.out / 'characters.png'}")


if __name__ == "__main__":
    report.command(main)
