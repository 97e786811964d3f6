"""The one exception that the package raises on purpose."""

from collections.abc import Callable

from qlora_rs._rust import QloraError

__all__ = ["QloraError", "refuse_together"]


def refuse_together(*checks: Callable[[], object]) -> None:
    """Run every check, and raise one QloraError with all that they refuse."""
    refusals = []
    for check in checks:
        try:
            check()
        except QloraError as error:
            refusals.append(str(error))
    if refusals:
        raise QloraError("; and ".join(refusals))
