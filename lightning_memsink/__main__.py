"""``python -m lightning_memsink``: the ``memsink`` command."""

from lightning_memsink.cli import main

raise SystemExit(main())
