"""The folder's map names every file with one sentence, and no file that there is not."""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "ensembles" / "experiments"


def test_the_map_names_every_file_with_one_sentence():
    tree = ast.parse((FOLDER / "__init__.py").read_text())
    named = re.findall(r"^\* `(\w+)`: .+\.$", ast.get_docstring(tree), re.MULTILINE)
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert sorted(named) == sorted(files | folders)


def test_the_folder_imports_nothing_by_itself():
    tree = ast.parse((FOLDER / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr]
