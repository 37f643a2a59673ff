"""The two reasons for which a run stops; hints, and names as a reader may be shown them."""

import difflib
import re
from collections.abc import Iterable, Mapping

# Controls (ESC, newline, C1 …), halves of surrogate pairs, and what turns the direction of text
# round or cannot be seen; the joiners of emoji and of Persian stay.
_UNSEEN = re.compile(
    '[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff'
    '\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]'
)
FORMULA = tuple('=+-@＝＋－＠\t\r')  # a spreadsheet would run what begins so


class UserError(ValueError):
    """A usage error: its message says what is wrong, where, and how to mend it.

    Launchers print the message as one plain sentence and exit with status 2.
    """


class RunFailed(RuntimeError):
    """A run cannot go on: its message says why and what to try.

    Launchers print the message as one plain sentence and exit with status 1.
    """


def reason_of(error: object) -> str:
    """An error in one line: the system's words, else the first of its text, else its type.

    >>> reason_of(FileNotFoundError(2, 'No such file or directory', 'photo.jpg'))
    'No such file or directory'
    """
    if text := getattr(error, 'strerror', None):
        return text
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: object, keep: str = '') -> str:
    r"""Text whose control characters and changes of direction are seen and do nothing.

    A name from a file, a folder or a server is data: it must not set a terminal's title, colour
    what follows, begin a line of its own or turn one round. Characters in `keep` stay.

    >>> printable('a\x1b[31m.png')
    'a\\x1b[31m.png'
    """
    return _UNSEEN.sub(
        lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], str(text)
    )


def csv_cell(value: object) -> object:
    r"""A value as a cell of a CSV file: text is `printable` and never a spreadsheet's formula.

    >>> csv_cell('=HYPERLINK("http://…")')
    '\'=HYPERLINK("http://…")'
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.7) -> str:
    """The end of an error's sentence: `; did you mean train?`, or nothing where none is near.

    A mapping of choices says how each is written in the sentence.

    >>> nearest('trian', ['train', 'test']), nearest('val', ['train', 'all'])
    ('; did you mean train?', '')
    """
    written = choices if isinstance(choices, Mapping) else {each: each for each in choices}
    plain = {each.casefold(): text for each, text in written.items()}
    # Of three letters, two in the same order are 0.67: val and all.
    found = difflib.get_close_matches(word.casefold(), plain, n=1, cutoff=cutoff)
    return f'; did you mean {plain[found[0]]}?' if found else ''
