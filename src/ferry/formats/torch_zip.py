"""The container that `torch.save` writes, without torch: a ZIP of stored members with one raw member per storage.

    NAME/data.pkl        the pickled structure, with references to storages
    NAME/byteorder       "little"
    NAME/data/KEY        the bytes of one storage, aligned to 64 so that `torch.load(mmap=True)` works
    NAME/version         "3\\n"

All sizes follow from shapes, so `ZipPlan` knows every offset before a byte is written. Payloads may then be written in
any order; `finish` puts the CRC-32 of each into the headers. Zip64 records are used where a size or offset needs them.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.crc32 import crc32
from ferry.core.dtypes import num_bytes
from ferry.core.errors import InputError, IntegrityError
from ferry.formats.pickles import Tensor, TensorRef, read_pickle, write_pickle

ALIGNMENT = 64
_LIMIT_32 = 0xFFFFFFFF
_FLAGS_UTF8 = 0x0800
_CHUNK = 1 << 20


class Member(NamedTuple):
    """One member of the archive; offsets are from the beginning of the archive."""

    name: str
    header_offset: int
    data_offset: int
    num_bytes: int


@dataclass(frozen=True)
class ZipPlan:
    """A torch archive that is to be written at `base` of a file: every offset, before the first byte."""

    members: tuple[Member, ...]
    contents: dict[str, bytes]
    """The members whose bytes are known now (pickle, version); the others are payloads."""
    payload_keys: dict[str, str]
    num_bytes: int
    base: int = 0

    def payload_offset(self, key: str) -> int:
        """Return where in the file the storage `key` begins."""
        return self.base + self._by_name[self.payload_keys[key]].data_offset

    @cached_property
    def _by_name(self) -> dict[str, Member]:
        return {member.name: member for member in self.members}

    def begin(self, fd: int) -> None:
        """Write headers and small members, and give the file its size."""
        if os.fstat(fd).st_size < self.base + self.num_bytes:
            os.ftruncate(fd, self.base + self.num_bytes)
        for member in self.members:
            content = self.contents.get(member.name)
            crc = crc32(content) if content is not None else 0
            os.pwrite(fd, _local_header(member, crc), self.base + member.header_offset)
            if content is not None:
                os.pwrite(fd, content, self.base + member.data_offset)

    def finish(self, fd: int, crcs: dict[str, int]) -> None:
        """Write the CRC-32 of each payload (by storage key) and the central directory."""
        known = {name: crc32(content) for name, content in self.contents.items()}
        known |= {self.payload_keys[key]: crc for key, crc in crcs.items()}
        for member in self.members:
            os.pwrite(fd, struct.pack("<I", known[member.name]), self.base + member.header_offset + 14)
        last = self.members[-1]
        directory_offset = last.data_offset + last.num_bytes
        os.pwrite(fd, _central_directory(self.members, known, directory_offset), self.base + directory_offset)


def plan_zip(structure: Any, *, name: str, base: int = 0, constants: dict[str, bytes] | None = None) -> ZipPlan:
    """Plan an archive for a structure that contains `Tensor` values; `constants` are storages known already, by key."""
    constants = constants or {}
    found = {tensor.key: tensor for tensor in _walk(structure) if tensor.key not in constants}
    contents = {f"{name}/data.pkl": write_pickle(structure), f"{name}/byteorder": b"little"}
    sizes = {member: len(content) for member, content in contents.items()}
    payload_keys = {key: f"{name}/data/{key}" for key in found}
    sizes |= {payload_keys[key]: num_bytes(tensor.dtype, tensor.shape) for key, tensor in found.items()}
    contents |= {f"{name}/data/{key}": data for key, data in constants.items()} | {f"{name}/version": b"3\n"}
    sizes |= {member: len(content) for member, content in contents.items()}
    members, position = [], 0
    for member, size in sizes.items():
        data_offset = position + 30 + len(member.encode()) + _zip64_bytes(size) + 4
        data_offset += -data_offset % ALIGNMENT
        members.append(Member(member, position, data_offset, size))
        position = data_offset + size
    placed = tuple(members)
    total = position + len(_central_directory(placed, dict.fromkeys(sizes, 0), position))
    return ZipPlan(placed, contents, payload_keys, total, base)


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)


def _zip64_bytes(size: int) -> int:
    return 20 if size >= _LIMIT_32 else 0


def _local_header(member: Member, crc: int) -> bytes:
    name = member.name.encode()
    extra, size = b"", member.num_bytes
    if _zip64_bytes(size):
        extra, size = struct.pack("<HHQQ", 1, 16, size, size), _LIMIT_32
    padding = member.data_offset - member.header_offset - 30 - len(name) - len(extra) - 4
    extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    fixed = struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, _FLAGS_UTF8, 0, 0, 0x21, crc, size, size, len(name), len(extra))
    return fixed + name + extra


def _central_directory(members: tuple[Member, ...], crcs: dict[str, int], offset: int) -> bytes:
    out = bytearray()
    for member in members:
        name, size, header = member.name.encode(), member.num_bytes, member.header_offset
        wide = b""
        if size >= _LIMIT_32:
            wide, size = wide + struct.pack("<QQ", size, size), _LIMIT_32
        if header >= _LIMIT_32:
            wide, header = wide + struct.pack("<Q", header), _LIMIT_32
        extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        out += struct.pack("<IHHHHHHIII", 0x02014B50, 45, 45, _FLAGS_UTF8, 0, 0, 0x21, crcs[member.name], size, size)
        out += struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, header) + name + extra
    count, size = len(members), len(out)
    if offset >= _LIMIT_32 or size >= _LIMIT_32 or count >= 0xFFFF:
        end = offset + size
        out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, offset)
        out += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    short, place = min(count, 0xFFFF), min(offset, _LIMIT_32)
    out += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, short, short, min(size, _LIMIT_32), place, 0)
    return bytes(out)


class Extent(NamedTuple):
    """Where a tensor's bytes lie: absolute byte offset in the file; always contiguous and row-major."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    crc: int
    whole_member: bool
    """Whether the tensor is all of its storage, so that `crc` is the CRC-32 of exactly these bytes."""


@dataclass(frozen=True)
class TorchArchive:
    """A torch archive opened for reading: its structure as plain data, and where its storages lie."""

    path: Path
    structure: Any
    storages: dict[str, tuple[int, int, int]]
    """Storage key -> (absolute offset, bytes, CRC-32)."""

    def extent(self, name: str, tensor: TensorRef) -> Extent:
        """Return where a tensor's bytes lie; raise InputError if they are not one row-major run."""
        step, contiguous = 1, True
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
            contiguous &= size == 1 or stride == step
            step *= size
        if not contiguous and step:
            raise InputError(
                f"{self.path}: tensor {name} is stored with strides {tensor.stride}, expected row-major",
                code="torch.strided",
                repair="save it again with .contiguous()",
            )
        item = num_bytes(tensor.storage.dtype, (1,))
        where = self.storages.get(tensor.storage.key)
        start, size = tensor.offset * item, step * item
        if where is None or start + size > where[1]:
            raise InputError(f"{self.path}: the bytes of tensor {name} are missing or cut", code="torch.cut")
        whole = start == 0 and size == where[1]
        return Extent(tensor.storage.dtype, tensor.shape, where[0] + start, size, where[2], whole)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, so that an archive inside another file can be opened."""

    def __init__(self, path: Path, base: int, size: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  (closed by close())
        self._base, self._size, self._position = base, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._base + self._position)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_torch(
    path: Path, *, base: int = 0, size: int | None = None, fields: frozenset[str] = frozenset()
) -> TorchArchive:
    """Open a file that `torch.save` or Ferry wrote; `base` and `size` select an archive inside a larger file."""
    whole = os.path.getsize(path)
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(path, base, whole - base if size is None else size))) as archive:
            return _read_archive(path, archive, base, fields)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, KeyError, EOFError) as error:
        with open(path, "rb") as file:
            old = file.read(2) == b"\x80\x02"
        hint = "it is in torch's format of before 1.6: load and save it with a newer torch" if old else ""
        raise InputError(
            f"{path} is not a complete PyTorch checkpoint ({error})",
            code="torch.container",
            repair=hint or "it is cut or damaged: fetch it again",
        ) from None


def _read_archive(path: Path, archive: zipfile.ZipFile, base: int, fields: frozenset[str]) -> TorchArchive:
    infos = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
    if "data.pkl" not in infos:
        raise zipfile.BadZipFile("no data.pkl inside")
    order = archive.read(infos["byteorder"]) if "byteorder" in infos else b"little"
    if order.strip() != b"little":
        raise InputError(f"{path} was written on a big-endian machine", code="torch.byteorder")
    storages = {}
    with open(path, "rb") as file:
        for name, info in infos.items():
            if name.startswith("data/"):
                offset = base + _data_offset(file.fileno(), base, info, path)
                storages[name.removeprefix("data/")] = (offset, info.file_size, info.CRC)
    structure = read_pickle(archive.read(infos["data.pkl"]), str(path), fields)
    return TorchArchive(path, structure, storages)


def _data_offset(fd: int, base: int, info: zipfile.ZipInfo, path: Path) -> int:
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: member {info.filename} is compressed, torch stores it", code="torch.compressed")
    header = os.pread(fd, 30, base + info.header_offset)
    signature, name_bytes, extra_bytes = struct.unpack("<I22xHH", header)
    if signature != 0x04034B50:
        raise IntegrityError(f"{path}: the header of member {info.filename} is damaged", code="torch.header")
    return info.header_offset + 30 + name_bytes + extra_bytes  # type: ignore[no-any-return]


def check_crcs(archive: TorchArchive) -> None:
    """Read every storage and compare its CRC-32 (0 = not taken); raise IntegrityError naming the first that differs."""
    with open(archive.path, "rb") as file:
        for key, (offset, size, crc) in archive.storages.items():
            total, position = 0, offset
            while position < offset + size:
                data = os.pread(file.fileno(), min(_CHUNK, offset + size - position), position)
                if not data:
                    raise InputError(f"{archive.path} ends inside storage {key}", code="torch.cut")
                total, position = crc32(data, total), position + len(data)
            if crc not in (0, total):
                raise IntegrityError(
                    f"{archive.path}: storage {key} has CRC-32 {total:08x}, the file promises {crc:08x}",
                    code="torch.crc",
                    repair="the file is damaged: copy it again",
                )


def envelope_sha256(path: Path, payload_ranges: tuple[tuple[int, int], ...]) -> str:
    """Return the sha256 of every byte of a file outside the given sorted, disjoint ranges."""
    total, position = hashlib.sha256(), 0
    with open(path, "rb") as file:
        for start, end in (*payload_ranges, (os.path.getsize(path), 0)):
            while position < start:
                data = os.pread(file.fileno(), min(_CHUNK, start - position), position)
                if not data:
                    break
                total.update(data)
                position += len(data)
            position = max(position, end)
    return total.hexdigest()
