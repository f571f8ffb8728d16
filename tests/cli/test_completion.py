"""Shell completion, asked of bash itself."""

from __future__ import annotations

import importlib
import shutil
import subprocess

import pytest

COMMANDS = ["train", "predict", "evaluate", "compare", "export", "import_data", "info"]


def script_of(module: str, shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"lungkit.cli.{module}").main(["--print-completion", shell])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def complete(script: str, function: str, *words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    line = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {function}"
    code = f"{script}\n{asked}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    found = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    return found.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("module", "words", "expected"),
    [
        ("predict", ["lungkit-predict", "--over"], ["--overlap", "--overwrite"]),
        ("predict", ["lungkit-predict", "--format", "dicom-s"], ["dicom-seg", "dicom-sr", "dicom-sc"]),
        ("predict", ["lungkit-predict", "--format", "nifti", "rt"], ["rtstruct"]),
        ("predict", ["lungkit-predict", "-i", "sc"], []),  # names of files, which bash completes itself
        ("train", ["lungkit-train", "--engine.dev"], ["--engine.devices"]),
        ("train", ["lungkit-train", "--logger", ""], ["tensorboard", "mlflow", "wandb"]),
        ("train", ["lungkit-train", "--model", "a"], ["attention-unet"]),
        ("compare", ["lungkit-compare", "--optimiser.m"], ["--optimiser.momentum"]),
        ("import_data", ["lungkit-import", "dicom", "--masks", "s"], ["seg"]),
    ],
)
def test_options_and_their_choices_are_completed(
    module: str, words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    script = script_of(module, "bash", capsys)
    assert complete(script, "_" + words[0].replace("-", "_"), *words) == expected


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_prints_its_script(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"lungkit-{module.partition('_')[0]}"
    assert f"complete -o default -F _{name.replace('-', '_')} {name}\n" in script_of(module, "bash", capsys)
    assert script_of(module, "zsh", capsys).startswith("autoload -U +X bashcompinit")
