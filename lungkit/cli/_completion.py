"""Shell completion: a script for bash or zsh that knows the options of a command and their choices."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

SHELLS = ("bash", "zsh")

_BASH = """\
# Completion of {command}. For this shell: source <({command} --print-completion {shell})
# For all to come: append the output of {command} --print-completion {shell} to ~/.{shell}rc
{function}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} words='' option='' place
    for ((place = COMP_CWORD - 1; place > 0; place--)); do
        if [[ ${{COMP_WORDS[place]}} == -* ]]; then option=${{COMP_WORDS[place]}}; break; fi
    done
    case $option in
{cases}    esac
    if [[ $current == -* ]]; then words={options}; fi
    COMPREPLY=()
    if [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$current")); fi
}}
complete -o default -F {function} {command}
"""


def completion_script(command: str, options: Mapping[str, Sequence[str]], shell: str) -> str:
    """The script; where an option has no choices the shell completes names of files.

    Args:
        command: its name.
        options: each option with its choices, none where it takes anything.
        shell: one of :data:`SHELLS`.

    Example:
        >>> script = completion_script("tool", {"--mode": ["fast", "slow"], "--input": []}, "bash")
        >>> print(*[line for line in script.splitlines() if "fast" in line or "complete -o" in line], sep="\\n")
                --mode) words='fast slow' ;;
        complete -o default -F _tool tool
    """
    cases = "".join(
        f"        {option}) words={shlex.quote(' '.join(choices))} ;;\n"
        for option, choices in options.items()
        if choices
    )
    script = _BASH.format(
        command=command,
        shell=shell,
        function="_" + command.replace("-", "_"),
        cases=cases or "        *) ;;\n",
        options=shlex.quote(" ".join(options)),
    )
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"
