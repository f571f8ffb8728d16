"""Models of other programs in, models of lungkit out."""

from __future__ import annotations

from lungkit.interop.nnunet_import import import_nnunet

__all__ = ["import_nnunet"]
