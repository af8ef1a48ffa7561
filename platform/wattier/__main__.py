"""``python -m wattier``, as a Ray job calls it."""

from wattier.cli import main

main()
