"""The one exception that the package raises on purpose."""

from qlora_rs._rust import QloraError

__all__ = ["QloraError"]
