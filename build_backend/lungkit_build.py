"""Build backend: scikit-build-core, told which torch to build against.

The native libraries need torch's headers, and plain ``torch`` in an isolated build environment would download several
GB of CUDA packages for them. So a build uses the torch of the environment that lungkit is installed into, where there
is one, and asks for the pinned release below only where there is none.

What was compiled stays in ``build/`` of the source tree, and an installation compiles only what has changed since.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

import scikit_build_core
from scikit_build_core import build as _backend

OLDEST_TORCH = (2, 10)
PINNED_TORCH = "torch==2.13.0"

get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
build_sdist = _backend.build_sdist
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable


def installed_torch() -> Path | None:
    """Folder of a torch that is new enough in the environment pip installs into, or None.

    pip runs the backend with that environment's interpreter but hides its packages from import; their folder is still
    the interpreter's ``purelib``.
    """
    for scheme_path in ("purelib", "platlib"):
        folder = Path(sysconfig.get_paths()[scheme_path]) / "torch"
        header = folder / "include" / "torch" / "headeronly" / "version.h"
        if header.is_file():
            found = dict(re.findall(r"define TORCH_VERSION_(MAJOR|MINOR) (\d+)", header.read_text()))
            if (int(found["MAJOR"]), int(found["MINOR"])) >= OLDEST_TORCH:
                return folder
    return None


def _requires(requires: list[str]) -> list[str]:
    return requires if "LUNGKIT_TORCH_DIR" in os.environ or installed_torch() else [*requires, PINNED_TORCH]


def _prepare() -> None:
    _keep_compiled()
    folder = installed_torch()
    if folder is not None:
        os.environ.setdefault("LUNGKIT_TORCH_DIR", str(folder))


def _keep_compiled() -> None:
    """Have scikit-build-core go on in its build folder, which it clears where its own path has changed.

    In pip's isolated build environments that path is another one each time. CMake configures anew all the same, with
    the compiler, torch and Python of the moment, and compiles what they change.
    """
    current = str(Path(scikit_build_core.__file__).resolve().parent)
    for record in Path("build").glob("*/.skbuild-info.json"):
        try:
            content = json.loads(record.read_text())
            if content["skbuild_path"] != current:
                record.write_text(json.dumps({**content, "skbuild_path": current}))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the folder is then cleared, which is slow but right


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requires(_backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requires(_backend.get_requires_for_build_editable(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _prepare()
    return _backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _prepare()
    return _backend.build_editable(wheel_directory, config_settings, metadata_directory)
