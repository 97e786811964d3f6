"""The one exception that the package raises on purpose."""

from collections.abc import Callable

from torch import nn

from qlora_rs._rust import QloraError

__all__ = ["QloraError", "check_model", "refuse_together"]


def check_model(model: object) -> None:
    """Refuse what is no torch module."""
    if isinstance(model, nn.Module):
        return
    what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise QloraError(f"model must be a torch.nn.Module, got {what}; pass the model itself")


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
