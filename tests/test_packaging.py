"""What an installation holds and claims, read from setup.cfg; `test_wheel.py` installs it."""

import configparser

from tests.support.checkout import ROOT, tracked

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PACKAGES = SETUP["options"]["packages"].split()
LINKED = {"universal_gcl.training": "training", "universal_gcl.hub_configs": "hub_configs"}


def folder_of(package):
    for linked, folder in LINKED.items():
        if package == linked or package.startswith(f"{linked}."):
            return ROOT / folder / package.removeprefix(linked).strip(".").replace(".", "/")
    return ROOT / package.replace(".", "/")


def test_two_import_names_are_claimed():
    assert {package.split(".")[0] for package in PACKAGES} == {"modeling_gcl", "universal_gcl"}
    assert "py_modules" not in SETUP["options"]


def test_every_module_is_in_a_package_that_is_installed():
    installed = {folder_of(package) for package in PACKAGES}
    modules = tracked("modeling_gcl/*.py", "universal_gcl/*.py", "training/*.py", "hub_configs/*.py")
    assert {path.parent for path in modules} == installed


def test_every_data_file_is_installed():
    """What is no Python in the packages is read at run time: it must be named in package_data."""
    shipped = {
        path
        for package, patterns in SETUP["options.package_data"].items()
        for pattern in patterns.split()
        for path in folder_of(package).glob(pattern)
    }
    rooms = ("modeling_gcl", "universal_gcl", "training", "hub_configs")
    data = {path for path in tracked(*rooms) if path.is_file() and path.suffix not in (".py", ".sh")}
    assert data - shipped == set()


def test_rooms_that_lie_at_the_top_are_linked_for_editors_and_bare_checkouts():
    mapped = dict(line.split(" = ") for line in SETUP["options"]["package_dir"].strip().splitlines())
    assert mapped == LINKED
    for package, folder in LINKED.items():
        assert (ROOT / package.replace(".", "/")).resolve() == ROOT / folder
