"""What disks, networks and hands do to a file."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import strategies as st

Damage = Callable[[bytes], bytes]


def _cut(share: float) -> Damage:
    return lambda data: data[: int(share * len(data))]


def _flip(share: float, bit: int) -> Damage:
    def damage(data: bytes) -> bytes:
        if not data:
            return b"\0"
        place = min(int(share * len(data)), len(data) - 1)
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    return damage


def _replace(share: float, length: int, content: bytes) -> Damage:
    def damage(data: bytes) -> bytes:
        place = int(share * len(data))
        return data[:place] + content + data[place + length :]

    return damage


def _zero(share: float, length: int) -> Damage:
    """A page that was never written."""
    return lambda data: _replace(share, length, bytes(min(length, len(data) - int(share * len(data)))))(data)


# Half of all near an end: headers and footers are there.
_shares = st.one_of(st.floats(0, 1), st.floats(0, 0.05), st.floats(0.9, 1))
_words = st.sampled_from([b"null", b"-1", b"1e999", b"{}", b"[]", b'"', b"\n", b"true", b"9" * 30, b"../", b"\xff\xfe"])
damages = st.one_of(
    st.builds(_cut, _shares),
    st.builds(_flip, _shares, st.integers(0, 7)),
    st.builds(_flip, _shares, st.integers(0, 7)),
    st.builds(_replace, _shares, st.integers(0, 12), _words | st.binary(max_size=8)),
    st.builds(_zero, _shares, st.sampled_from([1, 8, 512, 4096])),
)


def files_of(folder: Path) -> Sequence[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# A file by its place among the sorted ones of a folder: their names are known only once it is made.
choices = st.floats(0, 1, exclude_max=True)


def damage_one(folder: Path, choice: float, damage: Damage, among: Sequence[str] | None = None) -> str | None:
    """Damages the chosen file; its name, or None where that changed nothing."""
    names = files_of(folder) if among is None else among
    name = names[int(choice * len(names))]
    before = (folder / name).read_bytes()
    after = damage(before)
    (folder / name).write_bytes(after)
    return None if before == after else name
