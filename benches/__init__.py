"""Measurements beside the peers, each one checked before it is timed. See README.md."""

import logging

# It would say that an optional kernel cannot be fetched; its built-in kernels are measured here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
