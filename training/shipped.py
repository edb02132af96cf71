"""Recipes and data that are installed with the package, in `universal_gcl.hub_configs`.

- `gcl train quickstart` finds a recipe by its name; `gcl train my/recipe.yaml` takes a path. A file that exists wins.
- Relative paths in any recipe start from the working directory. There is one exception: a path under `hub_configs/`
  that does not exist there is read from the installed package. So the same recipe finds the quickstart's data in a
  clone and in an installation.
"""

import difflib
from importlib import resources
from pathlib import Path, PurePosixPath

FOLDER_NAME = "hub_configs"


def shipped_folder() -> Path:
    """The folder of the recipes that are installed with the package."""
    return Path(str(resources.files("universal_gcl.hub_configs")))


def shipped_recipes() -> list[str]:
    """Names of the installed recipes: their paths in `hub_configs/` without `.yaml`, as in "lcs558k/clip"."""
    folder = shipped_folder()
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(name for name in names if not name.startswith("accelerate/"))


def find_recipe(name: str) -> Path:
    """
    The file of a recipe.

    Args:
        name: path of a YAML file, or name of an installed recipe.

    Raises:
        FileNotFoundError: there is neither; the message lists the names.
    """
    if Path(name).is_file():
        return Path(name)
    names = shipped_recipes()
    if name in names:
        return shipped_folder() / f"{name}.yaml"
    nearest = difflib.get_close_matches(name.removeprefix(f"{FOLDER_NAME}/").removesuffix(".yaml"), names, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise FileNotFoundError(
        f"{name}: no such recipe. Give the path of a YAML file (the working directory is {Path.cwd()}), or the name of "
        f"a recipe that comes with GCL: {', '.join(names)}.{hint}"
    )


def find_data(path: str) -> str:
    """Resolve a path of a recipe. A path under `hub_configs/` that does not exist is looked up in the installed
    package."""
    parts = PurePosixPath(path).parts
    if parts[:1] != (FOLDER_NAME,) or Path(path).exists():
        return path
    installed = shipped_folder().joinpath(*parts[1:])
    return str(installed) if installed.exists() else path
