"""Models by name: those in the package, and those of other registry files. Nothing is fetched from anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lungkit._reading import read_json
from lungkit.errors import UsageError, shorten

PACKAGED = Path(__file__).resolve().parents[1] / "models" / "registry.json"
VARIABLE = "LUNGKIT_MODELS"
"""Environment variable: registry files of others, separated as PATH is; their names go before those of the package."""


@dataclass(frozen=True)
class KnownModel:
    """An entry of a registry: ``folder`` is a run or checkpoint, ``card`` (Markdown) says what it is and is not."""

    name: str
    folder: Path
    summary: str
    licence: str
    card: Path | None
    registry: Path


def known_models(environment: Mapping[str, str] | None = None) -> dict[str, KnownModel]:
    """All models by name.

    A registry is a JSON file; its paths are relative to it::

        {"models": {"NAME": {"folder": "NAME", "summary": "...", "licence": "...", "card": "NAME/README.md"}}}

    Args:
        environment: in which ``LUNGKIT_MODELS`` is looked up; None is the process's.

    Raises:
        UsageError: a registry file is absent or does not have this form; names the file and the entry.

    Example:
        >>> sorted(known_models({}))
        ['lidc-nodules']
    """
    environment = os.environ if environment is None else environment
    given = [Path(part) for part in environment.get(VARIABLE, "").split(os.pathsep) if part]
    found: dict[str, KnownModel] = {}
    for registry in (*given, PACKAGED):
        for name, model in _read(registry).items():
            found.setdefault(name, model)
    return found


def model_folder(name: str | os.PathLike[str]) -> Path:
    """The folder that a name or a path means: what lies there on disk, else the model of that name.

    Raises:
        UsageError: neither; lists the names.

    Example:
        >>> model_folder("lidc-nodules").name
        'lidc-nodules'
    """
    path = Path(name)
    if path.exists() or path.name != str(name):
        return path
    models = known_models()
    if str(name) not in models:
        raise UsageError(
            f"{name}: no such file or folder, and no model of that name; known are {shorten(sorted(models))} "
            f"(lungkit-models list), or name a run folder of lungkit-train"
        )
    return models[str(name)].folder


def _read(registry: Path) -> dict[str, KnownModel]:
    try:
        entries = read_json(registry)["models"].items()
    except OSError as error:
        raise UsageError(f"{registry}: cannot be read ({error.strerror}); correct {VARIABLE}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f'{registry}: not a registry of models, {{"models": {{NAME: ...}}}} ({error})'
        ) from error
    found = {}
    for name, entry in entries:
        try:
            folder, card = registry.parent / entry["folder"], entry.get("card")
            found[name] = KnownModel(
                name=name,
                folder=folder,
                summary=str(entry["summary"]),
                licence=str(entry["licence"]),
                card=None if card is None else registry.parent / card,
                registry=registry,
            )
        except (LookupError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{registry}: {name} must have folder, summary and licence ({error!r})"
            ) from error
    return found
