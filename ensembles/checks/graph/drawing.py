"""Draws autograd graphs with torchviz and Graphviz, under the names that goldens have.

A drawing is for people: no check compares it with anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from ensembles.case import Case, Given
from ensembles.checks.graph.canonical import CanonicalForm, canonical_form
from ensembles.subject import Recipe

__all__ = ["draw_autograd_graph"]


def draw_autograd_graph(
    model: Given,
    batch: Any,
    path: str | os.PathLike[str],
    *,
    training: bool = False,
    overwrite: bool = False,
    **recipe: Unpack[Recipe],
) -> tuple[Path, Path]:
    """Draws the graph that `measure_autograd_graph` writes down, as PDF and as SVG.

    Drawn by torchviz: parameters are blue and have all of their names, outputs are green, and
    operations have the names of the canonical text. The same graph gives the same files.

    Args:
        model: As for `measure_autograd_graph`; so is the recipe.
        batch: What the model is called with; None where a case brings it.
        path: Where to write: path.pdf and path.svg. A suffix .pdf or .svg is left out.
        training: Whether the model is called in training mode.
        overwrite: Whether files that exist are replaced.

    Returns:
        The paths of the PDF and of the SVG.

    Raises:
        ImportError: If torchviz is not installed.
        RuntimeError: If Graphviz's program `dot` is not installed, or fails.
        FileExistsError: If one of the files exists, and `overwrite` is not set.
        ValueError: As `measure_autograd_graph` does.

    Example::

        draw_autograd_graph(resnet18(), torch.randn(1, 3, 32, 32), "drawings/resnet18")
    """
    make_dot = _torchviz()
    program = shutil.which("dot")
    if program is None:
        raise RuntimeError(
            "drawing needs Graphviz's program `dot`, which is not on the PATH. Get it with: "
            "apt-get install graphviz (Debian, Ubuntu), brew install graphviz (macOS)."
        )
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".pdf", ".svg") else stem
    files = (stem.with_name(f"{stem.name}.pdf"), stem.with_name(f"{stem.name}.svg"))
    for file in files:
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: give another path, or overwrite=True.")
    form = canonical_form(Case.of(model, batch, **recipe), training=training)
    source = _source(form, make_dot)
    # Both are drawn before one is written: a failure leaves no half of a pair.
    drawings = [_rendered(program, source, file.suffix[1:]) for file in files]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for file, drawing in zip(files, drawings, strict=True):
        file.write_bytes(drawing)
    return files


def _torchviz() -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports distutils
            from torchviz import make_dot
    except ImportError as error:
        hint = "" if error.name != "distutils" else " setuptools"
        raise ImportError(
            f"drawing needs torchviz, which cannot be imported ({error}). "
            f'Get it with: pip install "pytest-ensembles[drawings]"{hint}'
        ) from error
    return make_dot  # type: ignore[no-any-return]


def _source(form: CanonicalForm, make_dot: Callable[..., Any]) -> str:
    """Torchviz's drawing as DOT, with canonical names in place of addresses."""
    outputs = [
        (tensor, f"output {member}" + (f" [{number}]" if number else ""))
        for member, tensors in form.tensors.items()
        for number, tensor in enumerate(tensors)
        if tensor.requires_grad
    ]
    ids, labels = _shown(form)
    for tensor, name in outputs:
        ids.setdefault(str(id(tensor)), name)
    named = {name: tensor for tensor, name in outputs}
    named |= {"\n".join(names): tensor for tensor, names, _ in form.registered}
    with _deep_recursion(len(form.functions)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchviz compares versions so
        dot = make_dot(tuple(dict.fromkeys(tensor for tensor, _ in outputs)), params=named)
    dot.body[:] = [_with_names(line, ids, labels) for line in dot.body]
    return str(dot.source)


def _shown(form: CanonicalForm) -> tuple[dict[str, str], dict[str, str]]:
    """What stands in place of an address, and the label of an operation, by address."""
    ids: dict[str, str] = {}
    labels: dict[str, str] = {}
    for i, function in enumerate(form.functions):
        address, name = str(id(function)), form.names[i]
        if leaf := form.leaves.get(i):
            ids[address] = f"gradient of {name}"
            ids[str(id(leaf.tensor))] = name
        else:
            ids[address] = name
            shown = " ".join(f"{key}={value}" for key, value in form.attributes[i])
            labels[address] = "\n".join(filter(None, [name, shown]))
    return ids, labels


@contextmanager
def _deep_recursion(nodes: int) -> Iterator[None]:
    """Torchviz follows the graph by recursion."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 4 * nodes + 1000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _with_names(line: str, ids: dict[str, str], labels: dict[str, str]) -> str:
    """A statement of DOT with names in place of addresses, and with labels for operations.

    Addresses that are not known belong to what the canonical graph leaves out: tensors that a
    custom function has saved, bases of views, and whole slices. They are numbered in their order.
    """
    head, bracket, rest = line.partition(" [")

    def named(match: re.Match[str]) -> str:
        address = match.group()
        if address not in ids:
            ids[address] = f"other {sum(n.startswith('other ') for n in ids.values()) + 1}"
        return _quoted(ids[address])

    if head.strip() in labels:
        rest = f"label={_quoted(labels[head.strip()])}]\n"
    return re.sub(r"\b\d+\b", named, head) + bracket + rest


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _rendered(program: str, source: str, form: str) -> bytes:
    # The same graph gives the same file: newer cairo takes the time in a PDF from this variable,
    # and where an older one has written it, it is replaced below by one of the same length.
    fixed_time = {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "0")}
    done = subprocess.run(
        [program, f"-T{form}"],
        input=source.encode(),
        capture_output=True,
        env=os.environ | fixed_time,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{program} -T{form} failed: {said}")
    if form == "pdf":
        return re.sub(rb"(?<=/CreationDate \(D:)\d{14}", b"19700101000000", done.stdout)
    # Graphviz repeats every title as a comment.
    return re.sub(rb"<!--.*?-->\n?", b"", done.stdout)
