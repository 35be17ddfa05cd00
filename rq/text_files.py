"""Text files, plain or packed as .gz, line by line: bounded in size, and what cannot be decoded is named by its line."""

import codecs
import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rq.files import InputError, told

# The first bytes of files that often bear a name which promises something else.
FIRST_BYTES = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"PAR1": "Parquet", b"\xff\xfe": "UTF-16 text"}
LONGEST_LINE = 2**24  # bytes
MOST_UNPACKED, ALWAYS_UNPACKED = 40, 2**26  # bytes for each byte packed; text packs 3 to 20 times, and 64 MiB are no harm
ONE_CHARACTER = "\x1f"  # stands in for a separator of several, such as "::", since readers of CSV take one only
BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


class _Unpacked(io.RawIOBase):
    """The bytes of a .gz, and a stop where they become more than any table would: its size may say nothing of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.total = path, gzip.GzipFile(path), 0
        self.most = most_unpacked(os.path.getsize(path))

    def readable(self) -> bool:
        """True: that is all it is for."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as io.BufferedReader asks."""
        part = self.file.read(len(buffer))
        self.total += len(part)
        if self.total > self.most:
            raise InputError(too_large(self.path))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Close the .gz, too."""
        self.file.close()
        super().close()


class _Replaced(io.RawIOBase):
    """The bytes of a file with each separator of several characters replaced by one character."""

    def __init__(self, file: IO[bytes], separator: str) -> None:
        self.file, self.separator, self.left = file, separator.encode(), b""

    def readable(self) -> bool:
        """True: that is all it is for."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as io.BufferedReader asks; whole lines are replaced, so no separator is cut in two."""
        if not self.left:
            self.left = b"".join(self.file.readlines(2**20)).replace(self.separator, ONE_CHARACTER.encode())
        part, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Close the file, too."""
        self.file.close()
        super().close()


def most_unpacked(packed: int) -> int:
    """The most bytes that a file of some packed bytes may hold."""
    return max(ALWAYS_UNPACKED, MOST_UNPACKED * packed)


def too_large(path: Path) -> str:
    """The refusal of a file that holds more."""
    return f"{path}: unpacks to more than {MOST_UNPACKED} times its size; if that is meant, unpack it and give it as .csv"


def is_gzip(path: Path) -> bool:
    """Whether a file is packed, by its name."""
    return path.name.lower().endswith(".gz")


def open_bytes(path: Path, *, separator: str = ",") -> IO[bytes]:
    """The file, unpacked; a separator of several characters is replaced by ONE_CHARACTER."""
    raw: io.RawIOBase = _Unpacked(path) if is_gzip(path) else io.FileIO(path)
    file = io.BufferedReader(raw, 2**20)
    return file if len(separator) == 1 else io.BufferedReader(_Replaced(file, separator), 2**20)


def lines(path: Path, *, encoding: str = "utf-8", separator: str = ",") -> Iterator[tuple[int, str]]:
    """(line number, text) of a file, unpacked; what cannot be unpacked or decoded is named by its line."""
    number = 0
    try:
        with open_bytes(path, separator=separator) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE:
                    raise InputError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes; is this a table?")
                yield number, line.decode("utf-8-sig" if number == 1 and encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        raise not_text(f"{path}:{number}", path, error, encoding=encoding) from error
    except BROKEN_GZIP as error:
        raise InputError(
            f"{path}: broken gzip data after line {number} ({_explained(path, error)}); fetch it anew"
        ) from error


def not_text(where: str, path: Path, error: Exception, *, encoding: str) -> InputError:
    """The refusal of bytes that are no text in an encoding."""
    cure = "save the file as UTF-8, or name its encoding by --encoding, such as latin-1 or gb18030"
    return InputError(f"{where}: not {encoding.upper()} text ({_explained(path, error)}); {cure}")


def first_line(path: Path, *, encoding: str = "utf-8") -> str:
    """The first line that is not blank, up to LONGEST_LINE bytes of it; '' where there is none or it cannot be read."""
    with contextlib.suppress(*BROKEN_GZIP), open_bytes(path) as file:
        for line in iter(lambda: file.readline(LONGEST_LINE), b""):
            if text := line.decode("utf-8-sig" if encoding == "utf-8" else encoding, "replace").strip("\r\n"):
                return text
    return ""


def whole_text(path: Path) -> str:
    """All of a UTF-8 file, unpacked, however long its lines are."""
    try:
        with open_bytes(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_text(str(path), path, error, encoding="utf-8") from error
    except BROKEN_GZIP as error:
        raise InputError(f"{path}: broken gzip data ({_explained(path, error)}); fetch it anew") from error


def encoding_of(path: Path, other: str | None) -> str:
    """'utf-8' where the whole file is that or there is no other, and else the other encoding."""
    if other is None:
        return "utf-8"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with contextlib.suppress(*BROKEN_GZIP), open_bytes(path) as file:
            for part in iter(lambda: file.read(2**20), b""):
                decoder.decode(part)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return other
    return "utf-8"


def _explained(path: Path, error: Exception) -> str:
    """The error, and the kind of file that its first bytes show: "invalid start byte; its first bytes are those of gzip"."""
    with open(path, "rb") as file:
        start = file.read(4)
    really = next((kind for magic, kind in FIRST_BYTES.items() if start.startswith(magic)), None)
    return told(error) + (
        f"; its first bytes are those of {really}" if really and not (is_gzip(path) and really == "gzip") else ""
    )
