"""Which source line an address of a compiled kernel belongs to: a reader of DWARF 4 line tables (.debug_line)."""

from __future__ import annotations

import struct
from bisect import bisect_right
from functools import cache
from pathlib import Path


def section(elf: bytes, wanted: str) -> bytes:
    """A section of a 64-bit little-endian ELF file; empty if there is none."""
    offset = struct.unpack_from("<Q", elf, 40)[0]
    size, count, names_index = struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, offset + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name, _, _, _, begin, length in headers:
        if elf[names + name : elf.index(b"\0", names + name)].decode() == wanted:
            return elf[begin : begin + length]
    return b""


class Reader:
    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position

    def read(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.position)
        self.position += struct.calcsize(form)
        return value

    def leb(self, *, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.read("B")
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - (1 << shift) if signed and byte & 64 else value

    def skip_string(self) -> bool:
        """Skip a zero-terminated string; whether it was empty."""
        end = self.data.index(b"\0", self.position)
        empty, self.position = end == self.position, end + 1
        return empty


def rows(data: bytes) -> list[tuple[int, int]]:
    """Pairs of address and line that the line programs of .debug_line yield, sorted."""
    table: list[tuple[int, int]] = []
    unit = 0
    while unit < len(data):
        reader = Reader(data, unit)
        end = reader.read("I") + reader.position
        version, header = reader.read("H"), reader.read("I")
        if version != 4:
            raise ValueError(f"a line table of DWARF 4 was expected, not of {version}")
        program = reader.position + header
        step, _, _, base, span, opcodes = (reader.read(form) for form in "BBBbBB")
        operands = [reader.read("B") for _ in range(opcodes - 1)]
        table += run_program(Reader(data, program), end, step, base, span, opcodes, operands)
        unit = end
    return sorted(table)


def run_program(
    reader: Reader, end: int, step: int, base: int, span: int, opcodes: int, operands: list[int]
) -> list[tuple[int, int]]:
    table, address, line = [], 0, 1
    while reader.position < end:
        opcode = reader.read("B")
        if opcode >= opcodes:
            address += (opcode - opcodes) // span * step
            line += base + (opcode - opcodes) % span
            table.append((address, line))
        elif opcode == 0:
            length = reader.leb()
            following = reader.position + length
            extended = reader.read("B")
            if extended == 1:  # end of sequence
                address, line = 0, 1
            elif extended == 2:
                address = reader.read("Q")
            reader.position = following
        elif opcode == 1:
            table.append((address, line))
        elif opcode == 2:
            address += reader.leb() * step
        elif opcode == 3:
            line += reader.leb(signed=True)
        elif opcode == 8:
            address += (255 - opcodes) // span * step
        elif opcode == 9:
            address += reader.read("H")
        else:
            for _ in range(operands[opcode - 1]):
                reader.leb()
    return table


@cache
def line_table(path: Path) -> list[tuple[int, int]]:
    return rows(section(path.read_bytes(), ".debug_line"))


def line_at(path: Path, address: int) -> int:
    """The line of the instruction at this address; 0 if it has none (code that the compiler made up)."""
    table = line_table(path)
    position = bisect_right(table, (address, 1 << 62)) - 1
    while position >= 0 and table[position][1] == 0:
        position -= 1
    return table[position][1] if position >= 0 else 0
