"""``python -m qlora_rs`` is the command ``qlora-rs``."""

from qlora_rs.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
