"""How the programs read their command lines: one way to write, one line for every mistake."""
from __future__ import annotations

import argparse
import difflib
import functools
import textwrap
from collections.abc import Iterable


class Help(argparse.Action):
    """-h, --help [GROUP]: print it and stop."""

    def __call__(self, parser, namespace, word, option_string=None):
        print(parser.explained(word))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """The command line of a program; a ValueError says what is wrong with it, and what is meant.

    --help shows all options but those of `later` groups, of which it gives the names; --help GROUP
    shows these, and --help all everything.
    """

    def __init__(self, add_help: bool = True, **own):
        layout = functools.partial(argparse.HelpFormatter, max_help_position=26, width=100)
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=layout, **own)
        self.groups: dict[str, argparse._ArgumentGroup] = {}
        if add_help:
            self.add_argument("-h", "--help", action=Help, nargs="?", const="", metavar="GROUP",
                              help="show this; a group of options; or all of them")

    def later(self, word: str, title: str) -> argparse._ArgumentGroup:
        """Add a group of options that --help shows by name alone, and --help WORD in full."""
        self.groups[word] = self.add_argument_group(title)
        return self.groups[word]

    def explained(self, word: str) -> str:
        """The help: in brief, or of a group, or of "all". ValueError for another word."""
        if word not in ("", "all", *self.groups):
            raise ValueError(f"--help {word}: there are {', '.join(['all', *self.groups])}")
        words = {id(group): name for name, group in self.groups.items()}
        formatter = self._get_formatter()
        if word in ("", "all"):
            formatter.add_usage(self.usage, self._actions, [])
            formatter.add_text(self.description)
        for group in self._action_groups:
            name = words.get(id(group), "")
            if word in (name, "all"):
                formatter.start_section(group.title)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        lines = [formatter.format_help().rstrip()]
        for name, group in self.groups.items() if word == "" else ():
            flags = ", ".join(action.option_strings[-1] for action in group._group_actions)
            lines.append(textwrap.fill(f"--help {name}, {group.title}: {flags}", 98,
                                       subsequent_indent="    ", break_on_hyphens=False))
        return "\n".join(lines)

    def error(self, message: str) -> None:
        raise ValueError(message)

    def read(self, argv: list[str], elsewhere: str = "",
             words: Iterable[str] = ()) -> argparse.Namespace:
        """Read options and words in any order. elsewhere: what to say of an option unlike all;
        words: the names that are written key=value here."""
        args, unknown = self.parse_known_intermixed_args(argv)
        if not unknown:
            return args
        flags = [flag[2:] for action in self._actions for flag in action.option_strings]
        name, _, value = unknown[0].lstrip("-").partition("=")
        if name in flags and value:
            raise ValueError(f"{unknown[0]}: write --{name} {value}")
        word = name.replace("-", "_")
        if word in words:
            behind = argv[argv.index(unknown[0]) + 1:]
            plain = [text for text in behind[:1] if not text.startswith("-") and "=" not in text]
            raise ValueError(f"{unknown[0]}: write {word}={value or [*plain, 'VALUE'][0]}")
        like = ", ".join(f"--{flag}" for flag in difflib.get_close_matches(name, flags))
        hints = [f"did you mean {like}?" if like else "", elsewhere]
        raise ValueError(f"there is no option {unknown[0]}; "
                         f"{' '.join(filter(None, hints)) or '--help lists them'}")
