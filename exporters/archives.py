# SPDX-License-Identifier: Apache-2.0
"""What a `.pt`, `.pt2` or `.ts` file really is, read from its table of contents without loading anything of it.

All that PyTorch writes today is a zip archive: a program of `torch.export.save`, a TorchScript archive, or pickled
tensors. The suffix does not tell which, and only the first two say what the model computes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from ..contracts.errors import InputError

Kind = Literal["program", "torchscript", "pickle", "other"]

_ZIP = b"PK\x03\x04"
_AGAIN = "Copy or save the file again."


def kind_of(path: Path) -> Kind:
    """What the file is, by its content.

    Raises:
        InputError: It is a zip archive that is cut short, or a program in a form that cannot be read safely.
    """
    if not _starts_with(path, _ZIP):
        return "pickle" if _starts_with(path, b"\x80") else "other"
    names = names_in(path)
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner or any(name.startswith("models/") for name in inner):
        return "program"
    if "serialized_exported_program.json" in names:
        raise InputError(
            f"{path.name} is a program in the form of torch 2.7 and older, whose weights have to be unpickled",
            next_step="Load it where it was made and save it again with torch.export.save of a newer torch.",
        )
    if any(name.startswith("code/") for name in inner):
        return "torchscript"
    return "pickle" if "data.pkl" in inner else "other"


def names_in(path: Path) -> list[str]:
    """The names of the archive's members.

    Raises:
        InputError: The table of contents, which stands at the end, is not there.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # Where the end is cut off, zipfile finds the table of an archive that lies inside, such as the examples
            if min((info.header_offset for info in archive.infolist()), default=0):
                raise zipfile.BadZipFile("the end is missing")
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path.name} is cut short or damaged: {error}", next_step=_AGAIN) from error


def read_member(path: Path, name: str) -> bytes:
    """One member, below the folder that PyTorch puts all of them in, with its checksum verified.

    Raises:
        InputError: There is no such member, or it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            full = next(full for full in archive.namelist() if full.partition("/")[2] == name)
            return archive.read(full)
    except (StopIteration, KeyError) as error:
        raise InputError(f"{path.name} holds no {name}", next_step=_AGAIN) from error
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path.name}: {name} is damaged", next_step=_AGAIN) from error


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic
