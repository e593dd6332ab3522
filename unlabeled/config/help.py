"""What a recipe does before torch takes its seconds: `import unlabeled.config.help` answers `--help` and stop signals.

The help comes from the source: the recipe's docstring and the keys of this project, as its dataclasses state them; keys
of the classes that these extend, such as `transformers.TrainingArguments`, are named by their class.
"""

import ast
import sys
from pathlib import Path

from unlabeled.runtime import signals

PACKAGE = Path(__file__).parents[1]
YAML = {"True": "true", "False": "false", "None": "null"}
Key = tuple[str, str, str, str]  # name, type, default, help


def help_of(recipe: Path) -> str:
    """What a recipe does and which keys it takes."""
    tree = ast.parse(recipe.read_text(encoding="utf-8"))
    called = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == "parse")
    known: dict[str, ast.ClassDef] = {}
    origin: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                known[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                origin |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    lines, shown = [ast.get_docstring(tree), ""], set()
    for name in map(_name, called.args):
        keys, foreign = _keys(name, known)
        lines += [ast.get_docstring(known[name]).splitlines()[0], ""]
        lines += [
            f"  --{key:<26} {kind:<5} {text} ({default})" for key, kind, default, text in keys if key not in shown
        ]
        lines += [f"  and every key of {origin[one]}" for one in foreign] + [""]
        shown |= {key for key, *_ in keys}
    return "\n".join([*lines, "All of them may stand in the YAML of --config as well; the command line wins."])


def _keys(name: str, known: dict[str, ast.ClassDef]) -> tuple[list[Key], list[str]]:
    """The keys of a class, those that it inherits first, and the classes from elsewhere that it extends."""
    if name not in known:
        return [], [name]
    found, foreign = {}, []
    for base in reversed(known[name].bases):
        keys, elsewhere = _keys(_name(base), known)
        found |= {key[0]: key for key in keys}
        foreign = elsewhere + foreign
    for node in known[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and _name(node.value.func) == "field":
            given = {word.arg: word.value for word in node.value.keywords}
            if "metadata" in given:
                kind, default = ast.unparse(node.annotation).split(" | ")[0], ast.unparse(given["default"]).strip("'")
                kind = kind if kind in ("int", "float", "bool", "dict") else "str"
                text = ast.literal_eval(given["metadata"])["help"]
                found[node.target.id] = (node.target.id, kind, YAML.get(default, default), text)
    return list(found.values()), foreign


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


main = getattr(sys.modules["__main__"], "__file__", None)
if main and Path(main).resolve().parent.name == "recipes":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_of(Path(main)))
        raise SystemExit(0)
    signals.start()
