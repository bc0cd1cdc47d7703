"""The map of each folder names every file with one sentence, and no file that there is not."""

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "ensembles" / "experiments"
MAPS = ["", "data", "evaluation", "plots", "robustness", "training"]


@pytest.mark.parametrize("folder", MAPS)
def test_the_map_names_every_file_with_one_sentence(folder):
    tree = ast.parse((FOLDER / folder / "__init__.py").read_text())
    named = re.findall(r"^\* `(\w+)`: .+\.$", ast.get_docstring(tree), re.MULTILINE)
    files = {path.stem for path in (FOLDER / folder).glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (FOLDER / folder).glob("*/__init__.py")}
    assert sorted(named) == sorted(files | folders)


@pytest.mark.parametrize("folder", [folder for folder in MAPS if folder != "plots"])
def test_the_folder_imports_nothing_by_itself(folder):
    tree = ast.parse((FOLDER / folder / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr]
