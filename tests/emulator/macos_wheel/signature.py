"""The ad-hoc code signature of a Mach-O file, which an arm64 Mac demands of everything that it loads.

The layout is that of Apple's open-source header cs_blobs.h; numbers are big-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

EMBEDDED_SIGNATURE, CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02
ADHOC = 0x2
SHA256 = 2


def signature_problems(file: bytes, offset: int, size: int) -> Iterator[str]:
    """A line for each page whose hash is not the signed one, and for what else is wrong with the signature.

    ``offset`` and ``size`` tell where the signature lies: LC_CODE_SIGNATURE.
    """
    blob = file[offset : offset + size]
    magic, _, count = struct.unpack_from(">III", blob)
    index = dict(struct.unpack_from(">II", blob, 12 + 8 * i) for i in range(count))  # slot: offset; 0 is the directory
    if magic != EMBEDDED_SIGNATURE or 0 not in index:
        yield "no embedded signature"
        return
    directory = blob[index[0] :]
    magic, _, _, flags, hashes, _, _, pages, limit = struct.unpack_from(">9I", directory)
    hash_size, hash_type, _, log_page = struct.unpack_from(">4B", directory, 36)
    if magic != CODE_DIRECTORY or not flags & ADHOC or (hash_type, hash_size) != (SHA256, 32):
        yield "expected an ad-hoc code directory of SHA-256 hashes"
        return
    if limit != offset or offset + size != len(file):
        yield "the signature does not cover the file up to itself, or is not its end"
    page_size = 1 << log_page
    if pages != -(-limit // page_size):
        yield f"{pages} pages are signed, the file has {-(-limit // page_size)}"
    for page in range(pages):
        signed = directory[hashes + 32 * page : hashes + 32 * (page + 1)]
        if hashlib.sha256(file[page * page_size : min((page + 1) * page_size, limit)]).digest() != signed:
            yield f"page {page} is not what was signed"
