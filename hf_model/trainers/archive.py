"""A `torch.save` file to the values in it and the places of its storages, without running anything.

Nothing but this module reads the file: what is checked is what is used. The zip format is read as `torch.save` writes
it, and as any tool that stores without compressing: one central directory, at the end, to entries that do not overlap.
"""

import io
import mmap
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_model.errors import UserError, memory_for, one_line
from hf_model.trainers.pickle_reader import MAX_PICKLE_BYTES, StoredBytes, read_pickle

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch's magic number
OTHER_FORMATS = {
    b"\x80": "is a plain pickle, which can run code: it was not opened. Save it with torch.save",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull`",
    b"<": "is a web page, not a checkpoint: download the file itself",
    b"\x1f\x8b": "is gzip-compressed: unpack it first",
    b"{": "is a JSON file, not a checkpoint",
}
MAX_ENTRIES = 100_000
# The bytes of a value of each storage class; of the others there are no weights.
ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    "ComplexDoubleStorage": 16,
}


@dataclass(frozen=True)
class Entry:
    """A stretch of the file."""

    start: int
    length: int
    crc: int = 0
    """Its CRC32; 0 where none was written."""


@dataclass(frozen=True)
class Archive:
    """An open file: its bytes, mapped, and what they say."""

    content: mmap.mmap
    value: Any
    """What was pickled, as `read_pickle` gives it."""
    storages: dict[str, Entry]
    """Key of a storage to its bytes."""
    is_big_endian: bool = False

    def bytes_of(self, record: Entry) -> memoryview:
        return memoryview(self.content)[record.start : record.start + record.length]


def is_zip(path: Path) -> bool:
    """Whether the file is of the zip format of `torch.save`, or of the older one of bare pickles."""
    try:
        if path.is_dir():
            raise UserError("is a folder, not a checkpoint file")
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise UserError("is not a regular file")
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    if not head:
        raise UserError("is empty")
    if head.startswith(ZIP):
        return True
    if head.startswith(LEGACY):
        return False
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
        raise UserError("is a safetensors file, not a torch.save checkpoint")
    for magic, message in OTHER_FORMATS.items():
        if head.lstrip().startswith(magic):
            raise UserError(message)
    raise UserError("is not a torch.save checkpoint")


def load(path: Path, is_zip: bool) -> Archive:
    """Map a file and read what it says. Nothing of its tensors is read.

    Raises:
        UserError: the file is damaged, holds code, or is not one of `torch.save`'s.
    """
    with distrust(), memory_for("to load it"), path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a private copy of whatever is written to
        return _load_zip(content) if is_zip else _load_legacy(content)


def is_intact(archive: Archive, record: Entry) -> bool:
    """Whether a record's bytes have its CRC32, where there is one: `set_crc32_options(False)` writes 0 for all."""
    return record.crc == 0 or zlib.crc32(archive.bytes_of(record)) == record.crc


@contextmanager
def distrust() -> Iterator[None]:
    """The file is not to be trusted in anything: whatever it trips in the reader is its fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"is damaged or was not written to its end ({one_line(error, 120)})") from None


# The zip format: an entry for the pickle, one for each storage, and some small ones.


def _load_zip(content: mmap.mmap) -> Archive:
    entries = _entries(content)
    pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise UserError("is a zip file, but not one written by torch.save (no data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    record = entries[pickles[0]]
    if record.length > MAX_PICKLE_BYTES:
        raise UserError(f"holds {record.length} bytes of values beside its tensors: more than a model's")
    order = _bytes(content, entries[prefix + "byteorder"]) if prefix + "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise ValueError("an unknown byte order")
    value, _ = read_pickle(io.BytesIO(_bytes(content, record)))
    data = prefix + "data/"
    storages = {name.removeprefix(data): entry for name, entry in entries.items() if name.startswith(data)}
    return Archive(content, value, storages, is_big_endian=order == b"big")


def _bytes(content: mmap.mmap, record: Entry) -> bytes:
    """A small entry's bytes, compared with its CRC32."""
    raw = content[record.start : record.start + record.length]
    if record.crc and zlib.crc32(raw) != record.crc:
        raise ValueError("the CRC32 of its values differs")
    return raw


def _entries(content: mmap.mmap) -> dict[str, Entry]:
    """Name to place of each entry of the archive, in the order of the central directory."""
    start, end, n_entries = _central_directory(content)
    if n_entries > MAX_ENTRIES:
        raise UserError(f"holds {n_entries} entries: more than a model's")
    entries: dict[str, Entry] = {}
    places: list[tuple[int, int]] = []
    place = start
    for _ in range(n_entries):
        fields = struct.unpack_from("<4s6H3I5H2I", content, place)
        signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length = fields[:13]
        if signature != b"PK\x01\x02":
            raise ValueError("its directory is cut short")
        place += 46
        raw = content[place : place + name_length]
        extra = content[place + name_length : place + name_length + extra_length]
        place += name_length + extra_length + comment_length
        name = raw.decode("utf-8")
        size, packed, header = _wide(extra, size, packed, fields[16])
        _check_entry(name, flags, method, size, packed, entries)
        data = _data_of(content, header, raw)
        if max(size, packed) > start - data:
            raise UserError("claims to hold more than its size")
        entries[name] = Entry(data, size, crc)
        places.append((header, data + size))
    if place != end:
        raise ValueError("its directory is longer than it says")
    _check_layout(sorted(places), start)
    if len({name.lower() for name in entries}) < len(entries):
        raise UserError("holds two entries of one name")
    return entries


def _central_directory(content: mmap.mmap) -> tuple[int, int, int]:
    """Start, end and number of entries of the directory, as the record at the file's very end tells."""
    end = len(content) - 22
    signature, _, _, _, n_entries, size, start, comment = struct.unpack_from("<4s4H2IH", content, max(end, 0))
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("no end of an archive at its end")
    if content[max(end - 20, 0) : end][:4] == b"PK\x06\x07":
        _, _, wide, _ = struct.unpack_from("<4sIQI", content, end - 20)
        signature, length, _, _, _, _, n_here, n_wide, size, start = struct.unpack_from("<4sQ2H2I4Q", content, wide)
        if (
            signature != b"PK\x06\x06"
            or n_here != n_wide
            or wide + 12 + length != end - 20
            or n_wide & 0xFFFF != n_entries
        ):
            raise ValueError("two ends of an archive that differ")
        n_entries, end = n_wide, wide
    if start + size != end:
        raise ValueError("its directory is not where it should be")
    return start, end, n_entries


def _wide(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and place of an entry, those of more than 32 bits from its extra field."""
    full = 0xFFFFFFFF
    if full not in (size, packed, header):
        return size, packed, header
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            return tuple(next(wide) if value == full else value for value in (size, packed, header))  # type: ignore
        extra = extra[4 + length :]
    raise ValueError("an entry without its sizes")


def _check_entry(name: str, flags: int, method: int, size: int, packed: int, entries: dict[str, Entry]) -> None:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise UserError("holds entries with paths outside of the archive")
    if name in entries:
        raise UserError("holds two entries of one name")
    if method or flags & 1 or size != packed:
        raise UserError("is a compressed archive, which torch.save does not write: unpack it first")
    if parts[-1] == "constants.pkl":
        raise UserError("is a TorchScript archive, not a checkpoint: save the model's state_dict() with torch.save")


def _data_of(content: mmap.mmap, header: int, name: bytes) -> int:
    """Where an entry's bytes begin: behind a header of its own, which must be of the same name."""
    fields = struct.unpack_from("<4s5H3I2H", content, header)
    if (
        fields[0] != ZIP
        or fields[3]
        or content[header + 30 : header + 30 + len(name)] != name
        or fields[9] != len(name)
    ):
        raise ValueError("an entry is not what its directory says")
    return header + 30 + fields[9] + fields[10]


def _check_layout(places: list[tuple[int, int]], end: int) -> None:
    """Entries begin with the file, follow each other, and end with the directory; between two, a CRC32 may stand."""
    reached = 0
    for start, stop in places:
        if not reached <= start <= reached + 24:
            raise UserError("holds entries that overlap, or bytes that belong to none")
        reached = stop
    if not reached <= end <= reached + 24:
        raise UserError("holds entries that overlap, or bytes that belong to none")


# The older format: pickles of the magic number, a version, the system, the content and the keys of the storages; then
# for each key the number of values, and the values, always of the small-endian kind.


def _load_legacy(content: mmap.mmap) -> Archive:
    head = io.BytesIO(content[:MAX_PICKLE_BYTES])
    head.seek(len(LEGACY))
    read_pickle(head)
    read_pickle(head)
    value, stored = read_pickle(head)
    keys, _ = read_pickle(head)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of storages")
    return Archive(content, value, _legacy_storages(content, head.tell(), keys, stored))


def _legacy_storages(content: mmap.mmap, place: int, keys: list[Any], stored: list[StoredBytes]) -> dict[str, Entry]:
    by_key = {storage.key: storage for storage in stored}
    if len({(storage.key, storage.dtype, storage.length) for storage in stored}) > len(by_key):
        raise ValueError("a storage of two kinds")
    storages: dict[str, Entry] = {}
    for key in keys:
        storage = by_key.pop(key)
        (length,) = struct.unpack_from("<q", content, place)
        size = length * ITEM_BYTES[storage.dtype]
        if length != storage.length or place + 8 + size > len(content):
            raise ValueError(f"the storage {key!r} is cut short")
        storages[key] = Entry(place + 8, size)
        place += 8 + size
    if by_key or place != len(content):
        raise ValueError("it holds other storages than it says")
    return storages
