"""Print the keys of recipes as JSON: `python -m unlabeled.chain.recipe_keys recipes/sft.py recipes/my_recipe.py`.

A chain asks a process of its own for them, since importing a recipe takes seconds and much memory.
"""

import json
import runpy
import sys
from dataclasses import fields, is_dataclass


def recipe_keys(file: str) -> list[str] | None:
    """The keys of the argument classes that a recipe imports or defines; None if it cannot be imported."""
    try:
        names = runpy.run_path(file, run_name="recipe")
    except Exception:  # the recipe will say so when it runs
        return None
    classes = [value for name, value in names.items() if name.endswith("Arguments") and is_dataclass(value)]
    return sorted({field.name for cls in classes for field in fields(cls) if field.init})


def main() -> None:
    print(json.dumps({file: recipe_keys(file) for file in sys.argv[1:]}))


if __name__ == "__main__":
    main()
