"""Reads a `torch.save` file or a plain pickle: its values, and where the bytes of its tensors are. Nothing is run.

Only this module reads the file, so what is checked is what is used.
"""

import io
import mmap
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from hf_model.errors import UserError, memory_for, one_line
from hf_model.reading import LFS_ADVICE, LFS_POINTER
from hf_model.trainers.pickle_reader import MAX_PICKLE_BYTES, Budget, StoredBytes, read_pickle

ZIP = b"PK\x03\x04"
# A pickle of torch's magic number, in each of pickle's protocols.
LEGACY = tuple(pickle.dumps(0x1950A86A20F9469CFC6C, protocol) for protocol in range(2, 6))
OTHER_FORMATS = {
    LFS_POINTER: LFS_ADVICE,
    b"<": "is a web page, not a checkpoint: download the file itself",
    b"\x1f\x8b": "is gzip-compressed: unpack it first",
    b"{": "is a JSON file, not a checkpoint",
}
PLAIN_PICKLE = b"\x80"  # of protocol 2 or later
ADVICE = "Save only the weights and plain values: torch.save({'model': model.state_dict(), 'model_args': {...}}, path)"
TOO_MUCH = f"holds more than {MAX_PICKLE_BYTES // 2**20} MiB of values beside its tensors. {ADVICE}"
MAX_COMMENT_BYTES = 2**16  # behind the end of an archive
MAX_DIRECTORY_BYTES = 16 * 2**20  # of a zip file; a storage takes about a hundred
DESCRIPTOR_BYTES = 24  # behind an entry at most: its CRC32 and sizes once more
ALIGNMENT = 64  # bytes, of the storages of a plain pickle
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE; Python's mmap has no name for it

# The dtype of each storage class.
STORAGE_DTYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8},
    **{"QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32},
    **{"QUInt4x2Storage": torch.quint4x2, "QUInt2x4Storage": torch.quint2x4},
}


class Reads:
    """A file's bytes by ordinary reads, for a file that the system does not let this process map."""

    def __init__(self, file: IO[bytes]):
        self.descriptor = os.dup(file.fileno())
        self.size = os.fstat(self.descriptor).st_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytearray:
        start, stop, _ = part.indices(self.size)
        content = bytearray(max(stop - start, 0))
        done = 0
        while done < len(content):  # one call reads 2 GiB at most
            if not (n_bytes := os.preadv(self.descriptor, [memoryview(content)[done:]], start + done)):
                raise ValueError("it became shorter while it was read")
            done += n_bytes
        return content

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class Entry:
    """A stretch of a file."""

    content: mmap.mmap | bytearray | Reads
    """The whole file."""
    start: int
    length: int
    crc: int = 0
    """Its CRC32; 0 if the file has none."""
    is_big_endian: bool = False

    def is_intact(self) -> bool:
        """Whether the bytes have the CRC32. True without a CRC32: `set_crc32_options(False)` writes 0."""
        return self.crc == 0 or zlib.crc32(self.buffer()) == self.crc

    def buffer(self) -> memoryview:
        """The bytes, in memory that may be written to: mapped if the file is, or a copy of them."""
        end = self.start + self.length
        if isinstance(self.content, Reads):
            return memoryview(self.content[self.start : end])
        return memoryview(self.content)[self.start : end]


@dataclass(frozen=True)
class Archive:
    """What a file holds, or several files that are one checkpoint."""

    value: Any
    """What was saved, as `read_pickle` gives it."""
    storages: dict[str, Entry]
    """Key of a storage to its bytes."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The texts in a safetensors file's header."""


def load(path: Path) -> Archive:
    """Map a file and read what it holds, but no values of tensors.

    Raises:
        UserError: the file cannot be read, is damaged, refers to code, or was not written by `torch.save`.
    """
    head = read_head(path)
    with distrust(), memory_for("to load it"), path.open("rb") as file:
        if head.startswith((ZIP, *LEGACY)):
            return _load_zip(file) if head.startswith(ZIP) else _load_legacy(file)
        if head.startswith(PLAIN_PICKLE):
            return _load_plain(file)
    messages = (message for magic, message in OTHER_FORMATS.items() if head.lstrip().startswith(magic))
    raise UserError(next(messages, "is not a torch.save checkpoint"))


def read_head(path: Path) -> bytes:
    """A file's first 64 bytes.

    Raises:
        UserError: it cannot be read, is a folder, or is empty.
    """
    try:
        if path.is_dir():
            raise UserError("is a folder, not a checkpoint file")
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise UserError("is not a regular file")
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    if not head:
        raise UserError("is empty")
    return head


@contextmanager
def distrust() -> Iterator[None]:
    """Turn any error of reading a file into a UserError: the file is damaged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"is damaged or was not written to its end ({one_line(error, 120)})") from None


def _value(
    file: bytes | IO[bytes] | mmap.mmap,
    embedded: Callable[[bytes], StoredBytes] | None = None,
    budget: Budget | None = None,
) -> tuple[Any, list[StoredBytes]]:
    try:
        return read_pickle(file, embedded, budget)
    except UserError as error:
        raise UserError(f"{error}. {ADVICE}") from None


def map_file(file: IO[bytes]) -> mmap.mmap | Reads:
    """Map the file for reading. Changes of the memory stay private and never reach the file.

    The system must not reserve memory for such private copies: a file can be larger than memory.
    """
    if sys.platform != "linux":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        flags, prot = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
    except OSError:  # vm.overcommit_memory=2 reserves memory anyway, and `ulimit -v` counts it: the weights are copied
        return Reads(file)


# The zip format: an entry for the pickle, one for each storage, and some small ones.


def _load_zip(file: IO[bytes]) -> Archive:
    content = map_file(file)
    entries = _entries(file, content)
    pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise UserError("is a zip file, but not one written by torch.save (no data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    order = _bytes(entries[prefix + "byteorder"]) if prefix + "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise ValueError("an unknown byte order")
    value, _ = _value(_bytes(entries[pickles[0]]))
    data, is_big_endian = prefix + "data/", order == b"big"
    return Archive(
        value,
        {
            name.removeprefix(data): replace(entry, is_big_endian=is_big_endian)
            for name, entry in entries.items()
            if name.startswith(data)
        },
    )


def _bytes(entry: Entry) -> bytes:
    """A small entry's bytes, compared with its CRC32."""
    if entry.length > MAX_PICKLE_BYTES:
        raise UserError(TOO_MUCH)
    raw = bytes(entry.content[entry.start : entry.start + entry.length])
    if entry.crc and zlib.crc32(raw) != entry.crc:
        raise ValueError("the CRC32 of its values differs")
    return raw


def _entries(file: IO[bytes], content: mmap.mmap | Reads) -> dict[str, Entry]:
    """Name to place of each entry. The entries fill the file from its start to the directory and do not overlap."""
    _check_end(content)
    with zipfile.ZipFile(file) as archive:
        infos, end = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
    _check_names([info.filename for info in infos])
    entries: dict[str, Entry] = {}
    reached = 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError("is a compressed archive, which torch.save does not write: unpack it first")
        start = _start_of(content, info)
        if info.file_size > end - start or info.file_size != info.compress_size:
            raise UserError("claims to hold more than its size")
        _check_gap(info.header_offset - reached)
        reached = start + info.file_size
        entries[info.filename] = Entry(content, start, info.file_size, info.CRC)
    _check_gap(end - reached)
    return entries


def _check_end(content: mmap.mmap | Reads) -> None:
    """Check that the file ends with its one directory, and that the directory is small."""
    end = len(content) - 22
    magic, size, comment = struct.unpack_from("<4s8xI4xH", content[max(end, 0) :])
    if end >= 76 and content[end - 20 : end].startswith(b"PK\x06\x07"):  # a large archive has a second, wider end
        wide_magic, size = struct.unpack_from("<4s36xQ", content[end - 76 : end])
        magic = magic if wide_magic == b"PK\x06\x06" else b""
    if magic != b"PK\x05\x06" and b"PK\x05\x06" not in content[max(end - MAX_COMMENT_BYTES, 0) :]:
        raise UserError("is incomplete: the end of the file is missing; save it again or give an earlier file")
    if magic != b"PK\x05\x06" or comment:
        raise ValueError("no end of an archive at its end")
    if size > MAX_DIRECTORY_BYTES:
        raise UserError(f"claims to hold a directory of {size:,} bytes, too many to read. {ADVICE}")


def _check_names(names: list[str]) -> None:
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(
            "is a TorchScript archive, not a checkpoint: save its weights with "
            "torch.save(torch.jit.load(path).state_dict(), new_path)"
        )
    if any(name.startswith("/") or "\\" in name or ".." in name.split("/") for name in names):
        raise UserError("holds entries with paths outside of the archive")
    if len({name.lower() for name in names}) < len(names):
        raise UserError("holds two entries of one name")


def _check_gap(length: int) -> None:
    if not 0 <= length <= DESCRIPTOR_BYTES:
        raise UserError("holds entries that overlap, or bytes that belong to none")


def _start_of(content: mmap.mmap | Reads, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind a header of its own, which must have the same name."""
    place = info.header_offset + 30
    magic, method, name_length, extra_length = struct.unpack("<4s4xH16x2H", content[info.header_offset : place])
    name = content[place : place + name_length].decode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if magic != ZIP or method or name != info.orig_filename:
        raise ValueError("an entry is not what its directory says")
    return place + name_length + extra_length


# The older format: pickles of the magic number, a version, the system, the content and the keys of the storages; then
# for each key the number of values, and the values, always little-endian.


def _load_legacy(file: IO[bytes]) -> Archive:
    content = map_file(file)
    with mmap.mmap(file.fileno(), min(len(content), MAX_PICKLE_BYTES), access=mmap.ACCESS_READ) as head:
        try:
            return _legacy(content, head, Budget(len(head)))
        except ValueError:
            if head.tell() == MAX_PICKLE_BYTES:
                raise UserError(TOO_MUCH) from None
            raise


def _legacy(content: mmap.mmap | bytearray | Reads, head: IO[bytes] | mmap.mmap, budget: Budget) -> Archive:
    """Read the pickles from `head`, the beginning of the content."""
    _, _, _, (value, stored), (keys, _) = (_value(head, budget=budget) for _ in range(5))
    place = head.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the keys of its storages are not a list")
    return Archive(value, _legacy_storages(content, place, keys, stored))


def _legacy_storages(
    content: mmap.mmap | bytearray | Reads, place: int, keys: list[Any], stored: list[StoredBytes]
) -> dict[str, Entry]:
    by_key = {storage.key: storage for storage in stored}
    if len({(storage.key, storage.dtype, storage.length) for storage in stored}) > len(by_key):
        raise ValueError("a storage of two kinds")
    storages: dict[str, Entry] = {}
    for key in keys:
        storage = by_key.pop(key)
        (length,) = struct.unpack("<q", content[place : place + 8])
        size = length * STORAGE_DTYPES[storage.dtype].itemsize
        if length != storage.length or place + 8 + size > len(content):
            raise ValueError(f"the storage {key!r} is cut short")
        storages[key] = Entry(content, place + 8, size)
        place += 8 + size
    if by_key or place != len(content):
        raise ValueError("it holds other storages than it says")
    return storages


# A plain pickle, as pickle.dump writes a whole model: each storage in it is a file of the older format, as bytes.


def _load_plain(file: IO[bytes]) -> Archive:
    raw = file.read(MAX_PICKLE_BYTES + 1)
    if len(raw) > MAX_PICKLE_BYTES:
        raise UserError(f"is a plain pickle of more than {MAX_PICKLE_BYTES // 2**20} MiB. {ADVICE}")
    content = bytearray()
    storages: dict[str, Entry] = {}

    budget = Budget(len(raw))

    def embedded(inner: bytes) -> StoredBytes:
        if len(content) + len(inner) > 2 * MAX_PICKLE_BYTES:  # the pickle can give the same bytes many times
            raise UserError(TOO_MUCH)
        archive = _legacy(bytearray(inner), io.BytesIO(inner), budget) if inner.startswith(LEGACY) else None
        if archive is None or not isinstance(stored := archive.value, StoredBytes):
            raise ValueError("a storage of another format")
        entry, key = archive.storages[stored.key], str(len(storages))
        content.extend(bytes(-len(content) % ALIGNMENT))
        storages[key] = Entry(content, len(content), entry.length)
        content.extend(inner[entry.start : entry.start + entry.length])
        return StoredBytes(key, stored.dtype, stored.length)

    value, _ = _value(raw, embedded, budget)
    return Archive(value, storages)
